"""A pool: made, opened, watched over and closed.

Owns the life of an open pool, its administrative changes and its housekeeping; everything else
is done by the parts it joins.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from nbdstore.errors import NoSpace, PoolFormatError, StoreError
from nbdstore.store import layout, recovery
from nbdstore.store.administration import Administration
from nbdstore.store.core import PoolOptions
from nbdstore.store.differences import Change, changes
from nbdstore.store.formatting import create_pool
from nbdstore.store.host import Disk, Failpoint, Host
from nbdstore.store.image import Image
from nbdstore.store.local_host import LOCAL
from nbdstore.store.punching import Puncher
from nbdstore.store.snapshot import Snapshot
from nbdstore.store.snapshots import Snapshots
from nbdstore.store.trash import Trash
from nbdstore.store.volume import Volume

log = logging.getLogger("nbdstore.store")

_TICK_S: Final = 0.5
_UNSYNCED_BYTES: Final = 256 << 20  # bounds both what power loss takes and what recovery checks
_WARN_AT: Final = (0.95, 0.90, 0.80)
_REFUSE_NEW_AT: Final = 0.95


class Pool:
    """An open pool."""

    def __init__(self, disk: Disk, opened: recovery.Opened, options: PoolOptions) -> None:
        self._disk = disk
        self._services = opened.services
        self._registry = opened.registry
        self._options = options
        self._report = opened.report
        self._core = opened.services.core
        self._checkpointer = opened.services.checkpointer
        self._committer = opened.services.committer
        self._puncher = Puncher(self._core)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._administration = Administration(opened.services, opened.registry, self._spawn)
        self._snapshots = Snapshots(opened.services, opened.registry, self._administration)
        self._trash = Trash(self._core, opened.registry, self._snapshots, self._spawn)
        self._warned_at = 0.0
        self._closed = False

    # -- making -----------------------------------------------------------------------------

    @staticmethod
    def create(
        directory: Path,
        *,
        block_size: int = 4096,
        capacity: int | None = None,
        journal_size: int = layout.DEFAULT_JOURNAL_SIZE,
        host: Host = LOCAL,
    ) -> None:
        """Make an empty pool in `directory`, which is made too or must be empty.

        Arguments:
            capacity: bytes; None = the size of the filesystem it lies on.

        Raises:
            InvalidArgument: a value makes no sense, or the directory holds other things.
            AlreadyExists: there is a pool already.
            StoreError, NoSpace: the disk refused; nothing is left behind.
        """
        create_pool(
            host,
            directory,
            block_size=block_size,
            capacity=capacity,
            journal_size=journal_size,
        )

    # -- opening and closing ----------------------------------------------------------------

    @classmethod
    async def open(
        cls, directory: Path, options: PoolOptions | None = None, *, host: Host = LOCAL
    ) -> Pool:
        """Open the pool in `directory` for this process alone, recovering what a crash left.

        Arguments:
            host: what the pool stands on; another one than this machine is for tests.

        Raises:
            PoolLocked: another process has it.
            PoolFormatError: there is none, or of a format not known here.
            Corruption: it is damaged; `nbdstore check` tells more.
        """
        options = options or PoolOptions()
        if not host.exists(directory / "super"):
            raise PoolFormatError(
                f"{directory} holds no pool: make one with "
                f"'nbdstore --pool {directory} pool create'"
            )
        disk = host.disk(directory)
        try:
            disk.lock()
            opened = recovery.open_parts(host, disk, options)
            recovery.check_writable(opened.report.superblock, directory)
            pool = cls(disk, opened, options)
            await pool._finish_recovery(opened)
        except BaseException:
            disk.close()
            raise
        pool._spawn(pool._keep_house())
        for volume in list(opened.registry.by_id.values()):
            if volume.info.deleted:
                pool._administration.empty(volume)
        return pool

    async def _finish_recovery(self, opened: recovery.Opened) -> None:
        report, core = opened.report, self._core
        for fault in report.spare_faults:
            log.warning("%s; the other copy is used", fault)
        # A killed process may have left its superblock unsynced, which frees what the one before
        # needs: nothing may be written before it is durable.
        await self._disk.offload(opened.super_file.fdatasync)
        core.host.reached(Failpoint.RECOVERY_REPLAYED)
        if core.data.size < opened.data_bytes:
            core.data.truncate(opened.data_bytes)
        for slot, block in opened.inline.items():
            core.data.pwritev([block], slot * core.block_size)
        core.host.reached(Failpoint.RECOVERY_INLINE_WRITTEN)
        for volume_id, seq in report.dropped.items():
            name = opened.registry.by_id[volume_id].name
            log.warning(
                "volume %s: writes after its last flush were lost in the crash (from record %d)",
                name,
                seq,
            )
        if report.n_records:
            log.info("recovered %d journal records", report.n_records)
        try:
            await self._checkpointer.run()
        except NoSpace:
            if report.dropped:
                raise  # what was dropped must not be read again before what comes now
            await self._disk.offload(core.data.fdatasync)
            core.journal.begin_without_checkpoint()

    async def close(self) -> None:
        """Write a checkpoint and let go of the pool; after a failure only let go."""
        if self._closed:
            return
        self._closed = True
        await self._administration.finish()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            if self._core.failed is None:
                try:
                    await self._checkpointer.run(last=True)
                except NoSpace as error:
                    # What is in the journal stays there; the next start replays it.
                    log.warning("closed without a checkpoint: %s", error)
                    await self._committer.commit_all()
            await self._committer.finish()
        finally:
            await self._core.misses.finish()
            self._disk.close()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, StoreError):
                log.error("housekeeping: %s", error)
            else:
                log.error("housekeeping ended by a bug", exc_info=error)
                self._core.fail("its housekeeping ended by a bug")

    # -- volumes ----------------------------------------------------------------------------

    @property
    def directory(self) -> Path:
        """Where the pool lies."""
        return self._disk.directory

    @property
    def volumes(self) -> dict[str, Volume]:
        """The volumes by name; not to be changed by the caller."""
        return self._registry.by_name

    async def create_volume(
        self,
        name: str,
        size: int,
        properties: dict[str, Any] | None = None,
        *,
        uuid: UUID | None = None,
    ) -> Volume:
        """Make an empty volume of `size` bytes; durable when this returns.

        Arguments:
            uuid: by which its maker knows it again; None = a new one.

        Raises:
            InvalidArgument, AlreadyExists: of name, size, properties and uuid.
            NoSpace: the pool is nearly full, or holds writes for want of space.
        """
        await self._require_room("volumes")
        return await self._administration.create(name, size, properties or {}, uuid)

    async def _require_room(self, what: str) -> None:
        """Raise NoSpace if there may be no new ones, even when the trash is empty."""
        while self.fill >= _REFUSE_NEW_AT or self._core.n_held:
            if not self._trash.reclaim():
                raise NoSpace(
                    f"the pool is {self.fill:.0%} full: trim, delete or enlarge it "
                    f"before making new {what}"
                )
            await self._core.wait_for_change(_TICK_S)

    async def resize_volume(self, volume: Volume, size: int, *, force: bool = False) -> None:
        """Change a volume's size; durable when this returns.  Connected clients see it later.

        Can be cancelled while it empties the end that is to be cut off; the volume keeps its size
        then, and holes where that was done.

        Raises:
            InvalidArgument: the size makes no sense, or data lies beyond it and not `force`.
            Busy: it is being written beyond the new size.
        """
        await self._administration.resize(volume, size, force=force)

    async def rename_volume(self, volume: Volume, name: str) -> None:
        """Give a volume another name; durable when this returns.

        Raises:
            InvalidArgument, AlreadyExists: of the name.
        """
        await self._administration.rename(volume, name)

    async def set_properties(self, volume: Volume, properties: dict[str, Any]) -> None:
        """Replace the properties of a volume; durable when this returns.

        Raises:
            InvalidArgument: they are more than 16 KiB of JSON.
        """
        await self._administration.set_properties(volume, properties)

    def require_deletable(self, volume: Volume) -> None:
        """Raise Busy while a snapshot of `volume` has clones, or is being read."""
        self._snapshots.require_deletable(volume)

    async def delete_volume(self, volume: Volume) -> None:
        """Take a volume away, and its snapshots; durable when this returns.

        Its space comes back bit by bit.

        Raises:
            Busy: a snapshot of it has clones, or is being read.
        """
        await self._snapshots.delete_volume(volume)

    # -- the trash --------------------------------------------------------------------------

    @property
    def trash(self) -> list[Volume]:
        """The volumes in the trash, those that came first first."""
        return self._trash.volumes

    async def trash_volume(self, volume: Volume) -> None:
        """Put a volume, with its snapshots, into the trash; durable when this returns.

        It loses its name, holds what it held, and can be restored until it is deleted: by
        :meth:`delete_volume`, after a time (PoolOptions), or when the pool needs its space.
        """
        await self._administration.trash(volume)

    async def restore_volume(self, volume: Volume, name: str) -> None:
        """Take a volume out of the trash, as `name`; durable when this returns.

        Raises:
            InvalidArgument, AlreadyExists: of the name.
        """
        await self._administration.restore(volume, name)

    # -- snapshots --------------------------------------------------------------------------

    @property
    def snapshots(self) -> dict[str, Snapshot]:
        """The snapshots of volumes that have a name, by ``VOLUME@NAME``, oldest first."""
        return {
            snapshot.name: snapshot
            for volume in self._registry.by_name.values()
            for snapshot in volume.snapshots.values()
        }

    def origin(self, volume: Volume) -> Snapshot | None:
        """The snapshot of another volume that a clone began as; None for what is no clone."""
        return self._registry.origin(volume)

    def heirs(self, snapshot: Snapshot) -> list[Image]:
        """What continues from a snapshot: volumes, its clones among them, and snapshots."""
        return self._registry.heirs(snapshot)

    async def create_snapshots(
        self, wanted: Sequence[tuple[Volume, str]], *, uuids: Sequence[str] | None = None
    ) -> list[Snapshot]:
        """Make a snapshot of each of some volumes, all of one moment; durable when this returns.

        They hold what was acknowledged before the call, and nothing acknowledged after it.

        Arguments:
            uuids: by which their maker knows them again, or of snapshots in another pool, of which
                these are copies; None = new ones.

        Raises:
            InvalidArgument, AlreadyExists: of the names.
            NoSpace: the pool is nearly full, or holds writes for want of space.
        """
        await self._require_room("snapshots")
        return await self._snapshots.create(wanted, uuids)

    async def delete_snapshot(self, snapshot: Snapshot) -> None:
        """Take a snapshot away, and free what only it holds; durable when this returns.

        Raises:
            Busy: it has clones, or two things continue from it, or it is being read.
            Corruption, ReadFailed: what it holds cannot be told; it stays.
        """
        await self._snapshots.delete(snapshot)

    async def bytes_alone(self, snapshot: Snapshot) -> int:
        """What only this snapshot holds: what deleting it would free, in bytes of data.

        The cost goes with what has changed since it was made, in slices.
        """
        return await self._snapshots.n_bytes_alone(snapshot)

    def changes(
        self, older: Image | None, newer: Image, *, offset: int = 0
    ) -> AsyncIterator[Change]:
        """Yield what is not the same in `newer` as in `older`; see differences.changes."""
        return changes(older, newer, offset=offset)

    def data_bytes(self) -> int:
        """All data that takes space, deleted volumes that are not empty yet included."""
        images = [*self._registry.by_id.values(), *self._registry.snapshots.values()]
        return sum(image.info.n_own for image in images) * self._core.block_size

    async def clone(
        self,
        snapshot: Snapshot,
        name: str,
        properties: dict[str, Any] | None = None,
        *,
        uuid: UUID | None = None,
    ) -> Volume:
        """Make a volume that begins as `snapshot` and shares its blocks; durable when this returns.

        Arguments:
            uuid: by which its maker knows it again; None = a new one.

        Raises:
            InvalidArgument, AlreadyExists: of name, properties and uuid.
            NoSpace: the pool is nearly full, or has not left what the snapshot had set aside.
        """
        await self._require_room("clones")
        return await self._snapshots.clone(snapshot, name, properties or {}, uuid)

    async def rollback(self, volume: Volume, snapshot: Snapshot) -> None:
        """Make a volume what its snapshot is; durable when this returns.

        The caller sees to it that nobody has the volume attached.  All snapshots stay.

        Raises:
            InvalidArgument: it is another volume's snapshot.
            NoSpace: the pool has not left what the snapshot had set aside.
        """
        await self._snapshots.rollback(volume, snapshot)

    async def flatten(
        self, volume: Volume, progress: Callable[[int], None] = lambda _n_bytes: None
    ) -> None:
        """Copy what a clone shares with its origin, so that it depends on it no longer.

        Takes as long as reading and writing that takes; can be cancelled, and called again.

        Arguments:
            progress: called with bytes of the volume that were gone through since the last call.

        Raises:
            Busy: it has snapshots, which share that, too.
            NoSpace, Corruption, ReadFailed: of the copying.
        """
        await self._snapshots.flatten(volume, progress)

    async def grow(self, capacity: int) -> None:
        """Raise the pool's capacity to `capacity` bytes; durable when this returns.

        Raises:
            InvalidArgument: it is less than now, or more than the format can address.
        """
        await self._administration.grow(capacity)

    # -- looking ----------------------------------------------------------------------------

    @property
    def fill(self) -> float:
        """Share of the capacity in use, 0 to 1; what is freed but not reusable yet is free."""
        slots = self._core.slots
        used = slots.n_slots - slots.n_free - slots.n_quarantined + slots.n_set_aside
        return used / slots.n_slots

    def status(self) -> dict[str, Any]:
        """What there is to know, JSON-able; sizes in bytes."""
        core, slots, size = self._core, self._core.slots, self._core.block_size
        counts = core.map_counts
        volumes = self._registry.by_name.values()
        fill = self.fill
        return {
            "directory": str(self.directory),
            "uuid": str(self._checkpointer.superblock.uuid),
            "format_version": self._checkpointer.superblock.format_version,
            "block_size": size,
            "capacity": slots.n_slots * size,
            "used": (slots.n_slots - slots.n_free - slots.n_quarantined) * size,
            "reclaimable": slots.n_quarantined * size,
            "reserved": (core.reserve + slots.n_set_aside) * size,
            "free": slots.n_free * size,
            "fill": round(fill, 6),
            "state": self._state(fill),
            "failure": core.failed,
            "shortage": core.shortage,
            "held_writes": core.n_held,
            "corruptions": core.n_corruptions,
            "newest_corruption": core.newest_corruption,
            "volumes": len(volumes),
            "provisioned": sum(v.size for v in volumes),
            "mapped": sum(v.info.n_mapped for v in volumes) * size,
            "allocated_on_host": core.data.allocated,
            "free_on_host": self._disk.free_bytes(),
            "unsynced": self._committer.n_unsynced_bytes,
            "map_memory": (counts.n_resident + counts.n_nodes) * size,
            "journal": {
                "size": core.journal.size,
                "used": core.journal.used,
                "syncs": core.journal.n_syncs,
            },
            "checkpoints": self._checkpointer.n_checkpoints,
        }

    def _state(self, fill: float) -> str:
        if self._core.failed is not None:
            return "failed"
        if self._core.shortage is not None:
            return "full"
        return "warning" if fill >= _WARN_AT[-1] else "ok"

    # -- housekeeping -----------------------------------------------------------------------

    async def checkpoint(self) -> None:
        """Write a checkpoint of the present."""
        await asyncio.shield(self._spawn(self._checkpointer.run()))

    async def _keep_house(self) -> None:
        """Sync what gets old, write checkpoints in time, give space back to the host."""
        host = self._core.host
        synced_at = host.monotonic()
        while self._core.failed is None:
            await host.sleep(_TICK_S)
            now = host.monotonic()
            self._warn_of_fill()
            unsynced = self._committer.n_unsynced_bytes
            if unsynced > _UNSYNCED_BYTES or now - synced_at > self._options.sync_interval_s:
                synced_at = now
                if not self._committer.is_settled:
                    with contextlib.suppress(StoreError):  # the pool has said it, and stopped
                        await self._committer.settle()
            if self._wants_checkpoint(now):
                with contextlib.suppress(NoSpace):  # logged; tried again at the next tick
                    await self._checkpointer.join()
                self._services.memory.balance()
            self._trash.empty_in_time()
            await self._puncher.work()

    def _wants_checkpoint(self, now: float) -> bool:
        journal = self._core.journal
        if journal.used * 2 > journal.size or self._services.memory.wants_checkpoint:
            return True
        old = now - self._checkpointer.done_at > self._options.checkpoint_interval_s
        return old and self._services.memory.counts.n_dirty > 0

    def _warn_of_fill(self) -> None:
        fill = self.fill
        reached = next((level for level in _WARN_AT if fill >= level), 0.0)
        if reached > self._warned_at:
            log.warning(
                "pool %s is %.0f %% full (warning at %.0f %%): trim, delete or grow it",
                self.directory,
                fill * 100,
                reached * 100,
            )
        self._warned_at = reached
