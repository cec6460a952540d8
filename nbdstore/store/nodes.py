"""The upper part of a volume's map: levels 1 to the root, the pointers to leaves and nodes.

Owns these arrays and which of level 1's nodes are in memory; does no I/O.  They change by
checkpoints only, which run one at a time.

Level 1 has an entry for each leaf, and each level above one for each node of the level below, a
node being `fanout` consecutive entries, one block.  The top level has one entry, the root.  All
are flat arrays over lazily touched memory.  Levels 2 and up are always in memory (16 bytes per
256 MiB of volume that was ever written, at 4 KiB blocks).  A node of level 1 is

========  =======================================================================
EMPTY     all its entries are null; nothing is on disk and nothing in memory
STORED    on disk at level 2's entry, not in memory
RESIDENT  in memory
========  =======================================================================

A map of one leaf has level 1 as its top: then that one entry is the root, and always there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from nbdstore.store import layout
from nbdstore.store.layout import ENTRY_SIZE, I64, U64
from nbdstore.store.lazyarray import LazyArray
from nbdstore.store.superblock import Pointer

EMPTY: Final = 0
STORED: Final = 1
RESIDENT: Final = 2

Indices = npt.NDArray[np.int64]
ReadNode = Callable[[int, int, str], bytes | None]
"""Called with location, checksum and a name; returns the verified block, or None: it is damaged,
somebody was told, and everything below is LOST now."""


LOST_POINTER: Final[Pointer] = (layout.LOST, 0)


class MapCounts:
    """What all maps of a pool have together.

    Attributes:
        n_resident, n_dirty: leaves in memory, and leaves that wait for a checkpoint.
        n_nodes: nodes of level 1 in memory.
        level_nodes: nodes that level 1, 2, ... can have.
    """

    __slots__ = ("level_nodes", "n_dirty", "n_nodes", "n_resident")

    def __init__(self) -> None:
        self.n_resident = 0
        self.n_dirty = 0
        self.n_nodes = 0
        self.level_nodes: list[int] = []

    def slots_to_write(self, n_more: int) -> int:
        """How many slots a checkpoint takes at most, were `n_more` more leaves dirty."""
        n_dirty = self.n_dirty + n_more
        return n_dirty + sum([min(n_dirty, n) for n in self.level_nodes])

    def add_levels(self, sizes: list[int], sign: int) -> None:
        """Count a map's nodes by level in (sign 1) or out (sign -1)."""
        self.level_nodes += [0] * (len(sizes) - len(self.level_nodes))
        for level, n in enumerate(sizes):
            self.level_nodes[level] += sign * n


