"""Every benchmark runs, tiny and once, so that none rots; figures are not looked at."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine
from benchmarks.model import Transport
from benchmarks.peers import PEERS, ROOT, Nbdstore
from benchmarks.rows import rows
from benchmarks.scale import SMOKE
from tests.children import Children

pytestmark = [
    pytest.mark.requires("fio", "nbdkit", "qemu-nbd", "qemu-img", "qemu-io", "nbdcopy"),
    pytest.mark.requires("nbd-server", "setpriv", "make"),
    pytest.mark.timeout(900),  # half a minute each, unless others use the machine
]

README = (ROOT / "benchmarks" / "README.md").read_text()
# One row of each kind is enough for the peers, whose part is to be started and reached.
KINDS = (
    *("tls-random-read-4k-depth-32", "tcp-fsync-8-clients"),
    *("snapshots-many-random-write-4k-depth-32", "open-10-volumes"),
)


def run(children: Children, *arguments: str) -> list[dict[str, Any]]:
    """Run benchmarks at the smallest scale and return the rows of the results."""
    output = children.directory / "output"
    said = children.run(
        *(sys.executable, "-m", "benchmarks", "run", "--smoke", "--no-plots", *arguments),
        *("--disk", children.directory, "--output", output),
        env={"PYTHONPATH": str(ROOT)},
        timeout_s=800,
    )
    assert "results are in" in said
    assert [path.name for path in children.directory.glob("nbdstore-bench-*")] == []
    found: list[dict[str, Any]] = json.loads((output / "results.json").read_text())["rows"]
    return found


def test_every_row_can_be_measured(children: Children) -> None:
    wanted = rows(SMOKE)
    found = run(children, "--peers", "nbdstore")
    assert [row["name"] for row in found] == [row.name for row in wanted]
    for row, definition in zip(found, wanted, strict=True):
        assert row["failed"] == {}
        lacking = [name for name in definition.needs_host if machine.why_missing(name)]
        assert bool(row["samples"]) is not bool(lacking), row["name"]
    output = children.directory / "output"
    assert (output / "results.md").stat().st_size > 0
    assert list(output.glob("*.png")) == []


def test_every_peer_can_be_measured(children: Children) -> None:
    found = run(children, *KINDS)
    for row in found:
        assert set(row["samples"]) | set(row["left_out"]) == set(PEERS)
        assert row["failed"] == {}
    by_name = {row["name"]: row for row in found}
    assert set(by_name["tcp-fsync-8-clients"]["samples"]) == set(PEERS)
    assert set(by_name["tls-random-read-4k-depth-32"]["left_out"]) == {"nbd-server"}
    (many,) = (row for name, row in by_name.items() if name.startswith("snapshots"))
    assert set(many["samples"]) == {"nbdstore", "qemu-qcow2"}
    assert set(by_name["open-10-volumes"]["left_out"]) == {"qemu-raw", "qemu-qcow2"}


def test_another_checkout_is_measured_beside_this_one(children: Children) -> None:
    other = children.directory / "other"
    other.mkdir()
    (other / "nbdstore").symlink_to(ROOT / "nbdstore")
    (row,) = run(
        children,
        "fsync-each-write",
        "--peers",
        "nbdstore",
        "--against",
        str(other),
        "--rounds",
        "2",
    )
    assert {name: len(found) for name, found in row["samples"].items()} == {
        **{"nbdstore": 2, "nbdstore@other": 2}
    }


def test_what_another_checkout_names_is_not_taken_from_the_working_directory(
    children: Children, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "other" / "nbdstore"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("print(__file__)")
    monkeypatch.chdir(ROOT)
    server = Nbdstore(children, tmp_path / "server", tmp_path, checkout=package.parent)
    said = children.run(*server.command(Transport.UNIX), env=server.env)
    assert said.split() == [str(package / "__main__.py")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_server_and_keeps_what_it_has(
    children: Children, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "output"
    process = children.start(
        *(sys.executable, "-m", "benchmarks", "run", "--smoke", "--runtime", "0.5"),
        *("random-read-4k-depth-1", "random-read-4k-depth-32", "--peers", "nbdkit,nbd-server"),
        *("--disk", str(tmp_path), "--output", str(output)),
        log="run.log",
        env={"PYTHONPATH": str(ROOT)},
    )
    wait_for_line(children.log_file("run.log"), process, "random-read-4k-depth-1 [")
    process.send_signal(number)
    process.send_signal(number)  # as whoever has no patience does: what there is is kept anyway
    assert process.wait(60) == 1
    assert servers_of(tmp_path) == []
    assert list(tmp_path.glob("nbdstore-bench-*")) == []
    body = json.loads((output / "results.json").read_text())
    assert body["finished"] is None
    assert set(body["rows"][0]["samples"]) == {"nbdstore", "nbdkit", "nbd-server"}
    assert "interrupted" in (output / "results.md").read_text()


def wait_for_line(log: Path, process: subprocess.Popen[bytes], text: str) -> None:
    """Follow a log until it has ``text``."""
    with subprocess.Popen(
        ["tail", "--lines=+1", "--follow", f"--pid={process.pid}", log], stdout=subprocess.PIPE
    ) as follower:
        assert follower.stdout
        for line in follower.stdout:
            if text in line.decode():
                break
        else:
            pytest.fail(f"the run ended without '{text}': {log.read_text()}")
        follower.kill()


def servers_of(directory: Path) -> list[str]:
    """The command lines of all processes that name the directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(str(directory) in word for word in command):
            found.append(" ".join(command))
    return found


