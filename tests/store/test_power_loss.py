"""The power fails: at any moment, in any order of writing, again and again.

Each seed is a course of its own (see power_loss.py); thousands of them are run by hand, some here.
What they found is kept as a single moment below, since a seed means something else as soon as
anything changes.
"""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_left

import pytest

from nbdstore.errors import NoSpace, PoolFailed, StoreError, WriteFailed
from nbdstore.store import Pool, Volume
from nbdstore.store.journal import align
from nbdstore.store.layout import JOURNAL_PAGE, slots_of
from tests.figures import Tell
from tests.store.crashes import KILLED, LAZY, Crash, crash_images, killed_at, platter
from tests.store.power_loss import Course, Opened, assert_clean, recover, run_seed
from tests.store.scene import Scene
from tests.store.simulated_disk import NAMES, Images, Mark, SimulatedDisk, Write
from tests.store.workload import Settings, Spread, joined

BLOCK = 4096


@pytest.mark.parametrize("seed", range(12))
def test_every_volume_is_a_prefix_of_what_was_acknowledged(tell: Tell, seed: int) -> None:
    figures = run_seed(seed)
    assert figures["crashes"] > 0
    tell("power-loss", figures)


@pytest.mark.parametrize("seed", range(4))
def test_a_pool_that_is_nearly_full_reuses_slots_soon(tell: Tell, seed: int) -> None:
    settings = Settings(n_steps=30, max_volumes=3, max_size=6 << 20, large=0.2)
    course = Course(settings, capacity=16 << 20, n_generations=2, n_crashes=4)
    tell("power-loss", run_seed(seed, course))


@pytest.mark.parametrize("seed", range(3))
def test_trees_of_any_height(tell: Tell, seed: int) -> None:
    settings = Settings(n_steps=15, spread=Spread(random.Random(seed).choice((300, 70_000)) << 20))
    tell("power-loss", run_seed(seed, Course(settings, n_generations=2, n_crashes=4)))


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


@pytest.mark.parametrize("crash", [LAZY, KILLED])
def test_a_lone_client_finds_all_that_was_flushed_whenever_the_power_fails(
    scene: Scene, crash: Crash
) -> None:
    """Be its rounds done by threads or at once, its blocks inline by then or when written."""
    moments: list[int] = []
    n_at_once = 0

    async def act(pool: Pool) -> None:
        nonlocal n_at_once
        volume = await the_volume(pool)
        for number in range(1, 16):
            assert volume.write_now([(number % 3 * BLOCK, bytes([number]) * BLOCK)])
            flushed = asyncio.Event()
            if volume.flush_soon(lambda _, flushed=flushed: flushed.set()):
                await flushed.wait()
            else:
                n_at_once += 1
            moments.append(len(scene.disk.events))

    scene.play(act, in_place_sync_s=1e9)
    assert 5 <= n_at_once < len(moments)
    for number, moment in enumerate(moments, 1):
        images = crash_images(scene.disk, moment, crash, random.Random(1))
        found = recover(SimulatedDisk(images), Spread())["v"][2]
        for last in range(max(1, number - 2), number + 1):
            at = last % 3 * BLOCK
            assert found[at : at + BLOCK] == bytes([last]) * BLOCK


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
        await volume.write(0, b"1" * 100_000)
        await volume.flush()  # a large one, so that no block goes inline now
        await volume.write(0, b"2" * BLOCK)
        await volume.write(BLOCK, b"3" * BLOCK)

    scene.play(act)
    assert scene.after(
        Crash(applied={file: 1.0, **dict.fromkeys({"data", "journal"} - {file}, 0)})
    )[: 3 * BLOCK] == (b"1" * 3 * BLOCK)


@pytest.mark.parametrize("file", ["data", "journal"])
def test_a_record_that_has_its_data_needs_no_other_and_is_needed(scene: Scene, file: str) -> None:
    async def act(pool: Pool) -> None:
        volume = await the_volume(pool)
        await volume.write(0, b"1" * 3 * BLOCK)
        await volume.flush()  # a small one, so that blocks go inline now
        await volume.write(0, b"2" * BLOCK)
        await volume.write(BLOCK, b"3" * BLOCK)

    scene.play(act)
    journal = b"2" * BLOCK + b"3" * BLOCK + b"1" * BLOCK
    assert scene.after(
        Crash(applied={file: 1.0, **dict.fromkeys({"data", "journal"} - {file}, 0)})
    )[: 3 * BLOCK] == (journal if file == "journal" else b"1" * 3 * BLOCK)


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
        await checkpointer._write(
            frozen, None
        )  # the simulation gives out the last freed slot first
        assert slots.is_used(doomed)[0]

    scene.play(act)
    for crash in (LAZY, KILLED):
        assert scene.after(crash)[:BLOCK] == b"0" * BLOCK


