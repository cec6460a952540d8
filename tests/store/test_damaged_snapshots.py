"""Damage to the trees of snapshots: told with its place, and costing no more than it must."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdstore.errors import Corruption
from nbdstore.store.image import Image
from nbdstore.store.salvage import Intact, Lost, SalvagedPool
from tests.store.anatomy import Anatomy
from tests.store.pools import MIB, assert_clean, check, findings, make_pool, opened, read
from tests.store.specimen import flip
from tests.store.test_snapshots import read_image, snap

BLOCK = 4096
PLACES = [0, 5 * MIB]
"""Where data is: two leaves below one node."""


@pytest.fixture
async def directory(tmp_path: Path) -> Path:
    """Two snapshots; of the second, the volume has changed the first leaf since."""
    path = make_pool(tmp_path / "pool")
    async with opened(path) as pool:
        volume = await pool.create_volume("v", 16 * MIB)
        for number, at in enumerate(PLACES):
            await volume.write(at, bytes([number + 1]) * 4 * BLOCK)
        await snap(pool, volume, "a")
        await volume.write(BLOCK, b"b" * BLOCK)
        await snap(pool, volume, "b")
        await volume.write(2 * BLOCK, b"v" * BLOCK)
    return path


def damage_leaf(directory: Path, image: str) -> None:
    """Damage the first leaf of an image."""
    places = Anatomy(directory).places
    (place,) = [p for p in places if (p.kind, p.volume, p.number) == ("leaf", image, 0)]
    flip(directory / "data", place.slot * BLOCK + 1234)


async def test_reading_below_a_damaged_leaf_is_an_error_that_names_the_snapshot(
    directory: Path,
) -> None:
    damage_leaf(directory, "v@a")
    async with opened(directory) as pool:
        with pytest.raises(Corruption, match=r"map of v@a, leaf 0 .*slot"):
            await pool.snapshots["v@a"].read(0, BLOCK)
        assert await read(pool.snapshots["v@a"], PLACES[1], BLOCK) == b"\2" * BLOCK
        for name in ("v@b", "v"):
            image: Image = {**pool.volumes, **pool.snapshots}[name]
            assert await read(image, BLOCK, BLOCK) == b"b" * BLOCK


async def test_a_snapshot_whose_content_cannot_be_told_is_not_deleted(directory: Path) -> None:
    damage_leaf(directory, "v@a")
    async with opened(directory) as pool:
        before = await read_image(pool.snapshots["v@b"])
        with pytest.raises(Corruption, match="v@a"):
            await pool.delete_snapshot(pool.snapshots["v@a"])
        assert list(pool.snapshots) == ["v@a", "v@b"]
        await pool.volumes["v"].write(0, b"x" * 3 * BLOCK)
        await pool.checkpoint()
        assert await read_image(pool.snapshots["v@b"]) == before
    found = (await check(directory)).findings
    assert [f.where.partition(" (")[0] for f in found if f.severity == "damage"] == [
        "map of v@a, leaf 0",
        "snapshot v@a, bytes 0 to 1048576",
    ]


async def test_repair_gives_up_what_was_below_and_the_rest_goes_on(directory: Path) -> None:
    damage_leaf(directory, "v@a")
    async with opened(directory) as pool:
        expected = {name: await read_image(pool.snapshots[name]) for name in ("v@b",)}
        expected["v"] = await read(pool.volumes["v"])
    report = await check(directory, repair=True)
    assert [f.repaired for f in report.findings] == [True, False]
    left = [str(report.findings[1])]
    assert findings(await check(directory)) == left
    async with opened(directory) as pool:
        with pytest.raises(Corruption, match="the way to it was damaged"):
            await pool.snapshots["v@a"].read(0, BLOCK)
        assert await read(pool.snapshots["v@a"], PLACES[1], BLOCK) == b"\2" * BLOCK
        assert await read_image(pool.snapshots["v@b"]) == expected["v@b"]
        assert await read(pool.volumes["v"]) == expected["v"]
        await pool.volumes["v"].write(3 * BLOCK, b"x" * BLOCK)
    assert findings(await check(directory)) == left
    async with opened(directory) as pool:
        await pool.delete_snapshot(pool.snapshots["v@a"])
        assert await read_image(pool.snapshots["v@b"]) == expected["v@b"]
    # What was shared with the lost part is its heir's now, and was not counted.
    again = await check(directory, repair=True)
    assert {f.severity for f in again.findings} <= {"inconsistency"}
    await assert_clean(directory)


async def test_what_was_shared_with_a_damaged_leaf_is_verified_all_the_same(
    directory: Path,
) -> None:
    """Each block is read for the one whose own it is: here that one has lost the way to it."""
    places = Anatomy(directory).places
    (block,) = [p for p in places if (p.kind, p.volume, p.number) == ("data", "v", 3)]
    damage_leaf(directory, "v@a")
    flip(directory / "data", block.slot * BLOCK + 99)
    found = [f.where for f in (await check(directory)).findings if f.severity == "damage"]
    assert any(f"(slot {block.slot}," in where for where in found), found


@pytest.mark.parametrize("name", ["v@a", "v@b", "v"])
async def test_salvage_brings_snapshots_back(directory: Path, name: str) -> None:
    async with opened(directory) as pool:
        images: dict[str, Image] = {**pool.volumes, **pool.snapshots}
        expected = {found: await read_image(image) for found, image in images.items()}
    damage_leaf(directory, "v@a")
    pool_of_old = SalvagedPool(directory)
    pool_of_old.choose([name])
    assert list(pool_of_old.images) == [name]
    content, lost = bytearray(16 * MIB), list[Lost]()
    for part in pool_of_old.contents(pool_of_old.images[name]):
        if isinstance(part, Intact):
            content[part.offset : part.offset + len(part.data)] = part.data
        else:
            lost.append(part)
    pool_of_old.close()
    if name == "v@a":
        assert [(part.start, part.stop) for part in lost] == [(0, MIB)]
        assert "map of v@a, leaf 0" in lost[0].reason
        assert content[MIB:] == expected[name][MIB:]
    else:
        assert not lost and content == expected[name]
