"""Snapshots while other things go on: clients, other changes, deletions, and what fails."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from unittest import mock

import pytest

from nbdstore.errors import Busy, NoSpace, NotFound, ReadFailed
from nbdstore.store import Pool, differences
from nbdstore.store.administration import Administration
from nbdstore.store.ranges import Ranges
from nbdstore.store.reading import Segment
from nbdstore.store.snapshot import Snapshot
from tests.store.crashes import KILLED
from tests.store.pools import MIB, assert_clean, make_pool, opened, read, until
from tests.store.scene import Scene
from tests.store.test_snapshots import read_image, snap

BLOCK = 4096


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make_pool(tmp_path / "pool")


@pytest.mark.parametrize("turns", range(0, 40, 3))
async def test_a_snapshot_that_is_made_while_its_volume_is_deleted_goes_with_it(
    directory: Path, turns: int
) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, b"1" * BLOCK)
        making = asyncio.ensure_future(snap(pool, volume, "s"))
        for _ in range(turns):
            await asyncio.sleep(0)
        deleting = asyncio.ensure_future(pool.delete_volume(volume))
        found, _ = await asyncio.gather(making, deleting, return_exceptions=True)
        assert isinstance(found, Snapshot | Busy | NotFound)
        await deleting
        await pool._administration.emptied(volume)
        assert not pool._registry.snapshots and not pool._registry.by_id
    await assert_clean(directory)
    async with opened(directory) as pool:
        assert not pool.volumes


async def test_a_volume_that_cannot_be_deleted_keeps_all_its_snapshots(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        for name in ("a", "b", "c"):
            await snap(pool, volume, name)
        with pool.snapshots["v@a"].in_use(), pytest.raises(Busy, match="v@a is being read"):
            await pool.delete_volume(volume)
        assert list(pool.snapshots) == ["v@a", "v@b", "v@c"]


async def test_nobody_begins_to_use_a_snapshot_that_is_being_deleted(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, b"1" * BLOCK)
        snapshot = await snap(pool, volume, "s")
        async with pool._checkpointer.lock:
            deleting = asyncio.ensure_future(pool.delete_snapshot(snapshot))
            await until(lambda: snapshot._n_going)
            with pytest.raises(NotFound, match="is being deleted"), snapshot.in_use():
                pass
        await deleting


async def test_a_snapshot_that_could_not_be_deleted_can_be_used(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, b"1" * BLOCK)
        snapshot = await snap(pool, volume, "s")
        with (
            mock.patch.object(pool._checkpointer, "_take", side_effect=NoSpace("full")),
            pytest.raises(NoSpace),
        ):
            await pool.delete_snapshot(snapshot)
        with snapshot.in_use():
            assert (await read_image(snapshot))[:BLOCK] == b"1" * BLOCK
        await volume.write(0, b"2" * BLOCK)
        await pool.delete_snapshot(snapshot)
        assert volume.status()["own"] == volume.status()["mapped"] == BLOCK
    await assert_clean(directory)


async def test_closing_does_not_wait_for_what_cannot_be_emptied(directory: Path) -> None:
    pool = await Pool.open(directory)
    volume = await pool.create_volume("v", MIB)
    await volume.write(0, b"1" * BLOCK)
    older, newer = await snap(pool, volume, "older"), await snap(pool, volume, "newer")
    with mock.patch.object(Administration, "_remove", side_effect=NoSpace("full")):
        await pool.rollback(volume, older)
        deleting = asyncio.ensure_future(pool.delete_snapshot(newer))
        await asyncio.sleep(0.01)
        assert not deleting.done()
        deleting.cancel()
        await pool.close()
    async with opened(directory) as pool:
        await pool.delete_snapshot(pool.snapshots["v@newer"])
    await assert_clean(directory)


async def test_what_could_not_be_cloned_costs_no_space(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", 4 * MIB)
        await volume.write(0, b"1" * BLOCK)
        await volume.write(3 * MIB, b"1" * BLOCK)
        snapshot = await snap(pool, volume, "s")
        before = list(pool._core.map_counts.level_nodes)
        with (
            mock.patch.object(pool._administration, "change", side_effect=NoSpace("full")),
            pytest.raises(NoSpace),
        ):
            await pool.clone(snapshot, "c")
        assert pool._core.map_counts.level_nodes == before


async def test_a_name_in_the_trash_stays_there(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        await pool.trash_volume(volume)
        await pool.rename_volume(volume, "w")
        assert not pool.volumes and [found.name for found in pool.trash] == ["w"]
    async with opened(directory) as pool:
        assert not pool.volumes and [found.name for found in pool.trash] == ["w"]


async def test_a_deletion_goes_on_when_a_checkpoint_has_space_again(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, b"1" * BLOCK)
        failing = [NoSpace("full"), NoSpace("full")]

        async def no_room(_ranges: Ranges) -> None:
            if failing:
                pool._core.space_changed()
                raise failing.pop()

        with mock.patch.object(Ranges, "_wait_for_journal", no_room):
            await pool.delete_volume(volume)
            while pool._registry.by_id:
                pool._core.space_changed()
                await asyncio.sleep(0)
    await assert_clean(directory)


async def test_a_clone_may_shrink_while_it_is_flattened(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", 2 * MIB + 1024)
        for at in range(0, 512, 2):
            await volume.write(at * BLOCK, b"1" * BLOCK)
        await volume.write(2 * MIB, b"2" * 1024)
        clone = await pool.clone(await snap(pool, volume, "s"), "c")
        flattening = asyncio.ensure_future(pool.flatten(clone))
        sizes = [2 * MIB + 512, MIB + 5 * BLOCK + 512, 3 * MIB, 100 * BLOCK]
        for size in sizes:
            await asyncio.sleep(0.001)
            await pool.resize_volume(clone, size, force=True)
        await flattening
        found = await read(clone)
        assert found == (await read(volume))[: sizes[-1]]
        assert clone.status()["own"] == clone.status()["mapped"]
    await assert_clean(directory)


async def test_what_cannot_be_read_stays_as_it_is_though_the_clone_grows_meanwhile(
    directory: Path,
) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, b"1" * BLOCK)
        await volume.write(2 * BLOCK, b"2" * BLOCK)
        clone = await pool.clone(await snap(pool, volume, "s"), "c")
        read_clone = clone.read

        async def grow_and_fail(offset: int, length: int) -> list[Segment]:
            if not offset:
                return await read_clone(offset, length)
            await pool.resize_volume(clone, 2 * MIB)
            raise ReadFailed("the disk does not answer")

        with mock.patch.object(clone, "read", grow_and_fail), pytest.raises(ReadFailed):
            await pool.flatten(clone)
        assert await read(clone) == await read(volume) + bytes(MIB)
    await assert_clean(directory)


@pytest.mark.parametrize("seed", range(6))
async def test_clients_go_on_while_a_snapshot_is_deleted(directory: Path, seed: int) -> None:
    """What they give up meanwhile is freed, too, whether it was looked at before or is later."""
    rng = random.Random(seed)
    with mock.patch.object(differences, "_SLICE_LEAVES", 1):
        async with opened(directory, checkpoint_slice_nodes=1) as pool:
            volume = await pool.create_volume("v", 16 * MIB)
            content = bytearray(16 * MIB)

            async def change() -> None:
                at, length = rng.randrange(4096) * BLOCK, rng.choice((1, 5, 300)) * BLOCK
                length = min(length, len(content) - at)
                if rng.random() < 0.3:
                    await volume.trim(at, length)
                    content[at : at + length] = bytes(length)
                else:
                    data = rng.randbytes(1) * length
                    await volume.write(at, data)
                    content[at : at + length] = data

            for number in range(3):
                for _ in range(20):
                    await change()
                await snap(pool, volume, f"s{number}")
                for _ in range(rng.choice((0, 20))):
                    await change()
            while pool.snapshots:
                chosen = rng.choice([*pool.snapshots.values()])
                deleting = asyncio.ensure_future(pool.delete_snapshot(chosen))
                while not deleting.done():
                    await change()
                    if rng.random() < 0.2:
                        await pool._committer.settle()
                    await asyncio.sleep(0)
                await deleting
            assert await read(volume) == content
            assert volume.status()["own"] == volume.status()["mapped"]
    await assert_clean(directory)


async def test_what_a_snapshot_holds_alone_can_be_told_while_others_are_deleted(
    directory: Path,
) -> None:
    with mock.patch.object(differences, "_SLICE_LEAVES", 1):
        async with opened(directory) as pool:
            volume = await pool.create_volume("v", 16 * MIB)
            for name in ("a", "b", "c"):
                for at in range(16):
                    await volume.write(at * MIB, name.encode() * BLOCK)
                await snap(pool, volume, name)
            telling = asyncio.ensure_future(pool.bytes_alone(pool.snapshots["v@a"]))
            await pool.delete_snapshot(pool.snapshots["v@b"])
            for at in range(16):
                await volume.write(at * MIB, b"x" * 100 * BLOCK)
            await pool._committer.settle()
            assert await telling == 16 * BLOCK
            assert pool.status()["corruptions"] == 0


# -- crashes at one moment ---------------------------------------------------------------------


def test_what_is_written_while_a_snapshot_is_made_is_of_the_next_epoch_after_any_crash() -> None:
    """The crash prevents the snapshot, not the write: so the epoch counts on, in recovery too."""
    scene = Scene()
    moments: list[int] = []

    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, b"1" * BLOCK)
        await pool.checkpoint()
        making = asyncio.ensure_future(snap(pool, volume, "never"))
        while volume.info.epoch == 1:
            await asyncio.sleep(0)
        await volume.write(0, b"2" * BLOCK)
        moments.append(len(scene.disk.events))
        await making

    scene.play(act)
    scene.begin_again(scene.crashed(KILLED, at=moments[0]))

    async def go_on(pool: Pool) -> None:
        volume = pool.volumes["v"]
        assert not pool.snapshots and volume.info.epoch == 2
        await snap(pool, volume, "s")
        await volume.write(0, b"3" * BLOCK)
        await pool.checkpoint()
        assert (await read_image(pool.snapshots["v@s"]))[:BLOCK] == b"2" * BLOCK

    scene.play(go_on, close=True)
    scene.assert_clean()
