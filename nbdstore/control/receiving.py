"""The receiving half of backups: a stream becomes a volume's snapshot, whole or not at all.

Owns what is kept of a stream that broke off, as the property ``receiving`` of the volume (the
object of `HalfReceived`). The property ``importing`` stands beside it, so that nobody can attach
the volume. What the stream looks like is `backup_stream`'s.

==================  ============================================================================
a volume that is    has
==================  ============================================================================
not there           nothing; a full stream makes it
as in the base      the snapshot that the stream builds on, and not changed since then
half received       ``receiving``: all bytes before `position` are as in the new snapshot, and are
                    durable; those behind it are as in the base, or as in the new one
being given up      ``receiving`` with position 0 while what came is taken back; then that goes, too
received            the snapshot, with the name and uuid that it has where it was sent;
                    ``receiving`` goes away after it has come, so a crash between leaves both, and
                    the next start takes it away; so does receiving it again, or the next one, or
                    aborting
==================  ============================================================================
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import AsyncIterator
from typing import Final

from nbdstore.control.backup_stream import BackupReader, Begin, Part, ResumeToken, Zeros
from nbdstore.control.contracts import PoolLike, SnapshotLike, VolumeLike
from nbdstore.control.events import Events
from nbdstore.control.long_operations import LongOperations, Task
from nbdstore.control.model import Record
from nbdstore.control.receiving_model import ReceivedInfo, ReceivingInfo
from nbdstore.control.stream import Buffer
from nbdstore.control.usage import Usage
from nbdstore.errors import (
    AlreadyExists,
    Busy,
    InvalidArgument,
    NbdstoreError,
    NotFound,
    StoreError,
    WrongBase,
)

KIND: Final = "receive"
"""The kind of that operation."""
_SAVE_BYTES: Final = 64 << 20
_SAVE_S: Final = 5.0  # how much of a transfer, in bytes or time, a killed server loses at most

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfReceived(Record):
    """What a half-received volume has: `Begin` of what is received, and how far that is."""

    uuid: str
    name: str
    size: int
    base: str | None
    base_size: int | None
    position: int = 0


class Receiving:
    """Receives into the volumes of one pool."""

    def __init__(
        self, usage: Usage, pool: PoolLike, running: LongOperations, events: Events
    ) -> None:
        self._usage = usage
        self._pool = pool
        self._running = running
        self._events = events

    async def receive(self, name: str, chunks: AsyncIterator[Buffer]) -> ReceivedInfo:
        """Receive a stream into volume `name`; durable on return.

        It is one of the operations while it runs. What came before a failure, or before it was
        cancelled, and is whole, is kept to go on from.

        Raises:
            Cancelled: somebody has cancelled the operation.
            BadStream: it is damaged or cut off.
            WrongBase: the volume is not what the stream builds on.
            AlreadyExists: it has the snapshot, or holds something else.
            Busy: it is in use.
        """
        reader = BackupReader()
        parts = _parts(reader, chunks)
        first = await anext(parts, None)  # this reads the beginning, too
        begin = reader.begin or reader.end()
        async with self._usage.turn:
            reception = await self._begin(name, begin)
            self._usage.imports.add(reception.volume.id)

        async def work(task: Task) -> None:
            try:
                await reception.take(first, parts, task)
                reader.end()
                await reception.complete(begin)
                task.reach(begin.size)
            except BaseException:
                await reception.break_off()
                raise

        request = {"volume": name, "snapshot": begin.name, "since": begin.base_name}
        try:
            await self._running.attend(KIND, request, work, total=begin.size)
        finally:
            self._usage.imports.discard(reception.volume.id)
        made = f"{reception.volume.name}@{begin.snapshot}"
        self._events.tell("snapshot.created", made, size=begin.size)
        return ReceivedInfo(
            volume=reception.volume.name,
            snapshot=made,
            uuid=begin.uuid,
            base=begin.base,
            size=begin.size,
            data=reader.n_data_bytes,
            zeros=reader.n_zero_bytes,
            resumed_at=begin.start,
        )

    def show(self, name: str) -> ReceivingInfo:
        """Tell what a half-received volume has; NotFound if it is none."""
        volume = self._usage.find(name)
        progress = self._progress(volume)
        return ReceivingInfo(
            volume=volume.name,
            snapshot=progress.name,
            uuid=progress.uuid,
            base=progress.base,
            size=progress.size,
            position=progress.position,
            running=volume.id in self._usage.imports,
            token=ResumeToken(
                uuid=progress.uuid, base=progress.base, start=progress.position
            ).encode(),
        )

    def _progress(self, volume: VolumeLike) -> HalfReceived:
        progress = received_so_far(volume)
        if progress is None:
            raise NotFound(f"volume '{volume.name}' is not half received: there is nothing to do")
        return progress

    async def abort(self, name: str) -> None:
        """Give up what a half-received volume has: it is as before then, or is gone."""
        async with self._usage.turn:
            volume = self._usage.find(name)
            progress = self._progress(volume)
            if volume.id in self._usage.imports:
                raise Busy(f"volume '{name}' is being received right now: end that first")
            if _with_uuid(volume, progress.uuid) is None:
                if progress.base is None:
                    await self._pool.delete_volume(volume)
                    self._events.tell("volume.deleted", name)
                    return
                base = self._base(volume, progress.base, progress.name)
                # Should a crash come after the rollback, nobody may go on where it was broken off.
                nothing = dataclasses.replace(progress, position=0)
                await self._usage.set(volume, receiving=nothing.to_json())
                await self._pool.rollback(volume, base)
                self._events.tell("volume.changed", name, rolled_back_to=base.name)
            await _unmark(self._usage, volume)

    async def unmark_received(self) -> None:
        """Take the marks from volumes whose snapshot has come: a crash came between the two.

        To be called when the pool has been opened. Where it fails the mark stays, and the log says
        so: a pool that is full, say, is served all the same.
        """
        async with self._usage.turn:
            for volume in list(self._pool.volumes.values()):
                try:
                    before = received_so_far(volume)
                    if before is not None and _with_uuid(volume, before.uuid) is not None:
                        await _unmark(self._usage, volume)
                        log.info("volume %s: %s has come whole", volume.name, before.name)
                except NbdstoreError as error:
                    log.warning("volume %s stays as half received: %s", volume.name, error)

    # -- the beginning ----------------------------------------------------------------------

    async def _begin(self, name: str, begin: Begin) -> _Reception:
        """Find or make the volume, see that the stream fits it, and mark it, durably."""
        progress = HalfReceived(
            uuid=begin.uuid,
            name=begin.name,
            size=begin.size,
            base=begin.base,
            base_size=begin.base_size,
        )
        volume = self._pool.volumes.get(name)
        if volume is None:
            self._require_full(name, begin)
            marks = {"importing": True, "receiving": progress.to_json()}
            made = await self._pool.create_volume(name, begin.size, marks)
            self._events.tell("volume.created", name, size=begin.size)
            return _Reception(self._usage, self._pool, made, progress, is_new=True)
        if volume.id in self._usage.imports:
            raise Busy(f"volume '{name}' is being received or imported right now: wait for that")
        self._usage.require_not_shrinking(volume, "receiving into it")
        before = received_so_far(volume)
        if before and before.uuid != begin.uuid and _with_uuid(volume, before.uuid):
            await _unmark(self._usage, volume)  # a crash came between the snapshot and this
            before = None
        if before is not None:
            _check_goes_on(volume, before, begin)
            return _Reception(self._usage, self._pool, volume, before)
        await self._mark(volume, begin, progress)
        return _Reception(self._usage, self._pool, volume, progress, is_unchanged=True)

    def _require_full(self, name: str, begin: Begin) -> None:
        if begin.base is not None:
            raise WrongBase(
                f"there is no volume '{name}', and this stream of {begin.name} builds on "
                f"{begin.base_name}: receive that first"
            )
        if begin.start:
            raise WrongBase(
                f"there is no volume '{name}', and this stream of {begin.name} goes on from "
                f"offset {begin.start}: send it from the beginning, without --resume"
            )

    async def _mark(self, volume: VolumeLike, begin: Begin, progress: HalfReceived) -> None:
        """Mark a volume that is as in the base, while nobody can attach it."""
        if _with_uuid(volume, begin.uuid) is not None:
            raise AlreadyExists(f"volume '{volume.name}' has {begin.name} already")
        if begin.base is None:
            raise AlreadyExists(
                f"volume '{volume.name}' exists, and this is a full stream of {begin.name}: "
                "receive it under another name"
            )
        with self._usage.barred(volume):
            self._usage.require_free(volume, "receiving into it")
            if begin.start:
                raise WrongBase(
                    f"nothing of {begin.name} was received into volume '{volume.name}', and this "
                    f"stream goes on from offset {begin.start}: send it without --resume"
                )
            base = self._base(volume, begin.base, begin.base_name or "")
            if begin.snapshot in volume.snapshots:
                raise AlreadyExists(
                    f"{volume.name}@{begin.snapshot} is another snapshot than the one sent: "
                    "delete it, or receive into another volume"
                )
            await self._require_unchanged(volume, base)
            await self._usage.set(volume, importing=True, receiving=progress.to_json())

    def _base(self, volume: VolumeLike, uuid: str, name: str) -> SnapshotLike:
        base = _with_uuid(volume, uuid)
        if base is None:
            raise WrongBase(
                f"the stream builds on {name} ({uuid}), which volume '{volume.name}' does not "
                "have: send what has changed since a snapshot that both have, or everything"
            )
        return base

    async def _require_unchanged(self, volume: VolumeLike, base: SnapshotLike) -> None:
        with base.in_use():
            changed = volume.size != base.size
            if not changed:
                changed = await anext(self._pool.changes(base, volume), None) is not None
        if changed:
            raise WrongBase(
                f"volume '{volume.name}' has changed since {base.name}: roll it back with "
                f"'nbdstore snapshot rollback {base.name}', or receive into another volume"
            )


def received_so_far(volume: VolumeLike) -> HalfReceived | None:
    """Return what a half-received volume has; None if it is none."""
    found = volume.properties.get("receiving")
    return HalfReceived.from_json(found) if found else None


def _with_uuid(volume: VolumeLike, uuid: str) -> SnapshotLike | None:
    for snapshot in volume.snapshots.values():
        if snapshot.status()["uuid"] == uuid:
            return snapshot
    return None


def _check_goes_on(volume: VolumeLike, before: HalfReceived, begin: Begin) -> None:
    """Raise unless a stream brings what is missing of a half-received volume."""
    if (before.uuid, before.base) != (begin.uuid, begin.base):
        raise WrongBase(
            f"volume '{volume.name}' is half received, with {before.name}, and this is a stream of "
            f"{begin.name}: go on with that one ('nbdstore receive --resume-token {volume.name}'), "
            f"or give it up with 'nbdstore receive --abort {volume.name}'"
        )
    if begin.start > before.position:
        raise WrongBase(
            f"the stream goes on from offset {begin.start}, and volume '{volume.name}' has what "
            f"comes before {before.position} only: ask for the token again with "
            f"'nbdstore receive --resume-token {volume.name}'"
        )


async def _unmark(usage: Usage, volume: VolumeLike) -> None:
    await usage.set(volume, importing=False, receiving=None)


async def _parts(reader: BackupReader, chunks: AsyncIterator[Buffer]) -> AsyncIterator[Part]:
    async for chunk in chunks:
        for part in reader.feed(chunk):
            yield part


class _Reception:
    """One stream on its way into one volume, which is marked.

    Arguments:
        is_new: the volume was made for it.
        is_unchanged: the volume is still as in the base.
    """

    def __init__(
        self,
        usage: Usage,
        pool: PoolLike,
        volume: VolumeLike,
        progress: HalfReceived,
        *,
        is_new: bool = False,
        is_unchanged: bool = False,
    ) -> None:
        self.volume = volume
        self._usage = usage
        self._pool = pool
        self._progress = progress
        self._position = progress.position
        self._is_new = is_new
        self._is_unchanged = is_unchanged

    async def take(self, first: Part | None, rest: AsyncIterator[Part], task: Task) -> None:
        """Write the parts; now and then what is there is made durable, and that is noted."""
        task.reach(self._position)
        if self.volume.size != self._progress.size:
            self._is_unchanged = False
            await self._pool.resize_volume(self.volume, self._progress.size, force=True)
        n_unsaved, saved_at = 0, time.monotonic()
        if first is not None:
            n_unsaved += await self._write(first)
        async for part in rest:
            n_unsaved += await self._write(part)
            task.reach(self._position)
            if n_unsaved >= _SAVE_BYTES or time.monotonic() - saved_at >= _SAVE_S:
                await self._save()
                n_unsaved, saved_at = 0, time.monotonic()

    async def _write(self, part: Part) -> int:
        """Write a part, unless it is there already; return how many bytes that were."""
        if part.stop <= self._position:
            return 0
        self._is_unchanged = False
        if isinstance(part, Zeros):
            await self.volume.write_zeroes(part.offset, part.length)
        else:
            at = part.offset
            for buffer in part.buffers:
                await self.volume.write(at, buffer)
                at += len(buffer)
        self._position = part.stop
        return 0 if isinstance(part, Zeros) else part.stop - part.offset

    async def _save(self) -> None:
        """Make what is there durable, and note that it is."""
        async with self._usage.turn:
            self._progress = dataclasses.replace(self._progress, position=self._position)
            await self.volume.flush()
            await self._usage.set(self.volume, receiving=self._progress.to_json())

    async def break_off(self) -> None:
        """Keep what has come; where that is nothing, leave all as it was.

        When the snapshot is there, nothing can go on any more: only the marks may be left.
        """
        is_received = _with_uuid(self.volume, self._progress.uuid) is not None
        try:
            if self._is_new and not self._position and not is_received:
                await self._pool.delete_volume(self.volume)
            elif self._is_unchanged or is_received:
                async with self._usage.turn:
                    await _unmark(self._usage, self.volume)
            else:
                await self._save()
        except (StoreError, InvalidArgument):
            pass  # what was noted before holds; the reason why it broke off goes up

    async def complete(self, begin: Begin) -> None:
        """Make the snapshot, then let the volume be used."""
        async with self._usage.turn:
            if _with_uuid(self.volume, begin.uuid) is None:
                wanted = [(self.volume, begin.snapshot)]
                await self._pool.create_snapshots(wanted, uuids=[begin.uuid])
            await _unmark(self._usage, self.volume)