@pytest.mark.parametrize("applied", [0.0, 1.0])
@pytest.mark.parametrize("close", [False, True])
def test_who_waits_for_a_checkpoint_may_go_away_at_any_moment(applied: float, close: bool) -> None:
    """The superblock is written, its sync is on the way, and whoever asked for it is gone."""
    for turns in range(0, 24, 2):
        scene = Scene()
        flushed: list[int] = []

        async def act(
            pool: Pool, turns: int = turns, scene: Scene = scene, flushed: list[int] = flushed
        ) -> None:
            volume = await the_volume(pool)
            await volume.write(0, b"x" * 100_000)
            await volume.flush()
            flushed.append(len(scene.disk.events))
            task = asyncio.create_task(pool.checkpoint())
            for _ in range(turns):
                await asyncio.sleep(0)
            if close:
                await pool.close()
            else:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await volume.write(100_000, b"y" * 100_000)
                await pool.checkpoint()

        scene.play(act)
        for at in range(flushed[0], len(scene.disk.events) + 1):
            crash = Crash(applied={"super": 1.0, "data": applied, "journal": 0.0})
            found = recover(SimulatedDisk(scene.crashed(crash, at=at)), Spread())
            assert found["v"][2][:100_000] == b"x" * 100_000


@pytest.mark.parametrize("size", [512, 1 << 20, 494_592])
def test_a_crash_after_a_shrink_that_lowers_the_tree(scene: Scene, size: int) -> None:
    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", 300 << 20)
        for at in (0, 2 << 20, 299 << 20):
            await volume.write(at, b"x" * BLOCK)
        await pool.checkpoint()
        await pool.resize_volume(volume, size, force=True)

    scene.play(act)
    for crash in (LAZY, KILLED):
        assert scene.after(crash)[:BLOCK] == b"x" * min(size, BLOCK)


@pytest.mark.parametrize("turns", [26, 36])
def test_a_crash_of_a_shrink_that_was_cut_short(scene: Scene, turns: int) -> None:
    """The volume has one size or the other, and of its end only what was there, or holes."""
    mib = 1 << 20
    before, after = 600 * mib, mib + 512
    places = range(6 * mib, before, 6 * mib)  # more leaves than one part of a range has

    async def prepare(pool: Pool) -> None:
        volume = await pool.create_volume("v", before)
        await volume.write(0, b"x" * 2 * mib)
        for place in places:
            await volume.write(place, b"x" * BLOCK)

    async def act(pool: Pool) -> None:
        shrink = asyncio.create_task(pool.resize_volume(pool.volumes["v"], after, force=True))
        for _ in range(turns):
            await asyncio.sleep(0)
        shrink.cancel()
        await asyncio.gather(shrink, return_exceptions=True)
        found.append((pool.volumes["v"].size, await n_left(pool)))
        await pool.close()

    async def look(pool: Pool) -> None:
        volume = pool.volumes["v"]
        assert volume.size in (before, after)
        assert joined(await volume.read(0, after)) == b"x" * after
        await n_left(pool)

    async def n_left(pool: Pool) -> int:
        """How many of `places` hold what was written there; the others hold nothing."""
        volume = pool.volumes["v"]
        if volume.size == after:
            return 0
        blocks = [joined(await volume.read(place, BLOCK)) for place in places]
        assert set(blocks) <= {b"x" * BLOCK, bytes(BLOCK)}
        return blocks.count(b"x" * BLOCK)

    found: list[tuple[int, int]] = []
    scene.play(prepare, close=True)
    scene.begin_again()
    scene.play(act)
    assert found == [(before, len(places) - 64 + 1) if turns < 30 else (after, 0)]
    disk = scene.disk
    for at in range(len(disk.events) + 1):
        for crash in (LAZY, KILLED):
            scene.disk = disk
            scene.begin_again(scene.crashed(crash, at=at))
            scene.play(look)


