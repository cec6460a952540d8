"""Snapshots, clones and the trash: what can be done with them, by name.

Owns the names (``VOLUME@NAME``), and what the store cannot know: who reads a snapshot, who has a
volume attached that is to be rolled back. What the store refuses - clones, two heirs - it tells.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from uuid import UUID

from nbdstore.control.contracts import PoolLike, VolumeLike
from nbdstore.control.events import Events
from nbdstore.control.identity import (
    checked_uuid,
    checked_uuids,
    snapshots_made_before,
    uuid_of,
)
from nbdstore.control.leases import Leases
from nbdstore.control.long_operations import LongOperations, Task
from nbdstore.control.model import OperationInfo, SnapshotInfo, TrashInfo
from nbdstore.control.usage import Usage
from nbdstore.errors import AlreadyExists, Busy, InvalidArgument, NotFound

FLATTEN = "flatten"
"""The kind of that operation."""


class Snapshots:
    """The snapshots and the trash of one pool."""

    def __init__(
        self,
        usage: Usage,
        pool: PoolLike,
        leases: Leases,
        running: LongOperations,
        events: Events,
    ) -> None:
        self._usage = usage
        self._pool = pool
        self._leases = leases
        self._running = running
        self._events = events

    # -- looking ----------------------------------------------------------------------------

    def find(self, name: str) -> Any:
        """Return the snapshot ``VOLUME@NAME``, or raise NotFound."""
        volume_name, at, _ = name.partition("@")
        if not at:
            raise InvalidArgument(f"'{name}' is no snapshot: write it as VOLUME@NAME")
        self._usage.find(volume_name)
        snapshot = self._pool.snapshots.get(name)
        if snapshot is None:
            raise NotFound(
                f"there is no snapshot '{name:.300}': 'nbdstore snapshot list {volume_name}' shows "
                "what is"
            )
        return snapshot

    async def listing(
        self, volume: str | None = None, *, unique: bool = False
    ) -> list[SnapshotInfo]:
        """List snapshots, of one volume or of all, by volume and age.

        With `unique` as `show` does: that costs as much as has changed since each was made.
        """
        if volume is not None:
            self._usage.find(volume)
        found = [
            snapshot
            for _, snapshot in sorted(self._pool.snapshots.items(), key=_by_volume_and_age)
            if volume in (None, snapshot.volume.name)
        ]
        if not unique:
            return [self._describe(snapshot) for snapshot in found]
        infos = []
        for snapshot in found:
            try:
                infos.append(await self._describe_whole(snapshot))
            except NotFound:  # it is being deleted, or was since it was listed
                if snapshot.name in self._pool.snapshots:
                    infos.append(self._describe(snapshot))
        return infos

    async def show(self, name: str) -> SnapshotInfo:
        """Describe one snapshot, with what it holds alone."""
        return await self._describe_whole(self.find(name))

    async def _describe_whole(self, snapshot: Any) -> SnapshotInfo:
        return self._describe(snapshot, await self._pool.bytes_alone(snapshot))

    def _describe(self, snapshot: Any, unique: int | None = None) -> SnapshotInfo:
        heirs = self._pool.heirs(snapshot)
        clones = [heir.name for heir in heirs if snapshot.volume not in (heir, _volume_of(heir))]
        return SnapshotInfo.from_json(
            snapshot.status()
            | {
                "snapshot": snapshot.name,
                "unique": unique,
                "clones": sorted(clones),
                "attached": self._usage.attached(snapshot),
            }
        )

    # -- making and deleting ----------------------------------------------------------------

    async def create(
        self, names: Sequence[str], *, uuids: Sequence[str] | None = None
    ) -> list[SnapshotInfo]:
        """Make snapshots ``VOLUME@NAME``, all of one moment, durably.

        With the `uuids` of those very ones, made by a call before, return them.
        """
        infos, _ = await self.create_once(names, uuids=uuids)
        return infos

    async def create_once(
        self, names: Sequence[str], *, uuids: Sequence[str] | None = None
    ) -> tuple[list[SnapshotInfo], bool]:
        """Make snapshots as `create`; tell whether they are new."""
        if not names:
            raise InvalidArgument("name at least one snapshot to make: VOLUME@NAME")
        chosen = None if uuids is None else checked_uuids(uuids, len(names))
        async with self._usage.turn:
            wanted = [self._wanted(name) for name in names]
            if chosen is not None:
                before = snapshots_made_before(self._pool, wanted, chosen)
                if before:
                    return [self._describe(snapshot) for snapshot in before], False
            for volume, _ in wanted:
                self._usage.require_no_import(volume, "making a snapshot of it")
            texts = None if chosen is None else [str(uuid) for uuid in chosen]
            made = await self._pool.create_snapshots(wanted, uuids=texts)
            infos = [self._describe(snapshot) for snapshot in made]
            for info in infos:
                self._events.tell("snapshot.created", info.snapshot, size=info.size)
            return infos, True

    def _wanted(self, name: str) -> tuple[VolumeLike, str]:
        volume_name, at, snapshot_name = name.partition("@")
        if not at:
            raise InvalidArgument(f"'{name}' names no snapshot: write it as VOLUME@NAME")
        return self._usage.find(volume_name), snapshot_name

    async def delete(self, name: str, *, uuid: str | None = None) -> None:
        """Delete a snapshot; what only it holds is free then. Busy while a client reads it.

        With its `uuid` another one of that name stays, and nothing is done if it is gone already.
        """
        wanted = None if uuid is None else checked_uuid(uuid)
        with ExitStack() as going:
            async with self._usage.turn:
                if wanted is not None and self._is_gone(name, wanted):
                    return
                snapshot = self.find(name)
                # What it is to be received over must stay, or that could not be given up.
                self._usage.require_no_import(snapshot.volume, f"deleting '{name}'")
                self._require_detached(snapshot, "deleting it")
                going.enter_context(snapshot.going())
            # This may take long; nobody begins to use it any more, so others may have their turns.
            try:
                await self._pool.delete_snapshot(snapshot)
            except NotFound:
                if wanted is None or not snapshot.is_gone:
                    raise
                return  # a call before this one, which still ran, has done it, and tells so
        self._events.tell("snapshot.deleted", name)

    def _require_detached(self, snapshot: Any, before: str) -> None:
        closing = f"close its connections with 'nbdstore disconnect {snapshot.name}'"
        self._usage.require_detached(snapshot, f"{before}, or {closing}")

    def _is_gone(self, name: str, uuid: UUID) -> bool:
        volume, snapshot_name = self._wanted(name)
        there = volume.snapshots.get(snapshot_name)
        return there is None or uuid_of(there) != uuid

    # -- volumes from snapshots -------------------------------------------------------------

    async def rollback(self, name: str, *, fence: bool = False) -> VolumeLike:
        """Make a volume what its snapshot is; with `fence`, end its lease and connections first."""
        async with self._usage.turn:
            snapshot = self.find(name)
            volume: VolumeLike = snapshot.volume
            before = f"rolling it back to '{name}'"
            self._usage.require_no_import(volume, before)
            if fence:
                await self._leases.end(volume, f"the volume is rolled back to '{name}'")
            with self._usage.barred(volume):
                self._usage.require_free(volume, before, ", or end that with --fence")
                await self._pool.rollback(volume, snapshot)
        return volume

    async def clone(
        self, name: str, new_name: str, properties: dict[str, Any], uuid: UUID | None
    ) -> tuple[VolumeLike, bool]:
        """Make a volume that begins as a snapshot, and shares its blocks; durable on return.

        With the `uuid` of the clone of this name, made by a call before, return that. Returns the
        volume, and whether it is new.
        """
        async with self._usage.turn:
            snapshot = self.find(name)
            there = self._pool.volumes.get(new_name)
            if there is not None and uuid is not None and uuid_of(there) == uuid:
                if self._pool.origin(there) is snapshot:
                    return there, False
                raise AlreadyExists(
                    f"the uuid {uuid} is that of volume '{new_name}', which is no clone of {name}, "
                    "or none any more: take a new uuid and another name"
                )
            return await self._pool.clone(snapshot, new_name, properties, uuid=uuid), True

    def flatten(self, name: str, *, operation_id: str | None = None) -> tuple[OperationInfo, bool]:
        """Begin to copy what a clone shares with its origin; it may be used meanwhile.

        Returns the operation and whether it is new, as `LongOperations.start`.
        """
        request: dict[str, Any] = {"volume": name}
        if (known := self._running.known(FLATTEN, request, operation_id)) is not None:
            return known, False
        volume = self._usage.find(name)

        async def work(task: Task) -> None:
            await self._pool.flatten(volume, task.advance)

        return self._running.start(
            FLATTEN, request, work, total=volume.size, operation_id=operation_id
        )

    # -- the trash --------------------------------------------------------------------------

    def trash(self) -> list[TrashInfo]:
        """List the volumes in the trash, those that came first first."""
        return [self._describe_trashed(volume) for volume in self._pool.trash]

    def _describe_trashed(self, volume: Any) -> TrashInfo:
        status = volume.status()
        at = datetime.datetime.fromtimestamp(status["trashed"], datetime.UTC)
        return TrashInfo(
            id=volume.id,
            name=volume.name,
            size=volume.size,
            mapped=status["mapped"],
            own=status["own"],
            snapshots=len(volume.snapshots),
            trashed=at.isoformat(timespec="seconds"),
        )

    def find_trashed(self, which: str) -> Any:
        """Return what is in the trash, by id, or the newest of a name; or raise NotFound."""
        found = [v for v in self._pool.trash if which in (str(v.id), v.name)]
        if not found:
            raise NotFound(
                f"there is no volume '{which}' in the trash: 'nbdstore trash list' shows what is"
            )
        return found[-1]

    async def restore(self, which: str, name: str | None = None) -> VolumeLike:
        """Take a volume out of the trash, under the name it had, or as `name`."""
        async with self._usage.turn:
            volume: VolumeLike = self.find_trashed(which)
            if name is None and volume.name in self._pool.volumes:
                raise AlreadyExists(
                    f"volume '{volume.name}' exists already: give the one in the trash another "
                    "name, with --as"
                )
            await self._pool.restore_volume(volume, name or volume.name)
        return volume

    async def purge(self, which: str) -> None:
        """Delete what is in the trash for good."""
        await self._pool.delete_volume(self.find_trashed(which))

    async def discard(self, volume: VolumeLike, *, snapshots: bool, now: bool) -> bool:
        """Put a volume that nobody uses into the trash, or delete it for good, `now`.

        With snapshots the latter may take long: it is in the trash then, and True is returned, for
        the caller to delete it from there when others have their turns again.

        Arguments:
            snapshots: take its snapshots along; without it, having some is Busy.
        """
        own = [
            snapshot
            for name, snapshot in self._pool.snapshots.items()
            if name.startswith(f"{volume.name}@")
        ]
        if not snapshots:
            require_no_snapshots(volume)
        for snapshot in own:
            self._require_detached(snapshot, "deleting its volume")
        if now and not own:
            await self._pool.delete_volume(volume)
            return False
        if now:
            self._pool.require_deletable(volume)
        await self._pool.trash_volume(volume)
        return now


def require_no_snapshots(volume: VolumeLike) -> None:
    """Raise Busy if a volume, which is to be deleted without them, has snapshots."""
    own = [f"{volume.name}@{name}" for name in volume.snapshots]
    if own:
        more = f" and {len(own) - 3} more" if len(own) > 3 else ""
        raise Busy(
            f"volume '{volume.name}' has snapshots ({', '.join(own[:3])}{more}): delete them "
            "first, or take them along with --snapshots"
        )


def _volume_of(image: Any) -> Any:
    """The volume of a snapshot; None for what is a volume itself."""
    return getattr(image, "volume", None)


def _by_volume_and_age(item: tuple[str, Any]) -> tuple[str, int]:
    return item[1].volume.name, item[1].info.epoch
