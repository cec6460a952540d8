"""The walk of a check through all trees: what is reachable, from where, and is it whole?

Owns the rules of who may point to what.  An image - a snapshot or a volume - has nodes and blocks
of its own, which nothing older points to: those born after the epoch of the image that it continues
from.  What was born earlier it shares with that one.  So images are visited after those that they
continue from, each slot must be found once as somebody's own, and all who share it after that.  But
when a part of a snapshot is LOST, what it had there belongs to nobody, and others may have it yet:
no slot of that is ever freed as long as the snapshot exists, and a check may find, after that, that
slots are used by nobody.
"""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np
from xxhash import xxh3_64_intdigest

from nbdstore.errors import ReadFailed
from nbdstore.store import layout, recovery
from nbdstore.store.blockmap import DIRTY, HOLE, RESIDENT
from nbdstore.store.image import Image
from nbdstore.store.layout import I64, U8, U64
from nbdstore.store.lazyarray import LazyArray
from nbdstore.store.mapmemory import load_nodes_now, load_now
from nbdstore.store.slots import set_bits, test_bits
from nbdstore.store.snapshot import Snapshot
from nbdstore.store.volume import Volume

_SHOWN: Final = 20  # slots that are not as they should be, each a finding


class Check(Protocol):
    """What the walk reports to."""

    repair: bool
    n_damaged_nodes: int

    def add(
        self, severity: str, where: str, expected: str, found: str, *, repaired: bool = False
    ) -> None:
        """Note a finding."""

    def progress(self, n_done: int, n_all: int, /) -> None:
        """Tell how many blocks were checked."""


