"""A volume of an open pool: what servers and commands hold in their hands.

Owns nothing but the joining of the parts: map, read path, write path, range operations, sync.
The caller has checked ranges against the size that it knows; they are checked again, since the
volume may have been shrunk or deleted since.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbdstore.errors import NotFast, NotFound, StoreError
from nbdstore.store import layout
from nbdstore.store.blockmap import BlockMap
from nbdstore.store.catalogue import VolumeInfo
from nbdstore.store.checkpoint import Checkpointer
from nbdstore.store.core import Core
from nbdstore.store.durability import Committer, Unsynced
from nbdstore.store.host import Buffer
from nbdstore.store.layout import U64
from nbdstore.store.mapmemory import MapMemory
from nbdstore.store.ranges import Extent, Ranges
from nbdstore.store.reading import Reading, Segment
from nbdstore.store.writing import Writing


@dataclass(frozen=True)
class Services:
    """What the volumes of a pool share beside its core."""

    core: Core
    committer: Committer
    memory: MapMemory
    checkpointer: Checkpointer


class Volume:
    """One volume.

    Attributes:
        info: what the catalogue says of it.
        map: where its blocks are.
        last_seq, durable_seq: its newest record, and its newest durable one.
        unsynced: its data that is in the page cache only.
    """

    def __init__(self, services: Services, info: VolumeInfo, blocks: BlockMap) -> None:
        self.services = services
        self.core = services.core
        self.block_size = self.core.block_size
        self.info = info
        self.map = blocks
        self.last_seq = 0
        self.durable_seq = 0
        self.unsynced = Unsynced()
        self.reading = Reading(self)
        self.writing = Writing(self)
        self.ranges = Ranges(self)

    @property
    def id(self) -> int:
        """Number of the volume; never used twice in a pool."""
        return self.info.id

    @property
    def name(self) -> str:
        """Name of the volume; it may change."""
        return self.info.name

    @property
    def size(self) -> int:
        """Size in bytes; it may change."""
        return self.info.size

    @property
    def properties(self) -> dict[str, Any]:
        """What others keep with the volume; changed by Pool.set_properties only."""
        return self.info.properties

    # -- data -------------------------------------------------------------------------------

    def read_now(self, offset: int, length: int) -> list[Segment] | None:
        """Read without waiting: the segments of `[offset, offset + length)`, or None.

        A segment is a bytes-like of data, or an int: that many zero bytes that hold no data.
        """
        if self.info.deleted or offset + length > self.info.size:
            self.check_range(offset, length)
        return self.reading.now(offset, length)

    async def read(self, offset: int, length: int) -> list[Segment]:
        """Read, waiting for the disk; segments as :meth:`read_now`.

        Raises:
            Corruption, ReadFailed: bad data is never returned.
        """
        self.check_range(offset, length)
        return await self.reading.read(offset, length)

    def write_now(self, writes: Sequence[tuple[int, Buffer]]) -> bool:
        """Do all of `writes` ((offset, data), in order) without waiting, or nothing (False).

        What is done survives the death of this process; :meth:`flush` makes it survive power loss.
        """
        return self.writing.now(writes)

    async def write(self, offset: int, data: Buffer) -> None:
        """Write, waiting for the disk, for a checkpoint or for space; see :meth:`write_now`.

        Raises:
            NoSpace, WriteFailed, ReadFailed, Corruption, PoolFailed.
        """
        await self.writing.write(offset, data)

    async def flush(self) -> None:
        """Make durable what was acknowledged on this volume before the call.

        Raises:
            PoolFailed: the sync failed, now or before.
        """
        self.core.check_alive()
        await self.services.committer.commit(self)

    async def trim(self, offset: int, length: int) -> None:
        """Make holes of the whole blocks within `[offset, offset + length)`."""
        self.check_range(offset, length)
        await self.ranges.trim(offset, length)

    async def write_zeroes(
        self, offset: int, length: int, *, no_hole: bool = False, fast: bool = False
    ) -> None:
        """Make `[offset, offset + length)` read as zeros; with `no_hole` keep space for it.

        Arguments:
            fast: rather fail, having done nothing, than wait for space.

        Raises:
            NotFast: with `fast` and `no_hole`, where there is not enough space at once.
            NoSpace: with `no_hole`, as for writes; else only for the merging of the two ends.
        """
        self.check_range(offset, length)
        n_blocks = length // self.block_size + 2
        if fast and no_hole and not self.core.may_set_aside(n_blocks):
            raise NotFast(f"volume {self.name}: no space at once for {length} bytes of zeroes")
        await self.ranges.write_zeroes(offset, length, no_hole=no_hole)

    async def extents(self, offset: int, length: int, *, max_extents: int) -> list[Extent]:
        """What `[offset, offset + length)` holds, or a prefix of it with `max_extents` extents.

        Extents are merged (no two neighbours of one kind) and cut at both ends of the range.
        """
        self.check_range(offset, length)
        return await self.ranges.extents(offset, length, max_extents)

    async def cache(self, offset: int, length: int) -> None:
        """Start reading `[offset, offset + length)` into the page cache."""
        self.check_range(offset, length)
        await self.reading.cache(offset, length)

    # -- for the parts of the store ---------------------------------------------------------

    async def load(self, start: int, stop: int) -> None:
        """Return with the map's leaves of blocks `[start, stop)` in memory."""
        await self.services.memory.load(lambda: self.map, start, stop, self.name)

    def release(self, old: U64, seq: int, *, n_mapped: int = 0, n_provisioned: int = 0) -> None:
        """Record `seq` replaced the entries with locations `old`: free and account them.

        Arguments:
            n_mapped, n_provisioned: how many blocks have a slot, or space set aside, instead.
        """
        held = layout.holds_slot(old)
        n_held = int(np.count_nonzero(held))
        n_promised = int(np.count_nonzero(layout.is_provisioned(old)))
        if n_held:
            # Without snapshots every birth epoch is newer than the newest of them.
            self.core.slots.free_later(layout.slots_of(old[held]), seq)
        self.info.n_mapped += n_mapped - n_held
        self.info.n_provisioned += n_provisioned - n_promised
        self.core.slots.n_set_aside += n_provisioned - n_promised

    def release_few(self, old: list[int], seq: int) -> None:
        """Like :meth:`release` where each of the few blocks has a slot now."""
        freed: list[int] = []
        n_promised = 0
        for location in old:
            slot = location & layout.SLOT_MASK
            if slot == layout.PROVISIONED:
                n_promised += 1
            elif 0 < slot < layout.LOST:
                freed.append(slot)
        if freed:
            self.core.slots.free_few_later(freed, seq)
        self.info.n_mapped += len(old) - len(freed)
        if n_promised:
            self.info.n_provisioned -= n_promised
            self.core.slots.n_set_aside -= n_promised

    def check_there(self) -> None:
        """Raise NotFound if the volume was deleted."""
        if self.info.deleted:
            raise NotFound(f"volume {self.info.name!r} was deleted")

    def check_range(self, offset: int, length: int) -> None:
        """Raise NotFound if the volume was deleted, StoreError if it has become too small."""
        self.check_there()
        if offset + length > self.info.size:
            raise self.beyond_end(offset, length)

    def beyond_end(self, offset: int, length: int) -> StoreError:
        """The error for a client that knows the size from before the volume was shrunk."""
        return StoreError(
            f"volume {self.name}: bytes {offset} to {offset + length} lie beyond its end at "
            f"{self.size}, since it was shrunk: connect anew"
        )

    def status(self) -> dict[str, Any]:
        """What there is to know, JSON-able; sizes in bytes."""
        info = self.info
        created = datetime.datetime.fromtimestamp(info.created, datetime.UTC)
        return {
            "id": info.id,
            "uuid": info.uuid,
            "name": info.name,
            "size": info.size,
            "block_size": self.block_size,
            "mapped": info.n_mapped * self.block_size,
            "reserved": info.n_provisioned * self.block_size,
            "epoch": info.epoch,
            "created": created.isoformat(timespec="seconds"),
            "properties": info.properties,
        }
