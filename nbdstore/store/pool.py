"""A pool: made, opened, watched over and closed.

Owns the life of an open pool, its administrative changes and its housekeeping; everything else
is done by the parts it joins.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

from nbdstore.errors import (
    AlreadyExists,
    InvalidArgument,
    NoSpace,
    PoolFormatError,
    StoreError,
)
from nbdstore.store import catalogue, layout, recovery, superblock
from nbdstore.store.catalogue import VolumeInfo
from nbdstore.store.core import PoolOptions
from nbdstore.store.disk import Disk
from nbdstore.store.journal import format_ring
from nbdstore.store.punching import Puncher
from nbdstore.store.records import admin_group
from nbdstore.store.superblock import NULL, Superblock
from nbdstore.store.volume import Volume

log = logging.getLogger("nbdstore.store")

_TICK_S: Final = 0.5
_UNSYNCED_BYTES: Final = 256 << 20  # bounds both what power loss takes and what recovery checks
_WARN_AT: Final = (0.95, 0.90, 0.80)
_REFUSE_NEW_AT: Final = 0.95
_PROPERTIES_BYTES: Final = 16 << 10
_ADMIN_RECORD_BYTES: Final = 64 << 10


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
        self._admin = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
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
    ) -> None:
        """Make an empty pool in `directory`, which is made too or must be empty.

        Arguments:
            capacity: bytes; None = the size of the filesystem it lies on.

        Raises:
            InvalidArgument: a value makes no sense, or the directory holds other things.
            AlreadyExists: there is a pool already.
            StoreError, NoSpace: the disk refused; nothing is left behind.
        """
        _check_geometry(block_size, capacity, journal_size)
        made = _make_directory(directory)
        disk = Disk(directory)
        try:
            disk.lock()
            if capacity is None:
                capacity = max(disk.total_bytes(), layout.MIN_CAPACITY)
            n_slots = min(capacity // block_size, layout.MAX_SLOTS)
            _format(disk, block_size, n_slots, journal_size)
        except BaseException:
            for name in ("super", "super.new", "journal", "data", "lock"):
                if disk.exists(name):
                    disk.remove(name)
            if made:
                shutil.rmtree(directory, ignore_errors=True)
            raise
        finally:
            disk.close()

    # -- opening and closing ----------------------------------------------------------------

    @classmethod
    async def open(cls, directory: Path, options: PoolOptions | None = None) -> Pool:
        """Open the pool in `directory` for this process alone, recovering what a crash left.

        Raises:
            PoolLocked: another process has it.
            PoolFormatError: there is none, or of a format not known here.
            Corruption: it is damaged; `nbdstore check` tells more.
        """
        options = options or PoolOptions()
        if not (directory / "super").exists():
            raise PoolFormatError(
                f"{directory} holds no pool: make one with "
                f"'nbdstore --pool {directory} pool create'"
            )
        disk = Disk(directory)
        try:
            disk.lock()
            opened = recovery.open_parts(disk, options)
            unknown = opened.report.superblock.readonly_compatible
            if unknown & ~layout.FEATURES_READONLY_COMPATIBLE:
                raise PoolFormatError(
                    f"pool {directory}: a newer nbdstore has written to it (features {unknown:#x})"
                    ": this version may only check it; install the newer one"
                )
            pool = cls(disk, opened, options)
            await pool._finish_recovery(opened)
        except BaseException:
            disk.close()
            raise
        pool._spawn(pool._keep_house())
        for volume in list(opened.registry.by_id.values()):
            if volume.info.deleted:
                pool._spawn(pool._empty(volume))
        return pool

    async def _finish_recovery(self, opened: recovery.Opened) -> None:
        report, core = opened.report, self._core
        for fault in report.superblock_faults:
            log.warning("superblock: %s; the other copy is used", fault)
        for slot, block in opened.inline.items():
            core.data.pwritev([block], slot * core.block_size)
        for volume_id, seq in report.dropped.items():
            name = opened.registry.by_id[volume_id].name
            log.warning(
                "volume %s: writes after its last flush were lost in the crash (from record %d)",
                name,
                seq,
            )
        if report.n_records:
            log.info("recovered %d journal records", report.n_records)
        await self._checkpointer.run()

    async def close(self) -> None:
        """Write a checkpoint and let go of the pool; after a failure only let go."""
        if self._closed:
            return
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            if self._core.failed is None:
                try:
                    await self._checkpointer.run()
                except NoSpace as error:
                    # What is in the journal stays there; the next start replays it.
                    log.warning("closed without a checkpoint: %s", error)
                    await self._committer.commit_all()
            await self._committer.finish()
        finally:
            self._disk.close()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
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
        self, name: str, size: int, properties: dict[str, Any] | None = None
    ) -> Volume:
        """Make an empty volume of `size` bytes; durable when this returns.

        Raises:
            InvalidArgument, AlreadyExists: of name and size.
            NoSpace: the pool is nearly full.
        """
        catalogue.check_name(name)
        catalogue.check_size(size)
        async with self._administration():
            self._check_new(name)
            if self.fill >= _REFUSE_NEW_AT:
                raise NoSpace(
                    f"the pool is {self.fill:.0%} full: trim, delete or enlarge it "
                    "before making new volumes"
                )
            info = VolumeInfo(
                self._checkpointer.next_id, name, size, properties=dict(properties or {})
            )
            await self._change(info.id, {"op": "create", "volume": info.to_json()})
            return self._registry.by_id[info.id]

    async def resize_volume(self, volume: Volume, size: int, *, force: bool = False) -> None:
        """Change a volume's size; durable when this returns.  Connected clients see it later.

        Raises:
            InvalidArgument: the size makes no sense, or data lies beyond it and not `force`.
        """
        catalogue.check_size(size)
        async with self._administration():
            if size < volume.size:
                await self._clear_tail(volume, size, force)
            await volume.flush()
            async with self._checkpointer.lock:
                if size < volume.size:
                    await self._checkpointer.run_locked()  # no node may lie beyond the new end
                await self._change(volume.id, {"op": "resize", "size": size})

    async def _clear_tail(self, volume: Volume, size: int, force: bool) -> None:
        if not force and (used := await self._used_beyond(volume, size)):
            raise InvalidArgument(
                f"volume {volume.name}: {used} bytes are mapped beyond the new size {size}: "
                "trim them, or use force to lose them"
            )
        await volume.write_zeroes(size, volume.size - size)

    @staticmethod
    async def _used_beyond(volume: Volume, size: int) -> int:
        used, at = 0, size
        while at < volume.size:
            for extent in await volume.extents(at, volume.size - at, max_extents=4096):
                used += extent.length if extent.kind.value != "hole" else 0
                at += extent.length
        return used

    async def rename_volume(self, volume: Volume, name: str) -> None:
        """Give a volume another name; durable when this returns.

        Raises:
            InvalidArgument, AlreadyExists: of the name.
        """
        catalogue.check_name(name)
        async with self._administration():
            if name != volume.name:
                self._check_new(name)
                await volume.flush()
                await self._change(volume.id, {"op": "rename", "name": name})

    async def set_properties(self, volume: Volume, properties: dict[str, Any]) -> None:
        """Replace the properties of a volume; durable when this returns.

        Raises:
            InvalidArgument: they are more than 16 KiB of JSON.
        """
        if len(json.dumps(properties)) > _PROPERTIES_BYTES:
            raise InvalidArgument(f"volume {volume.name}: properties of more than 16 KiB")
        async with self._administration():
            await volume.flush()
            await self._change(volume.id, {"op": "properties", "properties": properties})

    async def delete_volume(self, volume: Volume) -> None:
        """Take a volume away; durable when this returns.  Its space comes back bit by bit."""
        async with self._administration():
            volume.check_there()
            await volume.flush()
            await self._change(volume.id, {"op": "delete"})
        self._spawn(self._empty(volume))

    async def _empty(self, volume: Volume) -> None:
        """Free the blocks of a deleted volume, then forget it."""
        await volume.ranges.clear(0, volume.map.n_blocks)
        async with self._administration():
            await volume.flush()
            async with self._checkpointer.lock:
                await self._change(volume.id, {"op": "remove"})

    async def grow(self, capacity: int) -> None:
        """Raise the pool's capacity to `capacity` bytes; durable when this returns.

        Raises:
            InvalidArgument: it is less than now, or more than the format can address.
        """
        n_slots = capacity // self._core.block_size
        now = self._core.slots.n_slots
        if n_slots < now:
            raise InvalidArgument(
                f"capacity {capacity}: less than the present {now * self._core.block_size}; "
                "a pool can only grow"
            )
        _check_capacity(capacity, self._core.block_size)
        async with self._administration(), self._checkpointer.lock:
            await self._change(0, {"op": "grow", "n_slots": n_slots})
        self._core.space_changed()

    def _check_new(self, name: str) -> None:
        if name in self._registry.by_name:
            raise AlreadyExists(f"volume {name!r} exists already: choose another name")

    @contextlib.asynccontextmanager
    async def _administration(self) -> AsyncIterator[None]:
        """One administrative change at a time, begun with room for it in the journal."""
        async with self._admin:
            while not self._core.journal.room_for(2 * _ADMIN_RECORD_BYTES):
                await self._checkpointer.join()
            yield

    async def _change(self, volume_id: int, change: dict[str, Any]) -> None:
        """Journal an administrative change, do it, and make it durable."""
        group = admin_group(volume_id, change)
        if not self._core.journal.room_for(len(group)):
            # The caller may hold the checkpoint's lock: it cannot be waited for here.
            raise NoSpace("the journal is full until the next checkpoint: try again in a moment")
        seq = self._core.append(group)
        self._registry.apply(self._services, volume_id, change, seq)
        await self._committer.commit_all()
        self._core.check_alive()

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
            "held_writes": core.n_held,
            "corruptions": core.n_corruptions,
            "volumes": len(volumes),
            "provisioned": sum(v.size for v in volumes),
            "mapped": sum(v.info.n_mapped for v in volumes) * size,
            "allocated_on_host": core.data.allocated,
            "free_on_host": self._disk.free_bytes(),
            "unsynced": self._committer.n_unsynced_bytes,
            "map_memory": self._services.memory.counts.n_resident * size,
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
        if self._core.n_held:
            return "full"
        return "warning" if fill >= _WARN_AT[-1] else "ok"

    # -- housekeeping -----------------------------------------------------------------------

    async def checkpoint(self) -> None:
        """Write a checkpoint of the present."""
        await self._checkpointer.run()

    async def _keep_house(self) -> None:
        """Sync what gets old, write checkpoints in time, give space back to the host."""
        synced_at = time.monotonic()
        while self._core.failed is None:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            self._warn_of_fill()
            unsynced = self._committer.n_unsynced_bytes
            if unsynced > _UNSYNCED_BYTES or now - synced_at > self._options.sync_interval_s:
                synced_at = now
                if unsynced or self._core.slots.n_quarantined:
                    with contextlib.suppress(StoreError):  # the pool has said it, and stopped
                        await self._committer.settle()
            if self._wants_checkpoint(now):
                with contextlib.suppress(NoSpace):  # logged; tried again at the next tick
                    await self._checkpointer.join()
                self._services.memory.balance()
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


def _check_geometry(block_size: int, capacity: int | None, journal_size: int) -> None:
    if block_size & (block_size - 1) or not (
        layout.MIN_BLOCK_SIZE <= block_size <= layout.MAX_BLOCK_SIZE
    ):
        raise InvalidArgument(
            f"block size {block_size}: choose 4096, 8192, 16384, 32768 or 65536 bytes"
        )
    if journal_size % block_size or not (
        layout.MIN_JOURNAL_SIZE <= journal_size <= layout.MAX_JOURNAL_SIZE
    ):
        raise InvalidArgument(
            f"journal size {journal_size}: choose a multiple of {block_size} bytes "
            "between 1 MiB and 64 GiB"
        )
    if capacity is not None:
        _check_capacity(capacity, block_size)


def _check_capacity(capacity: int, block_size: int) -> None:
    if capacity < layout.MIN_CAPACITY or capacity // block_size > layout.MAX_SLOTS:
        raise InvalidArgument(
            f"capacity {capacity}: choose between 16 MiB and {layout.MAX_SLOTS * block_size} bytes"
        )


def _make_directory(directory: Path) -> bool:
    """Make `directory`, or make sure that it is empty; tell whether it was made."""
    try:
        directory.mkdir(mode=0o700, parents=True)
        return True
    except FileExistsError:
        pass
    except OSError as error:
        raise StoreError(f"cannot make {directory}: {error.strerror}") from error
    if not directory.is_dir():
        raise InvalidArgument(f"{directory} is not a directory: choose another place")
    try:
        found = sorted(p.name for p in directory.iterdir() if p.name not in ("lost+found", "lock"))
    except OSError as error:
        raise StoreError(f"cannot read {directory}: {error.strerror}") from error
    if "super" in found:
        raise AlreadyExists(f"{directory} holds a pool already: use it, or choose another place")
    if found:
        raise InvalidArgument(
            f"{directory} is not empty (it holds {found[0]!r}): choose an empty directory"
        )
    return False


def _format(disk: Disk, block_size: int, n_slots: int, journal_size: int) -> None:
    """Write the files; the superblock comes last, so that there is a pool or there is none."""
    ring, data = disk.open("journal", create=True), disk.open("data", create=True)
    super_file = disk.open("super.new", create=True)
    try:
        format_ring(ring, journal_size)
        ring.fdatasync()
        data.truncate(block_size)  # slot 0
        data.fdatasync()
        first = Superblock(
            uuid=uuid.uuid4(),
            generation=0,
            block_size=block_size,
            n_slots=n_slots,
            journal_size=journal_size,
            journal_offset=0,
            journal_seq=1,
            catalogue=NULL,
            catalogue_bytes=0,
            free_map=NULL,
            created=int(time.time()),
        )
        superblock.write(super_file, first)
        superblock.write(super_file, first.next())
        super_file.fdatasync()
        disk.rename("super.new", "super")
        disk.sync()
    finally:
        for file in (ring, data, super_file):
            file.close()
