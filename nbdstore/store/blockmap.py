"""The map of one volume in memory: block -> (location, checksum), and which of it is where.

Owns the entries of the blocks and the state of the leaves they lie in; does no I/O: it says which
leaves it misses and takes them when somebody has read them.  The levels above are nodes.py's.

The tree: level 0 is the entries of the volume's blocks.  A leaf is `fanout = block_size / 16`
consecutive ones, one block on disk, one page of memory at 4 KiB blocks.  Level 0 is a flat array
over lazily touched memory, so that an array index is a block number and one numpy expression
serves a whole batch; a leaf at a time it comes and goes.

A leaf has a kind and two flags, in one byte:

===========  ==================================================================================
HOLE         all entries are 0; the memory is untouched; if clean, level 1's entry is null
STORED       on disk at level 1's entry, not in memory
RESIDENT     in memory
UNIFORM      all entries are PROVISIONED, of one epoch; the memory is untouched
| DIRTY      differs from what level 1's entry points to
| FROZEN     belongs to a checkpoint that has not written it yet: before the leaf changes, what it
             was goes to `frozen`
===========  ==================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from nbdstore.store import layout
from nbdstore.store.layout import ENTRY_SIZE, I64, U64
from nbdstore.store.lazyarray import LazyArray
from nbdstore.store.nodes import MapCounts, Nodes, ReadNode
from nbdstore.store.superblock import Pointer

HOLE: Final = 0
STORED: Final = 1
RESIDENT: Final = 2
UNIFORM: Final = 3
KIND: Final = 3
DIRTY: Final = 4
FROZEN: Final = 8
WRITABLE: Final = RESIDENT | DIRTY

FrozenLeaf = bytes | int
"""What a frozen leaf was: the bytes of its node, or the location of all its entries."""

Leaves = npt.NDArray[np.int64]
_NO_LEAVES: Final[Leaves] = np.empty(0, np.int64)


class BlockMap:
    """The map of one volume.

    Arguments:
        totals: counts its leaves in, until :meth:`retire`.
        read_only: it is a snapshot's; no checkpoint will have to write it.

    Attributes:
        n_blocks: blocks of the volume; `n_leaves` of them, the last one padded with holes.
        entries: uint64, shape (n_leaves * fanout, 2): location and checksum; 0 = hole.
        words: the same as a memoryview of u64, for scalars: `words[2 * block]` is the location.
        states: uint8, shape (n_leaves,): kind and flags; `state_bytes` the same as a memoryview.
        nodes: the levels above.
        n_resident, n_dirty: leaves in memory, and leaves a checkpoint has to write.
        frozen: leaves that changed after they were frozen, as they were.
    """

    def __init__(
        self, n_blocks: int, block_size: int, totals: MapCounts, *, read_only: bool = False
    ) -> None:
        self._totals = totals
        self.block_size = block_size
        self.fanout = block_size // ENTRY_SIZE
        self.leaf_shift = self.fanout.bit_length() - 1
        self.n_blocks = n_blocks
        self.n_leaves = -(-n_blocks // self.fanout)
        self._leaf_memory = LazyArray((self.n_leaves * self.fanout, 2), "<u8")
        self.entries: U64 = self._leaf_memory.array
        self.words = self._leaf_memory.memory.cast("Q")
        state = LazyArray((self.n_leaves,), np.uint8)
        self.states = state.array
        self.state_bytes = state.memory
        self.nodes = Nodes(self.n_leaves, block_size, totals, read_only=read_only)
        self._uniform_epochs = LazyArray((self.n_leaves,), np.uint32).array
        self.n_resident = 0
        self.n_dirty = 0
        self.frozen: dict[int, FrozenLeaf] = {}
        self._clock = 0

    # -- opening ----------------------------------------------------------------------------

    def load_levels(self, root: Pointer, read_node: ReadNode) -> U64:
        """Take over a tree from disk; its leaves become STORED, UNIFORM or HOLE.

        Returns the locations of all its nodes, leaves included.
        """
        parts = [np.empty(0, np.uint64)]
        for first_leaf, locations in self.nodes.load(root, read_node):
            held = layout.holds_slot(locations)
            parts.append(locations[held])
            if first_leaf >= 0:
                leaves = np.arange(first_leaf, first_leaf + len(locations))
                uniform = layout.is_provisioned(locations)
                self.states[leaves[held | layout.is_lost(locations)]] = STORED
                self.states[leaves[uniform]] = UNIFORM
                epochs = locations[uniform] >> layout.NP_SLOT_BITS
                self._uniform_epochs[leaves[uniform]] = epochs
        return np.unique(np.concatenate(parts))

    @property
    def is_changed(self) -> bool:
        """A checkpoint has something to write."""
        return self.n_dirty > 0 or any(self.nodes.dirty)

    # -- leaves -----------------------------------------------------------------------------

    def leaf_range(self, start: int, stop: int) -> tuple[int, int]:
        """The leaves `[first, last + 1)` that hold blocks `[start, stop)`, not empty."""
        return start >> self.leaf_shift, ((stop - 1) >> self.leaf_shift) + 1

    def leaves_in_use(self) -> Iterator[tuple[int, int, bool]]:
        """Yield `(first, stop, lost)`, ascending, for all leaves that are not HOLE.

        A stretch of leaves that are LOST with the nodes above them comes as a whole, every other
        leaf by itself.
        """
        leaves = np.flatnonzero(self.states & KIND)
        at = 0
        for first, stop in self.nodes.lost_stretches():
            before, after = np.searchsorted(leaves, [first, stop]).tolist()
            yield from ((leaf, leaf + 1, False) for leaf in leaves[at:before].tolist())
            yield first, stop, True
            at = after
        yield from ((leaf, leaf + 1, False) for leaf in leaves[at:].tolist())

    def missing(self, start: int, stop: int) -> Leaves:
        """The STORED leaves that hold entries of blocks `[start, stop)`."""
        first, last = self.leaf_range(start, stop)
        states = self.state_bytes[first:last]
        if len(states) == 1 and states[0] & KIND != STORED:
            return _NO_LEAVES  # as for most requests: 0.5 us, where arrays take 5
        found: Leaves = np.flatnonzero(self.states[first:last] & KIND == STORED) + first
        return found

    def missing_of(self, blocks: I64) -> Leaves:
        """The STORED leaves that hold entries of `blocks`."""
        leaves = np.unique(blocks >> self.leaf_shift)
        found: Leaves = leaves[self.states[leaves] & KIND == STORED]
        return found

    def install(self, leaf: int, node: bytes) -> None:
        """Make a STORED leaf RESIDENT, with the bytes of its node."""
        assert self.states[leaf] & KIND == STORED
        n = self._blocks_in(leaf)  # a LOST leaf may have more
        self._leaf_entries(leaf)[:n] = np.frombuffer(node, "<u8").reshape(self.fanout, 2)[:n]
        self.states[leaf] += RESIDENT - STORED
        self._add_resident(1)

    def _leaf_entries(self, leaf: int) -> U64:
        return self.entries[leaf << self.leaf_shift : (leaf + 1) << self.leaf_shift]

    def _uniform_location(self, leaf: int) -> int:
        return layout.pack_location(layout.PROVISIONED, int(self._uniform_epochs[leaf]))

    def locations(self, start: int, stop: int) -> U64:
        """The locations of blocks `[start, stop)`, of which no leaf is STORED: a copy."""
        found: U64 = self.entries[start:stop, 0].copy()
        first, last = self.leaf_range(start, stop)
        for leaf in (np.flatnonzero(self.states[first:last] & KIND == UNIFORM) + first).tolist():
            low = max((leaf << self.leaf_shift) - start, 0)
            found[low : ((leaf + 1) << self.leaf_shift) - start] = self._uniform_location(leaf)
        return found

    def windows(self, n_blocks: int) -> U64:
        """The entries of all ranges of `n_blocks`, by their first block: a view.

        uint64, shape (ranges, 2 * n_blocks): location and checksum of one block after the other.
        """
        shape = (len(self.entries) - n_blocks + 1, 2 * n_blocks)
        return np.ndarray(shape, "<u8", self.words, 0, (ENTRY_SIZE, ENTRY_SIZE // 2))

    # -- changes ----------------------------------------------------------------------------

    def make_writable(self, blocks: I64) -> None:
        """Before entries of `blocks` change: their leaves become RESIDENT | DIRTY.

        None of them may be STORED.
        """
        leaves = blocks >> self.leaf_shift
        states = self.states[leaves]
        if bool((states == WRITABLE).all()):
            return
        leaves = np.unique(leaves[states != WRITABLE])
        states = self.states[leaves]
        plain = (states == RESIDENT) | (states == HOLE)
        for leaf in leaves[~plain].tolist():
            self._make_leaf_writable(leaf)
        self._add_resident(int(np.count_nonzero(states[plain] == HOLE)))
        self._add_dirty(int(np.count_nonzero(plain)))
        self.states[leaves[plain]] = WRITABLE

    def _make_leaf_writable(self, leaf: int) -> None:
        state = self.state_bytes[leaf]
        assert state & KIND != STORED
        if state & FROZEN:
            self._keep_frozen(leaf)
        if state & KIND == UNIFORM:
            location = self._uniform_location(leaf)
            self._leaf_entries(leaf)[: self._blocks_in(leaf), 0] = location
        if state & KIND != RESIDENT:
            self._add_resident(1)
        if not state & DIRTY:
            self._add_dirty(1)
        self.state_bytes[leaf] = WRITABLE

    def _blocks_in(self, leaf: int) -> int:
        return min(self.n_blocks - (leaf << self.leaf_shift), self.fanout)

    def touch(self, leaves: Leaves) -> None:
        """Have the next checkpoint write those of `leaves` (none STORED) that hold something."""
        for leaf in leaves.tolist():
            kind = self.state_bytes[leaf] & KIND
            if kind == RESIDENT:
                self._make_leaf_writable(leaf)
            elif kind == UNIFORM:
                self.set_provisioned(np.array([leaf]), int(self._uniform_epochs[leaf]))

    def set_hole(self, leaves: Leaves) -> None:
        """Make all entries of `leaves` (none STORED) holes."""
        self._set_uniform(leaves, HOLE)

    def set_provisioned(self, leaves: Leaves, epoch: int) -> None:
        """Make all entries of `leaves` (none STORED) PROVISIONED, born in `epoch`."""
        self._set_uniform(leaves, UNIFORM)
        self._uniform_epochs[leaves] = epoch

    def _set_uniform(self, leaves: Leaves, kind: int) -> None:
        states = self.states[leaves]
        assert not (states & KIND == STORED).any()
        for leaf in leaves[states & FROZEN != 0].tolist():
            self._keep_frozen(leaf)
        self._forget(leaves[states & KIND == RESIDENT].tolist())
        self._add_dirty(int(np.count_nonzero(states & DIRTY == 0)))
        self.states[leaves] = kind | DIRTY

    def _forget(self, leaves: list[int]) -> None:
        """Give back the memory of RESIDENT leaves."""
        size = self.block_size
        at = 0
        while at < len(leaves):
            stop = at + 1
            while stop < len(leaves) and leaves[stop] == leaves[stop - 1] + 1:
                stop += 1
            self._leaf_memory.forget(leaves[at] * size, (leaves[stop - 1] + 1) * size)
            at = stop
        self._add_resident(-len(leaves))

    def evict(self, n_leaves: int) -> int:
        """Give back the memory of up to `n_leaves` clean leaves; return how many.

        Goes round the leaves like a clock's hand, so that all take their turn.
        """
        if self.n_resident == 0:
            return 0
        clean = np.flatnonzero(self.states == RESIDENT)
        if not len(clean):
            return 0
        at = int(np.searchsorted(clean, self._clock))
        chosen = np.sort(np.roll(clean, -at)[:n_leaves])
        self._clock = int(clean[(at + len(chosen)) % len(clean)])
        self._evict(chosen)
        return len(chosen)

    def evict_leaf(self, leaf: int) -> None:
        """Give back the memory of one clean RESIDENT leaf."""
        self._evict(np.array([leaf], np.int64))

    def _evict(self, leaves: Leaves) -> None:
        self._forget(leaves.tolist())
        self.states[leaves] = STORED

    # -- checkpoints ------------------------------------------------------------------------

    def freeze(self) -> Leaves:
        """Begin a checkpoint: return the leaves it has to write, each as it is now."""
        assert not self.frozen
        if not self.n_dirty:
            return np.empty(0, np.int64)
        dirty = np.flatnonzero(self.states & DIRTY)
        self.states[dirty] |= FROZEN
        return dirty

    def _keep_frozen(self, leaf: int) -> None:
        self.frozen[leaf] = self._frozen_now(leaf)

    def _frozen_now(self, leaf: int) -> FrozenLeaf:
        kind = self.state_bytes[leaf] & KIND
        if kind == HOLE:
            return 0
        if kind == UNIFORM:
            return self._uniform_location(leaf)
        entries = self._leaf_entries(leaf)
        return entries.tobytes() if entries[:, 0].any() else 0

    def frozen_leaf(self, leaf: int) -> FrozenLeaf:
        """What `leaf` was when it was frozen: its node's bytes, or its uniform location."""
        if leaf in self.frozen:
            return self.frozen[leaf]
        return self._frozen_now(leaf)

    def leaf_written(self, leaf: int, pointer: Pointer) -> int:
        """The checkpoint has written `leaf`: level 1 points there; return the old location."""
        old = self.nodes.leaf_written(leaf, pointer)
        if self.frozen.pop(leaf, None) is None:
            self.state_bytes[leaf] &= KIND
            self._add_dirty(-1)
            if self.state_bytes[leaf] == RESIDENT and not pointer[0]:  # only holes are left in it
                self._forget([leaf])
                self.state_bytes[leaf] = HOLE
        return old

    def abandon_freeze(self, leaves: Leaves) -> None:
        """A checkpoint failed: those of `leaves` that it has not written are dirty again."""
        self.frozen.clear()
        self.states[leaves] &= KIND | DIRTY

    # -- resizing ---------------------------------------------------------------------------

    def resized(self, n_blocks: int) -> BlockMap:
        """Return this map with `n_blocks`, and retire this one.

        Blocks beyond `n_blocks` must be holes, and no node may point there; none may be frozen.
        """
        last = self.n_leaves - 1
        if n_blocks > self.n_blocks and self.state_bytes[last] & KIND == UNIFORM:
            self._make_leaf_writable(last)  # it stands for the blocks it has now, not for more
        new = BlockMap(n_blocks, self.block_size, self._totals)
        n = min(self.n_leaves, new.n_leaves)
        new.states[:n] = self.states[:n]
        new._uniform_epochs[:n] = self._uniform_epochs[:n]
        kinds = new.states[:n] & KIND
        resident = np.flatnonzero(kinds == RESIDENT)
        shape = (-1, self.fanout, 2)
        new.entries.reshape(shape)[resident] = self.entries.reshape(shape)[resident]
        new._add_resident(len(resident))
        new._add_dirty(int(np.count_nonzero(new.states[:n] & DIRTY)))
        new.nodes.retire()  # the empty ones it began with
        new.nodes = self.nodes.resized(new.n_leaves)
        self.retire()
        return new

    def ends_before(self, n_blocks: int) -> bool:
        """Tell whether all from block `n_blocks` on is holes, on disk too; nothing is STORED."""
        if n_blocks >= self.n_blocks:
            return True  # the last leaf may be UNIFORM as far as the map goes
        boundary = n_blocks >> self.leaf_shift
        if n_blocks % self.fanout:
            if self.state_bytes[boundary] & KIND == UNIFORM:
                return False
            inside = n_blocks % self.fanout
            if self._leaf_entries(boundary)[inside:, 0].any():
                return False
            boundary += 1
        # A clean HOLE's pointer is null; the nodes above were written without it.
        return not self.states[boundary:].any() and self.nodes.is_empty_from(boundary)

    def retire(self) -> None:
        """Count no more: the volume has another map, or is gone."""
        self._totals.n_resident -= self.n_resident
        self._totals.n_dirty -= self.n_dirty
        self.nodes.retire()

    def _add_resident(self, n: int) -> None:
        self.n_resident += n
        self._totals.n_resident += n

    def _add_dirty(self, n: int) -> None:
        self.n_dirty += n
        self._totals.n_dirty += n
