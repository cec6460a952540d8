"""The trash: volumes that were deleted, and can be brought back for a while.

Owns when they are deleted for good: when their time is up, or earlier, the oldest first, when the
pool needs the space that they hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from nbdstore.errors import Busy, NotFound
from nbdstore.store.core import Core, log
from nbdstore.store.registry import Registry
from nbdstore.store.snapshots import Snapshots
from nbdstore.store.volume import Volume

Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class Trash:
    """The trash of one pool.

    Arguments:
        spawn: starts a task whose failure is noticed even if nobody waits for it.
    """

    def __init__(self, core: Core, registry: Registry, snapshots: Snapshots, spawn: Spawn) -> None:
        self._core = core
        self._registry = registry
        self._snapshots = snapshots
        self._spawn = spawn
        self._deleting: asyncio.Task[None] | None = None
        core.reclaim = self.reclaim

    @property
    def volumes(self) -> list[Volume]:
        """The volumes in it, those that came first first."""
        found = [v for v in self._registry.by_id.values() if v.info.trashed and not v.info.deleted]
        return sorted(found, key=lambda volume: (volume.info.trashed, volume.id))

    def empty_in_time(self) -> None:
        """Begin to delete what has been there for as long as it may."""
        oldest = self._oldest()
        if oldest is not None:
            age_s = self._core.host.time() - oldest.info.trashed
            if age_s >= self._core.options.trash_keep_s:
                self._delete(oldest, "its time in the trash is up")

    def reclaim(self) -> bool:
        """Begin to delete the oldest; False if nothing is left that could be, or is being."""
        oldest = self._oldest()
        if oldest is not None:
            self._delete(oldest, "the pool needs its space")
        return self._deleting is not None or any(
            volume.info.deleted for volume in self._registry.by_id.values()
        )

    def _oldest(self) -> Volume | None:
        if self._deleting is not None:
            return None
        return next((v for v in self.volumes if not self._snapshots.clones_of(v)), None)

    def _delete(self, volume: Volume, why: str) -> None:
        self._deleting = self._spawn(self._work(volume, why))
        self._deleting.add_done_callback(self._deleted)

    async def _work(self, volume: Volume, why: str) -> None:
        if not volume.info.trashed:
            return  # it was restored just now
        try:
            await self._snapshots.delete_volume(volume)
            log.info("volume %s was deleted for good: %s", volume.name, why)
        except (Busy, NotFound) as error:
            log.debug("volume %s: %s", volume.name, error)  # it is looked at again

    def _deleted(self, _task: asyncio.Task[None]) -> None:
        self._deleting = None
