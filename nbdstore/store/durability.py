"""Group commit: what makes an acknowledged write durable, for how little.

Owns the rounds of syncs and the knowledge of what is durable; knows volumes only as owners of
unsynced data.

A round covers everything written before it began, for all who wait then; those who come while it
runs share the next one.  It comes in two kinds:

- *small*: what the waiting volumes have unsynced fits into 64 KiB.  Its blocks go inline into one
  DATA record, and only the journal is synced: one fdatasync into recycled space.  Other volumes'
  dirty data is not waited for.
- *full*: the data file and the journal are synced, side by side.  Their order does not matter:
  a record whose data did not make it is found by its checksums.

A hop to a thread and back costs more than a fast disk takes for a small round: 100 us and more,
with the locks of the interpreter.  So a small round is done in place, on the loop, if nobody is
held up by it: since the last one there were hardly any reads and writes but one for each flush, as
of clients that write and flush by turns, and rounds took less than 10 ms on average.

``journal.durable_seq`` is the seq up to which records *and the data they map* are durable, in
every volume; it travels in the header of each record.  Slots freed by record f may be used again
once a *durable* record carries a durable_seq >= f, so that recovery knows that it need not check
what stood in them; or once a checkpoint that includes f is durable.  A failed sync is final: the
kernel has dropped the dirty pages and a second sync would lie (fsync(2)); the pool fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
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

OnDurable = Callable[[PoolFailed | None], None]
"""Called when something is durable, or with why the pool failed."""


class Unsynced:
    """Data of one volume that is in the page cache only.

    Attributes:
        first_seq: the first record that maps some of it; 0 if there is none.
        n_bytes: how much.
        slots, checksums: where it lies and what it is, while it is little enough to go inline.
    """

    __slots__ = ("checksums", "first_seq", "n_bytes", "slots")

    def __init__(self) -> None:
        self.first_seq = 0
        self.n_bytes = 0
        self.slots: list[int] = []
        self.checksums: list[int] = []

    def add(self, seq: int, slots: SlotSequence, checksums: list[int], n_bytes: int) -> None:
        """Note that record `seq` mapped `slots`, `n_bytes` in all."""
        if not self.first_seq:
            self.first_seq = seq
        self.n_bytes += n_bytes
        if self.n_bytes <= INLINE_BYTES:
            self.slots += slots.tolist() if isinstance(slots, np.ndarray) else slots
            self.checksums += checksums


class Syncable(Protocol):
    """What a round needs of a volume: its newest and its newest durable record."""

    last_seq: int
    durable_seq: int
    unsynced: Unsynced


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
        self._task: asyncio.Task[None] | None = None
        self._all_durable_seq = 0
        self.horizon = 0

    def wrote(self, volume: Syncable, seq: int, slots: SlotSequence, checksums: list[int]) -> None:
        """Note that record `seq` of `volume` mapped `slots`, which hold data of `checksums`."""
        volume.last_seq = seq
        volume.unsynced.add(seq, slots, checksums, len(slots) * self._core.block_size)
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

        A callback and no coroutine: a task for each of many small flushes costs as much as they do.
        """
        if self._is_durable(volume, volume.last_seq):
            return False
        self._waiting[volume] = None
        self._join(done)
        return True

    def _is_durable(self, volume: Syncable, seq: int) -> bool:
        return volume.durable_seq >= seq or self._all_durable_seq >= seq

    async def commit_all(self) -> None:
        """Return when everything written so far is durable."""
        self._core.check_alive()
        self._everything = True
        await self._round()

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
        """Wait for the round that runs, if any."""
        if self._task is not None:
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
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        core = self._core
        while self._waiters:
            waiters, self._waiters = self._waiters, []
            waiting, self._waiting = self._waiting, {}
            everything, self._everything = self._everything, False
            try:
                others = core.n_calls > _CALLS_PER_FLUSH * len(waiters)
                core.n_calls = 0
                await self._sync([*waiting], everything, in_place=not others)
            except StoreError as error:
                core.fail(str(error))
            except Exception:
                log.exception("a bug in the commit of the pool")
                core.fail("its commit ended by a bug")
            failure = core.failure
            for done in waiters:
                done(failure)
        self._task = None

    async def _sync(self, waiting: Sequence[Syncable], everything: bool, *, in_place: bool) -> None:
        core = self._core
        core.check_alive()
        small = not everything and self._write_inline(waiting)
        covered = waiting if small else [*self._unsynced]
        seq = core.journal.seq
        for volume in covered:
            volume.unsynced = Unsynced()
            self._unsynced.pop(volume, None)
        carried = core.journal.seal()
        core.host.reached(Failpoint.COMMIT_SEALED)
        # While this waits, new records and unsynced data may come; they belong to a later round.
        if small:
            await self._sync_journal(in_place)
        else:
            data = core.disk.offload(core.data.fdatasync)
            await asyncio.gather(data, core.journal.sync(core.disk))
        core.host.reached(Failpoint.COMMIT_SYNCED)
        for volume in waiting:
            volume.durable_seq = max(volume.durable_seq, seq)
        if not small:
            self._all_durable_seq = seq
        self._advance(seq, carried)

    async def _sync_journal(self, in_place: bool) -> None:
        """Sync the journal alone: by a thread, unless `in_place` and it was quick lately."""
        journal, clock = self._core.journal, self._core.host.monotonic
        begun = clock()
        if in_place and self._sync_s < self._core.options.in_place_sync_s:
            journal.sync_in_place()
        else:
            await journal.sync(self._core.disk)
        self._sync_s += (clock() - begun - self._sync_s) / _SMOOTHING

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
