"""The power fails: at any moment, in any order of writing, again and again.

Each seed is a course of its own (see power_loss.py); thousands of them are run by hand and by the
soak test, some here.  A seed that once found a bug stays in REGRESSIONS with what it found.
"""

from __future__ import annotations

import random

import pytest

from nbdstore.store import Pool, Volume
from nbdstore.store.layout import slots_of
from tests.store.power_loss import Course, Spread, courses, recover, run_seed
from tests.store.scene import Scene
from tests.store.simulated_disk import KILLED, LAZY, Crash, SimulatedDisk
from tests.store.workload import Settings

BLOCK = 4096

REGRESSIONS = {
    6: "check counted a node as used that a replayed resize had dropped",
    20: "closing cancelled a checkpoint between the superblock's write and its sync",
    1009: "write_zeroes at the end of a short leaf promised space beyond the volume's end",
    1122: "the same",
}


@pytest.mark.parametrize("seed", range(12))
def test_every_volume_is_a_prefix_of_what_was_acknowledged(seed: int) -> None:
    assert run_seed(seed, courses(seed)) > 0


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_what_once_went_wrong_goes_right(seed: int) -> None:
    run_seed(seed, courses(seed))


@pytest.mark.parametrize("seed", range(4))
def test_a_pool_that_is_nearly_full_reuses_slots_soon(seed: int) -> None:
    settings = Settings(n_steps=30, max_volumes=3, max_size=6 << 20, large=0.2)
    run_seed(seed, Course(settings, capacity=16 << 20, n_generations=2, n_crashes=4))


@pytest.mark.parametrize("seed", range(3))
def test_trees_of_any_height(seed: int) -> None:
    settings = Settings(n_steps=15, spread=Spread(random.Random(seed).choice((300, 70_000)) << 20))
    run_seed(seed, Course(settings, n_generations=2, n_crashes=4))


# -- single moments --------------------------------------------------------------------------------


@pytest.fixture
def scene() -> Scene:
    """A pool on a disk that loses all it may."""
    return Scene()


async def the_volume(pool: Pool) -> Volume:
    return await pool.create_volume("v", 1 << 20)


@pytest.mark.parametrize("n_bytes", [1, BLOCK, 100_000])
def test_a_flush_is_enough_for_everything_before_it(scene: Scene, n_bytes: int) -> None:
    async def act(pool: Pool) -> None:
        volume = await the_volume(pool)
        await volume.write(10, b"x" * n_bytes)
        await volume.write_zeroes(0, 11)
        await volume.flush()

    scene.play(act)
    assert scene.after()[: n_bytes + 20] == bytes(11) + b"x" * (n_bytes - 1) + bytes(10)


def test_without_a_flush_power_loss_may_take_a_write_and_sigkill_may_not(scene: Scene) -> None:
    async def act(pool: Pool) -> None:
        volume = await the_volume(pool)
        await volume.write(0, b"x")

    scene.play(act)
    assert scene.after(LAZY)[:1] == b"\0"
    assert scene.after(KILLED)[:1] == b"x"


def test_a_write_and_flush_survive_beside_the_unsynced_data_of_another_volume(scene: Scene) -> None:
    """What a server does with FUA."""

    async def act(pool: Pool) -> None:
        volume = await the_volume(pool)
        bulk = await pool.create_volume("bulk", 4 << 20)
        for number in range(20):
            await bulk.write(number * 100_000, bytes([number + 1]) * 100_000)
            await volume.write(number * BLOCK, bytes([number + 1]) * BLOCK)
            await volume.flush()

    scene.play(act)
    expected = b"".join(bytes([number + 1]) * BLOCK for number in range(20))
    assert scene.after()[: 20 * BLOCK] == expected


def test_a_checkpoint_is_enough_too(scene: Scene) -> None:
    async def act(pool: Pool) -> None:
        volume = await the_volume(pool)
        await volume.write(0, b"x" * 100_000)
        await pool.checkpoint()

    scene.play(act)
    assert scene.after()[:100_001] == b"x" * 100_000 + b"\0"


def test_a_clean_close_is_enough_too(scene: Scene) -> None:
    async def act(pool: Pool) -> None:
        volume = await the_volume(pool)
        await volume.write(0, b"x" * 100_000)
        await pool.close()

    scene.play(act)
    assert scene.after()[:100_001] == b"x" * 100_000 + b"\0"


@pytest.mark.parametrize("file", ["data", "journal"])
def test_data_without_record_and_record_without_data_are_both_as_if_never_written(
    scene: Scene, file: str
) -> None:
    async def act(pool: Pool) -> None:
        volume = await the_volume(pool)
        await volume.write(0, b"1" * 3 * BLOCK)
        await volume.flush()
        await volume.write(0, b"2" * BLOCK)
        await volume.write(BLOCK, b"3" * BLOCK)

    scene.play(act)
    assert scene.after(
        Crash(applied={file: 1.0, **dict.fromkeys({"data", "journal"} - {file}, 0)})
    )[: 3 * BLOCK] == (b"1" * 3 * BLOCK)


def test_a_lost_block_ends_the_history_of_its_volume_and_of_no_other(scene: Scene) -> None:
    lost: list[int] = []

    async def act(pool: Pool) -> None:
        volume = await the_volume(pool)
        other = await pool.create_volume("w", 1 << 20)
        await volume.write(0, b"1" * BLOCK)
        lost.append(int(volume.map.words[0]) & ((1 << 40) - 1))
        await volume.write(BLOCK, b"2" * BLOCK)
        await other.write(0, b"3" * BLOCK)

    scene.play(act)
    images = scene.crashed(KILLED)
    images["data"][lost[0] * BLOCK] ^= 1
    found = recover(SimulatedDisk(images), Spread())
    assert found["v"][2] == bytes(1 << 20)
    assert found["w"][2][:BLOCK] == b"3" * BLOCK


def test_a_slot_that_went_inline_and_became_a_node_keeps_the_node(scene: Scene) -> None:
    """A block is overwritten before a small flush journals it; a checkpoint takes its slot."""

    async def act(pool: Pool) -> None:
        volume = await the_volume(pool)
        other = await pool.create_volume("w", 1 << 20)
        await volume.write(0, b"0" * BLOCK)
        await volume.flush()
        # A checkpoint begins ...
        checkpointer, slots = pool._checkpointer, pool._core.slots
        frozen = checkpointer._freeze()
        # ... and while it runs: a slot is mapped, replaced, journalled, and released.
        await other.write(0, b"1" * BLOCK)
        doomed = slots_of(other.map.entries[:1, 0])
        await other.write(0, b"2" * BLOCK)
        await other.flush()  # the record of block data has both
        await other.write(BLOCK, b"3" * BLOCK)
        await other.flush()
        assert not slots.is_used(doomed)[0]
        await checkpointer._write(frozen)  # the simulation gives out the last freed slot first
        assert slots.is_used(doomed)[0]

    scene.play(act)
    for crash in (LAZY, KILLED):
        assert scene.after(crash)[:BLOCK] == b"0" * BLOCK
