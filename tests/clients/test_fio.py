"""Random load by fio's NBD engine: every block that fio writes carries a checksum it verifies."""

from __future__ import annotations

import json

import pytest

from tests.children import Children
from tests.clients.served_pool import ServedPool

pytestmark = pytest.mark.requires("fio")


def fio(children: Children, uri: str, *options: str) -> None:
    """Run fio's jobs, each of which writes its own 32 MiB and then verifies them."""
    result = children.directory / "fio.json"
    children.run(
        *("fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}"),
        *("--output-format=json", f"--output={result}"),
        *("--size=32M", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"),
        *("--randseed=7", "--end_fsync=1", "--group_reporting=1", *options),
        timeout_s=240,
    )
    (job,) = json.loads(result.read_text())["jobs"]
    assert job["error"] == 0
    assert job["read"]["io_bytes"] > 0, "fio has verified nothing"


LOADS = {
    "one block at a time": ["--rw=randwrite", "--bs=4k", "--iodepth=1", "--size=4M"],
    "deep queue": ["--rw=randwrite", "--bs=4k", "--iodepth=64"],
    "all sizes, not aligned": [
        *("--rw=randwrite", "--bssplit=512/20:1536/20:4k/20:20k/20:128k/20"),
        *("--iodepth=16", "--blockalign=512"),
    ],
    "sequential": ["--rw=write", "--bs=1M", "--iodepth=8"],
    "reads between writes": ["--rw=randrw", "--bs=16k", "--iodepth=16"],
    "fsync between writes": ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--fsync=32"],
    "trims between writes": ["--rw=randtrimwrite", "--bs=16k", "--iodepth=1"],
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
def test_one_job_over_the_unix_socket(
    served: ServedPool, children: Children, load: list[str]
) -> None:
    fio(children, served.unix_uri(), *load)


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_four_jobs_on_one_volume(served: ServedPool, children: Children, transport: str) -> None:
    uri = served.uri() if transport == "tcp" else served.unix_uri()
    jobs = ("--numjobs=4", "--offset_increment=32M")
    fio(children, uri, *jobs, "--rw=randwrite", "--bs=4k", "--iodepth=16", "--fsync=64")
