"""Which leaves of which maps, and which nodes above them, are in memory.

Owns loading them from disk and evicting clean ones under the memory limit; the arrays are the
maps' (blockmap.py, nodes.py), dirty leaves become clean by checkpoints only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from nbdstore.store import layout
from nbdstore.store.blockmap import KIND, STORED, BlockMap, Leaves
from nbdstore.store.core import Core
from nbdstore.store.layout import U64
from nbdstore.store.nodes import STORED as NODE_STORED
from nbdstore.store.superblock import Pointer

_LOAD_LEAVES: Final = 64  # per thread call: 256 KiB at 4 KiB blocks
_NODES_SHARE: Final = 8  # of the memory is for level 1, whose nodes cover 256 leaves each

GetMap = Callable[[], BlockMap]
"""Returns a volume's map; a resize replaces it."""


class MapMemory:
    """The memory of all maps of one pool.

    Attributes:
        counts: leaves and nodes in memory, and how many leaves wait for a checkpoint.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._maps: dict[int, GetMap] = {}
        most = core.options.map_memory // core.block_size
        self._max_nodes = most // _NODES_SHARE
        self._max_leaves = most - self._max_nodes
        self.counts = core.map_counts
        self._turn = 0

    def register(self, volume: int, get_map: GetMap) -> None:
        """Count the map of `volume` in."""
        self._maps[volume] = get_map

    def unregister(self, volume: int) -> None:
        """Count the map of `volume` out."""
        del self._maps[volume]

    @property
    def wants_checkpoint(self) -> bool:
        """Half of the memory is dirty: a checkpoint would let it be evicted."""
        return 2 * self.counts.n_dirty > self._max_leaves

    @property
    def is_crowded(self) -> bool:
        """The limit is used up by dirty leaves: writes wait for a checkpoint."""
        return self.counts.n_dirty > self._max_leaves

    def balance(self, n_leaves: int = 0, n_nodes: int = 0) -> None:
        """Evict what is clean until `n_leaves` and `n_nodes` more fit below the limits."""
        leaves = self.counts.n_resident + n_leaves - self._max_leaves
        nodes = self.counts.n_nodes + n_nodes - self._max_nodes
        if leaves <= 0 and nodes <= 0:
            return
        maps = [get() for get in self._maps.values()]
        for _ in range(len(maps)):
            self._turn = (self._turn + 1) % len(maps)
            if leaves > 0:
                leaves -= maps[self._turn].evict(leaves)
            if nodes > 0:
                nodes -= maps[self._turn].nodes.evict(nodes)

    # -- loading ----------------------------------------------------------------------------

    async def load(self, get_map: GetMap, start: int, stop: int, name: str) -> None:
        """Return with no leaf of blocks `[start, stop)` STORED, and no await after that.

        The map may be a smaller one then, which has not all of these blocks.

        Raises:
            Corruption, ReadFailed: of a leaf or node.
        """
        while len(missing := get_map().missing(start, stop)):
            leaves = missing[:_LOAD_LEAVES]
            await self.load_nodes(get_map, leaves, name)
            self.balance(len(leaves))
            await self._load_leaves(get_map, leaves, name)

    async def load_nodes(self, get_map: GetMap, leaves: Leaves, name: str) -> None:
        """Return with the pointers to `leaves` in memory, and no await after that.

        Raises:
            Corruption, ReadFailed: of a node.
        """
        while len(missing := get_map().nodes.missing(leaves)):
            found = get_map()
            numbers = missing[:_LOAD_LEAVES].tolist()
            self.balance(n_nodes=len(numbers))
            pointers = [found.nodes.pointer(node) for node in numbers]
            blocks = await self._read(numbers, pointers, f"map of {name}, level 1, node")
            # Meanwhile others may have loaded a node, a checkpoint may have written it elsewhere,
            # or the map may have been replaced: then this is of yesterday.
            if get_map() is not found:
                continue
            for node, before, block in zip(numbers, pointers, blocks, strict=True):
                stored = found.nodes.states[node] == NODE_STORED
                if stored and found.nodes.pointer(node) == before:
                    found.nodes.install(node, block)

    async def _load_leaves(self, get_map: GetMap, leaves: Leaves, name: str) -> None:
        found = get_map()
        leaves = leaves[leaves < found.n_leaves]  # it may have been shrunk since
        # Others may have loaded a leaf, and made a hole of it: then it has no pointer any more.
        leaves = leaves[found.states[leaves] & KIND == STORED]
        if len(found.nodes.missing(leaves)):
            return  # evicted between loading and here; the caller tries again
        pointers = found.nodes.leaf_pointers(leaves)
        numbers = leaves.tolist()
        blocks = await self._read(numbers, pointers, f"map of {name}, leaf")
        # As above; a leaf may also have been changed and evicted again.
        if get_map() is not found or len(found.nodes.missing(leaves)):
            return
        current = found.nodes.leaf_pointers(leaves)
        for leaf, block, before, now in zip(numbers, blocks, pointers, current, strict=True):
            if found.state_bytes[leaf] & KIND == STORED and before == now:
                found.install(leaf, block)

    async def read_leaves(self, pointers: U64, what: str) -> U64:
        """Read leaves from the disk, which stay as they are in memory.

        Arguments:
            pointers: their entries, uint64, shape (n, 2).

        Returns the locations in them: uint64, shape (n, fanout).

        Raises:
            Corruption, ReadFailed: of a leaf.
        """
        fanout = self._core.block_size // layout.ENTRY_SIZE
        found = np.zeros((len(pointers), fanout), np.uint64)
        uniform = layout.is_provisioned(pointers[:, 0])
        found[uniform] = pointers[uniform, :1]
        rows = np.flatnonzero(layout.holds_slot(pointers[:, 0]))
        for at in range(0, len(rows), _LOAD_LEAVES):
            part = rows[at : at + _LOAD_LEAVES]
            entries = [(location, checksum) for location, checksum in pointers[part].tolist()]
            for row, block in zip(
                part, await self._read(part.tolist(), entries, what), strict=True
            ):
                found[row] = np.frombuffer(block, "<u8").reshape(fanout, 2)[:, 0]
        return found

    async def _read(
        self, numbers: Sequence[int], pointers: Sequence[Pointer], what: str
    ) -> list[bytes]:
        """Read the blocks that `pointers` point to, which stay where they are meanwhile."""
        core = self._core

        def read() -> list[bytes]:
            return [
                core.try_block(location, checksum, f"{what} {number}")
                or layout.lost_node(core.block_size)
                for number, (location, checksum) in zip(numbers, pointers, strict=True)
            ]

        return await core.read_in_thread(read)


async def load_map(
    core: Core, root: Pointer, size: int, name: str, *, read_only: bool = False
) -> BlockMap:
    """Load the map of an image of `size` bytes, down to where its leaves are.

    Nobody may free a node of it meanwhile.

    Raises:
        Corruption, ReadFailed: of a node.
    """
    blocks, load = _unloaded(core, root, size, name, read_only=read_only)
    try:
        await core.read_in_thread(load)
    except BaseException:
        blocks.retire()
        raise
    return blocks


def load_map_now(
    core: Core, root: Pointer, size: int, name: str, *, read_only: bool = False
) -> tuple[BlockMap, U64]:
    """Like :func:`load_map`, but waits for the disk in place: for recovery.

    Returns the locations of the nodes, too.
    """
    blocks, load = _unloaded(core, root, size, name, read_only=read_only)
    return blocks, load()


def _unloaded(
    core: Core, root: Pointer, size: int, name: str, *, read_only: bool = False
) -> tuple[BlockMap, Callable[[], U64]]:
    """A map, and what loads it; that may run in a thread, as long as nobody uses the map."""
    n_blocks = -(-size // core.block_size)
    blocks = BlockMap(n_blocks, core.block_size, core.map_counts, read_only=read_only)

    def read(location: int, checksum: int, what: str) -> bytes | None:
        return core.try_block(location, checksum, f"map of {name}, {what}")

    return blocks, lambda: blocks.load_levels(root, read)


def load_now(core: Core, found: BlockMap, start: int, stop: int, name: str) -> None:
    """Like :meth:`MapMemory.load`, but waits for the disk in place: for recovery and checks.

    What is damaged is LOST then, if ``core.on_damage`` wants to know of it.
    """
    missing = found.missing(start, stop)
    load_nodes_now(core, found, missing, name)
    for leaf, (location, checksum) in zip(
        missing.tolist(), found.nodes.leaf_pointers(missing), strict=True
    ):
        raw = core.try_block(location, checksum, f"map of {name}, leaf {leaf}")
        found.install(leaf, raw or layout.lost_node(core.block_size))


def load_nodes_now(core: Core, found: BlockMap, leaves: Leaves, name: str) -> None:
    """Like :meth:`MapMemory.load_nodes`, but waits for the disk in place."""
    for node in np.asarray(found.nodes.missing(leaves)).tolist():
        what = f"map of {name}, level 1, node {node}"
        raw = core.try_block(*found.nodes.pointer(node), what)
        found.nodes.install(node, raw or layout.lost_node(core.block_size))
