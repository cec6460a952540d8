"""The trash: how long volumes rest in it, and who gets their space when it is needed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from unittest import mock

import pytest

from nbdstore.errors import Busy, NoSpace, NotFound
from tests.store.pools import MIB, assert_clean, make_pool, opened, read, until

BLOCK = 4096


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make_pool(tmp_path / "pool", 32 * MIB)


async def test_a_volume_is_deleted_when_its_time_is_up(directory: Path) -> None:
    async with opened(directory, trash_keep_s=0.0) as pool:
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, b"1" * BLOCK)
        await pool.create_snapshots([(volume, "s")])
        await pool.trash_volume(volume)
        await until(lambda: volume.id not in pool._registry.by_id)
    await assert_clean(directory)


async def test_a_volume_stays_as_long_as_its_time_is_not_up(directory: Path) -> None:
    async with opened(directory, trash_keep_s=3600.0) as pool:
        volume = await pool.create_volume("v", MIB)
        await pool.trash_volume(volume)
        pool._trash.empty_in_time()
        assert pool.trash == [volume]
        assert pool._trash._deleting is None


@pytest.mark.parametrize("on_full", ["wait", "error"])
async def test_a_write_that_finds_no_space_gets_that_of_the_oldest(
    directory: Path, on_full: str
) -> None:
    async with opened(directory, on_full=on_full) as pool:
        held = []
        for name in ("old", "new"):
            volume = await pool.create_volume(name, 12 * MIB)
            await volume.write(0, b"x" * 10 * MIB)
            await pool.trash_volume(volume)
            held.append(volume)
        volume = await pool.create_volume("v", 16 * MIB)
        await volume.write(0, b"y" * 12 * MIB)
        assert pool.trash == [held[1]]
        await pool.restore_volume(held[1], "new")
        assert await read(held[1], 0, BLOCK) == b"x" * BLOCK
    await assert_clean(directory)


async def test_what_has_clones_stays(directory: Path) -> None:
    async with opened(directory, trash_keep_s=0.0) as pool:
        volume = await pool.create_volume("v", MIB)
        (snapshot,) = await pool.create_snapshots([(volume, "s")])
        clone = await pool.clone(snapshot, "c")
        await pool.trash_volume(volume)
        pool._trash.empty_in_time()
        assert pool._trash._deleting is None
        await pool.delete_volume(clone)
        await until(lambda: volume.id not in pool._registry.by_id)
    await assert_clean(directory)


async def test_a_new_volume_gets_the_space_of_the_trash(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", 32 * MIB)
        await volume.write(0, b"x" * 20 * MIB)
        with mock.patch("nbdstore.store.pool._REFUSE_NEW_AT", 0.5):
            with pytest.raises(NoSpace, match="full"):
                await pool.create_volume("w", MIB)
            await pool.trash_volume(volume)
            await pool.create_volume("w", MIB)
        assert not pool.trash
    await assert_clean(directory)


async def test_a_volume_whose_deletion_has_begun_is_not_restored(tmp_path: Path) -> None:
    """Nor cloned, nor rolled back: it may have lost a snapshot already."""
    async with opened(make_pool(tmp_path / "pool")) as pool:
        volume = await pool.create_volume("v", MIB)
        older, newer = [
            (await pool.create_snapshots([(volume, name)]))[0] for name in ("older", "newer")
        ]
        await pool.trash_volume(volume)
        async with pool._administration.turn():
            deleting = asyncio.ensure_future(pool.delete_volume(volume))
            await asyncio.sleep(0)
        await until(lambda: newer.is_gone)
        for change in (
            pool.restore_volume(volume, "v"),
            pool.clone(older, "c"),
            pool.rollback(volume, older),
            pool.create_snapshots([(volume, "another")]),
        ):
            with pytest.raises((Busy, NotFound)):
                await change
        await deleting


async def test_a_volume_that_was_restored_just_now_is_not_deleted(tmp_path: Path) -> None:
    async with opened(make_pool(tmp_path / "pool"), trash_keep_s=0) as pool:
        volume = await pool.create_volume("v", MIB)
        await pool.trash_volume(volume)
        pool._trash.empty_in_time()  # the task that does it comes later
        pool._registry.apply(
            pool._services, volume.id, {"op": "restore", "name": "v"}, volume.last_seq
        )
        await asyncio.sleep(0.01)
        assert not volume.is_gone
