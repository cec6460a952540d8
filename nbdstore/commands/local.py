"""A pool that no server holds, opened for one command.

Owns an event loop for as long: the store is asynchronous, the commands are not. The rules are
those of `nbdstore.control.operations`, as when a server is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, Unpack

from nbdstore.commands.local_backups import LocalBackups
from nbdstore.control.capacity import CapacityReport
from nbdstore.control.changes import Deletion, VolumeChanges
from nbdstore.control.model import (
    AttachmentInfo,
    LeaseInfo,
    OperationInfo,
    PoolInfo,
    SnapshotInfo,
    TrashInfo,
    VolumeInfo,
)
from nbdstore.control.operations import Operations
from nbdstore.control.service import Content
from nbdstore.control.space import SpaceReport
from nbdstore.control.stream import Piece
from nbdstore.store import Pool, PoolOptions

T = TypeVar("T")


class LocalService:
    """A `VolumeService` on the pool in `directory`, locked until `close`.

    Raises:
        PoolLocked: another process has it open, and other StoreErrors of opening.
    """

    def __init__(self, directory: Path) -> None:
        self._runner = asyncio.Runner()
        try:
            # Nobody could make space while a command waits for it: a full pool is an error at once.
            self._pool = self._run(Pool.open(directory, options=PoolOptions(on_full="error")))
        except BaseException:
            self._runner.close()
            raise
        self._operations = Operations(self._pool)
        self._run(self._operations.begin())
        self.backups = LocalBackups(self._operations.backups, self._run)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def close(self) -> None:
        """Write what is left and unlock the pool."""
        try:
            self._run(self._close())
        finally:
            self._runner.close()

    async def _close(self) -> None:
        await self._operations.close()
        await self._pool.close()

    def pool(self) -> PoolInfo:
        return self._operations.pool()

    def grow_pool(self, capacity: int) -> PoolInfo:
        return self._run(self._operations.grow_pool(capacity))

    def checkpoint(self) -> PoolInfo:
        return self._run(self._operations.checkpoint())

    def capacity(self) -> CapacityReport:
        return self._operations.capacity()

    def space(self) -> SpaceReport:
        return self._run(self._operations.space())

    def attachments(self) -> list[AttachmentInfo]:
        return self._operations.attachments()

    def disconnect(self, connection_id: int) -> None:
        self._run(self._operations.disconnect(connection_id))

    def leases(self) -> list[LeaseInfo]:
        return self._operations.leases.list()

    def acquire_lease(self, name: str, holder: str, *, force: bool = False) -> LeaseInfo:
        return self._run(self._operations.leases.acquire(name, holder, force=force))

    def release_lease(self, name: str, holder: str, epoch: int | None = None) -> None:
        self._run(self._operations.leases.release(name, holder, epoch))

    def break_lease(self, name: str) -> None:
        self._run(self._operations.leases.break_(name))

    def volumes(self) -> list[VolumeInfo]:
        return self._operations.volumes()

    def volume(self, name: str) -> VolumeInfo:
        return self._operations.volume(name)

    def create_volume(
        self, name: str, size: int, allow: Sequence[str] = (), *, uuid: str | None = None
    ) -> VolumeInfo:
        return self._run(self._operations.create_volume(name, size, allow, uuid=uuid))

    def update_volume(self, name: str, **changes: Unpack[VolumeChanges]) -> VolumeInfo:
        return self._run(self._operations.update_volume(name, **changes))

    def delete_volume(self, name: str, **how: Unpack[Deletion]) -> None:
        self._run(self._operations.delete_volume(name, **how))

    def snapshots(self, volume: str | None = None, *, unique: bool = False) -> list[SnapshotInfo]:
        return self._run(self._operations.snapshots.listing(volume, unique=unique))

    def create_snapshots(
        self, names: Sequence[str], *, uuids: Sequence[str] | None = None
    ) -> list[SnapshotInfo]:
        return self._run(self._operations.snapshots.create(names, uuids=uuids))

    def delete_snapshot(self, name: str, *, uuid: str | None = None) -> None:
        self._run(self._operations.snapshots.delete(name, uuid=uuid))

    def rollback(self, name: str, *, fence: bool = False) -> VolumeInfo:
        return self._run(self._operations.rollback(name, fence=fence))

    def clone(
        self, name: str, new_name: str, allow: Sequence[str] = (), *, uuid: str | None = None
    ) -> VolumeInfo:
        return self._run(self._operations.clone(name, new_name, allow, uuid=uuid))

    def start_flatten(self, name: str, *, operation_id: str | None = None) -> OperationInfo:
        async def start() -> OperationInfo:
            return self._operations.snapshots.flatten(name, operation_id=operation_id)[0]

        return self._run(start())

    def trash(self) -> list[TrashInfo]:
        return self._operations.snapshots.trash()

    def restore(self, which: str, name: str | None = None) -> VolumeInfo:
        return self._run(self._operations.restore(which, name))

    def purge(self, which: str) -> None:
        self._run(self._operations.snapshots.purge(which))

    def read_content(self, name: str) -> Content:
        size, pieces = self._operations.read_content(name)
        return Content(size, self._stepped(pieces))

    def write_content(
        self, name: str, size: int, pieces: Iterable[Piece], *, overwrite: bool = False
    ) -> VolumeInfo:
        return self._run(
            self._operations.write_content(name, size, _as_async(pieces), overwrite=overwrite)
        )

    def start_scrub(
        self,
        volume: str | None = None,
        *,
        rate: int | None = None,
        restart: bool = False,
        operation_id: str | None = None,
    ) -> OperationInfo:
        async def start() -> OperationInfo:
            info, _ = self._operations.scrubs.start(
                volume, rate=rate, restart=restart, operation_id=operation_id
            )
            return info

        return self._run(start())

    def operations(self) -> list[OperationInfo]:
        return []  # none outlives the command that started it

    def operation(self, operation_id: str, *, wait_s: int = 0) -> OperationInfo:
        return self._run(self._operations.running.wait(operation_id, wait_s))

    def cancel_operation(self, operation_id: str) -> OperationInfo:
        return self._run(self._operations.running.cancel(operation_id))

    def _stepped(self, pieces: AsyncIterator[Piece]) -> Iterator[Piece]:
        async def step() -> Piece | None:
            return await anext(pieces, None)

        while (piece := self._run(step())) is not None:
            yield piece


async def _as_async(pieces: Iterable[Piece]) -> AsyncIterator[Piece]:
    """Yield from `pieces`, which may block: nothing else runs on the loop of one command."""
    for piece in pieces:
        yield piece
