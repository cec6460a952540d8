"""A volume shrinks, or is deleted, at any moment at which something that was asked of it waits.

What was asked then is done, or refused since the bytes it wanted are gone: never a failure of the
search in a map that is a smaller one now, nor damage that is none, nor holes where there was data.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nbdstore.errors import NotFound, StoreError
from nbdstore.store import Pool, Volume, local_host
from nbdstore.store.mapmemory import MapMemory
from nbdstore.store.reading import Reading, Segment
from tests.store.pools import MIB, assert_clean, make_pool, opened

SIZE, FAR = 1 << 30, 512 * MIB
"""Nodes of level 1 are of 256 MiB, leaves of one."""


async def all_of(items: AsyncIterator[Any]) -> None:
    async for _ in items:
        pass


Ask = Callable[[Pool, Volume], Awaitable[Any]]

ASKED: dict[str, Ask] = {
    "read": lambda _, v: v.read(FAR, 8 * MIB),
    "extents": lambda _, v: v.extents(0, SIZE, max_extents=1000),
    "verify": lambda _, v: v.verify(FAR, 8 * MIB),
    "verify a snapshot": lambda p, v: p.snapshots["db@a"].verify(FAR, 8 * MIB, unlike=v),
    "cache": lambda _, v: v.cache(FAR, 8 * MIB),
    "write": lambda _, v: v.write(FAR + 5, b"x" * MIB),
    "trim": lambda _, v: v.trim(0, SIZE),
    "write zeroes": lambda _, v: v.write_zeroes(FAR + 5, 7 * MIB),
    "set space aside": lambda _, v: v.write_zeroes(FAR + 5, 7 * MIB, no_hole=True),
    "changes": lambda p, v: all_of(p.changes(p.snapshots["db@a"], v)),
    "changes against it": lambda p, v: all_of(p.changes(v, p.snapshots["db@a"])),
    "all it holds": lambda p, v: all_of(p.changes(None, v)),
    "flatten": lambda p, v: p.flatten(v, lambda _: None),
}


class Gate:
    """Holds one task up where it waits for the `n`-th time, for the disk or to let others in."""

    def __init__(self, n: int) -> None:
        self.task: asyncio.Task[Any] | None = None
        self.reached, self.passed = asyncio.Event(), asyncio.Event()
        self._n = n
        self._read, self._sleep = MapMemory._read, local_host.LocalHost.sleep

    async def _pass(self) -> None:
        self._n -= asyncio.current_task() is self.task
        if self._n < 0 and not self.reached.is_set():
            self.reached.set()
            await self.passed.wait()

    async def read(self, memory: MapMemory, *what: Any) -> Any:
        found = await self._read(memory, *what)
        await self._pass()
        return found

    async def sleep(self, host: local_host.LocalHost, delay_s: float) -> None:
        await self._pass()
        await self._sleep(host, delay_s)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed pool with ``db``, its snapshot ``a``, and ``copy``, a clone of that."""
    directory = make_pool(tmp_path_factory.mktemp("filled"))

    async def fill() -> None:
        async with opened(directory) as pool:
            volume = await pool.create_volume("db", SIZE)
            for offset in range(FAR, FAR + 9 * MIB, 3 * MIB):
                await volume.write(offset, b"a" * MIB)
            (snapshot,) = await pool.create_snapshots([(volume, "a")])
            await volume.write(FAR, b"b" * MIB)
            clone = await pool.clone(snapshot, "copy")
            await clone.write(FAR + MIB, b"c" * MIB)

    asyncio.run(fill())
    return directory


@pytest.mark.parametrize("size", [MIB, FAR + 4 * MIB + 512])
@pytest.mark.parametrize("asked", ASKED)
async def test_what_waits_while_its_volume_shrinks_is_done_or_refused(
    filled: Path, tmp_path: Path, asked: str, size: int
) -> None:
    async def shrink(pool: Pool, volume: Volume) -> None:
        await pool.resize_volume(volume, size, force=True)

    name = "copy" if asked == "flatten" else "db"
    async for error in asked_beside(filled, tmp_path, ASKED[asked], name, shrink):
        assert error is None or "beyond its end" in str(error)
        assert error is None or type(error) is StoreError


async def test_a_write_whose_ends_are_cut_off_while_they_are_read_is_refused(
    tmp_path: Path,
) -> None:
    read = Reading.read
    async with opened(make_pool(tmp_path / "pool")) as pool:
        volume = await pool.create_volume("db", 2 * MIB)
        await volume.write(0, b"a" * 2 * MIB)

        async def read_and_shrink(reading: Reading, offset: int, length: int) -> list[Segment]:
            found = await read(reading, offset, length)
            await pool.resize_volume(volume, MIB // 2, force=True)
            return found

        with (
            mock.patch.object(Reading, "block_now", return_value=None),  # it is not in memory
            mock.patch.object(Reading, "read", autospec=True, side_effect=read_and_shrink),
            pytest.raises(StoreError, match="beyond its end"),
        ):
            await volume.write(MIB + 5, bytes(MIB // 2))


@pytest.mark.parametrize("asked", ["extents", "changes", "changes against it", "all it holds"])
async def test_of_a_volume_that_is_deleted_nobody_is_told_that_it_holds_nothing(
    filled: Path, tmp_path: Path, asked: str
) -> None:
    async def delete(pool: Pool, volume: Volume) -> None:
        await pool.delete_volume(volume)
        await pool._administration.emptied(volume)

    async for error in asked_beside(filled, tmp_path, ASKED[asked], "copy", delete):
        assert isinstance(error, NotFound)


async def asked_beside(
    filled: Path, tmp_path: Path, ask: Ask, name: str, change: Ask
) -> AsyncIterator[BaseException | None]:
    """Do `change` at each moment at which what is asked waits; yield how that ends."""
    for n in range(5):
        directory = tmp_path / str(n)
        shutil.copytree(filled, directory)
        gate = Gate(n)
        with (
            mock.patch.object(MapMemory, "_read", autospec=True, side_effect=gate.read),
            mock.patch.object(local_host.LocalHost, "sleep", autospec=True, side_effect=gate.sleep),
        ):
            async with opened(directory) as pool:
                volume = pool.volumes[name]
                gate.task = asyncio.ensure_future(ask(pool, volume))
                reached = asyncio.ensure_future(gate.reached.wait())
                await asyncio.wait([gate.task, reached], return_when=asyncio.FIRST_COMPLETED)
                if reached.done():
                    await change(pool, volume)
                reached.cancel()
                gate.passed.set()
                await asyncio.wait([gate.task])
                assert pool.status()["corruptions"] == 0
        await assert_clean(directory)
        error = gate.task.exception()
        if not gate.reached.is_set():
            assert error is None
            break
        yield error
    assert n
