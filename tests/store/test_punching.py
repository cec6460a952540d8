"""Giving space back to the host: enough, not too much, and never what is needed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from nbdstore.errors import NoSpace, WriteFailed
from nbdstore.store import Pool
from nbdstore.store.punching import CHUNK_BYTES
from tests.store.pools import MIB, assert_clean, hooked, make_pool, opened, read, until


@pytest.fixture(autouse=True)
def keep_little() -> Iterator[None]:
    """Let the pool keep 4 MiB, and look at once."""
    with (
        mock.patch("nbdstore.store.punching.KEEP_BYTES", 4 * MIB),
        mock.patch("nbdstore.store.punching.WHILE_S", 0.0),
        mock.patch("nbdstore.store.punching._SCARCE_S", 0.0),
    ):
        yield


async def punch(pool: Pool) -> int:
    """Let the pool punch; return how many bytes of the host are left to it."""
    await pool._committer.settle()
    for _ in range(3):
        await pool._puncher.work()
    return pool._core.data.allocated


@pytest.mark.parametrize("block_size", [4096, 65536])
async def test_what_was_freed_goes_back_to_the_host(tmp_path: Path, block_size: int) -> None:
    place = make_pool(tmp_path / "p", 256 * MIB, block_size=block_size)
    async with opened(place) as pool:
        volume = await pool.create_volume("v", 128 * MIB)
        for at in range(0, 100 * MIB, 4 * MIB):
            await volume.write(at, random.Random(at).randbytes(4 * MIB))
        await pool.checkpoint()
        full = await punch(pool)
        assert full >= 100 * MIB
        await volume.trim(10 * MIB, 80 * MIB)
        await pool.checkpoint()
        assert await punch(pool) <= full - 70 * MIB
        for at in (0, 4 * MIB, 92 * MIB, 96 * MIB):
            assert await read(volume, at, 4 * MIB) == random.Random(at).randbytes(4 * MIB)
        await volume.write(10 * MIB, b"x" * 20 * MIB)
        assert await read(volume, 10 * MIB, 20 * MIB) == b"x" * 20 * MIB
    await assert_clean(place)


async def test_some_is_kept_for_the_next_writes(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", 64 * MIB)
        await volume.write(0, b"x" * 32 * MIB)
        await volume.trim(0, 32 * MIB)
        await pool.checkpoint()
        left = await punch(pool)
        assert 3 * MIB <= left <= 8 * MIB


async def test_only_whole_free_chunks_are_punched(directory: Path) -> None:
    """A block left in every chunk keeps all of them."""
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", 64 * MIB)
        await volume.write(0, b"x" * 32 * MIB)
        for at in range(0, 32 * MIB, CHUNK_BYTES // 2):
            await volume.trim(at, CHUNK_BYTES // 2 - 4096)
        await pool.checkpoint()
        before = pool._core.data.allocated
        assert await punch(pool) == before > 30 * MIB


async def test_what_is_freed_but_not_durably_is_not_punched(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", 64 * MIB)
        await volume.write(0, b"x" * 32 * MIB)
        await volume.flush()
        await volume.trim(0, 32 * MIB)
        before = pool._core.data.allocated
        await pool._puncher.work()
        assert pool._core.data.allocated == before


async def test_a_filesystem_without_holes_is_asked_once(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", 64 * MIB)
        await volume.write(0, b"x" * 32 * MIB)
        await volume.trim(0, 32 * MIB)
        with mock.patch.object(pool._core.data, "punch", return_value=False) as refused:
            await punch(pool)
            await punch(pool)
            assert refused.call_count == 1


@pytest.mark.parametrize("error", [WriteFailed, NoSpace])
async def test_a_failed_punch_does_not_end_the_housekeeping(
    directory: Path, error: type[Exception]
) -> None:
    def hook(operation: str, name: str) -> None:
        if operation == "punch":
            failures.append(name)
            raise error("data: punching failed")

    failures: list[str] = []
    with hooked(hook):
        async with opened(directory, sync_interval_s=0.0) as pool:
            volume = await pool.create_volume("v", 64 * MIB)
            await volume.write(0, b"x" * 32 * MIB)
            await volume.trim(0, 32 * MIB)
            await pool.checkpoint()
            await until(lambda: bool(failures))
            await volume.write(0, b"y" * 4096)
            await asyncio.wait_for(until(lambda: pool.status()["unsynced"] == 0), 10)
            assert pool.status()["state"] == "ok"