def test_a_crash_after_a_volume_was_removed(scene: Scene) -> None:
    async def act(pool: Pool) -> None:
        volume = await the_volume(pool)
        for number in range(5):
            doomed = await pool.create_volume(f"doomed{number}", 300 << 20)
            await doomed.write(number * 7 << 20, b"x" * BLOCK)
            await pool.checkpoint()
            await pool.delete_volume(doomed)
            await asyncio.sleep(1)
        await volume.write(0, b"y")
        await volume.flush()

    scene.play(act)
    for crash in (LAZY, KILLED):
        assert scene.after(crash)[:1] == b"y"


@pytest.mark.parametrize("before", [64 << 20, 128 << 20])
@pytest.mark.parametrize("after", [128 << 20, 300 << 20, 1 << 40])
def test_a_crash_after_the_pool_has_grown(before: int, after: int) -> None:
    scene = Scene(before)

    async def act(pool: Pool) -> None:
        volume = await the_volume(pool)
        await pool.grow(after)
        await volume.write(0, b"y")
        await volume.flush()

    scene.play(act)
    for crash in (LAZY, KILLED):
        assert scene.after(crash)[:1] == b"y"


# -- a new process on the same machine -------------------------------------------------------------


ONES, TWOS, THREES = b"1" * 100_000, b"2" * 100_000, b"3" * 100_000


def play_until_a_sync_fails(scene: Scene, file: str) -> None:
    """Volume "v" holds ONES for good, and may hold TWOS, and THREES behind them."""

    def broken(operation: str, name: str) -> None:
        if (operation, name) == ("sync", file):
            raise WriteFailed(f"{name}: Input/output error while syncing")

    async def act(pool: Pool) -> None:
        volume = await the_volume(pool)
        await volume.write(0, ONES)
        await volume.flush()
        await volume.write(0, TWOS)
        await volume.write(len(TWOS), THREES)
        if file == "super":
            await volume.flush()
        scene.disk.fault = broken
        with pytest.raises(PoolFailed):
            await (pool.checkpoint() if file == "super" else volume.flush())
        scene.disk.fault = None

    scene.play(act)


def what_a_new_process_finds(scene: Scene) -> bytes:
    """What "v" holds, and a flush then promises; the log has a mark of when the pool was open."""
    found: list[bytes] = []

    async def act(pool: Pool) -> None:
        scene.disk.mark(Opened())
        volume = pool.volumes["v"]
        found.append(joined(await volume.read(0, 200_000)))
        await volume.flush()

    scene.play(act)
    return found[0]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("file", ["data", "journal"])
def test_what_a_failed_sync_has_kept_from_the_disk_is_not_built_upon(seed: int, file: str) -> None:
    """The page cache still has it, takes it for clean, and no later sync writes it."""
    scene = Scene()
    scene.disk.random.seed(seed)
    play_until_a_sync_fails(scene, file)
    found = what_a_new_process_finds(scene)
    assert found in (ONES + bytes(100_000), TWOS + bytes(100_000), TWOS + THREES)
    assert scene.after(LAZY)[:200_000] == found


@pytest.mark.parametrize("file", NAMES)
def test_what_only_the_page_cache_has_is_not_built_upon(file: str) -> None:
    """All of it is there and nothing of it on the disk, which every power loss shows."""

    def full(operation: str, name: str) -> None:
        if (operation, name) == ("write", "data"):
            raise NoSpace("data: No space left on device while writing")

    scene = Scene(greedy=False)  # the lowest slots are those that the superblock before needs
    scene.disk.deceives = True
    play_until_a_sync_fails(scene, file)
    failed = len(scene.disk.events)
    # A checkpoint would write down by itself what was found in the journal.
    scene.disk.fault = full if file == "journal" else None
    found = what_a_new_process_finds(scene)
    opened = scene.disk.events.index(Mark(Opened()))
    kept = TWOS + THREES if file == "super" else ONES + bytes(100_000)
    for at in range(failed, len(scene.disk.events) + 1):
        for crash in (LAZY, Crash(applied={"super": 0.0})):
            after = scene.crashed(crash, at=at)
            left = recover(SimulatedDisk(after), Spread())["v"][2][:200_000]
            assert left == found if at > opened else left in (kept, found)
    assert found == kept


