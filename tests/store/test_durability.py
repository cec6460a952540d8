"""Flushes: what they cost, what they cover, and how they share."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from unittest import mock

import pytest

from nbdstore.errors import PoolFailed, WriteFailed
from nbdstore.store import Pool, Volume
from nbdstore.store.durability import IDLE_TURNS, INLINE_BYTES, MOST_TURNS
from nbdstore.store.journal import Journal
from tests.store.pools import MIB, Calls, hooked, opened, read, until

BLOCK = 4096


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
async def counted(directory: Path, calls: Calls) -> AsyncIterator[Pool]:
    """A pool whose calls to the disk are counted, and that does nothing unasked."""
    with hooked(calls):
        async with opened(directory, sync_interval_s=1e9, checkpoint_interval_s=1e9) as pool:
            yield pool


@pytest.fixture
async def volume(counted: Pool, calls: Calls) -> Volume:
    found = await counted.create_volume("v", 16 * MIB)
    calls.clear()
    return found


async def test_a_small_flush_is_one_fdatasync_of_the_journal(volume: Volume, calls: Calls) -> None:
    for number in range(5):
        assert volume.write_now([(number * BLOCK, b"x" * BLOCK)])
        calls.clear()
        await volume.flush()
        assert calls.syncs() == ["journal"]


async def test_a_large_flush_syncs_data_and_journal(volume: Volume, calls: Calls) -> None:
    assert volume.write_now([(0, b"x" * (INLINE_BYTES + BLOCK))])
    await volume.flush()
    assert sorted(calls.syncs()) == ["data", "journal"]


@pytest.mark.parametrize(("n_bytes", "names"), [(INLINE_BYTES, 1), (INLINE_BYTES + BLOCK, 2)])
async def test_the_border_between_small_and_large(
    volume: Volume, calls: Calls, n_bytes: int, names: int
) -> None:
    for at in range(0, n_bytes, BLOCK):
        assert volume.write_now([(at, b"x" * BLOCK)])
    await volume.flush()
    assert len(calls.syncs()) == names


async def test_a_small_flush_does_not_wait_for_what_another_volume_has_written(
    counted: Pool, volume: Volume, calls: Calls
) -> None:
    bulk = await counted.create_volume("bulk", 16 * MIB)
    assert bulk.write_now([(0, b"b" * 8 * MIB)])
    assert volume.write_now([(0, b"x" * BLOCK)])
    calls.clear()
    await volume.flush()
    assert calls.syncs() == ["journal"]
    await bulk.flush()
    assert sorted(calls.syncs()) == ["data", "journal", "journal"]


async def test_a_flush_with_nothing_to_do_syncs_nothing(volume: Volume, calls: Calls) -> None:
    assert volume.write_now([(0, b"x" * BLOCK)])
    await volume.flush()
    calls.clear()
    for _ in range(10):
        await volume.flush()
    assert calls == []


@pytest.mark.parametrize("change", ["trim", "write_zeroes"])
async def test_a_flush_covers_range_operations(volume: Volume, calls: Calls, change: str) -> None:
    assert volume.write_now([(0, b"x" * BLOCK)])
    await volume.flush()
    calls.clear()
    await getattr(volume, change)(0, BLOCK)
    assert calls.syncs() == []
    await volume.flush()
    assert calls.syncs() == ["journal"]


async def test_a_flush_makes_another_volumes_flush_no_cheaper_if_it_was_small(
    counted: Pool, volume: Volume, calls: Calls
) -> None:
    other = await counted.create_volume("other", MIB)
    assert volume.write_now([(0, b"x" * BLOCK)])
    assert other.write_now([(0, b"y" * BLOCK)])
    calls.clear()
    await volume.flush()
    await other.flush()
    assert calls.syncs() == ["journal", "journal"]


async def test_flushes_that_wait_together_share_a_round(
    counted: Pool, volume: Volume, calls: Calls
) -> None:
    volumes = [await counted.create_volume(f"v{n}", MIB) for n in range(20)]
    calls.clear()
    for found in volumes:
        assert found.write_now([(0, b"x" * 512)])
    await asyncio.gather(*(found.flush() for found in volumes for _ in range(5)))
    assert len(calls.syncs()) <= 2  # 80 KiB in all: data and journal, once


async def test_n_writers_that_flush_share_rounds(volume: Volume, calls: Calls) -> None:
    async def writer(number: int) -> None:
        for round_ in range(10):
            assert volume.write_now([(number * BLOCK, bytes([round_]) * BLOCK)])
            await volume.flush()

    await asyncio.gather(*map(writer, range(16)))
    n_rounds = volume.core.journal.n_syncs
    assert n_rounds < 16 * 10 / 4


async def test_who_comes_while_a_round_runs_waits_for_the_next(
    volume: Volume, calls: Calls
) -> None:
    assert volume.write_now([(0, b"1" * BLOCK)])
    first = asyncio.create_task(volume.flush())
    await until(lambda: calls.syncs() == ["journal"])
    assert volume.write_now([(BLOCK, b"2" * BLOCK)])
    second = asyncio.create_task(volume.flush())
    third = asyncio.create_task(volume.flush())
    await first
    await asyncio.gather(second, third)
    assert calls.syncs() == ["journal", "journal"]


async def test_a_flush_returns_only_after_a_sync_that_began_after_it(
    volume: Volume, calls: Calls
) -> None:
    """The sync that runs when a write comes does not cover it."""
    assert volume.write_now([(0, b"1" * BLOCK)])
    first = asyncio.create_task(volume.flush())
    await until(lambda: bool(calls.syncs()))
    assert volume.write_now([(BLOCK, b"2" * BLOCK)])
    seq = volume.last_seq
    await first
    assert volume.durable_seq < seq
    await volume.flush()
    assert volume.durable_seq >= seq


async def test_a_caller_that_goes_away_takes_nobody_with_it(volume: Volume, calls: Calls) -> None:
    assert volume.write_now([(0, b"1" * BLOCK)])
    gone, stays = asyncio.create_task(volume.flush()), asyncio.create_task(volume.flush())
    await until(lambda: bool(calls.syncs()))
    gone.cancel()
    await stays
    assert volume.write_now([(0, b"2" * BLOCK)])
    await volume.flush()


async def test_a_round_that_is_about_to_begin_or_runs_can_be_waited_for(
    counted: Pool, volume: Volume, calls: Calls
) -> None:
    done: list[object] = []
    assert volume.write_now([(0, b"1" * BLOCK)])
    assert volume.flush_soon(done.append)
    await counted._committer.finish()
    assert (done, calls.syncs()) == ([None], ["journal"])
    await counted._committer.finish()


# -- in place ------------------------------------------------------------------------------------


async def test_after_quick_syncs_small_ones_are_done_in_place(volume: Volume, calls: Calls) -> None:
    """In one turn of the loop, that is: nobody else has a turn before it is done."""
    volume.core.host = mock.Mock(wraps=volume.core.host, monotonic=lambda: 0.0)
    in_place = []
    for number in range(8):
        assert volume.write_now([(0, bytes([number]) * BLOCK)])
        calls.clear()
        flush = asyncio.create_task(volume.flush())
        await asyncio.sleep(0)  # it asks for a round
        await asyncio.sleep(0)  # the round runs, or begins
        in_place.append(volume.durable_seq >= volume.last_seq)
        await flush
        assert calls.syncs() == ["journal"]
    assert in_place == [False] * 6 + [True] * 2


async def test_a_slow_sync_sends_those_after_it_to_threads(volume: Volume) -> None:
    now_s = 0.0

    def a_second_later() -> float:
        nonlocal now_s
        now_s += 1
        return now_s

    volume.core.host = mock.Mock(wraps=volume.core.host, monotonic=lambda: 0.0)
    for _ in range(7):
        assert volume.write_now([(0, b"x" * BLOCK)])
        await volume.flush()
    volume.core.host.monotonic = a_second_later
    with mock.patch.object(Journal, "sync_in_place", autospec=True) as in_place:
        for _ in range(3):
            assert volume.write_now([(0, b"x" * BLOCK)])
            await volume.flush()
        assert in_place.call_count == 1


def make_quick(volume: Volume) -> None:
    """Have all syncs take no time."""
    volume.core.host = mock.Mock(wraps=volume.core.host, monotonic=lambda: 0.0)
    volume.services.committer._sync_s = 0.0


async def test_nothing_is_done_in_place_while_others_read(counted: Pool, volume: Volume) -> None:
    make_quick(volume)
    other = await counted.create_volume("other", MIB)
    with mock.patch.object(Journal, "sync_in_place", autospec=True) as in_place:
        for n_reads, expected in ((0, 1), (10, 1), (0, 2)):
            for _ in range(n_reads):
                assert other.read_now(0, BLOCK) == [BLOCK]
            assert volume.write_now([(0, b"x" * BLOCK)])
            await volume.flush()
            assert in_place.call_count == expected


async def test_a_large_flush_is_never_done_in_place(volume: Volume) -> None:
    make_quick(volume)
    with mock.patch.object(Journal, "sync_in_place", autospec=True) as in_place:
        assert volume.write_now([(0, b"x" * (INLINE_BYTES + BLOCK))])
        await volume.flush()
        assert not in_place.called


async def test_callbacks_of_several_volumes_share_a_round(
    counted: Pool, volume: Volume, calls: Calls
) -> None:
    volumes = [volume, *[await counted.create_volume(f"v{n}", MIB) for n in range(7)]]
    make_quick(volume)
    calls.clear()
    done: list[object] = []
    for found in volumes:
        assert found.write_now([(0, b"x" * BLOCK)])
    for found in volumes:
        assert found.flush_soon(done.append)
    assert done == []
    await until(lambda: len(done) == 8)
    assert done == [None] * 8
    assert calls.syncs() == ["journal"]
    assert not any(found.flush_soon(done.append) for found in volumes)


async def test_a_lone_client_has_its_flush_done_at_once(volume: Volume, calls: Calls) -> None:
    make_quick(volume)
    done: list[object] = []
    for number in range(3):
        assert volume.write_now([(0, bytes([number]) * BLOCK)])
        calls.clear()
        assert not volume.flush_soon(done.append)
        assert calls.syncs() == ["journal"]
        assert volume.durable_seq >= volume.last_seq
    await volume.flush()
    assert (done, calls.syncs()) == ([], ["journal"])


async def test_a_flush_after_one_that_was_shared_waits_for_others(volume: Volume) -> None:
    make_quick(volume)
    done: list[object] = []
    for number in range(2):
        assert volume.write_now([(number * BLOCK, b"1" * BLOCK)])
    assert volume.flush_soon(done.append)
    assert volume.flush_soon(done.append)
    await until(lambda: len(done) == 2)
    assert volume.write_now([(0, b"2" * BLOCK)])
    assert volume.flush_soon(done.append)
    await until(lambda: len(done) == 3)
    assert volume.write_now([(0, b"3" * BLOCK)])
    assert not volume.flush_soon(done.append)


async def test_a_lone_clients_large_flush_is_no_less_large(volume: Volume, calls: Calls) -> None:
    make_quick(volume)
    done: list[object] = []
    assert volume.write_now([(0, b"1" * (INLINE_BYTES + BLOCK))])
    assert volume.flush_soon(done.append)
    await until(lambda: bool(done))
    assert done == [None]
    assert sorted(calls.syncs()) == ["data", "journal"]


async def test_a_lone_clients_flush_that_fails_is_said_to_at_once(volume: Volume) -> None:
    make_quick(volume)
    done: list[object] = []
    assert volume.write_now([(0, b"1" * BLOCK)])
    failing = WriteFailed("journal: Input/output error while syncing")
    with mock.patch.object(Journal, "sync_in_place", side_effect=failing):
        for _ in range(2):
            with pytest.raises(PoolFailed, match="Input/output error"):
                volume.flush_soon(done.append)
    with pytest.raises(PoolFailed):
        await volume.flush()
    assert volume.durable_seq < volume.last_seq
    assert done == []


# -- waiting for others -------------------------------------------------------------------------


async def share_a_round(volume: Volume) -> None:
    """Have two clients write, then flush, by one round."""
    done: list[object] = []
    for number in range(2):
        assert volume.write_now([(number * BLOCK, b"1" * BLOCK)])
    for _ in range(2):
        assert volume.flush_soon(done.append)
    await until(lambda: len(done) == 2)


async def turns_until(done: list[object], n: int) -> int:
    """How many turns of the loop it takes until `done` has `n` entries."""
    n_turns = 0
    while len(done) < n:
        await asyncio.sleep(0)
        n_turns += 1
    return n_turns


async def test_a_round_waits_for_who_has_written_and_is_about_to_flush(
    volume: Volume, calls: Calls
) -> None:
    make_quick(volume)
    await share_a_round(volume)
    calls.clear()
    done: list[object] = []
    for number in range(3):
        assert volume.write_now([(number * BLOCK, b"2" * BLOCK)])
    for _ in range(3):
        assert calls.syncs() == []
        assert volume.flush_soon(done.append)
        for _ in range(IDLE_TURNS - 1):
            await asyncio.sleep(0)
    await until(lambda: len(done) == 3)
    assert calls.syncs() == ["journal"]


async def test_a_round_waits_a_few_turns_for_who_does_not_flush(volume: Volume) -> None:
    make_quick(volume)
    await share_a_round(volume)
    done: list[object] = []
    for number in range(2):
        assert volume.write_now([(number * BLOCK, b"2" * BLOCK)])
    assert volume.flush_soon(done.append)
    assert 1 < await turns_until(done, 1) <= IDLE_TURNS + 1


async def test_a_round_does_not_wait_where_many_write_and_few_flush(volume: Volume) -> None:
    make_quick(volume)
    await share_a_round(volume)
    done: list[object] = []
    for _ in range(7):
        assert volume.write_now([(0, b"2" * BLOCK)])
    with mock.patch.object(Journal, "sync", autospec=True) as sync:
        assert volume.flush_soon(done.append)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert sync.called


async def test_a_round_does_not_wait_for_ever_where_others_go_on_coming(volume: Volume) -> None:
    """In each turn somebody reads, and somebody flushes: one has always yet to."""
    make_quick(volume)
    await share_a_round(volume)
    done: list[object] = []
    assert volume.write_now([(0, b"2" * BLOCK)])
    for _ in range(MOST_TURNS + 1):
        assert not done
        volume.read_now(0, BLOCK)
        assert volume.flush_soon(done.append)
        await asyncio.sleep(0)
    assert len(done) == MOST_TURNS + 1


async def test_a_round_for_all_waits_for_nobody(counted: Pool, volume: Volume) -> None:
    make_quick(volume)
    await share_a_round(volume)
    for number in range(2):
        assert volume.write_now([(number * BLOCK, b"2" * BLOCK)])
    done: list[object] = []
    assert volume.flush_soon(done.append)
    settling = asyncio.create_task(counted._committer.commit_all())
    with mock.patch.object(Journal, "sync", autospec=True) as sync:
        await asyncio.sleep(0)  # it asks for all
        for _ in range(2):  # the round begins, and a task of it
            await asyncio.sleep(0)
        assert sync.called
    await settling


# -- blocks in the records that map them ---------------------------------------------------------


def bytes_of(volume: Volume, write: tuple[int, bytes]) -> int:
    """How much a write puts into the journal."""
    before = volume.core.journal.head
    assert volume.write_now([write])
    return volume.core.journal.head - before


async def test_what_follows_a_small_flush_goes_inline_at_once(volume: Volume, calls: Calls) -> None:
    assert bytes_of(volume, (0, b"1" * BLOCK)) < BLOCK
    await volume.flush()
    assert ("read", "data") in calls
    for number in range(3):
        assert bytes_of(volume, (0, bytes([number]) * BLOCK)) > BLOCK
        calls.clear()
        await volume.flush()
        # Nothing is read again, and no record needed but the one that vouches.
        assert calls == [("sync", "journal"), ("write", "journal")]


async def test_no_more_goes_inline_at_once_than_a_small_flush_covers(volume: Volume) -> None:
    assert volume.write_now([(0, b"1" * BLOCK)])
    await volume.flush()
    for at in range(0, INLINE_BYTES, 4 * BLOCK):
        assert bytes_of(volume, (at, b"2" * 4 * BLOCK)) > 4 * BLOCK
    assert bytes_of(volume, (MIB, b"3" * BLOCK)) < BLOCK
    await volume.flush()
    assert bytes_of(volume, (0, b"4" * BLOCK)) < BLOCK  # it was a large one


async def test_a_small_flush_covers_what_is_inline_already_and_what_is_not(
    volume: Volume, calls: Calls
) -> None:
    assert volume.write_now([(0, b"1" * BLOCK)])
    await volume.flush()
    volume.flushes_little = False
    assert bytes_of(volume, (0, b"2" * BLOCK)) < BLOCK
    volume.flushes_little = True
    assert bytes_of(volume, (BLOCK, b"3" * BLOCK)) > BLOCK
    calls.clear()
    await volume.flush()
    assert calls.count(("read", "data")) == 1
    assert calls.syncs() == ["journal"]


# -- freed slots ---------------------------------------------------------------------------------


async def test_overwriting_without_syncs_uses_new_slots(counted: Pool, volume: Volume) -> None:
    seen = set()
    for number in range(50):
        assert volume.write_now([(0, bytes([number]) * BLOCK)])
        seen.add(int(volume.map.words[0]))
    assert len(seen) == 50
    assert counted.status()["reclaimable"] >= 49 * BLOCK


async def test_settling_makes_all_that_was_freed_usable(counted: Pool, volume: Volume) -> None:
    for number in range(50):
        assert volume.write_now([(0, bytes([number]) * BLOCK)])
    free = counted.status()["free"]
    await counted._committer.settle()
    assert counted.status()["reclaimable"] == 0
    assert counted.status()["free"] >= free + 49 * BLOCK


async def test_what_is_freed_is_usable_only_when_a_durable_record_says_so(
    counted: Pool, volume: Volume
) -> None:
    assert volume.write_now([(0, b"1" * BLOCK)])
    await volume.flush()
    assert volume.write_now([(0, b"2" * BLOCK)])  # frees the first
    await volume.flush()  # makes the freeing durable; no record says so yet
    assert counted.status()["reclaimable"] > 0
    assert volume.write_now([(BLOCK, b"3" * BLOCK)])  # says so; it is not durable itself
    assert counted.status()["reclaimable"] > 0
    await volume.flush()
    assert counted.status()["reclaimable"] == 0


# -- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["journal", "data"])
async def test_a_failed_sync_is_final(directory: Path, broken: str) -> None:
    fail = False

    def hook(operation: str, name: str) -> None:
        if fail and (operation, name) == ("sync", broken):
            raise WriteFailed(f"{name}: Input/output error while syncing")

    with hooked(hook):
        async with opened(directory) as pool:
            volume = await pool.create_volume("v", MIB)
            await volume.write(0, b"x" * 100_000)
            fail = True
            waiters = [asyncio.create_task(volume.flush()) for _ in range(3)]
            failures: list[object] = []
            assert volume.flush_soon(failures.append)
            for found in await asyncio.gather(*waiters, return_exceptions=True) + failures:
                assert isinstance(found, PoolFailed)
                assert "Input/output error" in str(found)
            fail = False  # the kernel has dropped the pages: a second sync would lie
            for _ in range(2):
                with pytest.raises(PoolFailed):
                    await volume.flush()
                with pytest.raises(PoolFailed):
                    volume.flush_soon(failures.append)
            assert len(failures) == 1
            with pytest.raises(PoolFailed):
                volume.write_now([(0, b"y")])
            with pytest.raises(PoolFailed):
                await volume.write(0, b"y")
            with pytest.raises(PoolFailed):
                await volume.trim(0, BLOCK)
            with pytest.raises(PoolFailed):
                await pool.create_volume("w", MIB)
            with pytest.raises(PoolFailed):
                await pool.checkpoint()
            assert pool.status()["state"] == "failed"
            assert "Input/output error" in pool.status()["failure"]
            assert await read(volume, 0, 100_000) == b"x" * 100_000  # reads go on
    async with opened(directory) as pool:
        assert pool.status()["state"] == "ok"
        assert await read(pool.volumes["v"], 0, 100_000) == b"x" * 100_000


async def test_what_is_unsynced_for_long_is_synced_unasked(directory: Path) -> None:
    calls = Calls()
    with hooked(calls):
        async with opened(directory, sync_interval_s=0.0) as pool:
            volume = await pool.create_volume("v", MIB)
            calls.clear()
            assert volume.write_now([(0, b"x" * BLOCK)])
            await until(lambda: "data" in calls.syncs())
            await until(lambda: pool.status()["unsynced"] == 0)


async def test_who_waits_for_all_hears_that_its_own_round_failed(directory: Path) -> None:
    fail = False

    def hook(operation: str, name: str) -> None:
        if fail and (operation, name) == ("sync", "data"):
            raise WriteFailed(f"{name}: Input/output error while syncing")

    with hooked(hook):
        async with opened(directory) as pool:
            volume = await pool.create_volume("v", MIB)
            await volume.write(0, b"x" * BLOCK)
            fail = True
            with pytest.raises(PoolFailed, match="Input/output error"):
                await pool._committer.commit_all()


@pytest.mark.parametrize("n_turns", [1, 3])
async def test_a_round_that_is_cancelled_fails_the_pool_and_is_not_waited_for(
    counted: Pool, volume: Volume, n_turns: int
) -> None:
    """Before its task has begun, and while it waits for the sync."""
    committer = counted._committer
    assert volume.write_now([(0, b"x" * BLOCK)])
    failures: list[object] = []
    with mock.patch.object(Journal, "sync", lambda *_: asyncio.Event().wait()):
        assert volume.flush_soon(failures.append)
        for _ in range(n_turns):
            await asyncio.sleep(0)
        assert committer._task is not None
        committer._task.cancel()
        await committer.finish()
    assert [type(failure) for failure in failures] == [PoolFailed]
    with pytest.raises(PoolFailed, match="cancelled"):
        await volume.flush()


async def test_a_sync_does_not_wait_for_many_who_read_in_threads(
    counted: Pool, volume: Volume
) -> None:
    may_end = threading.Event()
    reads = [asyncio.create_task(volume.core.read_in_thread(may_end.wait)) for _ in range(50)]
    try:
        assert volume.write_now([(0, b"x" * (INLINE_BYTES + BLOCK))])
        await volume.flush()
        assert not any(read_.done() for read_ in reads)
    finally:
        may_end.set()
    assert await asyncio.gather(*reads) == [True] * 50
