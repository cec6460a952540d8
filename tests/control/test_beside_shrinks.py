"""A shrink that takes long holds up nobody but who uses the volume itself."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from unittest import mock

import pytest

from nbdstore.control.client import ControlClient
from nbdstore.control.model import VolumeInfo
from nbdstore.errors import Busy
from nbdstore.store import Volume
from tests.control.real_pool import TIMEOUT_S, Served

MIB = 1 << 20


class Clearing:
    """Holds up the clearing of what is to be cut off."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.passed = threading.Event()
        self._clear = Volume.write_zeroes

    async def write_zeroes(self, volume: Volume, offset: int, length: int) -> None:
        self.reached.set()
        while not self.passed.is_set():
            await asyncio.sleep(0)
        await self._clear(volume, offset, length)


@pytest.fixture
def pool(served: Served) -> Served:
    """A pool with ``db``, full of data, its snapshot ``a``, and ``logs``."""

    async def fill() -> None:
        volume = await served.pool.create_volume("db", 4 * MIB)
        await served.pool.create_snapshots([(volume, "a")])
        await volume.write(0, b"d" * 4 * MIB)
        await served.pool.create_volume("logs", MIB)

    served.run(fill())
    return served


@pytest.fixture
def shrinking(pool: Served) -> Iterator[Future[VolumeInfo]]:
    """``db`` while it is cut down to 1 MiB, which goes on at the end."""
    clearing = Clearing()
    patch = mock.patch.object(
        Volume, "write_zeroes", autospec=True, side_effect=clearing.write_zeroes
    )
    with patch, ThreadPoolExecutor(1) as threads:
        call = threads.submit(
            pool.client.update_volume, "db", size=MIB, shrink=True, force=True, iops=100
        )
        try:
            assert clearing.reached.wait(TIMEOUT_S)
            yield call
        finally:
            clearing.passed.set()
        info = call.result(TIMEOUT_S)
        assert (info.size, info.mapped, info.iops) == (MIB, MIB, 100)
        pool.client.create_snapshots(["db@b"])  # nothing is in the way any more


def test_other_changes_do_not_wait(pool: Served, shrinking: Future[VolumeInfo]) -> None:
    client = pool.client
    client.create_volume("web", MIB)
    client.update_volume("web", size=2 * MIB, new_name="net", iops=100)
    client.create_snapshots(["logs@a", "net@a"])
    client.clone("db@a", "copy")
    client.acquire_lease("net", "node-1")
    client.delete_volume("copy")
    assert client.volume("db").size == 4 * MIB
    assert not shrinking.done()


USES: dict[str, Callable[[ControlClient], object]] = {
    "snapshot": lambda client: client.create_snapshots(["db@b"]),
    "rollback": lambda client: client.rollback("db@a", fence=True),
    "delete": lambda client: client.delete_volume("db", fence=True, snapshots=True),
    "lease": lambda client: client.acquire_lease("db", "node-1", force=True),
    "grow": lambda client: client.update_volume("db", size=8 * MIB),
    "shrink": lambda client: client.update_volume("db", size=2 * MIB, shrink=True, force=True),
    "import": lambda client: client.write_content("db", MIB, [], overwrite=True),
    "receive": lambda client: client.backups.receive(
        "db", client.backups.send("logs@b", since="logs@a")
    ),
}


@pytest.mark.parametrize("use", USES)
def test_the_volume_itself_is_busy(pool: Served, shrinking: Future[VolumeInfo], use: str) -> None:
    if use == "receive":
        pool.client.create_snapshots(["logs@a"])
        pool.client.create_snapshots(["logs@b"])
    with pytest.raises(Busy, match="'db' is being shrunk: wait for that before"):
        USES[use](pool.client)
    assert not shrinking.done()