class TreeWalk:
    """One walk.

    Arguments:
        verify: read the blocks, and not only what leads to them.

    Attributes:
        used: the bitmap of slots that are in use, so far.
        n_nodes, n_blocks: visited so far.
    """

    def __init__(self, opened: recovery.Opened, check: Check, *, verify: bool = True) -> None:
        self._opened = opened
        self._verifies = verify
        self._check = check
        self._core = opened.services.core
        slots = self._core.slots
        n_bits = slots.n_regions * slots.region_slots
        self.used: U8 = LazyArray((n_bits // 8,), np.uint8).array
        set_bits(self.used, np.array([0, *range(slots.n_slots, n_bits)], np.int64))
        self.n_nodes = 0
        self.n_blocks = 0
        self._n_total = 0
        self._partly_lost: set[int] = set()
        self._seen: dict[int, tuple[int, int]] = {}
        """Leaves without a flaw, by slot: blocks mapped and provisioned in each."""

    def run(self) -> None:
        """Visit everything."""
        registry = self._opened.registry
        snapshots = sorted(registry.snapshots.values(), key=lambda found: found.info.epoch)
        images: list[Image] = [*snapshots, *registry.by_id.values()]
        self._n_total = sum(image.info.n_own for image in images)
        self._use(self._opened.roots.all_slots(), "the pool's own trees")
        for image in images:
            if isinstance(image, Snapshot) and not image.is_open:
                image.open_now()
            self._visit(image)
            self._opened.services.memory.balance()

    # -- slots ------------------------------------------------------------------------------

    def _use(self, slots: I64, who: str) -> None:
        """`who` has `slots` of its own, which nobody else may have."""
        distinct, counts = np.unique(self._inside(slots, who), return_counts=True)
        shared = distinct[(counts > 1) | test_bits(self.used, distinct)]
        for slot in shared[:_SHOWN].tolist():
            self._check.add("damage", f"{who}, slot {slot}", "one pointer to it", "more than one")
        set_bits(self.used, distinct)

    def _share(self, image: Image, slots: I64, who: str) -> None:
        """`image` shares `slots` with what it continues from; that has been visited."""
        slots = self._inside(slots, who)
        alone = slots[~test_bits(self.used, slots)]
        # Below a damaged node of the other, or one that was, it is the only one that has them.
        if len(alone) and not self._check.n_damaged_nodes and not self._continues_from_lost(image):
            for slot in alone[:_SHOWN].tolist():
                where = f"{who}, slot {slot}"
                self._check.add(
                    "damage", where, "a slot shared with what it continues from", "none"
                )
        set_bits(self.used, alone)

    def _continues_from_lost(self, image: Image) -> bool:
        """Tell whether some of what `image` continues from, further up too, is LOST."""
        parent = self._opened.registry.snapshots.get(image.info.parent)
        while parent is not None:
            if parent.id in self._partly_lost:
                return True
            parent = self._opened.registry.snapshots.get(parent.info.parent)
        return False

    def _inside(self, slots: I64, who: str) -> I64:
        n_slots = self._core.slots.n_slots
        outside = slots[slots >= n_slots]
        if len(outside):
            self._check.add("damage", who, f"slots below {n_slots}", f"slot {int(outside[0])}")
        return slots[slots < n_slots]

    def _point(self, image: Image, locations: U64, who: str) -> U64:
        """Account what `image` points to; return the locations that are its own."""
        held = locations[layout.holds_slot(locations)]
        is_own = layout.holds_slot_of_after(held, image.kept_epoch)
        self._use(layout.slots_of(held[is_own]), who)
        self._share(image, layout.slots_of(held[~is_own]), who)
        return held[is_own]

    # -- images -----------------------------------------------------------------------------

    def _visit(self, image: Image) -> None:
        self._visit_nodes(image)
        n_mapped = n_provisioned = n_own = 0
        lost = _Stretches()
        for leaf, end, is_lost in image.map.leaves_in_use():
            start = leaf << image.map.leaf_shift
            stop = min(end << image.map.leaf_shift, image.map.n_blocks)
            if is_lost:
                lost.add(start, stop)
                continue
            slot = self._visit_leaf_pointer(image, leaf)
            mapped, provisioned = self._seen.get(slot, (-1, 0))
            if mapped < 0 or image.map.n_dirty:
                mapped, provisioned, own = self._visit_leaf(image, leaf, start, stop, slot, lost)
                n_own += own
            n_mapped += mapped
            n_provisioned += provisioned
        for leaf in np.flatnonzero(image.map.states == HOLE | DIRTY).tolist():
            self._visit_leaf_pointer(image, leaf)  # until the next checkpoint
        self._add_lost(image, lost)
        if lost.found:
            self._partly_lost.add(image.id)
        if not self._check.n_damaged_nodes or self._check.repair:
            self._count(image, n_mapped, n_provisioned, n_own)

    def _visit_nodes(self, image: Image) -> None:
        """The nodes above the leaves; dirty ones are what the last checkpoint has written."""
        nodes = image.map.nodes
        for level in range(1, nodes.depth):
            found = nodes.levels[level][nodes.used(level), 0]
            self.n_nodes += int(np.count_nonzero(layout.holds_slot(found)))
            self._point(image, found, f"map of {image.name}")

    def _visit_leaf_pointer(self, image: Image, leaf: int) -> int:
        """Account the pointer to a leaf; return its slot, -1 if it has none."""
        one = np.array([leaf], np.int64)
        load_nodes_now(self._core, image.map, one, image.name)
        location = image.map.nodes.locations(0, one)
        self._point(image, location, f"map of {image.name}")
        if not layout.holds_slot(location)[0]:
            return -1
        self.n_nodes += 1
        return int(layout.slots_of(location)[0])

    def _visit_leaf(
        self, image: Image, leaf: int, start: int, stop: int, slot: int, lost: _Stretches
    ) -> tuple[int, int, int]:
        """Return how many blocks of a leaf are mapped, provisioned, and mapped on its own."""
        n_damaged = self._check.n_damaged_nodes
        load_now(self._core, image.map, start, start + 1, image.name)
        if self._check.n_damaged_nodes > n_damaged:
            image.map.make_writable(np.array([start]))  # so that repair writes that it is LOST
        locations = image.map.locations(start, stop)
        slots = layout.slots_of(locations)
        held = np.flatnonzero(layout.holds_slot(locations) & (slots < self._core.slots.n_slots))
        # What is shared was read before, unless the leaf of whose it is could not be.
        unread = held[~test_bits(self.used, slots[held])]
        self._point(image, locations, f"{image.kind} {image.name}")
        n_mapped = int(np.count_nonzero(layout.holds_slot(locations)))
        n_provisioned = int(np.count_nonzero(layout.is_provisioned(locations)))
        lost_blocks = np.flatnonzero(layout.is_lost(locations)) + start
        lost.add_blocks(lost_blocks)
        own = np.flatnonzero(layout.holds_slot_of_after(locations, image.kept_epoch))
        if self._verifies:
            self._verify(image, np.union1d(own, unread) + start)
        if not len(lost_blocks) and slot >= 0 and not image.map.n_dirty:
            self._seen[slot] = n_mapped, n_provisioned
        if image.map.state_bytes[leaf] == RESIDENT:
            image.map.evict_leaf(leaf)
        return n_mapped, n_provisioned, len(own)

    def _add_lost(self, image: Image, lost: _Stretches) -> None:
        """Tell of what cannot be read, for whatever reason, as byte ranges."""
        size = image.block_size
        for start, stop in lost.found:
            end = min(stop * size, image.size)
            self._check.add(
                "damage",
                f"{image.kind} {image.name}, bytes {start * size} to {end}",
                "data",
                "nothing: the way to it is damaged",
            )

    def _count(self, image: Image, n_mapped: int, n_provisioned: int, n_own: int) -> None:
        info = image.info
        before = info.n_mapped, info.n_provisioned, info.n_own
        if before == (n_mapped, n_provisioned, n_own):
            return
        if not self._check.n_damaged_nodes:
            self._check.add(
                "inconsistency",
                f"catalogue, {image.kind} {image.name}",
                f"{n_mapped} blocks mapped, {n_own} of its own, {n_provisioned} provisioned",
                f"{before[0]}, {before[2]} and {before[1]}",
            )
        if isinstance(image, Volume):
            self._core.slots.n_set_aside += n_provisioned - info.n_provisioned
        info.n_mapped, info.n_provisioned, info.n_own = n_mapped, n_provisioned, n_own

    # -- blocks -----------------------------------------------------------------------------

    def _verify(self, image: Image, blocks: I64) -> None:
        """Read and hash `blocks` of an image."""
        slots = layout.slots_of(image.map.entries[blocks, 0])
        for start, stop in layout.runs(slots):
            self._verify_run(image, blocks[start:stop], int(slots[start]))
        self.n_blocks += len(blocks)
        self._check.progress(self.n_blocks, self._n_total)

    def _verify_run(self, image: Image, blocks: I64, first_slot: int) -> None:
        core = self._core
        size = core.block_size
        try:
            raw = memoryview(core.data.pread(len(blocks) * size, first_slot * size))
        except ReadFailed as error:
            if len(blocks) > 1:  # which of them is it?
                for index in range(len(blocks)):
                    single = blocks[index : index + 1]
                    self._verify_run(image, single, first_slot + index)
                return
            raw = memoryview(b"")
            if first_slot not in self._opened.inline:
                where = f"{image.kind} {image.name} at {int(blocks[0]) * size}"
                self._check.add("damage", where, "a readable block", str(error))
                return
        expected = image.map.entries[blocks, 1].tolist()
        for index, block in enumerate(blocks.tolist()):
            slot = first_slot + index
            found = self._opened.inline.get(slot, raw[index * size : (index + 1) * size])
            if (slot + 1) * size <= self._opened.data_bytes:
                found = memoryview(bytes(found).ljust(size, b"\0"))
            if len(found) < size or xxh3_64_intdigest(found) != expected[index]:
                self._block_damaged(image, block, slot, found)

    def _block_damaged(self, image: Image, block: int, slot: int, raw: memoryview) -> None:
        size = image.block_size
        whole = len(raw) == size
        place = f"slot {slot}, byte {slot * size} of data"
        self._check.add(
            "damage",
            f"{image.kind} {image.name} at {block * size} ({place})",
            f"checksum {image.map.words[2 * block + 1]:016x}",
            f"{xxh3_64_intdigest(raw):016x}" if whole else f"{len(raw)} bytes",
        )


class _Stretches:
    """Ranges `[start, stop)` of blocks that come in ascending order, joined as they come."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []

    def add_blocks(self, blocks: I64) -> None:
        """Add `blocks`, int64, ascending."""
        for start, stop in layout.runs(blocks):
            self.add(int(blocks[start]), int(blocks[stop - 1]) + 1)

    def add(self, start: int, stop: int) -> None:
        """Add blocks `[start, stop)`."""
        if self.found and self.found[-1][1] == start:
            start = self.found.pop()[0]
        self.found.append((start, stop))
