"""A snapshot: a volume as it was at one moment, to be read only.

Owns when its map is in memory: from its first use on.  Its tree on disk never changes, and no slot
in it is freed while the snapshot exists; how it comes and goes is told in snapshots.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nbdstore.errors import Busy, NotFound
from nbdstore.store.blockmap import BlockMap
from nbdstore.store.catalogue import SnapshotInfo
from nbdstore.store.extents import Extent
from nbdstore.store.image import Image, Services
from nbdstore.store.mapmemory import load_map, load_map_now
from nbdstore.store.reading import Segment

if TYPE_CHECKING:
    from nbdstore.store.volume import Volume


class Snapshot(Image):
    """One snapshot.

    Attributes:
        volume: what it is a snapshot of.
        n_users: who needs it not to be deleted now; see :meth:`in_use`.
    """

    info: SnapshotInfo
    kind = "snapshot"

    def __init__(self, services: Services, info: SnapshotInfo, volume: Volume) -> None:
        super().__init__(services)
        self.info = info
        self.volume = volume
        self.n_users = 0
        self._is_gone = False
        self._n_going = 0
        self._loading = asyncio.Lock()

    @property
    def name(self) -> str:
        """``VOLUME@NAME``; it changes with the volume's."""
        return f"{self.volume.name}@{self.info.name}"

    @property
    def is_gone(self) -> bool:
        """It was deleted."""
        return self._is_gone

    @property
    def properties(self) -> dict[str, Any]:
        """Those of its volume: who may attach the one may attach the other."""
        return self.volume.properties

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """While this lasts, it cannot be deleted.

        Raises:
            NotFound: it was, or is about to be.
        """
        self.check_staying()
        self.n_users += 1
        try:
            yield
        finally:
            self.n_users -= 1

    @contextlib.contextmanager
    def going(self) -> Iterator[None]:
        """While this lasts, nobody can begin to use it: it is being deleted.

        Raises:
            NotFound: it was.
            Busy: somebody uses it.
        """
        self.check_there()
        if self.n_users:
            raise Busy(
                f"snapshot {self.name} is being read: try again when that is done; "
                "'nbdstore operation list' shows what can be cancelled"
            )
        self._n_going += 1
        try:
            yield
        finally:
            self._n_going -= 1

    def check_staying(self) -> None:
        """Raise NotFound if it was deleted, or is about to be."""
        self.check_there()
        if self._n_going:
            raise NotFound(f"snapshot {self.name!r} is being deleted")

    # -- the map in memory ------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Its map is in memory."""
        return hasattr(self, "map")

    async def open(self) -> None:
        """Return with the map in memory.

        Raises:
            Corruption, ReadFailed: of a node.
        """
        async with self._loading:
            self.check_there()
            if not self.is_open:
                info = self.info
                self.map = await load_map(
                    self.core, info.root, info.size, self.name, read_only=True
                )
                self.services.memory.register(self.id, lambda: self.map)

    def open_now(self) -> None:
        """Like :meth:`open`, but waits for the disk in place: for checks."""
        info = self.info
        self.map, _ = load_map_now(self.core, info.root, info.size, self.name, read_only=True)
        self.services.memory.register(self.id, lambda: self.map)

    def removed(self) -> None:
        """It exists no more."""
        self._is_gone = True
        if self.is_open:
            self.map.retire()
            self.services.memory.unregister(self.id)

    def current_map(self) -> BlockMap:
        """As Image.current_map: what was deleted is overwritten."""
        self.check_there()
        return self.map

    async def load(self, start: int, stop: int) -> None:
        """As Image.load; a deleted snapshot's map tells nothing any more."""
        await self.open()
        await super().load(start, stop)
        self.check_there()

    # -- data -------------------------------------------------------------------------------

    def read_now(self, offset: int, length: int) -> list[Segment] | None:
        """As Image.read_now."""
        return super().read_now(offset, length) if self.is_open else None

    def read_batch_now(self, offsets: Sequence[int], length: int) -> Sequence[memoryview | None]:
        """As Image.read_batch_now."""
        return super().read_batch_now(offsets, length) if self.is_open else [None] * len(offsets)

    async def read(self, offset: int, length: int) -> list[Segment]:
        """As Image.read."""
        await self.open()
        return await super().read(offset, length)

    async def extents(self, offset: int, length: int, *, max_extents: int) -> list[Extent]:
        """As Image.extents."""
        await self.open()
        return await super().extents(offset, length, max_extents=max_extents)

    async def cache(self, offset: int, length: int) -> None:
        """As Image.cache."""
        await self.open()
        await super().cache(offset, length)

    def status(self) -> dict[str, Any]:
        """What there is to know, JSON-able; sizes in bytes."""
        info = self.info
        created = datetime.datetime.fromtimestamp(info.created, datetime.UTC)
        return {
            "id": info.id,
            "uuid": info.uuid,
            "volume": self.volume.name,
            "name": info.name,
            "size": info.size,
            "block_size": self.block_size,
            "mapped": info.n_mapped * self.block_size,
            "own": info.n_own * self.block_size,
            "epoch": info.epoch,
            "created": created.isoformat(timespec="seconds"),
        }