def level_sizes(n_blocks: int, fanout: int) -> list[int]:
    """Return the number of entries of each level, from the blocks up to the root's 1."""
    sizes = [n_blocks]
    while sizes[-1] > 1 or len(sizes) == 1:
        sizes.append(-(-sizes[-1] // fanout))
    return sizes


class Nodes:
    """Levels 1 and up of one map.

    Attributes:
        levels: levels 1 to the root, uint64, shape (entries of the level, 2), padded to nodes.
        states: uint8, by node of level 1.
        dirty: by level, the nodes that have changed since they were written.
        n_resident: RESIDENT nodes.
    """

    def __init__(
        self, n_leaves: int, block_size: int, totals: MapCounts, *, read_only: bool = False
    ) -> None:
        self._totals = totals
        self._read_only = read_only
        self._block_size = block_size
        self.fanout = block_size // ENTRY_SIZE
        self.shift = self.fanout.bit_length() - 1
        self.n_leaves = n_leaves
        sizes = level_sizes(n_leaves, self.fanout) if n_leaves > 1 else [1]
        self._sizes = sizes
        if not read_only:
            totals.add_levels(sizes[1:], 1)
        memories = [self._level(n) for n in sizes]
        self._first = memories[0]
        self.levels: list[U64] = [memory.array for memory in memories]
        self.dirty: list[set[int]] = [set() for _ in sizes]
        self.states = np.zeros(-(-n_leaves // self.fanout), np.uint8)
        self.n_resident = 0
        self._clock = 0

    def _level(self, n_entries: int) -> LazyArray:
        padded = n_entries + (-n_entries % self.fanout if n_entries > 1 else 0)
        return LazyArray((padded, 2), "<u8")

    @property
    def depth(self) -> int:
        """Number of levels."""
        return len(self.levels)

    @property
    def root(self) -> Pointer:
        """The entry of the topmost node."""
        location, checksum = self.levels[-1][0].tolist()
        return location, checksum

    # -- opening ----------------------------------------------------------------------------

    def load(self, root: Pointer, read_node: ReadNode) -> Iterator[tuple[int, U64]]:
        """Take over a tree from disk; afterwards level 1 is STORED.

        Yields `(level, locations)` for the entries in use, level 1's as `(first leaf, locations
        of its node)` with a first leaf >= 0, those above as `(-1, locations)`.  The pointer to a
        damaged node becomes LOST, which makes the node that it stands in dirty.
        """
        self.levels[-1][0] = root
        if self.depth == 1 and root[0]:
            yield 0, self.levels[0][:, 0].copy()
        for depth in range(self.depth - 1, 0, -1):
            used = self.used(depth)
            for node in used.tolist():
                location, checksum = self.levels[depth][node].tolist()
                raw = read_node(location, checksum, f"node {node} of level {depth}")
                if raw is None:
                    self.levels[depth][node] = LOST_POINTER
                    self.dirty[depth].add(node >> self.shift)
                    raw = layout.lost_node(self._block_size)
                entries = self._entries_in(raw, depth - 1, node)
                if depth > 1:
                    self.levels[depth - 1][node << self.shift : (node + 1) << self.shift] = entries
                else:
                    self.states[node] = STORED
                    n_leaves = min(self.fanout, self.n_leaves - (node << self.shift))
                    yield node << self.shift, entries[:n_leaves, 0]
            yield -1, self.levels[depth][used, 0]

    def _entries_in(self, raw: bytes, level: int, node: int) -> U64:
        """The entries of a node of `levels[level]`; of a LOST one, as many as there can be."""
        entries = np.frombuffer(raw, "<u8").reshape(self.fanout, 2)
        n_entries = self._sizes[level] - (node << self.shift)
        if n_entries < self.fanout and entries[n_entries:, 0].any():
            entries = entries.copy()
            entries[n_entries:] = 0
        return entries

    def used(self, depth: int) -> Indices:
        """The indices of the entries of `levels[depth]`, depth >= 1, that are not null.

        Looks only below entries that are in use or changed, so that a level of a large and
        mostly empty volume is not touched as a whole.
        """
        if depth == self.depth - 1:
            return np.flatnonzero(self.levels[depth][:, 0])
        changed = np.fromiter(self.dirty[depth], np.int64)
        nodes = np.union1d(self.used(depth + 1), changed)
        entries = self.levels[depth].reshape(-1, self.fanout, 2)[nodes, :, 0]
        row, column = np.nonzero(entries)
        found: Indices = nodes[row] * self.fanout + column
        return found

    def lost_stretches(self) -> list[tuple[int, int]]:
        """The leaves `[first, stop)` whose nodes of level 1 are LOST and not in memory."""
        if self.depth == 1:
            return []
        lost = layout.is_lost(self.levels[1][: len(self.states), 0]) & (self.states == STORED)
        nodes = np.flatnonzero(lost)
        return [
            (
                int(nodes[start]) << self.shift,
                min(int(nodes[stop - 1] + 1) << self.shift, self.n_leaves),
            )
            for start, stop in layout.runs(nodes)
        ]

    # -- level 1 in memory ------------------------------------------------------------------

    def missing(self, leaves: Indices) -> Indices:
        """The STORED nodes that hold the pointers to `leaves`.

        Some may lie beyond the end: whoever waited for a node may have to do with a smaller map.
        """
        nodes = np.unique(leaves >> self.shift)
        nodes = nodes[nodes < len(self.states)]
        found: Indices = nodes[self.states[nodes] == STORED]
        return found

    def pointer(self, node: int) -> Pointer:
        """Where a node of level 1 is on disk."""
        location, checksum = self.levels[1][node].tolist()
        return location, checksum

    def install(self, node: int, raw: bytes) -> None:
        """Make a STORED node RESIDENT, with its bytes."""
        assert self.states[node] == STORED
        self._entries(node)[:] = self._entries_in(raw, 0, node)
        self._set_state(node, RESIDENT)

    def _entries(self, node: int) -> U64:
        return self.levels[0][node << self.shift : (node + 1) << self.shift]

    def _set_state(self, node: int, state: int) -> None:
        change = (state == RESIDENT) - (int(self.states[node]) == RESIDENT)
        self.states[node] = state
        self.n_resident += change
        self._totals.n_nodes += change

    def leaf_pointers(self, leaves: Indices) -> list[Pointer]:
        """The entries of `leaves`, whose nodes are not STORED."""
        return [(location, checksum) for location, checksum in self.levels[0][leaves].tolist()]

    def evict(self, n_nodes: int) -> int:
        """Give back the memory of up to `n_nodes` clean nodes; return how many."""
        if not self.n_resident or self.depth == 1:
            return 0
        clean = np.flatnonzero(self.states == RESIDENT)
        clean = clean[~np.isin(clean, np.fromiter(self.dirty[0], np.int64))]
        if not len(clean):
            return 0
        at = int(np.searchsorted(clean, self._clock))
        chosen = np.roll(clean, -at)[:n_nodes].tolist()
        for node in chosen:
            self._forget(node)
            self._set_state(node, STORED)
        self._clock = chosen[-1] + 1
        return len(chosen)

    def _forget(self, node: int) -> None:
        size = self._block_size
        self._first.forget(node * size, (node + 1) * size)

    # -- checkpoints ------------------------------------------------------------------------

    def leaf_written(self, leaf: int, pointer: Pointer) -> int:
        """Point to where a checkpoint has written `leaf`, whose node is not STORED.

        Returns the location that stood there.
        """
        node = leaf >> self.shift
        if self.depth > 1 and self.states[node] == EMPTY:
            self._set_state(node, RESIDENT)
        old = int(self.levels[0][leaf, 0])
        self.levels[0][leaf] = pointer
        self.dirty[0].add(node)
        return old

    def node_bytes(self, level: int, node: int) -> bytes:
        """The bytes of the node of `levels[level]`'s entries `[node * fanout, ...)`."""
        return self.levels[level][node << self.shift : (node + 1) << self.shift].tobytes()

    def written(self, level: int, nodes: list[int], pointers: list[Pointer]) -> list[int]:
        """Point to where a checkpoint has written `nodes` of `levels[level]`.

        Returns the locations that stood there.
        """
        upper = self.levels[level + 1]
        old: list[int] = upper[nodes, 0].tolist()
        upper[nodes] = pointers
        self.dirty[level].difference_update(nodes)
        self.dirty[level + 1].update(node >> self.shift for node in nodes)
        if level == 0:
            for node, (location, _) in zip(nodes, pointers, strict=True):
                if not location:
                    self._forget(node)
                    self._set_state(node, EMPTY)
        return old

    # -- resizing ---------------------------------------------------------------------------

    def resized(self, n_leaves: int) -> Nodes:
        """Return these with `n_leaves`; the caller retires these.

        No pointer may stand beyond; if only one leaf is left, node 0 may not be STORED.
        """
        new = Nodes(n_leaves, self._block_size, self._totals)
        for depth in range(min(self.depth, new.depth)):
            n = min(len(self.levels[depth]), len(new.levels[depth]))
            used = self.used(depth) if depth else self._resident_leaves()
            used = used[used < n]
            new.levels[depth][used] = self.levels[depth][used]
            new.dirty[depth] = {node for node in self.dirty[depth] if node << self.shift < n}
        if new.depth > self.depth:
            new.dirty[self.depth - 1].add(0)  # what was the root has a parent now
        if new.depth > 1 and self.depth > 1:
            n_nodes = min(len(self.states), len(new.states))
            for node in np.flatnonzero(self.states[:n_nodes]).tolist():
                new._set_state(node, int(self.states[node]))
        elif new.depth > 1 and self.root[0]:
            new._set_state(0, RESIDENT)
        return new

    def _resident_leaves(self) -> Indices:
        """The leaves whose pointers are in memory."""
        if self.depth == 1:
            return np.zeros(1, np.int64)
        nodes = np.flatnonzero(self.states == RESIDENT)
        leaves = nodes[:, None] * self.fanout + np.arange(self.fanout)
        found: Indices = leaves.reshape(-1)
        return found

    def is_empty_from(self, n_leaves: int) -> bool:
        """Tell whether no node above level 1 points to anything from leaf `n_leaves` on."""
        first = n_leaves
        for depth in range(1, self.depth):
            first = -(-first // self.fanout)
            if (self.used(depth) >= first).any():
                return False
        return True

    def slots_from(self, depth: int, epoch: int) -> I64:
        """The slots that levels `depth` (>= 1) and up point to, of nodes born after `epoch`."""
        parts = [np.empty(0, np.int64)]
        for level in range(depth, self.depth):
            found = self.levels[level][self.used(level), 0]
            parts.append(layout.slots_of(found[layout.holds_slot_of_after(found, epoch)]))
        return np.concatenate(parts)

    # -- beside another tree ----------------------------------------------------------------

    def locations(self, level: int, indices: Indices) -> U64:
        """The locations at `indices` of `levels[level]`; 0 where this tree has no such entry.

        So trees of different heights can be compared: the same index of the same level stands for
        the same blocks in both.
        """
        found = np.zeros(len(indices), np.uint64)
        if level < self.depth:
            inside = indices < len(self.levels[level])
            found[inside] = self.levels[level][indices[inside], 0]
        return found

    def slots_unlike(self, others: Sequence[Nodes], epoch: int) -> I64:
        """The slots of nodes of level 1 and up, born after `epoch`, that none of `others` has."""
        parts = [np.empty(0, np.int64)]
        for level in range(1, self.depth):
            used = self.used(level)
            found = self.levels[level][used, 0]
            alone = layout.holds_slot_of_after(found, epoch)
            for other in others:
                alone &= found != other.locations(level, used)
            parts.append(layout.slots_of(found[alone]))
        return np.concatenate(parts)

    def retire(self) -> None:
        """Count no more: the volume has other nodes, or is gone."""
        self._totals.n_nodes -= self.n_resident
        if not self._read_only:
            self._totals.add_levels(self._sizes[1:], -1)
