"""Checkpoints: exactly what was at one moment, whatever goes on meanwhile, or nothing at all."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nbdstore.errors import NoSpace, PoolFailed, WriteFailed
from nbdstore.store import Pool, Volume, superblock
from nbdstore.store.host import Failpoint
from nbdstore.store.layout import I64
from tests.store.callers import cancelled_after
from tests.store.crashes import KILLED, LAZY, crash_images
from tests.store.power_loss import assert_clean, recover
from tests.store.scene import Scene
from tests.store.simulated_disk import Reached, SimulatedDisk, Write
from tests.store.workload import Spread, joined

MIB = 1 << 20
BLOCK = 4096
N_LEAVES = 5


@pytest.fixture
def scene() -> Scene:
    """A pool whose checkpoints let others go on after each node they write."""
    return Scene(64 * MIB)


def last(scene: Scene, place: Failpoint) -> int:
    """After how many events the store last came to `place`."""
    events = scene.disk.events
    return max(i + 1 for i, event in enumerate(events) if event == Reached(place))


async def a_volume_of_leaves(pool: Pool) -> Volume:
    """With one block in each leaf of its map, and a provisioned one."""
    volume = await pool.create_volume("v", N_LEAVES * MIB)
    for leaf in range(N_LEAVES):
        await volume.write(leaf * MIB, bytes([leaf + 1]) * BLOCK)
        await volume.write_zeroes(leaf * MIB + BLOCK, BLOCK, no_hole=True)
    return volume


async def overwrite(volume: Volume) -> None:
    for leaf in range(N_LEAVES):
        await volume.write(leaf * MIB, b"later" + bytes(BLOCK - 5))


async def trim(volume: Volume) -> None:
    await volume.trim(0, volume.size)


async def fill(volume: Volume) -> None:
    await volume.write_zeroes(0, volume.size, no_hole=True)


async def add(volume: Volume) -> None:
    for leaf in range(N_LEAVES):
        await volume.write(leaf * MIB + 9 * BLOCK, b"new" * 1000)


@pytest.mark.parametrize("change", [overwrite, trim, fill, add])
@pytest.mark.parametrize("turns", range(0, 12, 2))
def test_it_holds_what_was_there_when_it_began(change: Callable[..., Any], turns: int) -> None:
    scene = Scene(64 * MIB)
    begun: list[bytes] = []

    async def act(pool: Pool) -> None:
        volume = await a_volume_of_leaves(pool)
        begun.append(joined(await volume.read(0, volume.size)))
        running = asyncio.create_task(pool.checkpoint())
        while pool._core.slots._frozen is None:
            await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        await change(volume)
        await running

    scene.play(act)
    # What came later is in the journal alone.
    images = crash_images(
        scene.disk, last(scene, Failpoint.CHECKPOINT_DURABLE), LAZY, random.Random(1)
    )
    current = superblock.decode(bytes(images["super"][: superblock.COPY_SIZE]), "super")
    images["journal"][current.journal_offset :] = bytes(MIB - current.journal_offset)
    assert_clean(images)
    assert recover(SimulatedDisk(images), Spread())["v"][2] == begun[0]


def writes_of_a_checkpoint() -> int:
    """How many times a checkpoint of the test's volume writes to the data file."""
    scene = Scene(64 * MIB)
    begun: list[int] = []

    async def act(pool: Pool) -> None:
        await a_volume_of_leaves(pool)
        begun.append(len(scene.disk.events))
        await pool.checkpoint()

    scene.play(act)
    return sum(isinstance(e, Write) and e.file == "data" for e in scene.disk.events[begun[0] :])


def test_a_failure_before_the_superblock_leaves_a_pool_that_goes_on() -> None:
    n_writes = writes_of_a_checkpoint()
    assert n_writes > N_LEAVES + 5
    for failing in range(n_writes):
        scene = Scene(64 * MIB)
        calls: list[str] = []

        def full(
            operation: str, name: str, calls: list[str] = calls, failing: int = failing
        ) -> None:
            if (operation, name) == ("write", "data"):
                calls.append(name)
                if len(calls) == failing + 1:
                    raise NoSpace("data: No space left on device")

        async def act(pool: Pool, scene: Scene = scene, full: Any = full) -> None:
            volume = await a_volume_of_leaves(pool)
            used = pool.status()["used"]
            generation = pool._checkpointer.superblock.generation
            scene.disk.fault = full
            with pytest.raises(NoSpace):
                await pool.checkpoint()
            assert pool.status()["state"] == "ok"
            assert pool._checkpointer.superblock.generation == generation
            assert pool.status()["used"] >= used
            await overwrite(volume)
            await volume.flush()
            await pool.checkpoint()
            assert pool._checkpointer.superblock.generation == generation + 1
            await add(volume)

        scene.play(act, close=True)
        scene.assert_clean()
        assert scene.after(LAZY)[:BLOCK] == b"later" + bytes(BLOCK - 5)


@pytest.mark.parametrize("file", ["super", "data", "journal"])
def test_a_failed_sync_or_superblock_stops_the_pool(scene: Scene, file: str) -> None:
    def broken(operation: str, name: str) -> None:
        if (operation, name) == ("sync", file):
            raise WriteFailed(f"{name}: Input/output error")

    async def act(pool: Pool) -> None:
        volume = await a_volume_of_leaves(pool)
        await volume.flush()
        scene.disk.fault = broken
        with pytest.raises(PoolFailed):
            await pool.checkpoint()
        assert pool.status()["state"] == "failed"
        with pytest.raises(PoolFailed):
            await volume.write(0, b"x")

    scene.play(act)
    assert scene.after(LAZY)[:BLOCK] == b"\1" * BLOCK


