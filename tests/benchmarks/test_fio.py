"""fio's jobs: each is whole, options are replaced where asked, and its words are understood."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from benchmarks import fio
from benchmarks.model import BenchmarkFailed, Unit
from tests.children import Children

NAMES = sorted(path.stem for path in fio.JOBS.glob("*.fio"))


def side(**values: float) -> dict[str, Any]:
    empty = {"total_ios": 0, "iops": 0.0, "bw_bytes": 0, "clat_ns": {}}
    return empty | values


def output(error: int = 0, **sides: dict[str, Any]) -> str:
    job = {name: sides.get(name, side()) for name in ("read", "write", "trim")} | {"error": error}
    return json.dumps({"jobs": [job]}, indent=2)


@pytest.mark.requires("fio")
@pytest.mark.parametrize("name", NAMES)
def test_a_job_needs_nothing_but_the_uri(children: Children, name: str) -> None:
    text = (fio.JOBS / f"{name}.fio").read_text()
    assert text.count("${") == 1
    children.run("fio", "--parse-only", fio.JOBS / f"{name}.fio", env={"URI": "nbd://localhost"})


def test_options_are_added_replaced_and_taken_out() -> None:
    lines = fio.job_text(
        "random-read-4k-depth-32",
        {"runtime": "500ms", "time_based": None, "uri": None, "filename": "/dev/nbd0"},
    ).splitlines()
    assert lines[0] == "[global]"
    assert {"runtime=500ms", "filename=/dev/nbd0", "iodepth=32"} < set(lines)
    assert not any(line.startswith(("time_based", "uri", "runtime=10")) for line in lines)
    assert lines.index("filename=/dev/nbd0") < lines.index("[random-read-4k-depth-32]")


def test_reads_and_writes_are_summed() -> None:
    latencies = {"percentile": {"50.000000": 70_000, "99.000000": 900_000}}
    text = output(
        read=side(total_ios=700, iops=70.0, bw_bytes=7000) | {"clat_ns": latencies},
        write=side(total_ios=300, iops=30.0, bw_bytes=3000),
    )
    result = fio.parse(text)
    assert result == fio.Result(1000, 100.0, 10_000.0, 70.0, 900.0)
    assert fio.sample(result, Unit.MB_PER_S, 2.0).value == 0.01
    assert fio.sample(result, Unit.IOPS, 2.0).value == 100.0


def test_words_around_the_figures_do_not_matter() -> None:
    text = output(read=side(total_ios=1, iops=1.0))
    assert fio.parse(f"fio: a note\n{text}\nanother\n").operations == 1


@pytest.mark.parametrize(
    "text",
    [
        "fio: no such server",
        output(error=5, read=side(total_ios=1)) + "\nfio: no such server",
        "fio: no such server\n" + output(),
    ],
    ids=["no figures", "an error", "no operation"],
)
def test_a_failure_is_told_in_fios_words(text: str) -> None:
    with pytest.raises(BenchmarkFailed, match="no such server"):
        fio.parse(text)


@pytest.mark.requires("fio")
def test_a_server_that_is_not_there_is_a_failure(children: Children) -> None:
    env = {"URI": f"nbd+unix:///?socket={children.directory}/nobody", "HOME": os.environ["HOME"]}
    with pytest.raises(BenchmarkFailed, match="nbd_connect_uri"):
        fio.run(children, "trim-all", {}, env=env, as_nobody=False)
