"""Backups over the control API: what a caller gets, and what is left when a caller leaves."""

from __future__ import annotations

import os
import time

import pytest

from nbdstore.control.stream import Buffer
from nbdstore.errors import BadStream, Busy, NotFound
from tests.control.real_pool import Served

MIB = 1 << 20
BLOCK = 4096


@pytest.fixture
def filled(served: Served) -> Served:
    """A pool with ``db@a``, empty, and ``db@b``, with 16 MiB in every other one of its blocks."""

    async def fill() -> None:
        volume = await served.pool.create_volume("db", 64 * MIB)
        await served.pool.create_snapshots([(volume, "a")])
        for block in range(0, 8192, 2):
            await volume.write(block * BLOCK, os.urandom(BLOCK))
        await served.pool.create_snapshots([(volume, "b")])

    served.run(fill())
    return served


def sent(pool: Served, name: str, since: str | None = None) -> bytes:
    return b"".join(pool.client.backups.send(name, since))


def test_all_of_it(filled: Served) -> None:
    backups = filled.client.backups
    found = backups.diff("db@b", "db@a")
    assert (found.size, found.older_size) == (64 * MIB, 64 * MIB)
    assert list(found.extents) == [(at * BLOCK, BLOCK) for at in range(0, 8192, 2)]
    info = backups.receive("copy", [sent(filled, "db@b")])
    assert (info.snapshot, info.data) == ("copy@b", 16 * MIB)
    assert list(backups.diff("copy").extents) == list(backups.diff("db").extents)
    assert filled.client.space().data == 32 * MIB


def test_a_caller_that_leaves_lets_go_of_the_snapshots(filled: Served) -> None:
    for path in ("/v1/snapshots/db@b/stream?since=db@a", "/v1/diff?newer=db@b&older=db@a"):
        connection = filled.connect()
        connection.request("GET", path)
        connection.getresponse().read(1)
        connection.close()
    deadline = time.monotonic() + 60
    while filled.client.snapshots():
        try:
            for name in ("db@b", "db@a"):
                filled.client.delete_snapshot(name)
        except Busy:
            assert time.monotonic() < deadline


def test_a_caller_that_stops_sending_leaves_what_came(filled: Served) -> None:
    backups = filled.client.backups
    with pytest.raises(BadStream, match="cut off"):
        backups.receive("copy", [sent(filled, "db@b")[: 9 * MIB]])
    info = backups.receiving("copy")
    assert not info.running
    assert 8 * MIB < info.position < 64 * MIB
    rest: list[Buffer] = [*backups.resume(info.token)]
    backups.receive("copy", rest)
    with pytest.raises(NotFound):
        backups.receiving("copy")
    assert list(backups.diff("copy@b").extents) == list(backups.diff("db@b").extents)


def test_giving_up(filled: Served) -> None:
    backups = filled.client.backups
    with pytest.raises(BadStream):
        backups.receive("copy", [sent(filled, "db@b")[:-1]])
    backups.abort_receive("copy")
    assert [info.name for info in filled.client.volumes()] == ["db"]
