"""Check and repair: every planted fault is found, and what can be mended is mended."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nbdstore.errors import Corruption, PoolFormatError, PoolLocked, StoreError
from nbdstore.store import Pool, Volume
from nbdstore.store.check import check_pool
from nbdstore.store.layout import pack_location
from tests.store.anatomy import Anatomy, Place
from tests.store.pools import (
    MIB,
    assert_clean,
    check,
    findings,
    killed,
    opened,
    read,
)
from tests.store.specimen import BLOCK, WIDE, contents, first_node, flip, flip_slot

# -- a good pool ---------------------------------------------------------------------------------


def test_the_format_is_read_alike_by_a_second_reader(original: Path) -> None:
    anatomy = Anatomy(original)
    report = check_pool(original)
    assert report.clean and not report.findings
    assert report.n_volumes == 2
    assert report.n_blocks == len(anatomy.of_kind("data")) == 257 + 4 * 3
    assert len(anatomy.of_kind("leaf")) == 2 + 4
    assert sorted(p.depth for p in anatomy.of_kind("node")) == [1, 1, 1, 1, 1, 2, 2, 3]
    slots = [place.slot for place in anatomy.places]
    assert len(slots) == len(set(slots))
    assert 0 not in slots


def test_checking_changes_nothing(original: Path, damaged: Path) -> None:
    check_pool(damaged)
    for name in ("super", "journal", "data"):
        assert (damaged / name).read_bytes() == (original / name).read_bytes()


def test_progress_is_told(original: Path) -> None:
    seen: list[tuple[int, int]] = []
    check_pool(original, progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (269, 269)
    assert seen == sorted(seen)


def test_a_report_is_plain_data(original: Path, damaged: Path) -> None:
    flip_slot(damaged, Anatomy(original).of_kind("data")[0])
    found = check_pool(damaged).to_json()
    assert found["clean"] is False
    assert found["findings"][0]["severity"] == "damage"


async def test_a_pool_that_is_being_served_is_not_checked(directory: Path, pool: Pool) -> None:
    with pytest.raises(PoolLocked):
        await check(directory)


def test_where_no_pool_is_nothing_is_checked(tmp_path: Path) -> None:
    with pytest.raises(PoolFormatError):
        check_pool(tmp_path)


# -- damaged blocks ------------------------------------------------------------------------------


async def test_every_damaged_data_block_is_found_and_costs_no_other(
    original: Path, before: dict[str, bytes], damaged: Path
) -> None:
    chosen = [p for p in Anatomy(original).of_kind("data") if p.number % 20 == 3]
    assert len(chosen) > 10
    for place in chosen:
        flip_slot(damaged, place)
    for repair in (False, True):
        report = await check(damaged, repair=repair)
        assert len(report.findings) == len(chosen)
        assert not report.clean
        for place, finding in zip(chosen, report.findings, strict=True):
            assert finding.severity == "damage"
            assert finding.where.startswith(f"volume {place.volume} at {place.number * BLOCK} ")
    async with opened(damaged) as pool:
        small = pool.volumes["small"]
        for number in range(0, 2 * MIB // BLOCK):
            if any((p.volume, p.number) == ("small", number) for p in chosen):
                with pytest.raises(Corruption):
                    await read(small, number * BLOCK, BLOCK)
            else:
                expected = before["small"][number * BLOCK :][:BLOCK]
                assert await read(small, number * BLOCK, BLOCK) == expected


@pytest.mark.parametrize("depth", range(4))
async def test_a_damaged_node_is_found_and_a_check_changes_nothing(
    original: Path, damaged: Path, depth: int
) -> None:
    flip_slot(damaged, first_node(original, depth))
    files = {name: (damaged / name).read_bytes() for name in ("super", "journal", "data")}
    report = await check(damaged)
    assert [f.severity for f in report.findings] == ["damage", "damage"]
    assert f"level {depth}" in report.findings[0].where or "leaf 0" in report.findings[0].where
    stop = min(MIB << 8 * depth, WIDE)
    assert report.findings[1].where == f"volume wide, bytes 0 to {stop}"
    assert not report.clean
    assert files == {name: (damaged / name).read_bytes() for name in files}


def of_catalogue(original: Path, kind: str, copy: int) -> Place:
    return next(p for p in Anatomy(original).of_kind(kind) if p.copy == copy)


@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize("kind", ["catalogue", "catalogue node"])
async def test_a_damaged_copy_of_the_catalogue_is_a_notice_and_rewritten(
    original: Path, before: dict[str, bytes], damaged: Path, kind: str, copy: int
) -> None:
    flip_slot(damaged, of_catalogue(original, kind, copy))
    for repair in (False, True):
        report = await check(damaged, repair=repair)
        assert f"catalogue, copy {copy}" in report.findings[0].where
        assert report.findings[0].severity == "notice"
    assert report.clean
    assert not (await check(damaged)).findings
    assert await contents(damaged) == before


@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize("kind", ["catalogue", "catalogue node"])
async def test_a_pool_opens_by_either_copy_of_the_catalogue_and_heals_the_other(
    original: Path, before: dict[str, bytes], damaged: Path, kind: str, copy: int
) -> None:
    flip_slot(damaged, of_catalogue(original, kind, copy))
    assert await contents(damaged) == before
    assert not (await check(damaged)).findings


@pytest.mark.parametrize("kind", ["catalogue", "catalogue node"])
async def test_two_damaged_copies_of_the_catalogue_are_damage_and_the_pool_refused(
    original: Path, damaged: Path, kind: str
) -> None:
    flip_slot(damaged, of_catalogue(original, kind, 0))
    flip_slot(damaged, of_catalogue(original, "catalogue", 1))
    for repair in (False, True):
        report = await check(damaged, repair=repair)
        assert not report.clean
        assert "catalogue, copy 0" in report.findings[0].where
    with pytest.raises(Corruption, match="catalogue"):
        await Pool.open(damaged)


@pytest.mark.parametrize("kind", ["free map", "free map node"])
async def test_a_damaged_free_map_is_found_and_rebuilt(
    original: Path, before: dict[str, bytes], damaged: Path, kind: str
) -> None:
    flip_slot(damaged, Anatomy(original).of_kind(kind)[0])
    report = await check(damaged)
    assert not report.clean
    assert "free map" in report.findings[0].where
    assert (await check(damaged, repair=True)).clean
    await assert_clean(damaged)
    assert await contents(damaged) == before
    await assert_clean(damaged)


# -- superblocks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [0, 1])
async def test_one_damaged_superblock_is_a_notice_and_rewritten(
    before: dict[str, bytes], damaged: Path, copy: int
) -> None:
    flip(damaged / "super", copy * 4096 + 77)
    report = await check(damaged)
    assert [f.severity for f in report.findings] == ["notice"]
    assert report.clean
    assert f"copy {copy}" in report.findings[0].where
    assert (await check(damaged, repair=True)).clean
    assert not (await check(damaged)).findings
    assert await contents(damaged) == before


@pytest.mark.parametrize("copy", [0, 1])
async def test_a_pool_opens_by_either_superblock_and_heals_the_other(
    before: dict[str, bytes], damaged: Path, copy: int
) -> None:
    flip(damaged / "super", copy * 4096 + 77)
    assert await contents(damaged) == before
    assert not (await check(damaged)).findings


async def test_two_damaged_superblocks_are_damage_and_the_pool_refused(damaged: Path) -> None:
    flip(damaged / "super", 77)
    flip(damaged / "super", 4096 + 77)
    for repair in (False, True):
        report = await check(damaged, repair=repair)
        assert not report.clean
        assert [f.severity for f in report.findings] == ["damage"]
    with pytest.raises(Corruption, match="super"):
        await Pool.open(damaged)


# -- the journal ---------------------------------------------------------------------------------


@pytest.fixture
async def crashed(directory: Path, tmp_path: Path) -> Path:
    """A pool whose journal holds ten flushed writes; later records say that they are durable."""
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        await pool.checkpoint()
        for number in range(10):
            await volume.write(number * BLOCK, bytes([number + 1]) * BLOCK)
            await volume.flush()
        await volume.write(10 * BLOCK, b"unsynced")
        return killed(directory, tmp_path / "crashed")


def record_offsets(directory: Path) -> list[int]:
    raw = (directory / "journal").read_bytes()
    return [at for at in range(0, len(raw), 64) if raw[at : at + 8] == b"NBDSJRNL"]


async def test_a_damaged_record_that_was_durable_is_never_taken_for_the_end(crashed: Path) -> None:
    offsets = record_offsets(crashed)
    flip(crashed / "journal", offsets[-12] + 100)
    with pytest.raises(Corruption, match="journal"):
        await Pool.open(crashed)
    report = await check(crashed)
    assert [f.severity for f in report.findings] == ["damage"]
    assert "journal" in report.findings[0].where


async def test_repair_goes_on_with_what_comes_before_the_damage(crashed: Path) -> None:
    offsets = record_offsets(crashed)
    flip(crashed / "journal", offsets[-12] + 100)
    report = await check(crashed, repair=True)
    assert report.clean
    assert report.findings[0].repaired
    await assert_clean(crashed)
    async with opened(crashed) as pool:
        found = await read(pool.volumes["v"], 0, 11 * BLOCK)
    n_left = len(found.rstrip(b"\0")) // BLOCK
    assert 0 < n_left < 10
    assert found == b"".join(bytes([n + 1]) * BLOCK for n in range(n_left)).ljust(11 * BLOCK, b"\0")
    await assert_clean(crashed)


async def test_a_crash_alone_is_nothing_to_find(crashed: Path) -> None:
    assert not (await check(crashed)).findings
    assert not (await check(crashed, repair=True)).findings


# -- truncated files -----------------------------------------------------------------------------

LENGTHS = ["empty", "one byte", "half", "all but one byte"]


def truncate(path: Path, length: str) -> None:
    size = path.stat().st_size
    wanted = {"empty": 0, "one byte": 1, "half": size // 2, "all but one byte": size - 1}[length]
    with path.open("r+b") as file:
        file.truncate(wanted)


@pytest.mark.parametrize("length", LENGTHS)
async def test_a_truncated_journal_is_found_and_the_pool_refused(
    damaged: Path, length: str
) -> None:
    truncate(damaged / "journal", length)
    report = await check(damaged)
    assert not report.clean
    assert "journal" in report.findings[0].where
    with pytest.raises(Corruption, match="journal"):
        await Pool.open(damaged)


@pytest.mark.parametrize("length", LENGTHS)
async def test_a_truncated_data_file_is_found_and_never_read_as_zeros(
    before: dict[str, bytes], damaged: Path, length: str
) -> None:
    truncate(damaged / "data", length)
    assert not (await check(damaged)).clean
    try:
        async with opened(damaged) as pool:
            small = pool.volumes["small"]
            for at in range(0, small.size, BLOCK):
                try:
                    assert await read(small, at, BLOCK) == before["small"][at : at + BLOCK]
                except Corruption:
                    pass
    except Corruption:
        pass


@pytest.mark.parametrize("length", LENGTHS)
async def test_a_truncated_superblock_file_is_found(damaged: Path, length: str) -> None:
    truncate(damaged / "super", length)
    report = await check(damaged)
    assert report.findings
    if length in ("empty", "one byte"):
        assert not report.clean
        with pytest.raises(Corruption, match="super"):
            await Pool.open(damaged)
    else:  # one copy is left
        async with opened(damaged):
            pass
        assert not (await check(damaged)).findings


@pytest.mark.parametrize("name", ["journal", "data"])
async def test_a_missing_file_is_an_error_that_names_it(damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    with pytest.raises(StoreError, match=name):
        await check(damaged)
    with pytest.raises(StoreError, match=name):
        await Pool.open(damaged)
    assert not (damaged / name).exists()


# -- what only a bug can have done ---------------------------------------------------------------


async def planted(directory: Path, plant: Callable[[Pool, Volume], None]) -> None:
    """Let a pool close with a fault in its memory, its checksums all right."""
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", 4 * MIB)
        await volume.write(0, random.Random(1).randbytes(10 * BLOCK))
        await volume.flush()
        await pool._committer.settle()
        plant(pool, volume)


def leak(pool: Pool, _volume: Volume) -> None:
    taken = pool._core.slots.allocate(7, 0)
    assert taken is not None


def lose(pool: Pool, volume: Volume) -> None:
    slots = volume.map.entries[3:6, 0].astype(np.int64) & ((1 << 40) - 1)
    pool._core.slots.give_back(slots)


def count_too_much(_pool: Pool, volume: Volume) -> None:
    volume.info.n_mapped += 5


def promise_too_much(pool: Pool, volume: Volume) -> None:
    volume.info.n_provisioned += 5
    pool._core.slots.n_set_aside += 5


INCONSISTENCIES = {
    leak: "expected free, found in use",
    lose: "expected in use, found free",
    count_too_much: "expected 10 blocks mapped, 10 of its own, 0 provisioned, found 15, 10 and 0",
    promise_too_much: "expected 10 blocks mapped, 10 of its own, 0 provisioned, found 10, 10 and 5",
}


@pytest.mark.parametrize("plant", INCONSISTENCIES)
async def test_wrong_counts_are_found_and_mended(
    directory: Path, plant: Callable[[Pool, Volume], None]
) -> None:
    await planted(directory, plant)
    for repair in (False, True):
        report = await check(directory, repair=repair)
        assert [f.severity for f in report.findings] == ["inconsistency"]
        assert INCONSISTENCIES[plant] in str(report.findings[0])
        assert report.clean is repair
    await assert_clean(directory)
    async with opened(directory) as pool:
        volume = pool.volumes["v"]
        assert await read(volume, 0, 10 * BLOCK) == random.Random(1).randbytes(10 * BLOCK)
        assert volume.status()["mapped"] == 10 * BLOCK
        assert volume.status()["reserved"] == 0
        await volume.trim(0, volume.size)
    await assert_clean(directory)


def entry_of(volume: Volume, block: int) -> np.ndarray:
    return volume.map.entries[block].copy()


def link_twice(_pool: Pool, volume: Volume) -> None:
    volume.map.make_writable(np.array([100]))
    volume.map.entries[100] = entry_of(volume, 3)
    volume.info.n_mapped += 1


def link_from_another_leaf(_pool: Pool, volume: Volume) -> None:
    volume.map.make_writable(np.array([600]))
    volume.map.entries[600] = entry_of(volume, 3)
    volume.info.n_mapped += 1


def link_beyond_the_pool(_pool: Pool, volume: Volume) -> None:
    volume.map.make_writable(np.array([100]))
    volume.map.entries[100] = (pack_location(1 << 30, 1), 1)
    volume.info.n_mapped += 1


@pytest.mark.parametrize("plant", [link_twice, link_from_another_leaf, link_beyond_the_pool])
async def test_wrong_pointers_are_damage_that_stays(
    directory: Path, plant: Callable[[Pool, Volume], None]
) -> None:
    await planted(directory, plant)
    for repair in (False, True):
        report = await check(directory, repair=repair)
        assert "damage" in [f.severity for f in report.findings]
        assert any("volume v" in f.where for f in report.findings)
        assert not report.clean


async def test_a_slot_that_two_volumes_use_is_damage(directory: Path) -> None:
    def plant(pool: Pool, volume: Volume) -> None:
        other = pool.volumes["other"]
        other.map.make_writable(np.array([0]))
        other.map.entries[0] = entry_of(volume, 3)
        other.info.n_mapped += 1

    async with opened(directory) as pool:
        await pool.create_volume("other", MIB)
    await planted(directory, plant)
    assert "more than one" in str(findings(await check(directory)))


async def test_very_many_findings_are_counted_but_not_all_kept(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", 48 * MIB)
        for at in range(0, volume.size, 4 * MIB):
            await volume.write(at, random.Random(1).randbytes(4 * MIB))
    with (directory / "data").open("r+b") as file:
        for place in Anatomy(directory).of_kind("data"):
            file.seek(place.slot * BLOCK)
            file.write(b"damage")
    report = await check(directory)
    assert len(report.findings) == 10_000
    assert report.n_findings_left_out == 12 * 1024 - 10_000
