"""Where the space is: the numbers add up, against a count of what a check finds in all trees."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from nbdstore.control import space
from nbdstore.store import Pool
from tests.control.backup_pools import BLOCK, site
from tests.control.sums import add_up, count
from tests.store.pools import MIB, killed, make_pool, opened
from tests.store.test_snapshots import Model


async def settled(pool: Pool) -> None:
    """Return with all freed space reusable and the trees on disk as in memory."""
    await pool.checkpoint()
    await pool._committer.settle()


@pytest.mark.parametrize("seed", range(6))
async def test_the_numbers_add_up_to_what_a_walk_finds(seed: int, tmp_path: Path) -> None:
    directory = make_pool(tmp_path / "pool")
    model = Model(seed, directory)
    for life in range(3):
        async with opened(directory) as pool:
            for _ in range(30):
                await model.step(pool)
                add_up(await space.report(pool), BLOCK)
            for volume in [*pool.volumes.values()][:1]:
                await pool.trash_volume(volume)
                model.held = {
                    name: held
                    for name, held in model.held.items()
                    if name.partition("@")[0] != volume.name
                }
            await settled(pool)
            report = await space.report(pool)
            add_up(report, BLOCK)
            copy = killed(directory, tmp_path / f"copy{life}")
        assert (report.data, report.used) == await asyncio.to_thread(count, copy)
        shutil.rmtree(copy)
    assert any(image.state == "trash" for image in report.images)


async def test_each_image_has_what_it_should(tmp_path: Path) -> None:
    async with site(tmp_path / "pool") as here:
        volume = await here.pool.create_volume("db", 8 * MIB)
        await volume.write(0, b"1" * 10 * BLOCK)
        await here.snapshot("db@a")
        await volume.write(0, b"2" * 3 * BLOCK)
        await here.operations.clone("db@a", "copy")
        await here.pool.volumes["copy"].write(5 * BLOCK, b"3" * 2 * BLOCK)
        await volume.write_zeroes(MIB, 4 * BLOCK, no_hole=True)
        report = await here.operations.space()
        add_up(report, BLOCK)
        found = {
            image.name: tuple(
                n // BLOCK
                for n in (image.mapped, image.own, image.shared, image.unique or 0, image.reserved)
            )
            for image in report.images
        }
        assert found == {
            "db": (10, 3, 7, 0, 4),
            "db@a": (10, 10, 0, 0, 0),
            "copy": (10, 2, 8, 0, 0),
        }
        assert [image.name for image in report.images] == ["copy", "db", "db@a"]
        assert report.data == 15 * BLOCK


async def test_what_a_snapshot_holds_alone_is_what_deleting_it_frees(tmp_path: Path) -> None:
    async with site(tmp_path / "pool") as here:
        volume = await here.pool.create_volume("db", 8 * MIB)
        for name in "abc":
            await volume.write(0, name.encode() * 10 * BLOCK)
            await volume.write(ord(name) * 20 * BLOCK, name.encode() * 5 * BLOCK)
            await here.snapshot(f"db@{name}")
        await volume.write(0, b"d" * 3 * BLOCK)
        for name in ("db@b", "db@a", "db@c"):
            before = await here.operations.space()
            (image,) = [image for image in before.images if image.name == name]
            await here.operations.snapshots.delete(name)
            after = await here.operations.space()
            assert before.data - after.data == image.unique
            assert image.unique


async def test_what_is_deleted_is_being_emptied_until_it_is_gone(tmp_path: Path) -> None:
    async with site(tmp_path / "pool") as here:
        volume = await here.pool.create_volume("db", 64 * MIB)
        await volume.write(0, b"1" * 32 * MIB)
        await here.pool.delete_volume(volume)
        report = await here.operations.space()
        assert report.images == []
        assert report.emptying == report.data
        add_up(report, BLOCK)
        await here.pool._administration.emptied(volume)
        report = await here.operations.space()
        assert (report.emptying, report.data) == (0, 0)
