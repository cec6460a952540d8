"""Administrative changes while a snapshot is deleted, which may take long: they need not wait.

What the deletion found before such a change is worth nothing if the change was one of what
continues from the snapshot; it looks again then. That nothing is freed that is still held, and that
nothing is lost, is the check's to say, at the end of each of these.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nbdstore.errors import Busy, NoSpace, NotFound
from nbdstore.store import Image, Pool, differences
from nbdstore.store.layout import I64
from nbdstore.store.mapmemory import MapMemory
from nbdstore.store.snapshot import Snapshot
from tests.store.pools import MIB, assert_clean, make_pool, opened, read
from tests.store.test_snapshots import read_image, snap

BLOCK = 4096
N_BLOCKS = 2048


class Search:
    """Holds up the searches of deletions for what they free: at their beginning, or at their end.

    n_begun: how many there were. passed: what lets them go on.
    """

    def __init__(self, *, at_end: bool) -> None:
        self.n_begun = 0
        self.reached = asyncio.Event()
        self.passed = asyncio.Event()
        self._at_end = at_end

    async def blocks_alone(self, snapshot: Snapshot, heirs: Sequence[Image]) -> AsyncIterator[I64]:
        self.n_begun += 1
        if not self._at_end:
            await self._pass()
        async for slots in differences.blocks_alone(snapshot, heirs):
            yield slots
        if self._at_end:
            await self._pass()

    async def _pass(self) -> None:
        self.reached.set()
        await self.passed.wait()


@asynccontextmanager
async def deleting(
    pool: Pool, search: Search, name: str = "v@b"
) -> AsyncIterator[asyncio.Future[None]]:
    """A deletion that is held up while this lasts."""
    deletion = asyncio.ensure_future(pool.delete_snapshot(pool.snapshots[name]))
    await search.reached.wait()
    try:
        yield deletion
    finally:
        search.passed.set()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make_pool(tmp_path / "pool")


@pytest.fixture(params=[False, True], ids=["before the search", "after the search"])
def search(request: pytest.FixtureRequest) -> Iterator[Search]:
    found = Search(at_end=request.param)
    with mock.patch("nbdstore.store.snapshots.blocks_alone", found.blocks_alone):
        yield found


async def fill(pool: Pool, byte: bytes, step: int) -> None:
    """Write every `step`-th block of ``v``."""
    volume = pool.volumes["v"]
    for block in range(0, N_BLOCKS, step):
        await volume.write(block * BLOCK, byte * BLOCK)


async def make_volume(pool: Pool) -> None:
    """Make ``v`` with snapshots ``a`` and ``b``, each of which holds blocks that nothing else does.

    Nothing but the volume continues from ``b``.
    """
    await pool.create_volume("v", N_BLOCKS * BLOCK)
    for name, step in (("a", 2), ("b", 3)):
        await fill(pool, name.encode(), step)
        await snap(pool, pool.volumes["v"], name)
    await fill(pool, b"c", 5)


async def test_other_volumes_are_changed_in_every_way_meanwhile(
    directory: Path, search: Search
) -> None:
    async with opened(directory) as pool:
        await make_volume(pool)
        async with deleting(pool, search) as deletion:
            other = await pool.create_volume("other", MIB)
            await other.write(0, b"o" * BLOCK)
            await snap(pool, other, "s")
            await pool.clone(pool.snapshots["other@s"], "copy")
            await pool.resize_volume(other, 2 * MIB)
            await pool.rename_volume(other, "another")
            await pool.rollback(other, pool.snapshots["another@s"])
            await pool.rename_volume(pool.volumes["v"], "w")
            await pool.set_properties(pool.volumes["w"], {"key": 1})
            await pool.delete_volume(pool.volumes["copy"])
            await pool.checkpoint()
            assert not deletion.done()
        await deletion
        assert search.n_begun == 1
        assert set(pool.snapshots) == {"w@a", "another@s"}
    await assert_clean(directory)


async def test_a_snapshot_of_the_volume_is_made_meanwhile(directory: Path, search: Search) -> None:
    async with opened(directory) as pool:
        await make_volume(pool)
        volume = pool.volumes["v"]
        async with deleting(pool, search) as deletion:
            await fill(pool, b"d", 7)
            then = await read(volume)
            await snap(pool, volume, "c")
            await fill(pool, b"e", 2)
        await deletion
        assert search.n_begun == 2, "what was found before the snapshot is not so any more"
        assert await read_image(pool.snapshots["v@c"]) == then
        await fill(pool, b"f", 3)
        assert await read_image(pool.snapshots["v@c"]) == then
    await assert_clean(directory)


async def test_a_snapshot_of_the_volume_fails_meanwhile(directory: Path, search: Search) -> None:
    async with opened(directory) as pool:
        await make_volume(pool)
        volume = pool.volumes["v"]
        async with deleting(pool, search) as deletion:
            with (
                mock.patch.object(pool._checkpointer, "_take", side_effect=NoSpace("full")),
                pytest.raises(NoSpace),
            ):
                await snap(pool, volume, "c")
            await fill(pool, b"d", 2)
            content = await read(volume)
        await deletion
        assert await read(volume) == content
        await pool.delete_snapshot(pool.snapshots["v@a"])
        assert volume.status()["own"] == volume.status()["mapped"]
    await assert_clean(directory)


@pytest.mark.parametrize("size", [N_BLOCKS * BLOCK * 4, N_BLOCKS * BLOCK // 3 // BLOCK * BLOCK])
async def test_the_volume_gets_another_size_meanwhile(
    directory: Path, search: Search, size: int
) -> None:
    async with opened(directory) as pool:
        await make_volume(pool)
        volume = pool.volumes["v"]
        async with deleting(pool, search) as deletion:
            await pool.resize_volume(volume, size, force=True)
        await deletion
        await pool.delete_snapshot(pool.snapshots["v@a"])
        assert volume.status()["own"] == volume.status()["mapped"]
    await assert_clean(directory)


async def test_what_continues_from_it_is_rolled_back_meanwhile(
    directory: Path, search: Search
) -> None:
    async with opened(directory) as pool:
        await make_volume(pool)
        volume = pool.volumes["v"]
        held = await read_image(pool.snapshots["v@a"])
        async with deleting(pool, search) as deletion:
            with mock.patch.object(pool._administration, "_empty"):
                await pool.rollback(volume, pool.snapshots["v@a"])
        with pytest.raises(Busy, match="not freed yet"):
            await deletion
        assert await read(volume) == held
    async with opened(directory) as pool:  # which frees what was discarded
        await pool.delete_snapshot(pool.snapshots["v@b"])
        assert await read(pool.volumes["v"]) == held
    await assert_clean(directory)


@pytest.mark.parametrize(
    "use",
    [
        lambda pool, snapshot: pool.clone(snapshot, "copy"),
        lambda pool, snapshot: pool.rollback(pool.volumes["v"], snapshot),
    ],
    ids=["clone", "rollback"],
)
async def test_nothing_new_continues_from_it_meanwhile(
    directory: Path, search: Search, use: Callable[[Pool, Snapshot], Awaitable[object]]
) -> None:
    async with opened(directory) as pool:
        await make_volume(pool)
        snapshot = pool.snapshots["v@b"]
        async with deleting(pool, search) as deletion:
            with pytest.raises(NotFound, match="v@b' is being deleted"):
                await use(pool, snapshot)
        await deletion
    await assert_clean(directory)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a"), ("b", "b")])
async def test_snapshots_are_deleted_one_after_the_other(
    directory: Path, search: Search, names: tuple[str, str]
) -> None:
    async with opened(directory) as pool:
        await make_volume(pool)
        content = await read(pool.volumes["v"])
        first, second = (
            asyncio.ensure_future(pool.delete_snapshot(pool.snapshots[f"v@{name}"]))
            for name in names
        )
        await search.reached.wait()
        search.passed.set()
        found = await asyncio.gather(first, second, return_exceptions=True)
        gone = [error for error in found if error is not None]
        assert [type(error) for error in gone] == ([NotFound] if names == ("b", "b") else [])
        assert await read(pool.volumes["v"]) == content
    await assert_clean(directory)


async def test_the_volume_is_deleted_meanwhile(directory: Path, search: Search) -> None:
    async with opened(directory) as pool:
        await make_volume(pool)
        async with deleting(pool, search) as deletion:
            whole = asyncio.ensure_future(pool.delete_volume(pool.volumes["v"]))
            while not pool._snapshots._deleting._waiters:  # it wants to delete the same snapshot
                await asyncio.sleep(0)
        await asyncio.gather(deletion, whole)
        assert (pool.volumes, pool.snapshots) == ({}, {})
    await assert_clean(directory)


async def test_the_volume_shrinks_while_a_node_of_its_map_is_read(directory: Path) -> None:
    size, far = 1 << 30, 512 * MIB  # nodes of level 1 are of 256 MiB
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", size)
        for byte in (b"a", b"b"):
            await volume.write(far, byte * MIB)
            if byte == b"a":
                await snap(pool, volume, "b")
    read_nodes, reached, passed = MapMemory._read, asyncio.Event(), asyncio.Event()

    async def read_later(memory: MapMemory, numbers: list[int], pointers: Any, what: str) -> Any:
        found = await read_nodes(memory, numbers, pointers, what)
        if what.startswith("map of v, level 1") and not reached.is_set():
            reached.set()
            await passed.wait()
        return found

    with mock.patch.object(MapMemory, "_read", read_later):
        async with opened(directory) as pool:
            deletion = asyncio.ensure_future(pool.delete_snapshot(pool.snapshots["v@b"]))
            await reached.wait()
            await pool.resize_volume(pool.volumes["v"], MIB, force=True)
            passed.set()
            await deletion
            assert pool.status()["mapped"] == 0
    await assert_clean(directory)
