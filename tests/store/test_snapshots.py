"""Snapshots, clones, rollback, flatten: what each image holds, and whose the space is."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdstore.errors import AlreadyExists, Busy, InvalidArgument, NotFound
from nbdstore.store import Pool, Volume
from nbdstore.store.differences import changes
from nbdstore.store.image import Image
from nbdstore.store.snapshot import Snapshot
from tests.store.pools import MIB, assert_clean, check, findings, killed, make_pool, opened, read

BLOCK = 4096


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make_pool(tmp_path / "pool")


async def snap(pool: Pool, volume: Volume, name: str) -> Snapshot:
    (snapshot,) = await pool.create_snapshots([(volume, name)])
    return snapshot


def used(pool: Pool) -> int:
    """Slots that hold something; what is freed but not usable again yet does not."""
    slots = pool._core.slots
    return slots.n_slots - slots.n_free - slots.n_quarantined


async def read_image(image: Image) -> bytes:
    return b"".join(
        bytes(part) if isinstance(part, int) else part for part in await image.read(0, image.size)
    )


# -- what they hold ----------------------------------------------------------------------------


async def test_a_snapshot_holds_what_the_volume_held_whatever_comes(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, b"1" * 4 * BLOCK)
        first = await snap(pool, volume, "first")
        await volume.write(BLOCK, b"2" * BLOCK)
        await volume.trim(2 * BLOCK, BLOCK)
        assert await read(volume, 0, 4 * BLOCK) == (
            b"1" * BLOCK + b"2" * BLOCK + bytes(BLOCK) + b"1" * BLOCK
        )
        assert (await read_image(first))[: 5 * BLOCK] == b"1" * 4 * BLOCK + bytes(BLOCK)
        assert list(pool.snapshots) == ["v@first"]
        await first.flush()
        assert not first.flush_soon(print)
    await assert_clean(directory)
    async with opened(directory) as pool:
        found = await read_image(pool.snapshots["v@first"])
        assert found[: 5 * BLOCK] == b"1" * 4 * BLOCK + bytes(BLOCK)


async def test_a_snapshot_keeps_a_uuid_of_its_own_or_the_one_it_is_given(directory: Path) -> None:
    given = "b3bd1ea2-5ee1-4e5b-bd0e-7f3d2a4f5c11"
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        first, second = await snap(pool, volume, "1"), await snap(pool, volume, "2")
        await pool.create_snapshots([(volume, "copy")], uuids=[given])
        uuids = [first.info.uuid, second.info.uuid, given]
        assert len({*uuids, volume.info.uuid}) == 4
        await pool.delete_snapshot(first)
        await pool.rename_volume(volume, "w")
    async with opened(directory) as pool:
        assert [found.status()["uuid"] for found in pool.snapshots.values()] == uuids[1:]


async def test_several_volumes_have_one_moment(directory: Path) -> None:
    async with opened(directory) as pool:
        one, two = [await pool.create_volume(name, MIB) for name in ("one", "two")]
        await one.write(0, b"1" * BLOCK)
        await two.write(0, b"2" * BLOCK)
        made = await pool.create_snapshots([(one, "s"), (two, "s")])
        assert [snapshot.name for snapshot in made] == ["one@s", "two@s"]
        await one.write(0, b"x" * BLOCK)
        assert [(await read_image(snapshot))[:1] for snapshot in made] == [b"1", b"2"]


async def test_writes_go_on_while_a_snapshot_is_made_and_are_not_in_it(directory: Path) -> None:
    async with opened(directory, checkpoint_slice_nodes=1) as pool:
        volume = await pool.create_volume("v", 16 * MIB)
        for at in range(16):
            await volume.write(at * MIB, bytes([at + 1]) * BLOCK)
        before = await read(volume)
        making = pool._spawn(pool.create_snapshots([(volume, "s")]))
        n_meanwhile = 0
        while not making.done():
            await volume.write((n_meanwhile % 16) * MIB, b"later" + bytes(BLOCK - 5))
            n_meanwhile += 1
        assert n_meanwhile > 3
        inside = await read_image(pool.snapshots["v@s"])
        differing = [at for at in range(16) if inside[at * MIB] != before[at * MIB]]
        # Those that came before the moment of the snapshot are in it, in the order they came.
        assert differing == list(range(len(differing)))
        await pool.delete_snapshot(pool.snapshots["v@s"])
    await assert_clean(directory)


async def test_a_clone_starts_as_the_snapshot_and_goes_its_own_way(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, b"1" * 4 * BLOCK)
        snapshot = await snap(pool, volume, "s")
        n_before = used(pool)
        clone = await pool.clone(snapshot, "c")
        assert used(pool) == n_before
        await clone.write(0, b"c" * BLOCK)
        await volume.write(BLOCK, b"v" * BLOCK)
        assert (await read(clone, 0, 2 * BLOCK)) == b"c" * BLOCK + b"1" * BLOCK
        assert (await read(volume, 0, 2 * BLOCK)) == b"1" * BLOCK + b"v" * BLOCK
        with pytest.raises(Busy, match="has clones: c"):
            await pool.delete_snapshot(snapshot)
        with pytest.raises(Busy, match="have clones: c"):
            await pool.delete_volume(volume)
        for number in range(7):
            await pool.clone(snapshot, f"d{number}")
        with pytest.raises(Busy, match="has clones: c, d0, d1, d2, d3 and 3 more: flatten"):
            await pool.delete_snapshot(snapshot)
    await assert_clean(directory)


async def test_a_flattened_clone_needs_its_origin_no_more(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB + 512)
        await volume.write(0, b"1" * 4 * BLOCK)
        await volume.write(MIB, b"e" * 512)
        await volume.write_zeroes(8 * BLOCK, BLOCK, no_hole=True)
        snapshot = await snap(pool, volume, "s")
        clone = await pool.clone(snapshot, "c")
        await clone.write(0, b"c" * BLOCK)
        expected = await read(clone)
        await pool.flatten(clone)
        assert clone.status()["own"] == clone.status()["mapped"]
        await pool.delete_volume(volume)
        await pool._administration.emptied(volume)
        assert await read(clone) == expected
    await assert_clean(directory)
    async with opened(directory) as pool:
        assert await read(pool.volumes["c"]) == expected


async def test_rollback_keeps_all_snapshots(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, b"1" * BLOCK)
        first = await snap(pool, volume, "first")
        await volume.write(0, b"2" * BLOCK)
        second = await snap(pool, volume, "second")
        await volume.write(0, b"3" * BLOCK)
        await pool.rollback(volume, first)
        assert (await read(volume))[:1] == b"1"
        await volume.write(BLOCK, b"4" * BLOCK)
        assert (await read_image(second))[: BLOCK + 1] == b"2" * BLOCK + b"\0"
        with pytest.raises(Busy, match="both continue from it"):
            await pool.delete_snapshot(first)
        await pool.delete_snapshot(second)
        await pool.delete_snapshot(first)
        assert (await read(volume))[: 2 * BLOCK] == b"1" * BLOCK + b"4" * BLOCK
    await assert_clean(directory)


async def test_rollback_is_for_ones_own_snapshots(directory: Path) -> None:
    async with opened(directory) as pool:
        volume, other = [await pool.create_volume(name, MIB) for name in ("v", "o")]
        snapshot = await snap(pool, volume, "s")
        with pytest.raises(InvalidArgument, match="clone it instead"):
            await pool.rollback(other, snapshot)


async def test_names_are_checked(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        await snap(pool, volume, "s")
        with pytest.raises(AlreadyExists, match="v@s exists"):
            await snap(pool, volume, "s")
        with pytest.raises(InvalidArgument, match="snapshot name"):
            await snap(pool, volume, "a@b")
        with pytest.raises(InvalidArgument, match="named twice"):
            await pool.create_snapshots([(volume, "a"), (volume, "b")])


async def test_a_deleted_snapshot_cannot_be_read_any_more(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, b"1" * BLOCK)
        snapshot = await snap(pool, volume, "s")
        assert (await read_image(snapshot))[:1] == b"1"
        await pool.delete_snapshot(snapshot)
        with pytest.raises(NotFound, match="snapshot 'v@s' was deleted"):
            snapshot.read_now(0, BLOCK)
        with pytest.raises(NotFound):
            await snapshot.read(0, BLOCK)


async def test_the_trash_keeps_a_volume_with_its_snapshots(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, b"1" * BLOCK)
        await snap(pool, volume, "s")
        await pool.trash_volume(volume)
        assert not pool.volumes and not pool.snapshots
        other = await pool.create_volume("v", MIB)
        with pytest.raises(AlreadyExists):
            await pool.restore_volume(volume, "v")
        await pool.rename_volume(other, "w")
    async with opened(directory) as pool:
        (volume,) = pool.trash
        await pool.restore_volume(volume, "v")
        assert (await read(pool.volumes["v"]))[:1] == b"1"
        assert list(pool.snapshots) == ["v@s"]
        await pool.trash_volume(volume)
        await pool.delete_volume(volume)
        await pool._administration.emptied(volume)
        assert not pool.trash
    await assert_clean(directory)


# -- space -------------------------------------------------------------------------------------


async def test_space_comes_back_in_any_order_of_deletion(directory: Path) -> None:
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)):
        async with opened(directory) as pool:
            volume = await pool.create_volume("v", 2 * MIB)
            await pool.checkpoint()
            n_empty = used(pool)
            snapshots = []
            for name in ("a", "b", "c"):
                await volume.write(0, name.encode() * 64 * BLOCK)
                await volume.write(ord(name) * BLOCK, name.encode() * BLOCK)
                snapshots.append(await snap(pool, volume, name))
            await volume.trim(0, 2 * MIB)
            for index in order:
                alone, before = await pool.bytes_alone(snapshots[index]), used(pool)
                await pool.delete_snapshot(snapshots[index])
                await pool.checkpoint()
                # Nodes of the maps come and go as well, a few for each snapshot.
                assert 0 <= before - used(pool) - alone // BLOCK <= 6
            assert volume.status()["own"] == 0
            assert used(pool) == n_empty
            await pool.delete_volume(volume)
            await pool._administration.emptied(volume)
        await assert_clean(directory)


async def test_own_space_of_all_images_adds_up(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", 2 * MIB)
        images: list[Image] = [volume]
        for at in range(6):
            await volume.write(at * BLOCK, bytes([at + 1]) * 20 * BLOCK)
            images.append(await snap(pool, volume, f"s{at}"))
        clone = await pool.clone(pool.snapshots["v@s3"], "c")
        await clone.write(0, b"c" * 30 * BLOCK)
        images.append(clone)
        for image in images:
            await read_image(image)  # loads their maps
        held = set()
        for image in images:
            locations = image.map.locations(0, image.map.n_blocks)
            held |= {int(location) & ((1 << 40) - 1) for location in locations if location}
        assert sum(image.info.n_own for image in images) == len(held)


# -- changes -----------------------------------------------------------------------------------


async def changed(older: Image | None, newer: Image) -> list[tuple[int, int]]:
    for image in (older, newer):
        if isinstance(image, Snapshot):
            await image.open()
    return [(c.offset // BLOCK, c.length // BLOCK) async for c in changes(older, newer)]


async def test_changes_are_what_was_written_between(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", 8 * MIB)
        await volume.write(0, b"1" * 8 * BLOCK)
        a = await snap(pool, volume, "a")
        assert await changed(a, volume) == []
        await volume.write(2 * BLOCK, b"2" * 2 * BLOCK)
        await volume.trim(6 * BLOCK, BLOCK)
        await volume.write(5 * MIB, b"3" * BLOCK)
        expected = [(2, 2), (6, 1), (1280, 1)]
        assert await changed(a, volume) == expected
        b = await snap(pool, volume, "b")
        assert await changed(a, b) == expected
        assert await changed(b, volume) == []
        assert await changed(b, a) == expected
        assert await changed(None, a) == [(0, 8)]
        await pool.resize_volume(volume, 16 * MIB)
        await volume.write(12 * MIB, b"4" * BLOCK)
        assert await changed(b, volume) == [(3072, 1)]


# -- a model -----------------------------------------------------------------------------------


class Model:
    """Random changes of a pool, beside what they should make of it."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.random = random.Random(seed)
        self.directory = directory
        self.held: dict[str, bytearray] = {}
        self.n_names = 0

    def name(self, prefix: str) -> str:
        self.n_names += 1
        return f"{prefix}{self.n_names}"

    def volumes(self) -> list[str]:
        return sorted(name for name in self.held if "@" not in name)

    def snapshots(self) -> list[str]:
        return sorted(name for name in self.held if "@" in name)

    async def step(self, pool: Pool) -> None:
        kinds = ["write"] * 8 + ["trim", "zeroes", "snapshot", "snapshot", "checkpoint"]
        kinds += ["delete_snapshot", "clone", "rollback", "delete", "resize", "flatten", "create"]
        if not self.volumes():
            kinds = ["create"]
        await getattr(self, self.random.choice(kinds))(pool)

    def range_of(self, name: str) -> tuple[int, int]:
        size = len(self.held[name])
        start = self.random.randrange(size)
        return start, min(self.random.choice([1, 700, BLOCK, 40 * BLOCK]), size - start)

    async def create(self, pool: Pool) -> None:
        if len(self.volumes()) < 3:
            name, size = self.name("v"), self.random.choice([100 * BLOCK, 700 * BLOCK, MIB + 512])
            await pool.create_volume(name, size)
            self.held[name] = bytearray(size)

    async def write(self, pool: Pool) -> None:
        name = self.random.choice(self.volumes())
        start, length = self.range_of(name)
        data = self.random.randbytes(1) * length
        await pool.volumes[name].write(start, data)
        self.held[name][start : start + length] = data

    async def trim(self, pool: Pool) -> None:
        name = self.random.choice(self.volumes())
        start, length = self.range_of(name)
        await pool.volumes[name].trim(start, length)
        first, stop = -(-start // BLOCK) * BLOCK, start + length
        if stop < len(self.held[name]):
            stop -= stop % BLOCK
        if first < stop:
            self.held[name][first:stop] = bytes(stop - first)

    async def zeroes(self, pool: Pool) -> None:
        name = self.random.choice(self.volumes())
        start, length = self.range_of(name)
        no_hole = self.random.random() < 0.5
        await pool.volumes[name].write_zeroes(start, length, no_hole=no_hole)
        self.held[name][start : start + length] = bytes(length)

    async def snapshot(self, pool: Pool) -> None:
        chosen = self.random.sample(self.volumes(), self.random.randint(1, len(self.volumes())))
        name = self.name("s")
        await pool.create_snapshots([(pool.volumes[volume], name) for volume in chosen])
        for volume in chosen:
            self.held[f"{volume}@{name}"] = bytearray(self.held[volume])

    async def delete_snapshot(self, pool: Pool) -> None:
        if names := self.snapshots():
            name = self.random.choice(names)
            try:
                await pool.delete_snapshot(pool.snapshots[name])
            except Busy:
                snapshot = pool.snapshots[name]
                heirs = pool.heirs(snapshot)
                assert len(heirs) > 1 or heirs[0] is not snapshot.volume
                return
            del self.held[name]

    async def clone(self, pool: Pool) -> None:
        if (names := self.snapshots()) and len(self.volumes()) < 4:
            source, name = self.random.choice(names), self.name("c")
            await pool.clone(pool.snapshots[source], name)
            self.held[name] = bytearray(self.held[source])

    async def rollback(self, pool: Pool) -> None:
        if names := self.snapshots():
            source = self.random.choice(names)
            volume = source.split("@")[0]
            await pool.rollback(pool.volumes[volume], pool.snapshots[source])
            self.held[volume] = bytearray(self.held[source])

    async def delete(self, pool: Pool) -> None:
        name = self.random.choice(self.volumes())
        try:
            await pool.delete_volume(pool.volumes[name])
        except Busy:
            return
        for gone in [found for found in self.held if found.split("@")[0] == name]:
            del self.held[gone]

    async def resize(self, pool: Pool) -> None:
        name = self.random.choice(self.volumes())
        size = self.random.choice([100 * BLOCK, 300 * BLOCK, 2 * MIB + 512])
        await pool.resize_volume(pool.volumes[name], size, force=True)
        held = self.held[name][:size]
        self.held[name] = held + bytes(size - len(held))

    async def flatten(self, pool: Pool) -> None:
        name = self.random.choice(self.volumes())
        try:
            await pool.flatten(pool.volumes[name])
        except Busy:
            assert any(found.startswith(f"{name}@") for found in self.held)

    async def checkpoint(self, pool: Pool) -> None:
        await pool.checkpoint()

    async def verify(self, pool: Pool) -> None:
        images: dict[str, Image] = {**pool.volumes, **pool.snapshots}
        assert sorted(images) == sorted(self.held)
        for name, image in images.items():
            assert await read_image(image) == self.held[name], name
        for _ in range(3 if images else 0):
            await self.verify_changes(images, *self.random.choices(sorted(images), k=2))

    async def verify_changes(self, images: dict[str, Image], a: str, b: str) -> None:
        """What is told not to have changed is the same, whatever the two have to do."""
        before, after = self.held[a], bytearray(self.held[b])
        for image in (images[a], images[b]):
            if isinstance(image, Snapshot):
                await image.open()
        before = before[: len(after)] + bytes(max(len(after) - len(before), 0))
        last = -1
        async for change in changes(images[a], images[b]):
            assert change.offset >= last
            last = change.offset + change.length
            before[change.offset : last] = after[change.offset : last]
        assert before[: len(after)] == after, (a, b)


@pytest.mark.parametrize("seed", range(12))
async def test_random_changes_leave_each_image_as_it_should_be(seed: int, tmp_path: Path) -> None:
    directory = make_pool(tmp_path / "pool", 64 * MIB)
    model = Model(seed, directory)
    for life in range(4):
        async with opened(directory, checkpoint_slice_nodes=2) as pool:
            await model.verify(pool)
            for _ in range(40):
                await model.step(pool)
            await model.verify(pool)
            if life % 2:
                directory = killed(directory, tmp_path / f"killed{life}")
        assert findings(await check(directory)) == []
    async with opened(directory) as pool:
        await model.verify(pool)
