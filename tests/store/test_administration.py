"""Administrative changes: volumes made, resized, renamed and deleted, the pool enlarged."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nbdstore.errors import (
    AlreadyExists,
    Busy,
    InvalidArgument,
    NotFound,
    StoreError,
    WriteFailed,
)
from nbdstore.sizes import exact_size
from nbdstore.store import Extent, ExtentKind, Pool, Volume, layout
from nbdstore.store.administration import Administration
from nbdstore.store.checkpoint import Checkpointer
from tests.store.callers import cancelled_after
from tests.store.pools import (
    MIB,
    assert_clean,
    hooked,
    killed,
    opened,
    read,
    until,
)

BLOCK = 4096


# -- volumes -------------------------------------------------------------------------------------


async def test_changes_are_durable_when_they_return(
    pool: Pool, directory: Path, tmp_path: Path
) -> None:
    """What the disk was told to sync is all that is copied: see test_power_loss for power loss."""
    a = await pool.create_volume("a", MIB, {"x": 1})
    b = await pool.create_volume("b", 2 * MIB)
    c = await pool.create_volume("c", 3 * MIB)
    await pool.rename_volume(a, "z")
    await pool.resize_volume(b, 5 * MIB)
    await pool.set_properties(b, {"allow": ["ä"]})
    await pool.delete_volume(c)
    await pool.grow(300 * MIB)
    async with opened(killed(directory, tmp_path / "k")) as again:
        assert {n: v.size for n, v in again.volumes.items()} == {"z": MIB, "b": 5 * MIB}
        assert again.volumes["z"].properties == {"x": 1}
        assert again.volumes["b"].properties == {"allow": ["ä"]}
        assert again.status()["capacity"] == 300 * MIB
        assert again.volumes["z"].status()["uuid"] == a.status()["uuid"]
        assert again.volumes["z"].status()["created"] == a.status()["created"]
    await assert_clean(tmp_path / "k")


async def test_ids_are_never_used_twice(pool: Pool, directory: Path, tmp_path: Path) -> None:
    first = await pool.create_volume("v", MIB)
    await pool.delete_volume(first)
    second = await pool.create_volume("v", MIB)
    assert second.id > first.id
    assert second.status()["uuid"] != first.status()["uuid"]
    await pool.delete_volume(second)
    async with opened(killed(directory, tmp_path / "k")) as again:
        assert (await again.create_volume("v", MIB)).id > second.id


async def test_names_are_unique(pool: Pool) -> None:
    a, b = await pool.create_volume("a", MIB), await pool.create_volume("b", MIB)
    with pytest.raises(AlreadyExists, match="'a'"):
        await pool.create_volume("a", MIB)
    with pytest.raises(AlreadyExists, match="'a'"):
        await pool.rename_volume(b, "a")
    await pool.rename_volume(a, "a")
    await pool.rename_volume(a, "c")
    await pool.rename_volume(b, "a")
    assert set(pool.volumes) == {"a", "c"}


async def test_two_that_want_one_name_at_once(pool: Pool) -> None:
    made = await asyncio.gather(
        *(pool.create_volume("v", MIB) for _ in range(5)), return_exceptions=True
    )
    assert sum(isinstance(found, Volume) for found in made) == 1
    assert sum(isinstance(found, AlreadyExists) for found in made) == 4


@pytest.mark.parametrize("size", [0, -512, 1000, layout.MAX_VOLUME_SIZE + 512])
async def test_sizes_that_make_no_sense_are_refused(pool: Pool, volume: Volume, size: int) -> None:
    with pytest.raises(InvalidArgument, match=str(size)):
        await pool.create_volume("w", size)
    with pytest.raises(InvalidArgument, match=str(size)):
        await pool.resize_volume(volume, size)
    assert set(pool.volumes) == {"v"}


async def test_the_largest_volume_costs_nothing_until_it_is_used(pool: Pool) -> None:
    volume = await pool.create_volume("huge", layout.MAX_VOLUME_SIZE)
    assert volume.write_now([(volume.size - 512, b"x" * 512), (0, b"y")])
    assert await read(volume, volume.size - 513, 513) == b"\0" + b"x" * 512
    await pool.checkpoint()
    await pool.delete_volume(volume)


async def test_properties_that_are_too_much_are_refused(pool: Pool, volume: Volume) -> None:
    with pytest.raises(InvalidArgument, match="16 KiB"):
        await pool.set_properties(volume, {"x": "y" * 20_000})
    with pytest.raises(InvalidArgument, match="16 KiB"):
        await pool.create_volume("w", MIB, {"x": "y" * 20_000})
    assert volume.properties == {}


async def test_a_catalogue_of_many_blocks(directory: Path) -> None:
    async with opened(directory) as pool:
        for number in range(40):
            await pool.create_volume(f"v{number}", MIB, {"x": "y" * 15_000})
    await assert_clean(directory)
    async with opened(directory) as pool:
        assert len(pool.volumes) == 40
        assert pool.volumes["v39"].properties == {"x": "y" * 15_000}


async def test_what_is_done_to_a_deleted_volume_is_not_found(
    pool: Pool, volume: Volume, directory: Path, tmp_path: Path
) -> None:
    await pool.delete_volume(volume)
    for _ in range(2):
        for change in (
            pool.rename_volume(volume, "w"),
            pool.resize_volume(volume, 9 * MIB),
            pool.resize_volume(volume, MIB),
            pool.set_properties(volume, {}),
            pool.delete_volume(volume),
            volume.trim(0, volume.size),
            volume.write_zeroes(0, volume.size, no_hole=True),
            volume.extents(0, volume.size, max_extents=1),
            volume.cache(0, volume.size),
        ):
            with pytest.raises(NotFound):
                await change
        await until(lambda: volume.id not in pool._registry.by_id)
    async with opened(killed(directory, tmp_path / "k")) as again:
        assert not again.volumes


async def test_changes_that_race_with_a_deletion_end_before_or_after_it(
    pool: Pool, directory: Path, tmp_path: Path
) -> None:
    for number in range(10):
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, b"x" * 100_000)
        found = await asyncio.gather(
            pool.rename_volume(volume, "w"),
            pool.delete_volume(volume),
            pool.set_properties(volume, {"n": number}),
            pool.resize_volume(volume, 2 * MIB),
            volume.write(5000, b"y" * 100_000),
            volume.write_zeroes(0, MIB, no_hole=True),
            pool.create_volume("w", MIB),
            return_exceptions=True,
        )
        assert all(
            isinstance(error, NotFound | AlreadyExists)
            for error in found
            if isinstance(error, BaseException)
        )
        await assert_clean(killed(directory, tmp_path / "k"))
        for left in list(pool.volumes.values()):
            await pool.delete_volume(left)
    await until(lambda: not pool._registry.by_id)


async def test_deleting_gives_all_space_back(pool: Pool, directory: Path) -> None:
    await pool.checkpoint()
    before = pool.status()["used"]
    for _ in range(3):
        volume = await pool.create_volume("v", 1 << 40)
        for at in range(0, 8 * MIB, MIB):
            await volume.write(at * 1000, b"x" * MIB)
        await volume.write_zeroes(1 << 39, 8 * MIB, no_hole=True)
        await pool.checkpoint()
        await pool.delete_volume(volume)
        await until(lambda volume=volume: volume.id not in pool._registry.by_id)  # type: ignore[misc]
    await pool.checkpoint()
    assert pool.status()["used"] <= before + 4 * BLOCK
    assert pool.status()["reserved"] == pool._core.reserve * BLOCK


async def test_a_deletion_that_a_crash_interrupted_is_finished(
    pool: Pool, directory: Path, tmp_path: Path
) -> None:
    volume = await pool.create_volume("v", 1 << 40)
    for at in range(0, 1 << 40, 1 << 34):
        await volume.write(at, b"x" * BLOCK)
    await pool.checkpoint()
    await pool.delete_volume(volume)
    copy = killed(directory, tmp_path / "k")
    await assert_clean(copy)
    async with opened(copy) as again:
        assert not again.volumes
        await until(lambda: not again._registry.by_id)
        await again.checkpoint()
        assert again.status()["used"] < 20 * BLOCK
    await assert_clean(copy)


# -- resizing ------------------------------------------------------------------------------------

MIBS = [1, 2, 3, 255, 256, 257, 600, 70_000]  # leaves of a map; 256 to a node, 65536 to the next


@pytest.mark.parametrize("before", MIBS)
async def test_growing_through_every_height_of_the_tree(pool: Pool, before: int) -> None:
    volume = await pool.create_volume("v", before * MIB - 512)
    await volume.write(0, b"first")
    await volume.write(volume.size - 100, b"l" * 100)
    for now in MIBS:
        for checkpoint in (False, True) if now >= before else ():
            end = volume.size
            await pool.resize_volume(volume, now * MIB + checkpoint * 512)
            assert await read(volume, 0, 6) == b"first\0"
            assert await read(volume, before * MIB - 612, 100) == b"l" * 100
            new = min(volume.size - end, MIB)
            assert await read(volume, end, new) == bytes(new)
            if checkpoint:
                await pool.checkpoint()
    assert volume.status()["mapped"] == 2 * BLOCK


@pytest.mark.parametrize("after", MIBS)
async def test_shrinking_through_every_height_of_the_tree(pool: Pool, after: int) -> None:
    volume = await pool.create_volume("v", 70_001 * MIB)
    places = [mib * MIB - BLOCK for mib in MIBS]
    for place in places:
        await volume.write(place, b"x" * BLOCK)
    await pool.checkpoint()
    for mib in reversed(MIBS):
        if mib >= after:
            await pool.resize_volume(volume, mib * MIB - 512, force=True)
            assert volume.status()["mapped"] == sum(p < volume.size for p in places) * BLOCK
            assert await read(volume, volume.size - 1024, 1024) == b"x" * 1024
    await pool.resize_volume(volume, 70_001 * MIB)
    assert await read(volume, after * MIB - 1024, 2048) == b"x" * 512 + bytes(1536)


async def test_a_volume_that_is_set_aside_as_a_whole_shrinks_within_its_last_block(
    pool: Pool,
) -> None:
    volume = await pool.create_volume("v", 4 * 4096 + 1024)
    await volume.write_zeroes(0, volume.size, no_hole=True)
    await pool.resize_volume(volume, 4 * 4096 + 512, force=True)
    await pool.resize_volume(volume, 9 * 4096)
    kinds = [(e.kind, e.length) for e in await volume.extents(0, volume.size, max_extents=9)]
    assert kinds == [(ExtentKind.ZERO, 5 * 4096), (ExtentKind.HOLE, 4 * 4096)]


async def test_shrinking_over_data_needs_force_and_says_how_much(
    pool: Pool, volume: Volume
) -> None:
    await volume.write(MIB, b"x" * 2 * BLOCK)
    await volume.write_zeroes(2 * MIB, BLOCK, no_hole=True)
    with pytest.raises(InvalidArgument, match=r"12 KiB of data.* beyond the new size 1 MiB:"):
        await pool.resize_volume(volume, MIB)
    assert volume.size == 8 * MIB
    await pool.resize_volume(volume, 4 * MIB)
    await pool.resize_volume(volume, MIB, force=True)
    assert volume.status()["reserved"] == volume.status()["mapped"] == 0


async def test_what_was_cut_off_never_comes_back(pool: Pool) -> None:
    volume = await pool.create_volume("v", 100 * BLOCK)
    await volume.write(0, b"x" * volume.size)
    await pool.resize_volume(volume, 50 * BLOCK + 512, force=True)
    await pool.resize_volume(volume, 100 * BLOCK)
    assert await read(volume) == (b"x" * (50 * BLOCK + 512)).ljust(100 * BLOCK, b"\0")


@pytest.mark.parametrize("n_blocks", [1, 44, 256, 300])
@pytest.mark.parametrize("checkpoint", [False, True])
async def test_growing_adds_holes_behind_a_provisioned_end(
    pool: Pool, directory: Path, tmp_path: Path, n_blocks: int, checkpoint: bool
) -> None:
    volume = await pool.create_volume("v", n_blocks * BLOCK)
    await volume.write_zeroes(0, volume.size, no_hole=True)
    if checkpoint:
        await pool.checkpoint()
    await pool.resize_volume(volume, 1000 * BLOCK)
    found = await volume.extents(0, volume.size, max_extents=9)
    assert [(e.length, e.kind) for e in found] == [
        (n_blocks * BLOCK, ExtentKind.ZERO),
        ((1000 - n_blocks) * BLOCK, ExtentKind.HOLE),
    ]
    assert volume.status()["reserved"] == n_blocks * BLOCK
    await assert_clean(killed(directory, tmp_path / "k"))


async def test_a_volume_becomes_smaller_still_while_it_is_seen_that_its_end_is_empty(
    pool: Pool, volume: Volume
) -> None:
    look, sizes = Volume.extents, [MIB]

    async def look_and_shrink(of: Volume, *where: int, max_extents: int) -> list[Extent]:
        found = await look(of, *where, max_extents=max_extents)
        while sizes:
            await pool.resize_volume(volume, sizes.pop())
        return found

    with mock.patch.object(Volume, "extents", autospec=True, side_effect=look_and_shrink):
        await pool.resize_volume(volume, 4 * MIB)
    assert volume.size == 4 * MIB
    assert await read(volume) == bytes(4 * MIB)


async def test_writes_at_the_end_of_a_shrinking_volume_are_kept_refused_or_make_it_busy(
    pool: Pool, volume: Volume, directory: Path, tmp_path: Path
) -> None:
    refused = 0

    async def writer(seed: int) -> None:
        nonlocal refused
        for number in range(60):
            try:
                await volume.write((seed * 251 + number * 37) % 2048 * BLOCK, b"x" * BLOCK)
            except StoreError:
                refused += 1
            await asyncio.sleep(0)

    async def resizer() -> None:
        for number in range(10):
            try:
                await pool.resize_volume(volume, (3 + number % 5) * MIB, force=True)
            except Busy:
                pass

    await asyncio.gather(*map(writer, range(8)), resizer())
    await assert_clean(killed(directory, tmp_path / "k"))


# -- growing the pool ----------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [64 * MIB, 64 * MIB + 5000, 65 * MIB, 128 * MIB, 1 << 40])
async def test_the_pool_grows(
    pool: Pool, volume: Volume, directory: Path, tmp_path: Path, capacity: int
) -> None:
    await volume.write(0, b"x" * MIB)
    await pool.grow(capacity)
    assert pool.status()["capacity"] == capacity // BLOCK * BLOCK
    async with opened(killed(directory, tmp_path / "k")) as again:
        assert again.status()["capacity"] == capacity // BLOCK * BLOCK
        await again.volumes["v"].write(MIB, b"y" * MIB)
    await assert_clean(tmp_path / "k")
    await volume.write(MIB, b"y" * MIB)
    await pool.checkpoint()


@pytest.mark.parametrize("capacity", [0, 64 * MIB - BLOCK, 1 << 62])
async def test_the_pool_does_not_shrink_nor_grow_without_bound(pool: Pool, capacity: int) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(exact_size(capacity))):
        await pool.grow(capacity)
    assert pool.status()["capacity"] == 64 * MIB


# -- callers that go away ------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13])
async def test_a_caller_that_goes_away_leaves_no_change_half_way(
    pool: Pool, volume: Volume, directory: Path, tmp_path: Path, turns: int
) -> None:
    await volume.write(0, b"x" * 100_000)
    changes = [
        pool.checkpoint(),
        pool.resize_volume(volume, 50_176, force=True),
        pool.create_volume("w", MIB),
        pool.grow(200 * MIB),
        pool.checkpoint(),
        pool.rename_volume(volume, "x"),
    ]
    for change in changes:
        await cancelled_after(turns, change)
        await volume.write(0, b"x" * BLOCK)
        await assert_clean(killed(directory, tmp_path / "k"))
        async with opened(tmp_path / "k") as again:
            (found,) = [v for v in again.volumes.values() if v.id == volume.id]
            assert await read(found, 0, 50_176) == b"x" * 50_176
    await pool.checkpoint()


@pytest.mark.parametrize("turns", range(1, 12, 2))
async def test_who_cancels_a_change_waits_until_it_is_made(pool: Pool, turns: int) -> None:
    volume = await pool.create_volume("v", MIB)
    changes = [
        pool.set_properties(volume, {"a": 1}),
        pool.resize_volume(volume, 2 * MIB),
        pool.rename_volume(volume, "w"),
    ]
    for change in changes:
        await cancelled_after(turns, change)
        assert not pool._administration._changes
    assert (volume.properties, volume.size, volume.name) == ({"a": 1}, 2 * MIB, "w")


async def test_closing_waits_for_what_a_cancelled_caller_takes_back(
    directory: Path,
) -> None:
    reached, passed = asyncio.Event(), asyncio.Event()
    change, run, under_way = Administration.change, Checkpointer.run, list[int]()

    async def held(*about: Any) -> None:
        reached.set()
        await passed.wait()
        await change(*about)

    pool = await Pool.open(directory)
    volume = await pool.create_volume("v", MIB)

    async def last_checkpoint(checkpointer: Checkpointer, *, last: bool) -> None:
        under_way.append(len(pool._administration._changes))
        await run(checkpointer, last=last)

    async def import_into_it() -> None:
        try:
            await pool.set_properties(volume, {"importing": False})
        except asyncio.CancelledError:
            await pool.delete_volume(volume)
            raise

    with mock.patch.object(Administration, "change", held):
        importing = asyncio.create_task(import_into_it())
        await reached.wait()
        importing.cancel()
        with mock.patch.object(Checkpointer, "run", autospec=True, side_effect=last_checkpoint):
            closing = asyncio.create_task(pool.close())
            await asyncio.sleep(0)
            passed.set()
            await closing
        assert importing.cancelled()
        assert under_way == [0]
    async with opened(directory) as again:
        assert "v" not in again.volumes
    await assert_clean(directory)


async def test_a_failed_write_to_the_superblock_fails_the_pool(directory: Path) -> None:
    broken = False

    def hook(operation: str, name: str) -> None:
        if broken and (operation, name) == ("write", "super"):
            raise WriteFailed("super: Input/output error while writing")

    with hooked(hook):
        async with opened(directory) as pool:
            volume = await pool.create_volume("v", MIB)
            await volume.write(0, b"x")
            await volume.flush()
            broken = True
            with pytest.raises(StoreError):
                await pool.checkpoint()
            assert pool.status()["state"] == "failed"
    async with opened(directory) as pool:
        assert await read(pool.volumes["v"], 0, 1) == b"x"
