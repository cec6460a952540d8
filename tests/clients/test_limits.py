"""Limits with real clients: never faster, changed while they run, kept over a restart."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.children import Children
from tests.clients.libnbd import nbdsh
from tests.clients.served_pool import NBDSTORE, ServedPool

LOAD = ("--ioengine=nbd", "--direct=1", "--size=64M", "--output-format=json")


def fio(children: Children, pool: ServedPool, *options: str) -> list[dict[str, Any]]:
    """Run fio; return its report on each job."""
    report = children.directory / "fio.json"
    children.run("fio", *LOAD, f"--uri={pool.unix_uri()}", f"--output={report}", *options)
    text = report.read_text()
    jobs: list[dict[str, Any]] = json.loads(text[text.index("{") :])["jobs"]
    return jobs


def command(pool: ServedPool) -> list[str]:
    """Return the words with which an nbdstore command on the pool begins."""
    return [str(NBDSTORE), "--pool", str(pool.directory)]


@pytest.mark.requires("fio")
def test_requests_per_second(served: ServedPool, children: Children) -> None:
    """A lower bound of the time it takes is certain, however slow the machine is."""
    served.nbdstore("volume", "set", "disk", "--iops", "500", "--burst", "0.1")
    start_s = time.monotonic()
    (job,) = fio(
        children, served, "--name=x", "--rw=randrw", "--bs=4k", "--iodepth=64", "--io_size=4M"
    )
    assert time.monotonic() - start_s > (1024 - 50 - 1) / 500
    assert job["error"] == 0
    assert job["read"]["total_ios"] + job["write"]["total_ios"] == 1024


@pytest.mark.requires("fio")
def test_bytes_per_second(served: ServedPool, children: Children) -> None:
    served.nbdstore("volume", "set", "disk", "--bandwidth", "32M", "--burst", "0")
    start_s = time.monotonic()
    (job,) = fio(children, served, "--name=x", "--rw=write", "--bs=1M", "--iodepth=8")
    assert time.monotonic() - start_s > 62 / 32
    assert (job["error"], job["write"]["io_bytes"]) == (0, 64 << 20)


@pytest.mark.requires("nbdsh")
def test_changed_while_a_client_waits(served: ServedPool, children: Children) -> None:
    """With the limit it would take half an hour; its end lets everything go at once."""
    served.nbdstore("volume", "set", "disk", "--bandwidth", "64K")
    lift = [*command(served), "volume", "set", "disk", "--bandwidth", "none"]
    nbdsh(
        children,
        served.uri(),
        f"""
        import subprocess
        data = [bytes([n]) * (1 << 20) for n in range(100)]
        cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data[n])), n << 20)
                   for n in range(100)]
        while not h.aio_command_completed(cookies[0]):
            h.poll(-1)
        subprocess.run({lift!r}, check=True)
        for cookie in cookies[1:]:
            while not h.aio_command_completed(cookie):
                h.poll(-1)
        for n in range(100):
            same(h.pread(1 << 20, n << 20), data[n])
        """,
    )


@pytest.mark.requires("nbdsh")
def test_kept_over_a_restart_and_no_hindrance_to_it(served: ServedPool, children: Children) -> None:
    served.nbdstore("volume", "set", "disk", "--bandwidth", "64K", "--burst", "0")
    assert served.process
    nbdsh(
        children,
        served.uri(),
        f"""
        import json, signal, subprocess

        def in_flight():
            listing = subprocess.check_output({[*command(served), "ps", "--json"]!r})
            return json.loads(listing)[0]["in_flight"]

        h.pread(1 << 20, 0)  # what follows waits for 16 s, unless the server ends
        data = nbd.Buffer.from_bytearray(bytearray(b"x" * 4096))
        cookie = h.aio_pwrite(data, 0)
        while in_flight() < 1:  # reading stops at the first one that is held back
            pass
        os.kill({served.process.pid}, signal.SIGTERM)
        while not h.aio_command_completed(cookie):
            h.poll(-1)
        """,
    )
    served.wait()
    served.restart()
    info = json.loads(served.nbdstore("volume", "show", "disk", "--json"))
    assert (info["bandwidth"], info["burst_s"]) == (64 << 10, 0)
    served.nbdstore("volume", "set", "disk", "--bandwidth", "none")
    nbdsh(children, served.uri(), "same(h.pread(4096, 0), b'x' * 4096)")