def test_a_superblock_that_a_killed_process_left_unsynced_is_made_durable_first() -> None:
    """Recovery writes into slots that the superblock before still needs, the lowest there are."""
    scene = Scene(greedy=False)
    flushed: list[int] = []

    async def act(pool: Pool) -> None:
        volume = await the_volume(pool)
        await volume.write(0, b"x" * 100_000)
        await volume.flush()
        flushed.append(len(scene.disk.events))
        await pool.checkpoint()

    scene.play(act)
    others = Crash(applied={"super": 0.0})  # of what the new process has written, all but that
    for killed in range(flushed[0], len(scene.disk.events)):
        disk = killed_at(scene.disk, killed)
        found = recover(disk, Spread())
        for at in range(disk.events.index(Mark(Opened()))):
            images = crash_images(disk, at, others, random.Random(1))
            assert recover(SimulatedDisk(images), Spread()) == found


def with_an_empty_volume() -> Scene:
    scene = Scene(greedy=False)  # so that no slot of before the crash is written again soon

    async def act(pool: Pool) -> None:
        await pool.create_volume("v", 4 << 20)

    scene.play(act, close=True)
    scene.begin_again()
    return scene


def records_written(scene: Scene, *n_blocks: int, at: int = 0) -> list[Write]:
    """Open the pool and write so many blocks each time, from block `at` on; return the records."""
    begun: list[int] = []

    async def act(pool: Pool) -> None:
        begun.append(len(scene.disk.events))
        volume, block = pool.volumes["v"], at
        for n in n_blocks:
            await volume.write(block * BLOCK, b"x" * (n * BLOCK))
            block += n

    scene.play(act)
    written = [event for event in scene.disk.events[begun[0] :] if isinstance(event, Write)]
    return [event for event in written if event.file == "journal"]


def test_records_beyond_one_that_was_lost_never_follow_a_new_one() -> None:
    """Where a new record ends lies one of before the crash, whose number would be the next.

    Of three records the first is lost.  The next process ends its recovery with an empty record,
    which gets a page of its own, and writes one more, as the third of before begins a page later.
    """

    def record_bytes(n_blocks: int) -> int:
        return len(records_written(with_an_empty_volume(), n_blocks)[0].data)

    n = bisect_left(range(1000), 2 * JOURNAL_PAGE - record_bytes(1), lo=1, key=record_bytes)
    scene = with_an_empty_volume()
    lost, _, beyond = records_written(scene, n, 1, 1)
    events = scene.disk.events
    left = platter(scene.disk, len(events), lambda _, event: () if event is lost else (event,))
    scene.begin_again(left)
    (new,) = records_written(scene, 1, at=1000)
    if align(new.offset + len(new.data), JOURNAL_PAGE) != beyond.offset:
        pytest.fail("the old record does not lie behind the new one: write other ones before")
    kept = scene.after(KILLED)
    assert kept[1000 * BLOCK : 1001 * BLOCK] == b"x" * BLOCK
    assert kept.count(b"x") == BLOCK


def with_a_short_data_file() -> Images:
    """What a crash leaves that cut off the last block's zeros."""
    scene = Scene()
    slot: list[int] = []

    async def act(pool: Pool) -> None:
        volume = await the_volume(pool)
        await volume.write(0, b"x" * 100)
        slot.append(int(slots_of(volume.map.entries[:1, 0])[0]))

    scene.play(act)
    images = scene.crashed(KILLED)
    assert len(images["data"]) == (slot[0] + 1) * BLOCK
    del images["data"][slot[0] * BLOCK + 512 :]
    return images


def test_where_the_file_ends_does_not_decide_what_is_in_a_block() -> None:
    """Its rest is zeros: the next write behind it would bring it back, recovery's own perhaps."""
    images = with_a_short_data_file()
    assert_clean(images)
    disk = SimulatedDisk(images)
    found = recover(disk, Spread())
    assert found["v"][2][:101] == b"x" * 100 + b"\0"
    for at in range(len(disk.events)):
        for crash in (LAZY, KILLED):
            again = crash_images(disk, at, crash, random.Random(1))
            assert recover(SimulatedDisk(again), Spread()) == found


@pytest.mark.parametrize("error", [NoSpace("No space left on device"), WriteFailed("I/O error")])
def test_a_file_that_cannot_be_made_longer_loses_nothing(error: StoreError) -> None:
    def fault(operation: str, _name: str) -> None:
        if operation == "truncate":
            raise error

    disk = SimulatedDisk(with_a_short_data_file(), fault=fault)
    with pytest.raises(type(error)):
        recover(disk, Spread())
    disk.fault = None
    assert recover(disk, Spread())["v"][2][:101] == b"x" * 100 + b"\0"