# --- The commands of the README ------------------------------------------------------------------


def commands() -> list[str]:
    blocks: list[str] = re.findall(r"^```console\n(.*?)^```", README, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    # What starts with URI= are fio's own jobs, which test_fio.py has.
    return [line[2:] for line in lines if line.startswith("$ python")]


def made_small(command: str, options: str) -> str:
    """The same command with ``options``, and with rows that are measured soon."""
    command = re.sub("^python -m benchmarks run", f"\\g<0> {options}", command)
    command = command.replace("--quick", "fsync-each-write --peers nbd-server").replace(
        "--rounds 3", ""
    )
    return command.replace("'random-write-*' fsync", "'fsync-*-write' random-read-16k*")


def test_the_commands_of_the_readme_work(children: Children) -> None:
    """As they are written, but small, and on rows and servers that are there."""
    directory = children.directory
    (directory / "other-checkout").mkdir()
    (directory / "other-checkout" / "nbdstore").symlink_to(ROOT / "nbdstore")
    (directory / "checkout").mkdir()
    for name in ("benchmarks", "nbdstore", "tests"):
        (directory / "checkout" / name).symlink_to(ROOT / name)
    small = f"--smoke --rounds 1 --disk {shlex.quote(str(directory))} --output results-directory"
    for command in (found := [made_small(command, small) for command in commands()]):
        children.run(
            *("bash", "-c", f"cd {shlex.quote(str(directory / 'checkout'))} && {command}"),
            env={"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            timeout_s=300,
        )
    assert len(found) == 5
    drawn = {path.name for path in (directory / "checkout" / "results-directory").glob("*.png")}
    assert {"fsync.png", "random-read.png"} <= drawn


@pytest.mark.parametrize("line", re.findall(r"^(make bench.*?)\s+#", README, re.M))
def test_make_knows_its_targets(children: Children, line: str) -> None:
    said = children.run(*shlex.split(line), "--dry-run", "-C", str(ROOT))
    arguments = re.findall(r"-m benchmarks (run.*)", said)
    assert len(arguments) == 1
    assert ("--quick" in arguments[0]) is ("bench-quick" in line)
    assert ("fsync --rounds 9" in arguments[0]) is ("ARGS" in line)


def test_make_adds_to_a_quick_run_what_it_is_told(children: Children) -> None:
    said = children.run(
        "make", "bench-quick", "ARGS=fsync --rounds 1", "--dry-run", "-C", str(ROOT)
    )
    assert "-m benchmarks run --quick fsync --rounds 1\n" in said
