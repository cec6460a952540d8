"""Waiting for the disk: the reads of a pool that the page cache could not serve.

Owns who waits how long and where; what a read is, is told in coldread.py.

A thread that waits for a block costs 20 to 50 us of hopping there and back, and both locks of the
interpreter, where a fast disk needs 40 us for the block itself.  A read that has missed the page
cache has started the disk, though, and the disk does not care who waits.  So the loop looks
again, once in each of its turns, which are short as nothing else keeps it: at the oldest reads
first, and at few that have not come.  It stays a loop: everybody else has a turn in between.

    state      a read that has missed        leaves it when
    -------    ---------------------------   -------------------------------------------------
    quick      is looked at in each turn     nothing has come in 64 turns (some 300 us), four
                                             times in a row with nothing come in between
    slow       waits in a thread             64 reads came from threads

In either state, reads that nothing has come of in 64 turns wait in threads, the oldest first, and
before them those that looking does not do for; the others are looked at whenever a thread has
come back.  Since the disk works on all of them meanwhile, few threads are enough, and syncs find
one that is free.

Turns are counted, and not time: where the loop has other things to do, looking costs no more.

What can hold the loop up nevertheless: asking a device whose queue is full (nr_requests, often 256)
waits for a place in it, though RWF_NOWAIT says not to; as does a filesystem that must read where
the blocks of the file are.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from nbdstore.store.coldread import ColdRead, Progress
from nbdstore.store.host import Disk

TURNS: Final = 64
MOST_LOOKS: Final = 1000  # at one read of which nothing comes, while others do
N_IN_VAIN: Final = 4
N_BY_THREAD: Final = 64
N_THREADS: Final = 6  # fewer than the disk has, see local_host.py
_LOOKS: Final = 4  # at reads of which nothing has come, in one turn: 1.5 us each
LONG_BYTES: Final = 128 << 10  # of reads whose copying costs more than a task, 10 us
_TURN_BYTES: Final = 4 << 20  # taken in one turn; some 1 ms

OnEnd = Callable[[Exception | None], None]
"""Called when a read is done, or with what went wrong."""


class Misses:
    """The reads of one pool that wait for the disk."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._waiting: deque[tuple[ColdRead, OnEnd]] = deque()
        self._overdue: deque[tuple[ColdRead, OnEnd]] = deque()  # looked at no more
        self._threads: set[asyncio.Task[None]] = set()
        self._will_look = False
        self._n_turns = 0  # since something came
        self._n_in_vain = 0
        self._n_by_thread = 0  # since it is slow

    async def wait(self, read: ColdRead) -> None:
        """Return when `read` is done.

        Raises:
            Corruption, ReadFailed: see ColdRead.
        """
        future = asyncio.get_running_loop().create_future()

        def ended(error: Exception | None) -> None:
            if not future.done():
                future.set_exception(error) if error else future.set_result(None)

        self.start(read, ended)
        try:
            await future
        except asyncio.CancelledError:
            read.is_abandoned = True
            raise

    def start(self, read: ColdRead, on_end: OnEnd) -> None:
        """Call `on_end` when `read` is done, which may be at once; never if it is abandoned first.

        A long one is looked at before it queues, as nobody may have: see Reading.now.
        """
        read.begin()
        if not self._waiting:
            self._n_turns = 0
        miss = (read, on_end)
        found = Progress.AWAITED
        if read.n_bytes >= LONG_BYTES:
            found = self._look_at(miss)
            self._wait_in_threads(self._overdue)
        if found in (Progress.AWAITED, Progress.ADVANCED):
            self._waiting.append(miss)
        self._go_on()

    @property
    def are_waiting(self) -> bool:
        """Whether some are looked at."""
        return bool(self._waiting)

    async def finish(self) -> None:
        """Wait for the threads."""
        while self._threads:
            await asyncio.wait(self._threads)

    # -- looking ----------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Look in the next turn, or have threads wait."""
        if not self._waiting or self._will_look:
            return
        if self._n_in_vain < N_IN_VAIN and self._n_turns < TURNS:
            self._will_look = True
            asyncio.get_running_loop().call_soon(self._turn)
        else:
            self._wait_in_threads(self._waiting)

    def _turn(self) -> None:
        self._will_look = False
        if self._look():
            self._n_turns = self._n_in_vain = 0
        else:
            self._n_turns += 1
            if self._n_turns == TURNS:
                self._n_in_vain += 1
                self._n_by_thread = 0
        self._go_on()

    def _look(self) -> bool:
        """Take what has come, from the oldest read on; tell whether anything has."""
        waiting = self._waiting
        awaited: list[tuple[ColdRead, OnEnd]] = []
        has_come = False
        left_bytes = _TURN_BYTES
        while waiting and left_bytes > 0 and len(awaited) < _LOOKS:
            miss = waiting.popleft()
            found = self._look_at(miss)
            has_come |= found in (Progress.DONE, Progress.ADVANCED)
            if found is Progress.DONE:
                left_bytes -= miss[0].n_bytes
            elif found is not Progress.IN_DOUBT:
                awaited.append(miss)
        waiting.extendleft(reversed(awaited))
        self._wait_in_threads(self._overdue)
        return has_come

    def _look_at(self, miss: tuple[ColdRead, OnEnd]) -> Progress:
        """Look at one read, and end it if it is done, or see to it that it gets a thread."""
        read, on_end = miss
        try:
            found = Progress.DONE if read.is_abandoned else read.look()
        except Exception as error:
            self._end(read, on_end, error)
            return Progress.DONE
        if found is Progress.DONE:
            self._end(read, on_end, None)
        elif found is Progress.AWAITED and read.n_looks >= MOST_LOOKS:
            found = Progress.IN_DOUBT
        if found is Progress.IN_DOUBT:
            self._overdue.append(miss)
        return found

    def _end(self, read: ColdRead, on_end: OnEnd, error: Exception | None) -> None:
        read.end()
        if not read.is_abandoned:
            on_end(error)

    # -- threads ----------------------------------------------------------------------------

    def _wait_in_threads(self, reads: deque[tuple[ColdRead, OnEnd]]) -> None:
        """Have threads wait for the first of `reads`, as far as there are any."""
        while reads and len(self._threads) < N_THREADS:
            task = asyncio.create_task(self._in_thread(*reads.popleft()))
            self._threads.add(task)
            task.add_done_callback(self._came_back)

    async def _in_thread(self, read: ColdRead, on_end: OnEnd) -> None:
        error = None
        try:
            if not read.is_abandoned:
                await self._disk.offload(read.read)
        except Exception as fault:
            error = fault
        self._end(read, on_end, error)

    def _came_back(self, task: asyncio.Task[None]) -> None:
        self._threads.discard(task)
        self._n_by_thread += 1
        if self._n_by_thread == N_BY_THREAD:
            self._n_in_vain = min(self._n_in_vain, N_IN_VAIN - 1)
        self._n_turns = 0
        self._wait_in_threads(self._overdue)
        if self._waiting and not self._will_look:
            self._look()
        self._go_on()
