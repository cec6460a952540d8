"""Repair of damaged maps: all that is not below the damage comes back."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdstore.errors import Corruption, PoolFailed
from nbdstore.store import Pool
from nbdstore.store.check import check_pool
from nbdstore.store.extents import ExtentKind
from tests.store.crashes import Crash, crash_images
from tests.store.pools import (
    MIB,
    assert_clean,
    check,
    findings,
    killed,
    opened,
    read,
    until,
)
from tests.store.simulated_disk import PLACE, SimulatedDisk
from tests.store.specimen import BLOCK, GIB, PLACES, WIDE, first_node, flip_slot
from tests.store.subjects import damaged as damaged_copy
from tests.store.subjects import open_and_look, subjects


def below(depth: int) -> list[int]:
    """Which of the PLACES of "wide" lie below its first node of `depth`; 0 is a leaf."""
    reach = MIB << 8 * depth
    return [index for index, at in enumerate(PLACES) if at < reach]


@pytest.mark.parametrize("depth", range(4))
async def test_repair_brings_back_all_that_is_not_below_a_damaged_node(
    original: Path, before: dict[str, bytes], damaged: Path, depth: int
) -> None:
    flip_slot(damaged, first_node(original, depth))
    if depth:
        with pytest.raises(Corruption, match="wide"):
            await Pool.open(damaged)
    report = await check(damaged, repair=True)
    assert [f.repaired for f in report.findings] == [True, False]
    for _ in range(2):
        async with opened(damaged) as pool:
            assert await read(pool.volumes["small"]) == before["small"]
            for index, at in enumerate(PLACES):
                if index in below(depth):
                    with pytest.raises(Corruption, match="the way to it was damaged"):
                        await read(pool.volumes["wide"], at, 10)
                else:
                    expected = before["wide"][index * 12_288 :][:12_288]
                    assert await read(pool.volumes["wide"], at, 12_288) == expected
        assert findings(await check(damaged)) == [str(report.findings[1])]


@pytest.mark.parametrize("depth", range(4))
async def test_what_is_lost_is_an_error_until_it_is_written_or_trimmed(
    original: Path, damaged: Path, depth: int
) -> None:
    flip_slot(damaged, first_node(original, depth))
    await check(damaged, repair=True)
    async with opened(damaged) as pool:
        wide = pool.volumes["wide"]
        (extent,) = await wide.extents(0, MIB, max_extents=2)
        assert extent.kind is ExtentKind.DATA  # so that whoever copies it meets the error
        with pytest.raises(Corruption):
            await wide.write(100, b"a part of a block")
        for block in range(3):
            await wide.write(block * BLOCK, b"w" * BLOCK)
        await wide.trim(4 * BLOCK, 2 * BLOCK)
        await wide.write_zeroes(6 * BLOCK, BLOCK, no_hole=True)
    async with opened(damaged) as pool:
        wide = pool.volumes["wide"]
        assert await read(wide, 0, 3 * BLOCK) == b"w" * 3 * BLOCK
        assert await read(wide, 4 * BLOCK, 3 * BLOCK) == bytes(3 * BLOCK)
        for block in (3, 7):
            with pytest.raises(Corruption):
                await read(wide, block * BLOCK, BLOCK)
        assert wide.status()["reserved"] == 4 * MIB * (depth < 2) + BLOCK
    stop = min(MIB << 8 * depth, WIDE)
    assert [f.where for f in (await check(damaged)).findings] == [
        f"volume wide, bytes {3 * BLOCK} to {4 * BLOCK}",
        f"volume wide, bytes {7 * BLOCK} to {stop}",
    ]
    if depth < 2:
        async with opened(damaged) as pool:
            await pool.volumes["wide"].trim(0, 400 * MIB)
        await assert_clean(damaged)


@pytest.mark.parametrize("depth", range(4))
async def test_a_volume_with_lost_parts_can_be_deleted_and_leaks_nothing(
    original: Path, damaged: Path, depth: int
) -> None:
    flip_slot(damaged, first_node(original, depth))
    await check(damaged, repair=True)
    async with opened(damaged) as pool:
        await pool.delete_volume(pool.volumes["wide"])
        await pool.delete_volume(pool.volumes["small"])
        await until(lambda: not pool._registry.by_id)
    await assert_clean(damaged)
    async with opened(damaged) as pool:
        assert pool.status()["used"] < 10 * BLOCK


@pytest.mark.parametrize("size", [MIB, 100 * MIB, 300 * GIB])
async def test_a_volume_that_is_lost_as_a_whole_can_be_resized(
    original: Path, damaged: Path, size: int
) -> None:
    flip_slot(damaged, first_node(original, 3))
    await check(damaged, repair=True)
    async with opened(damaged) as pool:
        await pool.resize_volume(pool.volumes["wide"], size, force=True)
    async with opened(damaged) as pool:
        wide = pool.volumes["wide"]
        with pytest.raises(Corruption):
            await read(wide, 0, 10)
        await wide.write_zeroes(0, size)
        assert await read(wide, size - 10, 10) == bytes(10)
    await assert_clean(damaged)


@pytest.mark.parametrize("depth", range(4))
async def test_writes_that_only_the_journal_has_survive_the_repair_of_a_node_above_them(
    original: Path, damaged: Path, tmp_path: Path, depth: int
) -> None:
    async with opened(damaged) as pool:
        wide = pool.volumes["wide"]
        await wide.write(BLOCK, b"j" * 2 * BLOCK)
        await wide.trim(300 * MIB, MIB)
        await wide.flush()
        crashed = killed(damaged, tmp_path / "crashed")
    flip_slot(crashed, first_node(original, depth))
    with pytest.raises(Corruption, match="wide"):
        await Pool.open(crashed)
    await check(crashed, repair=True)
    async with opened(crashed) as pool:
        wide = pool.volumes["wide"]
        assert await read(wide, BLOCK, 2 * BLOCK) == b"j" * 2 * BLOCK
        assert await read(wide, 300 * MIB, MIB) == bytes(MIB)
        for block in (0, 3):
            with pytest.raises(Corruption):
                await read(wide, block * BLOCK, BLOCK)


async def test_a_node_damaged_under_a_checkpoint_stops_the_pool_and_loses_no_flushed_write(
    original: Path, damaged: Path
) -> None:
    node = first_node(original, 1)
    pool = await Pool.open(damaged)
    flip_slot(damaged, node)  # it was verified when the pool was opened, and forgotten since
    volume = pool.volumes["wide"]
    await volume.write(100 * MIB, b"n" * BLOCK)  # a leaf of which the map knows that it is a hole
    await volume.flush()
    with pytest.raises(PoolFailed, match="level 1, node 0"):
        await pool.checkpoint()
    await pool.close()
    await check(damaged, repair=True)
    async with opened(damaged) as pool:
        assert await read(pool.volumes["wide"], 100 * MIB, BLOCK) == b"n" * BLOCK
        with pytest.raises(Corruption):
            await read(pool.volumes["wide"], 0, BLOCK)
        assert len(await read(pool.volumes["wide"], 300 * MIB, BLOCK)) == BLOCK


@pytest.mark.parametrize("name", ["node", "journal payload"])
def test_a_crash_during_repair_leaves_a_pool_that_repair_brings_back_all_the_same(
    name: str,
) -> None:
    subject = subjects()["killed"]
    images = damaged_copy(subject)
    regions = [r for r in subject.regions if r.kind == name]
    region = regions[len(regions) // 2]
    images[region.file][region.start + 20] ^= 1
    disk = SimulatedDisk(images)
    check_pool(PLACE, host=disk.host, repair=True)
    expected = open_and_look(SimulatedDisk(disk.images))
    n_events = len(disk.events)
    assert n_events > 10
    for moment in range(n_events + 1):
        rng = random.Random(moment)
        again = SimulatedDisk(crash_images(disk, moment, Crash.random(rng), rng))
        check_pool(PLACE, host=again.host, repair=True)
        assert open_and_look(again) == expected
