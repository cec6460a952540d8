"""Which slots are free: the free map, who gets one, and when a freed one may be used again.

Owns the bitmap of slots, the count of space set aside, and the quarantine; does no I/O.

States of a slot, and what moves it on::

    free --allocate--> used --free_later(seq)--> quarantined --release(horizon)--> free
                       used --give_back--------> free      (it was never reachable)

A slot that record `seq` freed stays in quarantine until (1) a record that is durable says that
`seq` and the data that replaced it are durable, so that recovery can neither need the slot nor
check it, and (2) no read that was planned before `seq` is in flight.  Quarantined slots count as
used in the bitmap of this process and as free in the one that a checkpoint writes, because the
checkpoint is what makes the freeing durable.

Allocation goes region by region (a region is what one block of the bitmap covers: 128 MiB at
4 KiB blocks): the emptiest region that has held data before, so that runs are long and pages of
the host's cache and filesystem are recycled, and a fresh region only when no used one is at
least an eighth free.

A request of 128 KiB, or a multiple of that, begins at such a multiple in the file where free space
allows it, as it would in a file that is overwritten in place: the page cache then holds it as one
folio instead of as many as six.  That is a third of the time of such a read (5.5 us instead of 9)
and up to half of that of such a write (24 us into fresh pages instead of 33 to 55, 10 into cached
ones instead of 12; ext4 of Linux 6.18).  What is left out on the way goes to small requests, and
to all before another region is begun.

Slots that were left out, or whose space was given back, may be the first that are free, while the
host's filesystem has no space for them.  So when it refuses a write, it is asked which of the free
slots it has space for already, and these come next.  A region where it has space for none is not
asked about again until a slot of it is freed: only what is written gets space, and it is used then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np

from nbdstore.store.layout import I64, U8, Bools
from nbdstore.store.lazyarray import LazyArray

_BIT: Final = np.left_shift(1, np.arange(8)).astype(np.uint8)
_NOT_BIT: Final = ~_BIT
_RUN_BYTES: Final = 128 << 10  # the largest request of a Linux client, by default
_RECYCLE_SHARE: Final = 8  # a used region is taken before a fresh one if 1/8 of it is free
_HELD_PARTS: Final = 1024  # of the file, that a host without space is asked for: 2 us each
_EMPTY: Final = np.empty(0, np.int64)
_FEW: Final = 12  # slots; to free them one by one takes 0.6 us each, as an array 8 us and more


class Slots:
    """The slots of one pool.

    Attributes:
        n_slots: capacity.  Slot 0 and slots beyond the capacity count as used for ever.
        n_free: slots that can be allocated now.
        n_set_aside: free slots promised to PROVISIONED blocks.
        n_quarantined: freed, but not to be used again yet.
    """

    def __init__(self, n_slots: int, block_size: int) -> None:
        self.region_slots = block_size * 8
        self._region_shift = self.region_slots.bit_length() - 1
        self._block_size = block_size
        self._quarantine: deque[tuple[int, I64 | list[int]]] = deque()
        self._window = _EMPTY
        self._window_at = 0
        self._run_slots = max(1, _RUN_BYTES // block_size)
        self._left_out: deque[int] = deque()
        self._readers: dict[int, int] = {}
        self._frozen: FrozenBitmap | None = None
        self._on_replay_free: Callable[[I64], None] | None = None
        self._replay_freed: list[I64] = []
        self.n_set_aside = 0
        self.n_quarantined = 0
        self.n_slots = 0
        self.n_free = 0
        self.n_used_regions = 0
        self._bitmap: U8 = np.empty(0, np.uint8)
        self._bitmap_bytes = memoryview(bytearray())  # the same, for scalars
        self._free_in_region = _EMPTY
        self._dirty = np.empty(0, np.bool_)
        self._none_held: set[int] = set()  # regions; see begin_anew
        self._resize(n_slots)
        self._mark(np.zeros(1, np.int64))

    # -- capacity ---------------------------------------------------------------------------

    @property
    def n_regions(self) -> int:
        """Regions, and so blocks of the bitmap."""
        return len(self._free_in_region)

    def grow(self, n_slots: int) -> None:
        """Raise the capacity to `n_slots`."""
        assert n_slots >= self.n_slots
        self._resize(n_slots)

    def _resize(self, n_slots: int) -> None:
        old_slots, old_regions = self.n_slots, self.n_regions
        n_regions = -(-n_slots // self.region_slots)
        bitmap = LazyArray((n_regions * self._block_size,), np.uint8).array
        bitmap[: len(self._bitmap)] = self._bitmap
        free = np.full(n_regions, self.region_slots, np.int64)
        free[:old_regions] = self._free_in_region
        dirty = np.zeros(n_regions, np.bool_)
        dirty[:old_regions] = self._dirty
        self._bitmap, self._free_in_region, self._dirty = bitmap, free, dirty
        self._bitmap_bytes = bitmap.data
        if old_slots:  # the last old region had slots beyond the old capacity
            self._unmark(np.arange(old_slots, old_regions * self.region_slots))
        self.n_slots = n_slots
        self.n_free += (n_regions - old_regions) * self.region_slots
        self._mark(np.arange(n_slots, n_regions * self.region_slots))

    # -- the bitmap -------------------------------------------------------------------------

    def _mark(self, slots: I64) -> None:
        if len(slots):
            self._count(slots, -1)
            set_bits(self._bitmap, slots)

    def _mark_ascending(self, slots: I64) -> None:
        """Like :meth:`_mark`, of slots in order, not empty: if they are a run, in a tenth."""
        first, last = slots.item(0), slots.item(-1)
        region = first >> self._region_shift
        if region == last >> self._region_shift:
            self._count_in(region, -len(slots))
        else:
            self._count(slots, -1)
        if last - first == len(slots) - 1:
            set_run(self._bitmap, first, last + 1)
        else:
            set_bits(self._bitmap, slots)

    def _unmark(self, slots: I64) -> None:
        if len(slots):
            self._count(slots, 1)
            clear_bits(self._bitmap, slots)

    def _count(self, slots: I64, sign: int) -> None:
        """Account `slots`, about to be freed (sign 1) or used (sign -1)."""
        regions = slots >> self._region_shift
        first = int(regions[0])
        if bool((regions == first).all()):
            self._count_in(first, sign * len(slots))
            return
        regions, counts = np.unique(regions, return_counts=True)
        if self._frozen is not None:
            self._frozen.keep(regions.tolist())
        self._free_in_region[regions] += sign * counts
        self._dirty[regions] = True
        if self._none_held and sign > 0:
            self._none_held.difference_update(regions.tolist())
        self.n_free += sign * len(slots)

    def _count_in(self, region: int, n: int) -> None:
        """Account `n` slots of `region`, about to be freed, or -n about to be used."""
        if self._frozen is not None:
            self._frozen.keep([region])
        self._free_in_region[region] += n
        self._dirty[region] = True
        if self._none_held and n > 0:
            self._none_held.discard(region)
        self.n_free += n

    def is_used(self, slots: I64) -> Bools:
        """Tell for each of `slots` (int64, below the bitmap's end) whether it is not free."""
        return test_bits(self._bitmap, slots)

    # -- allocation -------------------------------------------------------------------------

    def allocate(self, n: int, floor: int) -> I64 | None:
        """Take `n` slots, leaving at least `floor` free; None if there are not that many.

        Returns int64, shape (n,), ascending as far as one window goes, in runs as long as the
        free space has them.
        """
        if self.n_free - n < floor:
            return None
        if n % self._run_slots == 0:
            self._go_to_boundary()
        elif n <= len(self._left_out):
            few = np.array([self._left_out.popleft() for _ in range(n)], np.int64)
            self._mark(few)
            return few
        at = self._window_at
        if at + n <= len(self._window):
            self._window_at = at + n
            taken = self._window[at : at + n]
            self._mark_ascending(taken)
            return taken
        parts: list[I64] = []
        while n:
            if self._window_at == len(self._window):
                self._open_window()
            part = self._window[self._window_at : self._window_at + n]
            self._window_at += len(part)
            self._mark_ascending(part)
            n -= len(part)
            parts.append(part)
        return np.concatenate(parts)

    def allocate_run(self, n: int, floor: int) -> int:
        """Take `n` slots that follow one another, if the next free ones do; return the first.

        Returns 0, which is never given out, with nothing taken, if they do not, or if fewer than
        `floor` would be left free.  Without arrays of slots, it takes a third of the time.
        """
        if self.n_free - n < floor:
            return 0
        if n % self._run_slots == 0:
            self._go_to_boundary()
        last = self._window_at + n - 1
        if last >= len(self._window):
            return 0
        first = self._window.item(self._window_at)
        region = first >> self._region_shift
        if (
            self._window.item(last) != first + n - 1
            or (first + n - 1) >> self._region_shift != region
        ):
            return 0
        self._window_at += n
        self._count_in(region, -n)
        set_run(self._bitmap, first, first + n)
        return first

    def allocate_few(self, n: int, floor: int) -> list[int] | None:
        """Like :meth:`allocate`, of so few that arrays would cost more than they save."""
        if self.n_free - n < floor:
            return None
        found: list[int] = []
        left_out = self._left_out if n <= len(self._left_out) else None
        for _ in range(n):
            if left_out:
                slot = left_out.popleft()
            else:
                if self._window_at == len(self._window):
                    self._open_window()
                slot = self._window.item(self._window_at)
                self._window_at += 1
            self._mark_one(slot)
            found.append(slot)
        return found

    def _go_to_boundary(self) -> None:
        """Leave the slots before the next multiple of a run to small requests, if one begins there.

        It does if the next slots that are free are a run themselves, up to the end of that one.
        """
        if self._window_at == len(self._window):
            self._open_window()
        window, at = self._window, self._window_at
        n_left_out = -window.item(at) % self._run_slots
        if not n_left_out:
            return
        last = at + n_left_out + self._run_slots - 1
        if last < len(window) and window.item(last) - window.item(at) == last - at:
            self._window_at += n_left_out
            self._left_out += window[at : self._window_at].tolist()

    def _mark_one(self, slot: int) -> None:
        region = slot >> self._region_shift
        if self._frozen is not None:
            self._frozen.keep([region])
        self._free_in_region[region] -= 1
        self._dirty[region] = True
        self._bitmap_bytes[slot >> 3] |= 1 << (slot & 7)
        self.n_free -= 1

    def _unmark_one(self, slot: int) -> None:
        self._count_in(slot >> self._region_shift, 1)
        self._bitmap_bytes[slot >> 3] &= ~(1 << (slot & 7))

    def _open_window(self) -> None:
        """Make what was left out, or else the free slots of the best region, the window.

        Allocation takes from it, so it is not empty, as long as anything is free; it ascends.
        """
        self._window_at = 0
        if self._left_out:
            self._window = np.sort(np.array(self._left_out, np.int64))
            self._left_out.clear()
            return
        fresh = self.n_used_regions
        region = int(self._free_in_region[:fresh].argmax()) if fresh else 0
        n_free = int(self._free_in_region[region])
        if fresh < self.n_regions and (fresh == 0 or n_free * _RECYCLE_SHARE < self.region_slots):
            region = fresh
            self.n_used_regions += 1
        self._window = self._free_slots(region)

    def _free_slots(self, region: int) -> I64:
        bits = self._bitmap[region * self._block_size : (region + 1) * self._block_size]
        free = np.flatnonzero(np.unpackbits(bits, bitorder="little") == 0)
        return free + (region << self._region_shift)

    def forget_window(self) -> None:
        """Look for free slots again: what was to be given out next may be used by now."""
        self._window, self._window_at = _EMPTY, 0
        self._left_out.clear()

    def begin_anew(self, held: Callable[[int, int], list[tuple[int, int]]]) -> None:
        """Allocate next, if there are any, free slots that the host has space for already.

        As many as a region has are enough: when they are used up, it will be asked again.  Regions
        where it had none of those that are free are left out.  Without that, each write that a
        full host refuses would cost 2 us for each part of the file, up to 95 ms.

        Arguments:
            held: tells for which parts of `[offset, offset + length)` of the file it has space, in
                bytes, as ranges `[start, stop)`.
        """
        self.forget_window()
        size, found, n_found, n_parts = self._block_size, [_EMPTY], 0, 0
        for region in np.argsort(-self._free_in_region[: self.n_used_regions]).tolist():
            if not self._free_in_region[region] or n_parts >= _HELD_PARTS:
                break
            if n_found >= self.region_slots:
                break
            if region in self._none_held:
                continue
            parts = held((region << self._region_shift) * size, self.region_slots * size)
            n_parts += len(parts)
            slots = self._free_among(region, parts) if parts else _EMPTY
            if not len(slots):
                self._none_held.add(region)
            found.append(slots)
            n_found += len(slots)
        self._window = np.sort(np.concatenate(found))

    def _free_among(self, region: int, parts: list[tuple[int, int]]) -> I64:
        """The free slots of `region` that lie in `parts`, ranges of bytes, whole."""
        size, base = self._block_size, region << self._region_shift
        is_inside = np.zeros(self.region_slots, np.bool_)
        for start, stop in parts:
            is_inside[-(-start // size) - base : stop // size - base] = True
        free = self._free_slots(region)
        return free[is_inside[free - base]]

    def give_back(self, slots: I64) -> None:
        """Free slots that nothing ever pointed to, at once."""
        self._unmark(slots)

    # -- freeing ----------------------------------------------------------------------------

    def free_few_later(self, slots: list[int], seq: int) -> None:
        """Like :meth:`free_later`, but not while the journal is replayed."""
        assert self._on_replay_free is None
        self._quarantine.append((seq, slots))
        self.n_quarantined += len(slots)

    def free_later(self, slots: I64, seq: int) -> None:
        """Put `slots`, which record `seq` freed, into quarantine."""
        if self._on_replay_free is not None:
            self._unmark(slots[self.is_used(slots)])
            self._replay_freed.append(slots)
            self._on_replay_free(slots)
        elif len(slots):
            self._quarantine.append((seq, slots))
            self.n_quarantined += len(slots)

    def release(self, horizon: int) -> int:
        """Free what records up to `horizon` freed, as far as readers allow; return how many."""
        horizon = min(horizon, min(self._readers, default=horizon))
        parts: list[I64 | list[int]] = []
        while self._quarantine and self._quarantine[0][0] <= horizon:
            parts.append(self._quarantine.popleft()[1])
        n = sum(map(len, parts))
        if n <= _FEW:
            for part in parts:
                for slot in part if isinstance(part, list) else part.tolist():
                    self._unmark_one(slot)
        else:
            self._unmark(_joined(parts))
        self.n_quarantined -= n
        return n

    @property
    def freed_by(self) -> int:
        """The newest record that freed something in quarantine; of a checkpoint's, one to come."""
        return self._quarantine[-1][0] if self._quarantine else 0

    @contextmanager
    def pinned(self, seq: int) -> Iterator[None]:
        """While this lasts, what records after `seq`, the newest now, free is not used again."""
        self.pin(seq)
        try:
            yield
        finally:
            self.unpin(seq)

    def pin(self, seq: int) -> None:
        """Begin what :meth:`unpin` ends: see :meth:`pinned`."""
        self._readers[seq] = self._readers.get(seq, 0) + 1

    def unpin(self, seq: int) -> None:
        """End what :meth:`pin` began."""
        self._readers[seq] -= 1
        if not self._readers[seq]:
            del self._readers[seq]

    # -- checkpoints ------------------------------------------------------------------------

    def freeze(self) -> FrozenBitmap:
        """Begin a checkpoint: return the free map of this moment, to be written by it.

        Its dirty blocks are those that changed since the last freeze, and those with slots in
        quarantine, which the checkpoint's file counts as free.
        """
        assert self._frozen is None
        regions = np.flatnonzero(self._dirty)
        self._dirty[regions] = False
        self._frozen = FrozenBitmap(self._block_size, regions, self._bitmap)
        self._frozen.clear(_joined([slots for _, slots in self._quarantine]))
        return self._frozen

    def thaw(self, *, written: bool) -> None:
        """End a checkpoint; if its free map was not `written`, those blocks are dirty again."""
        assert self._frozen is not None
        if not written:
            self._dirty[list(self._frozen.blocks)] = True
        self._frozen = None

    # -- opening a pool ---------------------------------------------------------------------

    def load(self, region: int, block: bytes) -> None:
        """Take over block `region` of the stored bitmap."""
        start = region * self._block_size
        bits = self._bitmap[start : start + self._block_size]
        bits |= np.frombuffer(block, np.uint8)
        free = self.region_slots - int(np.bitwise_count(bits).sum())
        self.n_free += free - int(self._free_in_region[region])
        self._free_in_region[region] = free

    def begin_replay(self, on_free: Callable[[I64], None]) -> None:
        """All blocks are loaded; what follows is the journal's changes, in order.

        Until :meth:`end_replay`, :meth:`free_later` frees at once, and tells `on_free`.
        """
        self._on_replay_free = on_free

    def replay_used(self, slots: I64) -> None:
        """A record, or a node that a superblock reaches, uses `slots` (distinct)."""
        self._mark(slots[~self.is_used(slots)])

    def end_replay(self, seq: int) -> None:
        """Quarantine, as freed by record `seq`, what the replayed records freed.

        Until the checkpoint that ends recovery is durable, a crash makes recovery read the same
        journal again, and check those slots against it.
        """
        self._on_replay_free = None
        freed = np.unique(np.concatenate([_EMPTY, *self._replay_freed]))
        held = freed[~self.is_used(freed)]
        self._replay_freed = []
        self._mark(held)
        self.free_later(held, seq)
        used = np.flatnonzero(self._free_in_region < self.region_slots)
        full = self.n_slots >> self._region_shift
        # The last region has slots beyond the capacity, which count as used from the start.
        touched = [r for r in used.tolist() if r < full or self._used_in_last_region()]
        self.n_used_regions = max(touched, default=0) + 1
        self.forget_window()

    def _used_in_last_region(self) -> bool:
        inside = self.n_slots - ((self.n_regions - 1) << self._region_shift)
        return int(self._free_in_region[-1]) < inside

    def bitmap_block(self, region: int) -> bytes:
        """Block `region` of the bitmap of this process."""
        return self._bitmap[region * self._block_size : (region + 1) * self._block_size].tobytes()

    # -- checking ---------------------------------------------------------------------------

    def without_quarantine(self) -> U8:
        """A copy of the bitmap (packed, little bit order) in which quarantined slots are free."""
        bitmap = self._bitmap.copy()
        clear_bits(bitmap, _joined([slots for _, slots in self._quarantine]))
        return bitmap

    def correct(self, lost: I64, leaked: I64) -> None:
        """Count `lost` as used and `leaked` as free: a check has found them so."""
        self._quarantine = deque(
            (seq, np.setdiff1d(slots, lost)) for seq, slots in self._quarantine
        )
        self.n_quarantined = sum(len(slots) for _, slots in self._quarantine)
        self._mark(lost[~self.is_used(lost)])
        self._unmark(leaked)

    # -- giving back ------------------------------------------------------------------------

    def free_runs(self, min_slots: int, region: int) -> list[tuple[int, int]]:
        """The runs `[start, stop)` of at least `min_slots` free slots in `region`."""
        bits = self._bitmap[region * self._block_size : (region + 1) * self._block_size]
        used = np.unpackbits(bits, bitorder="little").view(np.int8)
        edges = np.flatnonzero(np.diff(used, prepend=1, append=1)).reshape(-1, 2)
        long = edges[edges[:, 1] - edges[:, 0] >= min_slots] + region * self.region_slots
        return [(start, stop) for start, stop in long.tolist()]


def _joined(parts: list[I64 | list[int]]) -> I64:
    """One array of all slots in `parts`."""
    few = [slot for part in parts if isinstance(part, list) for slot in part]
    return np.concatenate(
        [np.array(few, np.int64), *(part for part in parts if not isinstance(part, list))]
    )


def set_bits(bitmap: U8, slots: I64) -> None:
    """Set the bits of `slots` in a packed bitmap of little bit order."""
    np.bitwise_or.at(bitmap, slots >> 3, _BIT[slots & 7])


def set_run(bitmap: U8, start: int, stop: int) -> None:
    """Set the bits of `[start, stop)`, not empty."""
    first, last = start >> 3, (stop - 1) >> 3
    head, tail = 0xFF << (start & 7) & 0xFF, 0xFF >> (7 - ((stop - 1) & 7))
    if first == last:
        bitmap[first] |= head & tail
    else:
        bitmap[first] |= head
        bitmap[first + 1 : last] = 0xFF
        bitmap[last] |= tail


def clear_bits(bitmap: U8, slots: I64) -> None:
    """Clear the bits of `slots`."""
    np.bitwise_and.at(bitmap, slots >> 3, _NOT_BIT[slots & 7])


def test_bits(bitmap: U8, slots: I64) -> Bools:
    """Tell which bits of `slots` are set."""
    found: Bools = (bitmap[slots >> 3] & _BIT[slots & 7]) != 0
    return found


def bits_set(bitmap: U8) -> I64:
    """The slots whose bits are set; the cost goes with the bytes that are not zero."""
    at = np.flatnonzero(bitmap)
    row, column = np.nonzero(np.unpackbits(bitmap[at, None], axis=1, bitorder="little"))
    found: I64 = at[row] * 8 + column
    return found


class FrozenBitmap:
    """The blocks of the free map that a checkpoint writes, apart from the live ones.

    Attributes:
        blocks: by region, the bytes of the bitmap's block; changed by set and clear only.
    """

    def __init__(self, block_size: int, regions: I64, bitmap: U8) -> None:
        self._block_size = block_size
        self._region_slots = block_size * 8
        self._live = bitmap
        self._kept: dict[int, U8] = {}
        self.blocks: dict[int, U8] = {r: self._copy(r) for r in regions.tolist()}

    def _copy(self, region: int) -> U8:
        return self._live[region * self._block_size : (region + 1) * self._block_size].copy()

    def keep(self, regions: list[int]) -> None:
        """The live bitmap is about to change in `regions`: remember what it was."""
        for region in regions:
            if region not in self.blocks and region not in self._kept:
                self._kept[region] = self._copy(region)

    def set(self, slots: I64) -> None:
        """Count `slots` as used."""
        for region, bits in self._split(slots):
            set_bits(self._block(region), bits)

    def clear(self, slots: I64) -> None:
        """Count `slots` as free."""
        for region, bits in self._split(slots):
            clear_bits(self._block(region), bits)

    def _block(self, region: int) -> U8:
        if region not in self.blocks:
            kept = self._kept.pop(region, None)
            self.blocks[region] = self._copy(region) if kept is None else kept
        return self.blocks[region]

    def _split(self, slots: I64) -> list[tuple[int, I64]]:
        """The slots by region, each counted from the region's first."""
        slots = np.sort(slots)
        regions = slots // self._region_slots
        firsts = np.flatnonzero(np.diff(regions, prepend=-1))
        parts = np.split(slots % self._region_slots, firsts[1:])
        return list(zip(regions[firsts].tolist(), parts, strict=True)) if len(slots) else []
