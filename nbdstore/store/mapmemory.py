"""Which leaves of which maps are in memory.

Owns loading leaves from disk and evicting clean ones under the memory limit; the arrays are the
maps' (blockmap.py), dirty leaves become clean by checkpoints only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from nbdstore.store.blockmap import KIND, STORED, BlockMap, Leaves
from nbdstore.store.core import Core

_LEAST_SHARE: Final = 4  # of the memory is for leaves, however many nodes there are
_LOAD_LEAVES: Final = 64  # per thread call: 256 KiB at 4 KiB blocks


class MapMemory:
    """The memory of all maps of one pool.

    Attributes:
        counts: leaves in memory, and of those how many wait for a checkpoint.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._maps: dict[int, Callable[[], BlockMap]] = {}
        self._most = core.options.map_memory // core.block_size
        self.counts = core.leaves
        self._turn = 0

    def register(self, volume: int, get_map: Callable[[], BlockMap]) -> None:
        """Count the map of `volume` in; `get_map` returns it (it is replaced by a resize)."""
        self._maps[volume] = get_map

    def unregister(self, volume: int) -> None:
        """Count the map of `volume` out."""
        del self._maps[volume]

    @property
    def _limit(self) -> int:
        """Leaves that may be in memory: what the nodes above, which never leave, have left."""
        return max(self._most - self.counts.n_nodes, self._most // _LEAST_SHARE)

    @property
    def wants_checkpoint(self) -> bool:
        """Half of the memory is dirty: a checkpoint would let it be evicted."""
        return 2 * self.counts.n_dirty > self._limit

    @property
    def is_crowded(self) -> bool:
        """The limit is used up by dirty leaves: writes wait for a checkpoint."""
        return self.counts.n_dirty > self._limit

    def balance(self, n_coming: int = 0) -> None:
        """Evict clean leaves until `n_coming` more fit below the limit."""
        excess = self.counts.n_resident + n_coming - self._limit
        maps = [get() for get in self._maps.values()]
        for _ in range(len(maps)):
            if excess <= 0:
                return
            self._turn = (self._turn + 1) % len(maps)
            excess -= maps[self._turn].evict(excess)

    async def load(self, get_map: Callable[[], BlockMap], start: int, stop: int, name: str) -> None:
        """Return with no leaf of blocks `[start, stop)` STORED.

        Raises:
            Corruption, ReadFailed: of a node.
        """
        while len(missing := get_map().missing(start, stop)):
            chunk = missing[:_LOAD_LEAVES]
            self.balance(len(chunk))
            await self._load_leaves(get_map, chunk, name)

    async def _load_leaves(
        self, get_map: Callable[[], BlockMap], leaves: Leaves, name: str
    ) -> None:
        core, found = self._core, get_map()
        pointers = found.levels[0][leaves].tolist()
        numbers = leaves.tolist()

        def read() -> list[bytes]:
            return [
                core.read_block(location, checksum, f"map of {name}, leaf {leaf}")
                for leaf, (location, checksum) in zip(numbers, pointers, strict=True)
            ]

        with core.slots.pinned(core.journal.seq):
            nodes = await core.disk.offload(read)
        # Meanwhile another request may have loaded a leaf (and changed it, and a checkpoint have
        # written it elsewhere, and it may be evicted again), or the map was replaced.
        if get_map() is not found:
            return
        current = found.levels[0][leaves].tolist()
        for leaf, node, before, now in zip(numbers, nodes, pointers, current, strict=True):
            if found.state_bytes[leaf] & KIND == STORED and before == now:
                found.install(leaf, node)


def load_now(core: Core, found: BlockMap, start: int, stop: int, name: str) -> None:
    """Like :meth:`MapMemory.load`, but waits for the disk in place: for recovery and checks."""
    for leaf in np.asarray(found.missing(start, stop)).tolist():
        location, checksum = found.leaf_pointer(leaf)
        found.install(leaf, core.read_block(location, checksum, f"map of {name}, leaf {leaf}"))
