"""Administrative changes: volumes made, resized, renamed and deleted, the pool enlarged.

Owns the course of each change: one at a time, checked, journalled, done, made durable.  What a
change does to the tables is the registry's, those that have to do with snapshots are in
snapshots.py.

A volume that is deleted rests in the trash first, if it is told to: nobody can attach it, it has
no name that others could not take, and it can be restored with all that it held.

Each change runs as a task of its own: whoever asked for it may be cancelled (a server that is told
to stop), the change is made or not made, never left half-way.  Who asked waits for that even then,
so what it does to keep others away, it does until the change is made.  What a change needs before
it and may take long, like emptying the end that a shrink cuts off, is the caller's own work and
ends with it: what is done of that is no more than trims.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Final, TypeVar
from uuid import UUID

from nbdstore.errors import AlreadyExists, Busy, InvalidArgument, NoSpace, NotFound
from nbdstore.sizes import exact_size
from nbdstore.store import catalogue
from nbdstore.store.blockmap import BlockMap
from nbdstore.store.catalogue import VolumeInfo
from nbdstore.store.extents import ExtentKind
from nbdstore.store.formatting import check_capacity
from nbdstore.store.host import Failpoint
from nbdstore.store.image import Services
from nbdstore.store.records import admin_group
from nbdstore.store.registry import Registry
from nbdstore.store.uninterrupted import to_its_end
from nbdstore.store.volume import Volume

_PROPERTIES_BYTES: Final = 16 << 10
_RECORD_BYTES: Final = 64 << 10  # of the journal, for one change and what it syncs

_RETRY_S: Final = 5.0

T = TypeVar("T")
Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class Administration:
    """Makes the administrative changes of one pool.

    Arguments:
        spawn: starts a task whose failure is noticed even if nobody waits for it.
    """

    def __init__(self, services: Services, registry: Registry, spawn: Spawn) -> None:
        self._services = services
        self._core = services.core
        self._checkpointer = services.checkpointer
        self._registry = registry
        self._spawn = spawn
        self._lock = asyncio.Lock()
        self._changes: set[asyncio.Task[Any]] = set()
        self._emptying: dict[int, asyncio.Task[None]] = {}

    async def finish(self) -> None:
        """Wait for the changes that are under way, and for what their callers do upon them.

        A caller that was cancelled goes on before this does, since it has waited for longer; it
        may take something back.
        """
        while self._changes:
            await asyncio.wait(self._changes)

    async def alone(self, change: Coroutine[Any, Any, T]) -> T:
        """Run `change` to its end, also if the caller is cancelled, which then waits for it."""
        task: asyncio.Task[T] = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await to_its_end(task)

    # -- the changes ------------------------------------------------------------------------

    async def create(
        self, name: str, size: int, properties: dict[str, Any], uuid: UUID | None = None
    ) -> Volume:
        """See Pool.create_volume."""
        catalogue.check_name(name)
        catalogue.check_size(size)
        check_properties(name, properties)
        return await self.alone(self._create(name, size, properties, uuid))

    async def _create(
        self, name: str, size: int, properties: dict[str, Any], uuid: UUID | None
    ) -> Volume:
        async with self.turn():
            self.check_new(name)
            self.check_new_uuid(uuid)
            host = self._core.host
            info = VolumeInfo(
                self._checkpointer.next_id,
                name,
                size,
                uuid=str(uuid or host.new_uuid()),
                created=int(host.time()),
                properties=dict(properties),
            )
            return await self.add(info)

    def check_new_uuid(self, uuid: UUID | None) -> None:
        """Raise AlreadyExists if `uuid` is, or was, that of another volume; None is of none."""
        for volume in self._registry.by_id.values():
            if uuid is not None and volume.info.uuid == str(uuid):
                raise AlreadyExists(
                    f"the uuid {uuid} is that of volume {volume.name!r}, or was: take a new one"
                )

    async def add(self, info: VolumeInfo, prepared: BlockMap | None = None) -> Volume:
        """Add a volume, for the holder of the turn; with a root, `prepared` is its map."""
        await self.change(info.id, {"op": "create", "volume": info.to_json()}, prepared)
        return self._registry.by_id[info.id]

    async def resize(self, volume: Volume, size: int, *, force: bool) -> None:
        """See Pool.resize_volume."""
        catalogue.check_size(size)
        if size < volume.size:
            # This takes long where much is mapped, and in a full pool waits for space. What others
            # do meanwhile is looked at below.
            await _clear_tail(volume, size, force)
        await self.alone(self._resize(volume, size))

    async def _resize(self, volume: Volume, size: int) -> None:
        async with self.turn():
            volume.check_there()
            shrinks = size < volume.size
            await volume.flush()
            async with self._checkpointer.lock:
                if shrinks:
                    await self._checkpointer.run_locked()  # no node may lie beyond the new end
                    n_blocks = -(-size // volume.block_size)
                    await volume.load(n_blocks - 1, n_blocks)  # no await from here to the change
                    if not volume.map.ends_before(n_blocks):
                        raise Busy(
                            f"volume {volume.name}: it is being written beyond "
                            f"{exact_size(size)}: "
                            "detach it before shrinking it"
                        )
                await self.change(volume.id, {"op": "resize", "size": size})

    async def rename(self, volume: Volume, name: str) -> None:
        """See Pool.rename_volume."""
        catalogue.check_name(name)
        await self.alone(self._rename(volume, name))

    async def _rename(self, volume: Volume, name: str) -> None:
        async with self.turn():
            volume.check_there()
            if name != volume.name:
                self.check_new(name)
                await volume.flush()
                await self.change(volume.id, {"op": "rename", "name": name})

    async def set_properties(self, volume: Volume, properties: dict[str, Any]) -> None:
        """See Pool.set_properties."""
        check_properties(volume.name, properties)
        await self.alone(self._set_properties(volume, properties))

    async def _set_properties(self, volume: Volume, properties: dict[str, Any]) -> None:
        async with self.turn():
            volume.check_there()
            await volume.flush()
            await self.change(volume.id, {"op": "properties", "properties": properties})

    async def delete(self, volume: Volume) -> bool:
        """See Pool.delete_volume; False, having done nothing, if the volume has snapshots."""
        return await self.alone(self._delete(volume))

    async def _delete(self, volume: Volume) -> bool:
        async with self.turn():
            volume.check_there()
            if volume.snapshots:  # nothing could say any more whose they are
                return False
            await volume.flush()
            await self.change(volume.id, {"op": "delete"})
        self.empty(volume)
        return True

    async def trash(self, volume: Volume) -> None:
        """See Pool.trash_volume."""
        await self.alone(self._trash(volume))

    async def _trash(self, volume: Volume) -> None:
        async with self.turn():
            volume.check_there()
            if not volume.info.trashed:
                await volume.flush()
                at = max(int(self._core.host.time()), 1)
                await self.change(volume.id, {"op": "trash", "at": at})

    async def restore(self, volume: Volume, name: str) -> None:
        """See Pool.restore_volume."""
        catalogue.check_name(name)
        await self.alone(self._restore(volume, name))

    async def _restore(self, volume: Volume, name: str) -> None:
        async with self.turn():
            volume.check_there()
            check_staying(volume)
            if volume.info.trashed:
                self.check_new(name)
                await self.change(volume.id, {"op": "restore", "name": name})

    def empty(self, volume: Volume) -> None:
        """Begin to free what a deleted volume holds."""
        task = self._spawn(self._empty(volume))
        self._emptying[volume.id] = task
        task.add_done_callback(lambda _: self._emptying.pop(volume.id, None))

    async def emptied(self, volume: Volume) -> None:
        """Wait until nothing is left of a deleted volume."""
        task = self._emptying.get(volume.id)
        if task is not None:
            await asyncio.wait([task])

    async def _empty(self, volume: Volume) -> None:
        while True:
            try:
                await volume.ranges.clear(0, volume.map.n_blocks, emptying=True)
                return await self._remove(volume)
            except NoSpace:  # for a checkpoint: others have to give some back
                await self._core.wait_for_change(_RETRY_S)

    async def _remove(self, volume: Volume) -> None:
        async with self.turn(), self._checkpointer.lock:
            await self._checkpointer.run_locked()  # frees the nodes of its map
            await self.change(volume.id, {"op": "remove"})

    async def grow(self, capacity: int) -> None:
        """See Pool.grow."""
        now = self._core.slots.n_slots * self._core.block_size
        if capacity < now:
            raise InvalidArgument(
                f"capacity {exact_size(capacity)}: less than the present {exact_size(now)}; a pool "
                "can only grow"
            )
        check_capacity(capacity, self._core.block_size)
        await self.alone(self._grow(capacity // self._core.block_size))

    async def _grow(self, n_slots: int) -> None:
        async with self.turn(), self._checkpointer.lock:
            await self.change(0, {"op": "grow", "n_slots": max(n_slots, self._core.slots.n_slots)})
        self._core.space_changed()

    # -- their course -----------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """One change at a time, begun with room for it in the journal."""
        async with self._lock:
            while not self._core.journal.room_for(2 * _RECORD_BYTES):
                await self._checkpointer.join()
            yield

    def check_new(self, name: str) -> None:
        """Raise AlreadyExists if there is a volume called `name`."""
        if name in self._registry.by_name:
            raise AlreadyExists(f"volume {name!r} exists already: choose another name")

    async def change(
        self, volume_id: int, change: dict[str, Any], prepared: BlockMap | None = None
    ) -> None:
        """Journal a change, do it, and make it durable; no await before it is done.

        Arguments:
            prepared: see Registry.apply.
        """
        volume = self._registry.by_id.get(volume_id)
        gone = volume is not None and volume.info.deleted
        if gone != (change["op"] == "remove"):
            raise NotFound(f"volume {volume_id} was deleted meanwhile")
        group = admin_group(volume_id, change)
        if not self._core.journal.room_for(len(group)):
            # The checkpoint's lock may be held: a checkpoint cannot be waited for here.
            raise NoSpace("the journal is full until the next checkpoint: try again in a moment")
        seq = self._core.append(group)
        self._core.host.reached(Failpoint.CHANGE_JOURNALLED)
        self._registry.apply(self._services, volume_id, change, seq, prepared)
        self._core.host.reached(Failpoint.CHANGE_MADE)
        await self._services.committer.commit_all()


def check_staying(volume: Volume) -> None:
    """Raise Busy if the deletion of `volume` has begun: it may have lost snapshots already."""
    if volume.is_going:
        raise Busy(f"volume {volume.name} is being deleted")


def check_properties(name: str, properties: dict[str, Any]) -> None:
    """Refuse properties that are more than 16 KiB of JSON (InvalidArgument)."""
    if len(json.dumps(properties)) > _PROPERTIES_BYTES:
        raise InvalidArgument(f"volume {name}: its properties are more than 16 KiB")


async def _clear_tail(volume: Volume, size: int, force: bool) -> None:
    """Make holes of all beyond byte `size`, if there are only holes or with `force`."""
    used, at = 0, size
    while at < volume.size and not force:
        for extent in await volume.extents(at, volume.size - at, max_extents=4096):
            used += extent.length if extent.kind is not ExtentKind.HOLE else 0
            at += extent.length
    if used:
        raise InvalidArgument(
            f"volume {volume.name}: {exact_size(used)} of data, or space set aside, lie beyond "
            f"the new size {exact_size(size)}: trim them, or lose them with --force"
        )
    if size < volume.size:  # else another change has made it as small meanwhile
        await volume.write_zeroes(size, volume.size - size)
