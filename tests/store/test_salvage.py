"""Salvage: all that is intact comes out of a damaged pool, and nothing is written to it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdstore.errors import Corruption, NotFound, PoolLocked, ReadFailed, WriteFailed
from nbdstore.store import Pool
from nbdstore.store.salvage import Intact, Lost, SalvagedPool
from tests.store.anatomy import Anatomy
from tests.store.crashes import LAZY
from tests.store.pools import FILES, MIB, check, hooked, killed, opened, read
from tests.store.power_loss import new_pool
from tests.store.scene import Scene
from tests.store.simulated_disk import PLACE, SimulatedDisk
from tests.store.specimen import BLOCK, PLACES, WIDE, first_node, flip, flip_slot

SMALL = 2 * MIB


@contextmanager
def salvaged(directory: Path) -> Iterator[SalvagedPool]:
    """A pool open for salvage; its files are the same afterwards."""
    files = {name: (directory / name).read_bytes() for name in FILES}
    pool = SalvagedPool(directory)
    try:
        yield pool
    finally:
        pool.close()
    assert files == {name: (directory / name).read_bytes() for name in FILES}


def copied(pool: SalvagedPool, name: str, start: int, stop: int) -> tuple[bytes, list[Lost]]:
    """What is salvaged of bytes `[start, stop)` of a volume, and all that is lost of it."""
    found, lost, end = bytearray(stop - start), [], 0
    for part in pool.contents(pool.volumes[name]):
        if isinstance(part, Intact):
            offset, data = part.offset, bytes(part.data)
            at, until = max(offset, start), min(offset + len(data), stop)
            if at < until:
                found[at - start : until - start] = data[at - offset : until - offset]
            first, last = offset, offset + len(data)
        else:
            lost.append(part)
            first, last = part.start, part.stop
        assert end <= first < last, "what is salvaged comes in ascending order"
        end = last
    return bytes(found), lost


def test_an_intact_pool_comes_out_whole(original: Path, before: dict[str, bytes]) -> None:
    with salvaged(original) as pool:
        assert sorted(pool.volumes) == ["small", "wide"]
        assert copied(pool, "small", 0, SMALL) == (before["small"], [])
        for index, at in enumerate(PLACES):
            expected = before["wide"][index * 12_288 :][:12_288]
            assert copied(pool, "wide", at, at + 12_288) == (expected, [])
        assert not pool.faults and not pool.journal_damaged and not pool.dropped


@pytest.mark.parametrize("depth", range(4))
def test_what_is_not_below_a_damaged_node_comes_out(
    original: Path, before: dict[str, bytes], damaged: Path, depth: int
) -> None:
    flip_slot(damaged, first_node(original, depth))
    stop = min(MIB << 8 * depth, WIDE)
    with salvaged(damaged) as pool:
        assert copied(pool, "small", 0, SMALL) == (before["small"], [])
        for index, at in enumerate(PLACES):
            found, lost = copied(pool, "wide", at, at + 12_288)
            assert [(part.start, part.stop) for part in lost] == [(0, stop)]
            expected = before["wide"][index * 12_288 :][:12_288]
            assert found == (bytes(12_288) if at < stop else expected)
        (fault,) = pool.faults
        assert f"level {depth}" in fault or "leaf 0" in fault
        assert {part.reason for part in lost} == (
            {"below a damaged node of its map"} if depth else {fault}
        )


def test_damaged_blocks_are_lost_one_by_one_with_the_reason(
    original: Path, before: dict[str, bytes], damaged: Path
) -> None:
    blocks = {p.number: p for p in Anatomy(original).of_kind("data") if p.volume == "small"}
    for number in (0, 7, 8, 100, 256):
        flip_slot(damaged, blocks[number])
    expected = bytearray(before["small"])
    for number in (0, 7, 8, 100, 256):
        expected[number * BLOCK : (number + 1) * BLOCK] = bytes(BLOCK)
    with salvaged(damaged) as pool:
        found, lost = copied(pool, "small", 0, SMALL)
    assert found == expected
    ranges = [(part.start // BLOCK, part.stop // BLOCK) for part in lost]
    assert ranges == [(0, 1), (7, 9), (100, 101), (256, 257)]
    assert all("expected checksum" in part.reason for part in lost)


def test_blocks_that_the_disk_cannot_read_are_lost_and_no_others(
    original: Path, before: dict[str, bytes]
) -> None:
    with salvaged(original) as pool:
        unreadable = pool.volumes["small"]
        real = pool._core.data.pread

        def pread(length: int, offset: int) -> bytes:
            if offset <= bad < offset + length:
                raise ReadFailed(f"data: Input/output error while reading at byte {offset}")
            return real(length, offset)

        (place,) = [
            p
            for p in Anatomy(original).of_kind("data")
            if (p.volume, p.number) == (unreadable.name, 42)
        ]
        bad = place.slot * BLOCK
        pool._core.data.pread = pool._core.data.pread_direct = pread  # type: ignore[method-assign]
        found, (lost,) = copied(pool, "small", 0, SMALL)
    assert (lost.start, lost.stop) == (42 * BLOCK, 43 * BLOCK)
    assert "Input/output error" in lost.reason
    assert found[: 42 * BLOCK] == before["small"][: 42 * BLOCK]
    assert found[43 * BLOCK :] == before["small"][43 * BLOCK :]


@pytest.mark.parametrize("kind", ["free map", "free map node", "catalogue", "super"])
def test_what_salvage_does_not_need_may_be_damaged(
    original: Path, before: dict[str, bytes], damaged: Path, kind: str
) -> None:
    if kind == "super":
        flip(damaged / "super", 99)
    else:
        flip_slot(damaged, Anatomy(original).of_kind(kind)[0])
    with salvaged(damaged) as pool:
        assert copied(pool, "small", 0, SMALL) == (before["small"], [])


@pytest.mark.parametrize("kind", ["catalogue", "super"])
def test_without_a_superblock_or_a_catalogue_nothing_can_be_salvaged(
    original: Path, damaged: Path, kind: str
) -> None:
    if kind == "super":
        flip(damaged / "super", 99)
        flip(damaged / "super", BLOCK + 99)
    else:
        for place in Anatomy(original).of_kind(kind):
            flip_slot(damaged, place)
    with pytest.raises(Corruption, match=f"{kind}.*nothing else says"):
        SalvagedPool(damaged)


async def test_a_damaged_journal_leaves_the_volumes_as_they_were_before_it(
    directory: Path, tmp_path: Path
) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, b"1" * BLOCK)
        await pool.checkpoint()
        await volume.write(0, b"2" * BLOCK)
        await volume.flush()
        at = pool._core.journal.head
        await volume.write(0, b"3" * BLOCK)
        await volume.flush()
        crashed = killed(directory, tmp_path / "crashed")
    flip(crashed / "journal", at % MIB + 8)
    while (crashed / "journal").read_bytes()[at : at + 8] != b"NBDSJRNL":
        at += 64
    flip(crashed / "journal", at + 70)
    with pytest.raises(Corruption):
        await Pool.open(crashed)
    with salvaged(crashed) as found:
        assert found.journal_damaged
        assert copied(found, "v", 0, BLOCK)[0] in (b"1" * BLOCK, b"2" * BLOCK)


@pytest.mark.parametrize("length", [0, 5000])
def test_a_closed_pool_is_salvaged_without_its_journal(
    damaged: Path, before: dict[str, bytes], length: int
) -> None:
    with (damaged / "journal").open("r+b") as file:
        file.truncate(length)
    with salvaged(damaged) as pool:
        assert copied(pool, "small", 0, SMALL) == (before["small"], [])


def test_what_only_the_journal_holds_is_salvaged() -> None:
    scene = Scene()
    content = random.Random(1).randbytes(3 * BLOCK + 100)

    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", MIB)
        await volume.write(BLOCK, content)
        await volume.flush()

    scene.play(act)
    disk = SimulatedDisk(scene.crashed(LAZY))  # of `data` nothing was synced

    async def look() -> None:
        pool = SalvagedPool(PLACE, host=disk.host)
        assert copied(pool, "v", BLOCK, BLOCK + len(content)) == (content, [])
        assert await read(pool.volumes["v"], BLOCK, len(content)) == content
        pool.close()

    asyncio.run(look())
    assert disk.images == SimulatedDisk(scene.crashed(LAZY)).images


async def test_an_export_reads_what_is_intact_and_fails_where_it_is_not(
    original: Path, before: dict[str, bytes], damaged: Path
) -> None:
    flip_slot(damaged, first_node(original, 0))
    with salvaged(damaged) as pool:
        wide = pool.volumes["wide"]
        with pytest.raises(Corruption):
            await read(wide, 0, BLOCK)
        (extent,) = await wide.extents(0, MIB, max_extents=1)
        assert extent.kind.name == "DATA"
        assert await read(wide, PLACES[1], 12_288) == before["wide"][12_288:24_576]
        assert await read(pool.volumes["small"]) == before["small"]
        await wide.flush()
        with pytest.raises(WriteFailed):
            await wide.write(PLACES[1], b"x" * BLOCK)


async def test_ranges_that_a_repair_gave_up_are_lost(original: Path, damaged: Path) -> None:
    flip_slot(damaged, first_node(original, 0))
    await check(damaged, repair=True)
    with salvaged(damaged) as pool:
        _, lost = copied(pool, "wide", 0, BLOCK)
    assert lost == [Lost(0, MIB, "the way to it was damaged")]


def test_volumes_are_chosen_by_name(original: Path) -> None:
    with salvaged(original) as pool:
        with pytest.raises(NotFound, match="'none'"):
            pool.choose(["small", "none"])
        pool.choose(["small"])
        assert list(pool.volumes) == ["small"]


async def test_volumes_in_the_trash_come_out_with_their_snapshots(directory: Path) -> None:
    """Each by its id: there may be several of one name, and a new volume that has it."""
    ids = []
    async with opened(directory) as pool:
        for number in range(3):
            volume = await pool.create_volume("v", MIB)
            await volume.write(BLOCK, bytes([number + 1]) * BLOCK)
            await pool.create_snapshots([(volume, "s")])
            if number < 2:
                ids.append(volume.id)
                await pool.trash_volume(volume)
    with salvaged(directory) as found:
        names = ["v", *(f"v~{number}" for number in ids)]
        assert sorted(found.volumes) == sorted(names)
        assert sorted(found.images) == sorted([*names, *(f"{name}@s" for name in names)])
        for byte, name in zip((3, 1, 2), names, strict=True):
            for image in (found.images[name], found.images[f"{name}@s"]):
                assert await read(image, 0, 2 * BLOCK) == bytes(BLOCK) + bytes([byte]) * BLOCK
        found.choose([names[1]])
        assert list(found.volumes) == list(found.images) == [names[1]]


async def test_a_pool_that_is_being_served_is_refused(directory: Path, pool: Pool) -> None:
    with pytest.raises(PoolLocked):
        SalvagedPool(directory)


async def test_salvage_shares_a_pool_with_salvage_but_with_nobody_who_writes(
    directory: Path,
) -> None:
    one, two = SalvagedPool(directory), SalvagedPool(directory)
    with pytest.raises(PoolLocked):
        await Pool.open(directory)
    one.close()
    with pytest.raises(PoolLocked):
        await Pool.open(directory)
    two.close()
    async with opened(directory):
        pass


def test_a_directory_in_which_nobody_may_write_is_enough(damaged: Path) -> None:
    (damaged / "lock").unlink()
    with hooked(lambda operation, _name: None if operation != "write" else pytest.fail("wrote")):
        pool = SalvagedPool(damaged)
    pool.close()
    assert sorted(path.name for path in damaged.iterdir()) == sorted(FILES)


async def test_new_pools_are_empty_and_nothing_is_lost() -> None:
    pool = SalvagedPool(PLACE, host=SimulatedDisk(new_pool(BLOCK, 24 * MIB)).host)
    assert pool.volumes == {} and pool.faults == {}
    pool.close()
