"""Who waits for the disk, how long and where: reads and threads whose end the test decides."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from nbdstore.errors import ReadFailed
from nbdstore.store.coldread import ColdRead, Progress
from nbdstore.store.host import Disk
from nbdstore.store.misses import (
    LONG_BYTES,
    MOST_LOOKS,
    N_BY_THREAD,
    N_IN_VAIN,
    N_THREADS,
    TURNS,
    Misses,
)


class Read(ColdRead):
    """A read that finds what the test says: `comes` at each look, until that is set otherwise."""

    def __init__(self, comes: Progress = Progress.AWAITED) -> None:
        self.comes = comes
        self.error: Exception | None = None
        self.n_bytes = 4096
        self.n_looks = 0
        self.is_abandoned = False
        self.told: list[str] = []

    def begin(self) -> None:
        self.told.append("begin")

    def end(self) -> None:
        self.told.append("end")

    def look(self) -> Progress:
        if self.error is not None:
            raise self.error
        self.n_looks += 1
        return self.comes

    def read(self) -> None:
        self.told.append("read")
        if self.error is not None:
            raise self.error


class Threads:
    """The threads of a disk, which come back when they are let."""

    def __init__(self) -> None:
        self.away: list[asyncio.Future[None]] = []
        self.n_ever = 0

    async def offload(self, call: Callable[[], Any]) -> None:
        gate = asyncio.get_running_loop().create_future()
        self.away.append(gate)
        self.n_ever += 1
        await gate
        call()

    def let(self) -> None:
        """Let the one that has been away for longest come back."""
        self.away.pop(0).set_result(None)


@pytest.fixture
def threads() -> Threads:
    return Threads()


@pytest.fixture
def misses(threads: Threads) -> Misses:
    return Misses(cast(Disk, threads))


async def turns(n: int) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


async def wait_for(misses: Misses, *reads: Read) -> list[asyncio.Task[None]]:
    """Begin to wait for `reads`, in order."""
    tasks = [asyncio.create_task(misses.wait(read)) for read in reads]
    await turns(2)
    return tasks


async def slow(misses: Misses, threads: Threads) -> None:
    """Have the disk known as slow."""
    for _ in range(N_IN_VAIN):
        (task,) = await wait_for(misses, Read())
        await turns(TURNS + 2)
        threads.let()
        await task


# -- looking -------------------------------------------------------------------------------------


async def test_what_comes_soon_needs_no_thread(misses: Misses, threads: Threads) -> None:
    reads = [Read() for _ in range(3)]
    tasks = await wait_for(misses, *reads)
    await turns(TURNS // 2)
    assert not any(task.done() for task in tasks)
    for read in reads:
        read.comes = Progress.DONE
    await asyncio.gather(*tasks)
    assert threads.n_ever == 0
    assert all(read.told == ["begin", "end"] for read in reads)


async def test_everybody_else_has_a_turn_between_two_looks(misses: Misses) -> None:
    read = Read()
    (task,) = await wait_for(misses, read)
    before = read.n_looks
    await turns(20)
    assert 19 <= read.n_looks - before <= 21
    read.comes = Progress.DONE
    await task


async def test_the_later_read_may_come_first(misses: Misses, threads: Threads) -> None:
    first, second = Read(), Read(Progress.DONE)
    tasks = await wait_for(misses, first, second)
    await tasks[1]
    assert not tasks[0].done()
    first.comes = Progress.DONE
    await tasks[0]
    assert threads.n_ever == 0


async def test_few_reads_are_looked_at_in_a_turn_when_nothing_comes(misses: Misses) -> None:
    reads = [Read() for _ in range(100)]
    tasks = await wait_for(misses, *reads)
    await turns(TURNS // 2)
    assert sum(read.n_looks > 0 for read in reads) == 4
    for read in reads:
        read.comes = Progress.DONE
    await asyncio.gather(*tasks)


async def test_a_long_read_that_is_there_does_not_queue_behind_those_that_are_awaited(
    misses: Misses,
) -> None:
    reads = [Read() for _ in range(10)]
    tasks = await wait_for(misses, *reads)
    long = Read(Progress.DONE)
    long.n_bytes = LONG_BYTES
    await misses.wait(long)
    assert long.told == ["begin", "end"]
    assert not any(task.done() for task in tasks)
    for read in reads:
        read.comes = Progress.DONE
    await asyncio.gather(*tasks)


async def test_a_turn_takes_no_more_than_its_bytes(misses: Misses) -> None:
    reads = [Read() for _ in range(4)]
    tasks = await wait_for(misses, *reads)
    for read in reads:
        read.n_bytes, read.comes = 3 << 20, Progress.DONE
    await turns(1)
    assert [read.told[-1] for read in reads] == ["end", "end", "begin", "begin"]
    await asyncio.gather(*tasks)


async def test_an_error_that_a_look_finds_is_that_read_s_alone(misses: Misses) -> None:
    bad, good = Read(), Read(Progress.DONE)
    bad.error = ReadFailed("data: Input/output error")
    tasks = await wait_for(misses, bad, good)
    await tasks[1]
    with pytest.raises(ReadFailed):
        await tasks[0]
    assert bad.told == ["begin", "end"]


# -- threads -------------------------------------------------------------------------------------


async def test_what_does_not_come_soon_waits_in_a_thread(misses: Misses, threads: Threads) -> None:
    read = Read()
    (task,) = await wait_for(misses, read)
    await turns(TURNS + 2)
    looks = read.n_looks
    assert len(threads.away) == 1
    await turns(TURNS)
    assert read.n_looks == looks == TURNS
    threads.let()
    await task
    assert read.told == ["begin", "read", "end"]


async def test_a_read_that_hangs_holds_up_nobody(misses: Misses, threads: Threads) -> None:
    hung = Read()
    (task,) = await wait_for(misses, hung)
    await turns(TURNS + 2)
    for _ in range(3 * TURNS):
        await asyncio.gather(*await wait_for(misses, Read(Progress.DONE)))
    assert threads.n_ever == 1
    threads.let()
    await task


async def test_a_read_that_others_overtake_for_ever_gets_a_thread(
    misses: Misses, threads: Threads
) -> None:
    overtaken = Read()
    (task,) = await wait_for(misses, overtaken)
    while not threads.away:
        await asyncio.gather(*await wait_for(misses, Read(Progress.DONE)))
        assert overtaken.n_looks <= MOST_LOOKS
    threads.let()
    await task
    assert overtaken.told == ["begin", "read", "end"]


async def test_what_is_in_doubt_goes_to_a_thread_at_once(misses: Misses, threads: Threads) -> None:
    (task,) = await wait_for(misses, Read(Progress.IN_DOUBT))
    await turns(2)
    assert len(threads.away) == 1
    threads.let()
    await task


async def test_few_threads_are_away_for_what_is_in_doubt_and_others_are_looked_at_meanwhile(
    misses: Misses, threads: Threads
) -> None:
    tasks = await wait_for(misses, *(Read(Progress.IN_DOUBT) for _ in range(20)))
    await asyncio.gather(*await wait_for(misses, Read(Progress.DONE)))
    while not all(task.done() for task in tasks):
        await turns(5)
        assert len(threads.away) <= N_THREADS
        if threads.away:
            threads.let()
    assert threads.n_ever == 20


async def test_an_error_in_a_thread_is_the_waiter_s(misses: Misses, threads: Threads) -> None:
    read = Read(Progress.IN_DOUBT)
    (task,) = await wait_for(misses, read)
    await turns(2)
    read.error = ReadFailed("data: Input/output error")
    threads.let()
    with pytest.raises(ReadFailed):
        await task
    assert read.told == ["begin", "read", "end"]


async def test_few_threads_are_away_and_one_that_comes_back_has_the_rest_looked_at(
    misses: Misses, threads: Threads
) -> None:
    await slow(misses, threads)
    reads = [Read() for _ in range(20)]
    tasks = await wait_for(misses, *reads)
    await turns(TURNS)
    assert len(threads.away) == N_THREADS
    assert sum(read.n_looks for read in reads) == 0
    for read in reads:
        read.comes = Progress.DONE
    threads.let()
    await asyncio.gather(tasks[0], *tasks[N_THREADS:])
    assert len(threads.away) == N_THREADS - 1
    for _ in range(N_THREADS - 1):
        threads.let()
    await asyncio.gather(*tasks)


# -- slow disks ----------------------------------------------------------------------------------


async def test_on_a_disk_known_as_slow_nobody_looks_in_vain(
    misses: Misses, threads: Threads
) -> None:
    await slow(misses, threads)
    for _ in range(N_BY_THREAD - 2):
        read = Read()
        (task,) = await wait_for(misses, read)
        await turns(1)
        threads.let()
        await task
        assert read.n_looks == 0


async def test_a_slow_disk_is_tried_again_and_may_have_become_quick(
    misses: Misses, threads: Threads
) -> None:
    await slow(misses, threads)
    for _ in range(N_BY_THREAD - 1):  # the first was the last that made it slow
        (task,) = await wait_for(misses, Read())
        await turns(1)
        threads.let()
        await task
    n_ever = threads.n_ever
    for _ in range(200):
        await asyncio.gather(*await wait_for(misses, Read(Progress.DONE)))
    assert threads.n_ever == n_ever


async def test_a_slow_disk_that_is_tried_again_and_still_is_slow_is_left_alone_again(
    misses: Misses, threads: Threads
) -> None:
    await slow(misses, threads)
    n_tried = 0
    for _ in range(3 * N_BY_THREAD):
        (task,) = await wait_for(misses, read := Read())
        while not threads.away:
            await turns(1)
        threads.let()
        await task
        n_tried += read.n_looks > 0
    assert 2 <= n_tried <= 3


# -- being given up ------------------------------------------------------------------------------


async def test_what_nobody_wants_any_more_is_neither_looked_at_nor_read(
    misses: Misses, threads: Threads
) -> None:
    read = Read()
    (task,) = await wait_for(misses, read)
    task.cancel()
    await turns(3)
    assert task.cancelled()
    looks = read.n_looks
    await turns(TURNS * 2)
    assert (read.n_looks, read.told) == (looks, ["begin", "end"])
    assert threads.n_ever == 0


async def test_what_a_thread_still_reads_stays_where_it_is_though_nobody_wants_it(
    misses: Misses, threads: Threads
) -> None:
    read = Read(Progress.IN_DOUBT)
    (task,) = await wait_for(misses, read)
    await turns(2)
    task.cancel()
    await turns(3)
    assert task.cancelled()
    assert read.told == ["begin"]
    threads.let()
    await misses.finish()
    assert read.told == ["begin", "read", "end"]
