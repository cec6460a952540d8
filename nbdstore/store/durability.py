"""Group commit: what makes an acknowledged write durable, for how little.

Owns the rounds of syncs and the knowledge of what is durable; knows volumes only as owners of
unsynced data.

A round covers everything written before it began, for all who wait then; those who come while it
runs share the next one.  It comes in two kinds:

- *small*: what the waiting volumes have unsynced fits into 64 KiB.  Its blocks go inline into the
  journal, and only that is synced: one fdatasync into recycled space.  Other volumes' dirty data is
  not waited for.  Blocks go inline when the round begins, into one DATA record; or, as long as
  small rounds follow each other, when they are written, into the record that maps them, which
  saves the round reading them again and a record.
- *full*: the data file and the journal are synced, side by side.  Their order does not matter:
  a record whose data did not make it is found by its checksums.

A hop to a thread and back costs more than a fast disk takes for a small round: 100 us and more,
with the locks of the interpreter.  So a small round is done in place, on the loop, if nobody is
held up by it: since the last one there were hardly any reads and writes but one for each flush, as
of clients that write and flush by turns, and rounds took less than 10 ms on average.  A round
begins in the loop's next turn, so that all who ask in this one share it; but at once where nobody
else asked for the last one, or did anything since.

Where clients write and flush by turns, those whose writes were answered since the last round are
about to flush, too.  So a round that follows a shared one waits for them: while there are more
such writes, or reads, than flushes, but not through more than a few turns in which neither comes,
nor through too many in all.  Of eight clients, seven share a round then instead of four, and each
of theirs takes a fifth less CPU.

``journal.durable_seq`` is the seq up to which records *and the data they map* are durable, in
every volume; it travels in the header of each record.  Slots freed by record f may be used again
once a *durable* record carries a durable_seq >= f, so that recovery knows that it need not check
what stood in them; or once a checkpoint that includes f is durable.  A failed sync is final: the
kernel has dropped the dirty pages and a second sync would lie (fsync(2)); the pool fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

import numpy as np
from xxhash import xxh3_64_intdigest

from nbdstore.errors import PoolFailed, ReadFailed, StoreError
from nbdstore.store import records
from nbdstore.store.core import Core, log
from nbdstore.store.host import Failpoint
from nbdstore.store.layout import SlotSequence

INLINE_BYTES: Final = 64 << 10
_SMOOTHING: Final = 8  # rounds, of the average time of one
_CALLS_PER_FLUSH: Final = 3  # a client that flushes each write makes one
IDLE_TURNS: Final = 8  # of the loop, 2 us each: those who were answered need some to flush
MOST_TURNS: Final = 256  # in all: those who come may have others come after them for ever

OnDurable = Callable[[PoolFailed | None], None]
"""Called when something is durable, or with why the pool failed."""


class Unsynced:
    """Data of one volume that is in the page cache only.

    Attributes:
        first_seq: the first record that maps some of it; 0 if there is none.
        n_bytes: how much.
        slots, checksums: where it lies and what it is, while it is little enough to go inline; but
            for what stands in the journal already, in the record that maps it.
    """

    __slots__ = ("checksums", "first_seq", "n_bytes", "slots")

    def __init__(self) -> None:
        self.first_seq = 0
        self.n_bytes = 0
        self.slots: list[int] = []
        self.checksums: list[int] = []

    def add(
        self,
        seq: int,
        slots: SlotSequence,
        checksums: list[int],
        n_bytes: int,
        *,
        is_inline: bool = False,
    ) -> None:
        """Note that record `seq` mapped `slots`, `n_bytes` in all, and has them if `is_inline`."""
        if not self.first_seq:
            self.first_seq = seq
        self.n_bytes += n_bytes
        if self.n_bytes <= INLINE_BYTES and not is_inline:
            self.slots += slots.tolist() if isinstance(slots, np.ndarray) else slots
            self.checksums += checksums


class Syncable(Protocol):
    """What a round needs of a volume: its newest and its newest durable record.

    Attributes:
        flushes_little: its last round was a small one, and so may be the next.
    """

    last_seq: int
    durable_seq: int
    unsynced: Unsynced
    flushes_little: bool


@dataclass(slots=True)
class _Round:
    """One round of syncs.

    Attributes:
        waiters: whom to tell of its end.
        waiting: the volumes that they wait for.
        everything: they wait for all volumes.
        is_small: only the journal is synced.
        seq: the last record that the sync covers.
        carried: the durable_seq that recovery is sure to learn of by it.
    """

    waiters: list[OnDurable]
    waiting: list[Syncable]
    everything: bool = False
    is_small: bool = False
    seq: int = 0
    carried: int = 0


class Committer:
    """Runs the rounds of one pool.

    Attributes:
        horizon: what records up to it freed may be used again, as far as readers allow.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        # Dicts for the sake of their order: what a round writes depends on no addresses.
        self._unsynced: dict[Syncable, None] = {}
        self._waiting: dict[Syncable, None] = {}
        self._everything = False
        self._waiters: list[OnDurable] = []
        self._sync_s = 2 * core.options.in_place_sync_s  # of small rounds, on average
        self._n_waiters = 0  # of the last round
        self._n_come = 0  # calls and flushes since then, when last looked at
        self._n_idle_turns = 0  # in which neither came
        self._n_turns = 0  # through which the next round was put off
        self._is_busy = False  # a round runs, or will in the next turn
        self._task: asyncio.Task[None] | None = None  # of a round that waits for threads
        self._all_durable_seq = 0
        self.horizon = 0

    def wants_inline(self, volume: Syncable, n_blocks: int) -> bool:
        """Whether `n_blocks` that `volume` is to write should stand in their record as well.

        That is, whether they are likely to be flushed soon, with no more than a small round takes.
        """
        if not volume.flushes_little:
            return False
        return volume.unsynced.n_bytes + n_blocks * self._core.block_size <= INLINE_BYTES

    def wrote(
        self,
        volume: Syncable,
        seq: int,
        slots: SlotSequence,
        checksums: list[int],
        *,
        is_inline: bool = False,
    ) -> None:
        """Note that record `seq` of `volume` mapped `slots`, which hold data of `checksums`.

        Arguments:
            is_inline: the record has their data, too.
        """
        volume.last_seq = seq
        n_bytes = len(slots) * self._core.block_size
        volume.unsynced.add(seq, slots, checksums, n_bytes, is_inline=is_inline)
        self._unsynced[volume] = None

    def forget(self, volume: Syncable) -> None:
        """`volume` was removed: nobody needs its data."""
        self._unsynced.pop(volume, None)

    @property
    def n_unsynced_bytes(self) -> int:
        """Data in the page cache only, in bytes."""
        return sum(v.unsynced.n_bytes for v in self._unsynced)

    @property
    def is_settled(self) -> bool:
        """All is durable, a durable record says so, and no freed slot waits to be used again."""
        core = self._core
        told = self.horizon >= core.journal.content_seq
        return told and not self._unsynced and not core.slots.n_quarantined

    async def commit(self, volume: Syncable) -> None:
        """Return when all records of `volume` written so far are durable, with their data.

        Raises:
            PoolFailed: the sync failed, now or before.
        """
        target = volume.last_seq
        while not self._is_durable(volume, target):
            self._core.check_alive()
            self._waiting[volume] = None
            await self._round()

    def commit_soon(self, volume: Syncable, done: OnDurable) -> bool:
        """Like :meth:`commit`, but call `done` at its end; False, and no call, if all is durable.

        It is also if a lone client asks, whose round is done in place before this returns. A
        callback and no coroutine: a task for each of many small flushes costs as much as they do.

        Raises:
            PoolFailed: that round failed.
        """
        if self._is_durable(volume, volume.last_seq):
            return False
        if self._is_alone:
            if not self._begin(_Round([done], [volume])):
                return True
            self._is_busy = False
            self._core.check_alive()
            return False
        self._waiting[volume] = None
        self._join(done)
        return True

    @property
    def _is_alone(self) -> bool:
        """Whoever asks for a sync now is the only one who did lately: it need not be shared."""
        n_calls = self._core.n_calls
        return n_calls <= 1 and self._n_waiters <= 1 and self._is_quick and not self._is_busy

    def _is_durable(self, volume: Syncable, seq: int) -> bool:
        return volume.durable_seq >= seq or self._all_durable_seq >= seq

    async def commit_all(self) -> None:
        """Return when everything written so far is durable.

        Raises:
            PoolFailed: the sync failed, now or before.
        """
        self._core.check_alive()
        self._everything = True
        await self._round()
        self._core.check_alive()

    async def settle(self) -> None:
        """Make durable that everything is durable.

        What is freed by now can be used again, and damage to what is there by now will be found.
        """
        journal = self._core.journal
        if self._core.slots.freed_by > journal.seq and journal.room_for(0):
            self._core.append(b"")
        await self.commit_all()
        if not self.is_settled:
            if journal.carried_durable_seq < journal.durable_seq and journal.room_for(0):
                self._core.append(b"")
            await self.commit_all()

    async def finish(self) -> None:
        """Wait for the round that runs or is about to begin, if any."""
        while self._is_busy:
            if self._task is None:
                await self._core.host.sleep(0)
            else:
                await asyncio.wait([self._task])

    async def _round(self) -> None:
        """Wait for the end of the next round to begin."""
        waiter = asyncio.get_running_loop().create_future()
        self._join(lambda _: None if waiter.done() else waiter.set_result(None))
        await waiter

    def _join(self, done: OnDurable) -> None:
        """Call `done` at the end of the next round, which begins in the loop's next turn.

        Then all who are served in this turn share it.
        """
        self._waiters.append(done)
        if not self._is_busy:
            self._is_busy = True
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        if self._others_are_about_to_join():
            asyncio.get_running_loop().call_soon(self._next)
            return
        round_ = _Round(self._waiters, [*self._waiting], self._everything)
        self._waiters, self._waiting, self._everything = [], {}, False
        if self._begin(round_):
            self._end(round_)

    def _others_are_about_to_join(self) -> bool:
        """Whether the next round should begin a turn later, for the sake of who flushes by then.

        Each call that comes brings it nearer to where there are too many of them, unless a flush
        comes with it: then it is the turns that are counted.
        """
        n_waiters, n_calls = len(self._waiters), self._core.n_calls
        n_likely = max(n_waiters, self._n_waiters)
        if self._n_waiters <= 1 or self._everything:
            return False
        if not n_waiters < n_calls <= _CALLS_PER_FLUSH * n_likely:
            return False
        if n_waiters + n_calls != self._n_come:
            self._n_come = n_waiters + n_calls
            self._n_idle_turns = 0
        self._n_idle_turns += 1
        self._n_turns += 1
        return self._n_idle_turns <= IDLE_TURNS and self._n_turns <= MOST_TURNS

    def _begin(self, round_: _Round) -> bool:
        """Begin a round; True if it is done as well, False if it goes on in a task.

        Without a task, and without an await, a round in place costs 5 us less, of some 100.
        """
        core = self._core
        self._is_busy = True
        self._n_waiters = len(round_.waiters)
        is_quiet = core.n_calls <= _CALLS_PER_FLUSH * self._n_waiters
        core.n_calls = self._n_come = self._n_turns = 0
        try:
            self._write(round_)
            in_place = round_.is_small and is_quiet and self._is_quick
            if in_place:
                self._sync_in_place()
                self._synced(round_)
        except Exception as error:
            in_place = True
            self._fail(error)
        if not in_place:
            self._task = asyncio.create_task(self._go_on(round_))
            self._task.add_done_callback(partial(self._gone, round_))
        return in_place

    async def _go_on(self, round_: _Round) -> None:
        # While this waits, new records and unsynced data may come; they belong to a later round.
        try:
            await self._sync_by_threads(round_)
            self._synced(round_)
        except Exception as error:
            self._fail(error)
        self._task = None
        self._end(round_)

    def _gone(self, round_: _Round, task: asyncio.Task[None]) -> None:
        """End a round whose task was cancelled, perhaps before it began, as when the loop ends.

        Nobody hears then what its sync comes to.
        """
        if task.cancelled():
            self._core.fail("its commit was cancelled")
            self._task = None
            self._end(round_)

    def _fail(self, error: Exception) -> None:
        if isinstance(error, StoreError):
            self._core.fail(str(error))
        else:
            log.error("a bug in the commit of the pool", exc_info=error)
            self._core.fail("its commit ended by a bug")

    def _end(self, round_: _Round) -> None:
        """Tell those who waited; those who came meanwhile share the next round."""
        self._is_busy = False
        failure = self._core.failure
        for done in round_.waiters:
            done(failure)
        if self._waiters and not self._is_busy:
            self._is_busy = True
            asyncio.get_running_loop().call_soon(self._next)

    def _write(self, round_: _Round) -> None:
        """Write what a round needs in the journal, and note what its sync will cover."""
        core = self._core
        core.check_alive()
        waiting = round_.waiting
        round_.is_small = not round_.everything and self._write_inline(waiting)
        round_.seq = core.journal.seq
        for volume in waiting if round_.is_small else [*self._unsynced]:
            volume.unsynced = Unsynced()
            volume.flushes_little = round_.is_small
            self._unsynced.pop(volume, None)
        round_.carried = core.journal.seal()
        core.host.reached(Failpoint.COMMIT_SEALED)

    def _synced(self, round_: _Round) -> None:
        core, seq = self._core, round_.seq
        core.host.reached(Failpoint.COMMIT_SYNCED)
        for volume in round_.waiting:
            volume.durable_seq = max(volume.durable_seq, seq)
        if not round_.is_small:
            self._all_durable_seq = seq
        self._advance(seq, round_.carried)

    @property
    def _is_quick(self) -> bool:
        """Small syncs were quick lately."""
        return self._sync_s < self._core.options.in_place_sync_s

    def _sync_in_place(self) -> None:
        """Sync the journal alone, while nobody else has a turn."""
        begun = self._core.host.monotonic()
        self._core.journal.sync_in_place()
        self._took(self._core.host.monotonic() - begun)

    async def _sync_by_threads(self, round_: _Round) -> None:
        core = self._core
        if round_.is_small:
            begun = core.host.monotonic()
            await core.journal.sync(core.disk)
            self._took(core.host.monotonic() - begun)
        else:
            data = core.disk.offload(core.data.fdatasync)
            await asyncio.gather(data, core.journal.sync(core.disk))

    def _took(self, sync_s: float) -> None:
        self._sync_s += (sync_s - self._sync_s) / _SMOOTHING

    def _advance(self, seq: int, carried: int) -> None:
        """Everything up to `seq` that is not unsynced still is durable now."""
        core = self._core
        durable = min([seq, *(v.unsynced.first_seq - 1 for v in self._unsynced)])
        core.journal.durable_seq = max(core.journal.durable_seq, durable)
        if core.journal.may_vouch:
            core.append(b"")
        self.raise_horizon(carried)

    def raise_horizon(self, seq: int) -> None:
        """What records up to `seq` freed may be used again."""
        self.horizon = max(self.horizon, seq)
        if self._core.slots.release(self.horizon):
            self._core.space_changed()

    def _write_inline(self, waiting: Sequence[Syncable]) -> bool:
        """Journal the unsynced blocks of `waiting`; False if that is too much of them."""
        core = self._core
        if sum(v.unsynced.n_bytes for v in waiting) > INLINE_BYTES:
            return False
        slots = [slot for v in waiting for slot in v.unsynced.slots]
        if not slots:
            return True
        if not core.journal.room_for(len(slots) * (8 + core.block_size) + 64):
            return False
        size = core.block_size
        # Just written: these reads find the page cache.  If they do not find what was written,
        # the kernel has failed to write it back: then the data file's sync must tell.
        try:
            blocks = [core.data.pread(size, slot * size) for slot in slots]
        except ReadFailed:
            return False
        if [*map(xxh3_64_intdigest, blocks)] != [c for v in waiting for c in v.unsynced.checksums]:
            return False
        core.append(records.data_group(slots, blocks))
        return True
