"""An image: a map of blocks, and how to read what it maps.

Owns what volumes and snapshots have in common, which is reading.  The caller has checked ranges
against the size that it knows; they are checked again, since the image may have been shrunk or
deleted since.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nbdstore.errors import NotFound, StoreError, WriteFailed
from nbdstore.store.batchread import read_batch_now
from nbdstore.store.blockmap import BlockMap
from nbdstore.store.catalogue import SnapshotInfo, VolumeInfo
from nbdstore.store.checkpoint import Checkpointer
from nbdstore.store.core import Core
from nbdstore.store.durability import Committer, OnDurable
from nbdstore.store.extents import Extent, Extents
from nbdstore.store.host import Buffer
from nbdstore.store.mapmemory import MapMemory
from nbdstore.store.reading import Reading, Segment, Verified


@dataclass(frozen=True)
class Services:
    """What the images of a pool share beside its core."""

    core: Core
    committer: Committer
    memory: MapMemory
    checkpointer: Checkpointer


class Image:
    """A volume or a snapshot of one.

    Attributes:
        info: what the catalogue says of it.
        map: where its blocks are.
        kind: "volume" or "snapshot".
        kept_epoch: its parent's epoch: what was born later is its own; 0 = everything is.

    """

    info: VolumeInfo | SnapshotInfo
    map: BlockMap
    kind: ClassVar[str]

    def __init__(self, services: Services) -> None:
        self.services = services
        self.core = services.core
        self.block_size = self.core.block_size
        self.kept_epoch = 0
        self.reading = Reading(self)
        self.contents = Extents(self)

    @property
    def id(self) -> int:
        """Number of the image; never used twice in a pool."""
        return self.info.id

    @property
    def name(self) -> str:
        """Name of the image; it may change."""
        return self.info.name

    @property
    def size(self) -> int:
        """Size in bytes; it may change."""
        return self.info.size

    @property
    def properties(self) -> dict[str, Any]:
        """What others keep with the volume."""
        raise NotImplementedError

    @property
    def is_gone(self) -> bool:
        """It was deleted."""
        raise NotImplementedError

    # -- data -------------------------------------------------------------------------------

    def read_now(self, offset: int, length: int) -> list[Segment] | None:
        """Read without waiting: the segments of `[offset, offset + length)`, or None.

        A segment is a bytes-like of data, or an int: that many zero bytes that hold no data.
        """
        if self.is_gone or offset + length > self.info.size:
            self.check_range(offset, length)
        self.core.n_calls += 1
        if length == self.block_size and not offset & (length - 1):  # one call less for most
            block = self.reading.block_now(offset // length)
            return None if block is None else [block]
        return self.reading.now(offset, length)

    def read_batch_now(self, offsets: Sequence[int], length: int) -> Sequence[memoryview | None]:
        """Read `length` bytes at each of `offsets` without waiting, by one call.

        Returns the content of each range, or None where :meth:`read_now` should be asked.
        """
        if self.is_gone or max(offsets) + length > self.info.size:
            return [None] * len(offsets)
        return read_batch_now(self, offsets, length)

    async def read(self, offset: int, length: int) -> list[Segment]:
        """Read, waiting for the disk; segments as :meth:`read_now`.

        Raises:
            Corruption, ReadFailed: bad data is never returned.
        """
        self.check_range(offset, length)
        return await self.reading.read(offset, length)

    async def extents(self, offset: int, length: int, *, max_extents: int) -> list[Extent]:
        """What `[offset, offset + length)` holds, or a prefix of it with `max_extents` extents.

        Extents are merged (no two neighbours of one kind) and cut at both ends of the range.
        """
        self.check_range(offset, length)
        return await self.contents.extents(offset, length, max_extents)

    async def cache(self, offset: int, length: int) -> None:
        """Start reading `[offset, offset + length)` into the page cache."""
        self.check_range(offset, length)
        await self.reading.cache(offset, length)

    async def verify(self, offset: int, length: int, *, unlike: Image | None = None) -> Verified:
        """Read what `[offset, offset + length)` maps from the disk itself and compare checksums.

        Blocks that are damaged are in the answer, not raised.  `length` is at least 1, and memory
        for as much is taken.

        Arguments:
            unlike: leave out what this one maps to the same place.

        Raises:
            Corruption, ReadFailed: of the map.
        """
        self.check_range(offset, length)
        return await self.reading.verify(offset, length, unlike)

    # -- changes, which only volumes take --------------------------------------------------

    def write_now(self, writes: Sequence[tuple[int, Buffer]], *, n_clients: int = 1) -> bool:
        """See Volume.write_now."""
        raise self._read_only()

    async def write(self, offset: int, data: Buffer) -> None:
        """See Volume.write."""
        raise self._read_only()

    async def trim(self, offset: int, length: int) -> None:
        """See Volume.trim."""
        raise self._read_only()

    async def write_zeroes(
        self, offset: int, length: int, *, no_hole: bool = False, fast: bool = False
    ) -> None:
        """See Volume.write_zeroes."""
        raise self._read_only()

    def _read_only(self) -> StoreError:
        return WriteFailed(f"{self.kind} {self.name} cannot be written: clone it, and write that")

    async def flush(self) -> None:
        """Return when all of it is durable: for what cannot be written, at once."""

    def flush_soon(self, done: OnDurable) -> bool:
        """See Volume.flush_soon."""
        return False

    # -- for the parts of the store ---------------------------------------------------------

    async def open(self) -> None:
        """Return with the map in memory: a volume's always is."""

    async def load(self, start: int, stop: int) -> None:
        """Return with the map's leaves of blocks `[start, stop)` in memory.

        No await comes after that, but the image may have been shrunk or deleted before.
        """
        await self.services.memory.load(self.current_map, start, stop, self.name)

    def current_map(self) -> BlockMap:
        """The map as long as its leaves and nodes are kept; raises NotFound after that."""
        return self.map

    def check_there(self) -> None:
        """Raise NotFound if the image was deleted."""
        if self.is_gone:
            raise NotFound(f"{self.kind} {self.name!r} was deleted")

    def check_range(self, offset: int, length: int) -> None:
        """Raise NotFound if the image was deleted, StoreError if it has become too small."""
        self.check_there()
        if offset + length > self.info.size:
            raise self.beyond_end(offset, length)

    def check_blocks(self, start: int, stop: int) -> None:
        """Like `check_range`, of blocks `[start, stop)`: the last one may end beyond the image."""
        self.check_there()
        if stop > self.map.n_blocks:
            raise self.beyond_end(start * self.block_size, (stop - start) * self.block_size)

    def beyond_end(self, offset: int, length: int) -> StoreError:
        """The error for a client that knows the size from before the volume was shrunk."""
        return StoreError(
            f"{self.kind} {self.name}: bytes {offset} to {offset + length} lie beyond its end at "
            f"{self.size}, since it was shrunk: connect anew"
        )
