"""What all parts of one open pool share: its files, slots and journal, and its last word.

Owns the decision that the pool has failed, the reserve, verified reads of single blocks, and
what stays in place under a thread that reads; knows nothing of volumes.

Concurrency: one event loop, one thread.  Maps, slots and journal change only on the loop, and
only between awaits; threads get buffers and file offsets, never maps.  What an await may change
is said where it stands.  The rule that makes it safe everywhere: after an await, look again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import xxhash

from nbdstore.errors import (
    Corruption,
    InvalidArgument,
    NoSpace,
    PoolFailed,
    ReadFailed,
    StoreError,
)
from nbdstore.sizes import exact_size
from nbdstore.store import layout
from nbdstore.store.host import Disk, File, Host
from nbdstore.store.journal import Journal
from nbdstore.store.layout import I64
from nbdstore.store.misses import Misses
from nbdstore.store.nodes import MapCounts
from nbdstore.store.slots import Slots

log = logging.getLogger("nbdstore.store")

T = TypeVar("T")

OnDamage = Callable[[Corruption | ReadFailed], None]
"""Called with what is wrong with a block that its caller can do without."""

_RESERVE_SHARE: Final = 100
_RESERVE_BYTES: Final = 64 << 20
_RESERVE_MOST_SHARE: Final = 16  # of a small pool
N_READERS: Final = 4  # threads of the disk, of which misses.py takes some and syncs the rest
_ADVICE: Final = (
    "'nbdstore check' lists all damage, 'nbdstore salvage' copies what is intact, "
    "'nbdstore check --repair' makes that usable in place; restore the rest from a backup"
)
_HOST_FULL_BYTES: Final = 16 << 20  # with less, a filesystem that was full still is
_OWN_SLOTS: Final = 6  # what a checkpoint of a small pool takes for its catalogues and free map


@dataclass(frozen=True)
class PoolOptions:
    """How an open pool behaves.

    Attributes:
        on_full: "wait": hold writes that find no space; "error": fail them with NoSpace at once.
        full_timeout_s: how long a write is held before it fails; 0 = for ever.
        map_memory: bytes of map leaves kept in memory; at least 16 MiB.
        sync_interval_s: how old unsynced data may get before it is synced unasked.
        checkpoint_interval_s: how old changes may get before a checkpoint writes the trees.
        checkpoint_slice_nodes: nodes that a checkpoint writes between two turns of the event
            loop; 128 take about 1 ms.
        in_place_sync_s: a small sync is done on the event loop if nobody else is there, and such
            syncs take less on average; 0 = never.
        trash_keep_s: how long a volume rests in the trash before it is deleted; it is deleted
            earlier when the pool needs the space.
        slots: makes the map of free slots, which decides where things are written.
    """

    on_full: str = "wait"
    full_timeout_s: float = 60.0
    map_memory: int = 512 << 20
    sync_interval_s: float = 5.0
    checkpoint_interval_s: float = 60.0
    checkpoint_slice_nodes: int = 128
    in_place_sync_s: float = 10e-3
    trash_keep_s: float = 86400.0
    slots: type[Slots] = Slots

    def __post_init__(self) -> None:
        if self.on_full not in ("wait", "error"):
            raise InvalidArgument(f"on_full {self.on_full!r}: choose 'wait' or 'error'")
        if self.map_memory < 16 << 20:
            raise InvalidArgument(f"map memory {self.map_memory}: give at least 16M")
        if self.full_timeout_s < 0:
            raise InvalidArgument(f"full timeout {self.full_timeout_s}: give 0 (for ever) or more")
        if self.trash_keep_s < 0:
            raise InvalidArgument(f"time in the trash {self.trash_keep_s}: give 0 or more")


class Core:
    """The shared state of an open pool.

    Attributes:
        misses: the reads that wait for the disk.
        map_counts: counts what all maps have in memory.
        on_damage: whom to tell of a node of a map that is damaged; all below it counts as LOST
            then, and unless the pool is being repaired, nothing may be written.  It may be called
            in a thread.  None = raise.
        failed: why the pool stopped acknowledging, or None.
        n_calls: reads, and batches of writes of each client, since the last round of syncs.
        reclaim: begins to delete what is kept only as long as there is space, and tells whether
            there is any, or some is being deleted; None = there never is.
        n_held: writes that wait for space now.
        n_corruptions: damaged blocks met by reads so far.
        newest_corruption: what was wrong with the last of them, or None.
        reserve: slots that only overwriting, checkpoints and freeing may use.
    """

    def __init__(
        self,
        host: Host,
        disk: Disk,
        data: File,
        journal: Journal,
        slots: Slots,
        block_size: int,
        options: PoolOptions,
    ) -> None:
        self.host = host
        self.disk = disk
        self.data = data
        self.journal = journal
        self.slots = slots
        self.block_size = block_size
        self.options = options
        self.misses = Misses(disk)
        self.map_counts = MapCounts()
        self.on_damage: OnDamage | None = None
        self.reclaim: Callable[[], bool] | None = None
        self.failed: str | None = None
        self.n_calls = 0
        self.n_held = 0
        self.n_corruptions = 0
        self.newest_corruption: str | None = None
        self.host_full = False
        self._readers = asyncio.Semaphore(N_READERS)
        self._space: asyncio.Event | None = None  # while somebody waits

    @property
    def reserve(self) -> int:
        n_slots = self.slots.n_slots
        wanted = max(n_slots // _RESERVE_SHARE, _RESERVE_BYTES // self.block_size)
        return min(wanted, n_slots // _RESERVE_MOST_SHARE)

    # -- failure ----------------------------------------------------------------------------

    def fail(self, why: str) -> None:
        """Stop acknowledging: what is on disk is no longer known (fsync(2), "EIO")."""
        if self.failed is None:
            self.failed = why
            log.critical("pool %s failed: %s; restart to recover", self.disk.directory, why)
        self.space_changed()

    @property
    def failure(self) -> PoolFailed | None:
        """The error for whoever asks anything of a pool that has failed."""
        if self.failed is None:
            return None
        return _stopped(self.failed)

    def check_alive(self) -> None:
        """Raise PoolFailed if the pool has failed."""
        if self.failed is not None:
            raise _stopped(self.failed)

    # -- the journal ------------------------------------------------------------------------

    def append(self, *groups: bytes) -> int:
        """Write a journal record; a failure fails the pool."""
        self.check_alive()
        try:
            return self.journal.append(*groups)
        except StoreError as error:
            self.fail(str(error))
            raise _stopped(error) from error

    # -- space ------------------------------------------------------------------------------

    def take_slots(self, n: int, n_holes: int, n_leaves: int) -> I64 | None:
        """Take `n` slots for a write that fills `n_holes` holes; None if it must wait.

        Filling holes leaves the reserve and what is promised to PROVISIONED blocks; overwriting,
        which gives as much back with the next sync, may use half of the reserve.  Either leaves
        what the next checkpoint needs: slots for the dirty leaves, of which this write makes up
        to `n_leaves` more, and for the nodes above them.
        """
        return self.slots.allocate(n, self._floor(n_holes, n_leaves))

    def take_run(self, n: int, n_holes: int, n_leaves: int) -> int:
        """Like :meth:`take_slots`, of `n` in a row: the first one, or 0 if others must be taken."""
        return self.slots.allocate_run(n, self._floor(n_holes, n_leaves))

    def _floor(self, n_holes: int, n_leaves: int) -> int:
        """How many slots a write must leave free; see :meth:`take_slots`."""
        for_checkpoint = self.map_counts.slots_to_write(n_leaves)
        if n_holes:
            return self.reserve + self.slots.n_set_aside + for_checkpoint
        return max(self.reserve // 2, for_checkpoint + _OWN_SLOTS)

    def take_few_slots(self, n: int, n_holes: int) -> list[int] | None:
        """Like :meth:`take_slots` where all leaves are dirty, of so few that arrays cost more."""
        # As for a write that does make a leaf dirty: that is what NO_HOLE counts with.
        return self.slots.allocate_few(n, self._floor(n_holes, 1))

    def may_set_aside(self, n: int) -> bool:
        """Tell whether `n` more slots can be promised; those in quarantine will be free in time."""
        slots = self.slots
        spoken_for = slots.n_set_aside + self.map_counts.slots_to_write(1)
        return slots.n_free + slots.n_quarantined - spoken_for - n >= self.reserve

    def space_changed(self) -> None:
        """Wake those who wait for slots, for room in the journal, or for the pool's end."""
        if self._space is not None:
            self._space.set()
            self._space = None

    async def wait_for_change(self, timeout_s: float) -> None:
        """Wait until :meth:`space_changed`, at most `timeout_s`."""
        if self._space is None:
            self._space = asyncio.Event()
        try:
            await asyncio.wait_for(self._space.wait(), timeout_s)
        except TimeoutError:
            pass  # the caller looks again either way

    def begin_hold(self) -> None:
        """One more request is held for want of space."""
        if not self.n_held:
            log.warning("writes are held: %s", self.no_space())
        self.n_held += 1

    def end_hold(self) -> None:
        """A held request went on, or failed."""
        self.n_held -= 1
        if not self.n_held:
            log.warning("no write is held any more")

    @property
    def shortage(self) -> str | None:
        """What has no space for a write that fills holes: the "pool", the "host", or None.

        That the host's filesystem was full shows only in a write that failed there, so that it has
        space again is looked up, unless writes are held, which try again all the time.
        """
        if self.host_full and (self.n_held or self.disk.free_bytes() < _HOST_FULL_BYTES):
            return "host"
        slots = self.slots
        if self.n_held or slots.n_free + slots.n_quarantined <= self._floor(1, 1):
            return "pool"
        return None

    def no_space(self) -> NoSpace:
        """The error for a request that found no space."""
        if self.host_full:
            return NoSpace(f"the filesystem under {self.disk.directory} is full: free space there")
        return NoSpace(
            f"the pool is full ({exact_size(self.slots.n_slots * self.block_size)}): trim or "
            "delete volumes, or enlarge it with 'nbdstore pool grow'"
        )

    # -- reading ----------------------------------------------------------------------------

    async def read_in_thread(self, call: Callable[[], T]) -> T:
        """Return what `call` does in a thread, under which what it reads stays where it is.

        Whoever is cancelled waits no longer, but nothing is let go of before the thread ends: it
        would take what is written to the same slots by then for damage. No more than a few threads
        read so at once, or a sync would wait for all who came before it.
        """
        seq = self.journal.seq
        self.slots.pin(seq)  # before it waits for its turn: what it is to read is known already
        reading = asyncio.ensure_future(self._read_in_turn(call))
        reading.add_done_callback(lambda _: self.slots.unpin(seq))
        return await asyncio.shield(reading)

    async def _read_in_turn(self, call: Callable[[], T]) -> T:
        async with self._readers:
            return await self.disk.offload(call)

    def read_block(self, location: int, checksum: int, what: str) -> bytes:
        """Return the node or block of the pool's own that an entry points to, verified.

        May wait for the disk.

        Raises:
            Corruption: it is not what was written, even when read past the page cache.
        """
        slot = location & layout.SLOT_MASK
        if slot == layout.LOST:
            return layout.lost_node(self.block_size)
        raw = self.data.pread(self.block_size, slot * self.block_size)
        if len(raw) == self.block_size and xxhash.xxh3_64_intdigest(raw) == checksum:
            return raw
        return self.reread_block(slot, checksum, what)

    def reread_block(self, slot: int, checksum: int, what: str) -> bytes:
        """Read a block that did not match past the page cache; Corruption if it never does."""
        if slot == layout.LOST:
            raise Corruption(
                what,
                "data",
                "nothing: the way to it was damaged",
                "restore that range from a backup; writing or trimming it ends this error",
            )
        raw = self.data.pread_direct(self.block_size, slot * self.block_size)
        found = xxhash.xxh3_64_intdigest(raw)
        if len(raw) == self.block_size and found == checksum:
            log.warning("%s: damaged in the page cache, intact on disk (slot %d)", what, slot)
            return raw
        self.n_corruptions += 1
        shown = f"checksum {found:016x}" if len(raw) == self.block_size else f"{len(raw)} bytes"
        error = Corruption(
            f"{what} (slot {slot}, byte {slot * self.block_size} of {self.data.name})",
            f"checksum {checksum:016x}",
            shown,
            _ADVICE,
        )
        self.newest_corruption = error.fault
        log.error("%s", error)
        raise error

    def try_block(self, location: int, checksum: int, what: str) -> bytes | None:
        """Like :meth:`read_block`, but tell `on_damage`, if there is one, and return None."""
        try:
            return self.read_block(location, checksum, what)
        except (Corruption, ReadFailed) as error:
            if self.on_damage is None:
                raise
            self.on_damage(error)
            return None

    def write_slots(self, slots: I64, blocks: list[bytes]) -> None:
        """Write `blocks[i]` to `slots[i]`, one call per run."""
        try:
            for start, stop in layout.runs(slots):
                self.data.pwritev(blocks[start:stop], int(slots[start]) * self.block_size)
        except NoSpace:
            self.slots.begin_anew(self.data.held)
            raise


def _stopped(why: str | StoreError) -> PoolFailed:
    return PoolFailed(f"the pool stopped: {why}; restart the server to recover")