def test_who_cancels_it_waits_for_its_end(scene: Scene) -> None:
    async def act(pool: Pool) -> None:
        volume = await a_volume_of_leaves(pool)
        checkpointer = pool._checkpointer
        for turns in range(1, 40, 3):
            await add(volume)
            n_before = checkpointer.n_checkpoints
            await cancelled_after(turns, checkpointer.run())
            assert checkpointer.n_checkpoints == n_before + 1
            assert not checkpointer.lock.locked()

    scene.play(act, close=True)
    scene.assert_clean()


def test_what_the_old_superblock_needs_stays_until_the_new_one_is_durable(scene: Scene) -> None:
    kept: list[Failpoint] = []
    old: list[I64] = []
    pools: list[Pool] = []

    def reached(place: Failpoint) -> None:
        scene.disk.events.append(Reached(place))
        if old and place is not Failpoint.CHECKPOINT_RELEASED:
            assert pools[0]._core.slots.is_used(old[0]).all(), place
            kept.append(place)

    def needed(pool: Pool) -> I64:
        """All that the superblock reaches, but for the blocks of the volume."""
        (volume,) = pool.volumes.values()
        nodes = volume.map.nodes
        leaves = np.array([w for w, _ in nodes.leaf_pointers(np.arange(N_LEAVES))], np.uint64)
        held = (leaves & np.uint64((1 << 40) - 1)).astype(np.int64)
        return np.concatenate([pool._checkpointer._roots.all_slots(), nodes.slots_from(1, 0), held])

    async def act(pool: Pool) -> None:
        pools.append(pool)
        volume = await a_volume_of_leaves(pool)
        await pool.checkpoint()
        await overwrite(volume)
        old.append(needed(pool))
        assert len(old[0]) > N_LEAVES + 5
        scene.disk.host.reached = reached  # type: ignore[method-assign]
        await pool.checkpoint()
        old_slots, old[:] = old[0], []
        assert not np.isin(needed(pool), old_slots).any()
        await pool._committer.settle()
        assert not pool._core.slots.is_used(old_slots).any()

    scene.play(act)
    assert {Failpoint.CHECKPOINT_FROZEN, Failpoint.CHECKPOINT_FLIPPED} <= set(kept)
    assert Failpoint.CHECKPOINT_DURABLE in kept


def test_the_journal_is_kept_until_the_superblock_is_durable(scene: Scene) -> None:
    tails: dict[Failpoint, int] = {}
    pools: list[Pool] = []

    def reached(place: Failpoint) -> None:
        tails[place] = pools[0]._core.journal.tail

    async def act(pool: Pool) -> None:
        pools.append(pool)
        await a_volume_of_leaves(pool)
        before = pool._core.journal.tail
        scene.disk.host.reached = reached  # type: ignore[method-assign]
        await pool.checkpoint()
        assert tails[Failpoint.CHECKPOINT_DURABLE] == before
        assert tails[Failpoint.CHECKPOINT_RELEASED] > before

    scene.play(act)


@pytest.mark.parametrize("n_volumes", [1, 20, 100])
def test_a_catalogue_of_any_number_of_blocks(n_volumes: int) -> None:
    scene = Scene(64 * MIB)
    expected = {f"v{n}": {"n": n, "text": "x" * 1500} for n in range(n_volumes)}

    async def act(pool: Pool) -> None:
        for name, properties in expected.items():
            await pool.create_volume(name, BLOCK, properties)
        await pool.checkpoint()
        blocks = pool._checkpointer.superblock.catalogue_bytes / BLOCK
        assert n_volumes * 0.3 < blocks < n_volumes * 0.6 + 1

    async def again(pool: Pool) -> None:
        assert {name: v.properties for name, v in pool.volumes.items()} == expected
        for volume in list(pool.volumes.values())[1:]:
            await pool.delete_volume(volume)
        await pool.checkpoint()

    scene.play(act)
    for crash in (LAZY, KILLED):
        scene.begin_again(scene.crashed(crash))
    scene.play(again, close=True)
    scene.assert_clean()
    assert [*recover(SimulatedDisk(scene.disk.images), Spread())] == ["v0"]


@pytest.mark.parametrize("capacity", [64, 128, 300])
def test_the_free_map_counts_its_own_blocks_wherever_they_lie(capacity: int) -> None:
    """A slot for a block of it changes another block of it, and so on, to a fixed point."""
    scene = Scene(capacity * MIB, greedy=False)
    moments: list[int] = []

    async def act(pool: Pool) -> None:
        volume = await a_volume_of_leaves(pool)
        slots = pool._core.slots
        for region in range(slots.n_regions):
            # As if all before this region were full: what comes now lies in this one.
            slots._window = np.arange(region * slots.region_slots + 7, slots.n_slots)
            slots._window = slots._window[~slots.is_used(slots._window)]
            slots._window_at = 0
            await overwrite(volume)
            await pool.checkpoint()
            moments.append(len(scene.disk.events))

    scene.play(act, close=True)
    scene.assert_clean()
    for moment in moments:
        scene.crashed(LAZY, at=moment)  # in which a check finds nothing


def test_a_checkpoint_of_no_change_is_as_small_as_the_pools_own_trees(scene: Scene) -> None:
    n_written: list[int] = []

    async def act(pool: Pool) -> None:
        await a_volume_of_leaves(pool)
        await pool.checkpoint()
        await pool._committer.settle()
        for _ in range(3):
            before = len(scene.disk.events)
            await pool.checkpoint()
            events = scene.disk.events[before:]
            n_written.append(
                sum(len(e.data) for e in events if isinstance(e, Write) and e.file == "data")
            )

    scene.play(act)
    assert max(n_written) <= 8 * BLOCK  # two catalogues and a free map, each with its root
