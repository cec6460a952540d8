"""Scrubbing: read all that volumes map from the disk, while they are served, and compare checksums.

Owns the course of a scrub, its rate, and the record by which one that was stopped goes on. The
record is the property ``scrub`` of each volume, durable like all properties::

    run         when the scrub began that looked at the volume last, or is doing so
    image       the id of the volume or snapshot that it is at; None = it is through
    position    the byte there, up to which all was looked at
    damaged     blocks found damaged in this run so far
    done        when a scrub last got through the volume; None = never

A volume is scrubbed with its snapshots, the newest first, and of each snapshot only what the one
before does not map to the same place: what they share is read once. Data that is written while a
scrub runs may be looked at or not; it was compared when it was written.
"""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nbdstore.control.contracts import ImageLike, PoolLike, VolumeLike
from nbdstore.control.long_operations import LongOperations, Task
from nbdstore.control.model import OperationInfo
from nbdstore.control.usage import Usage
from nbdstore.errors import Busy, InvalidArgument, NotFound, StoreError
from nbdstore.sizes import exact_size

KIND = "scrub"
DEFAULT_RATE = 100 << 20
MIN_RATE = 64 << 10
STEP_BYTES = 4 << 20
"""Looked at between two turns of the loop and two looks at the rate."""
SAVE_EVERY_S = 30.0
"""How much work a kill costs, in time."""
MAX_SHOWN = 100
"""Damaged blocks in the result of a scrub; the log has all."""


@dataclass
class Progress:
    """The record of a volume; see the module."""

    run: str
    image: int | None
    position: int = 0
    damaged: int = 0
    done: str | None = None

    @classmethod
    def of(cls, volume: VolumeLike) -> Progress | None:
        """Read the record of a volume; None if it was never scrubbed."""
        record = volume.properties.get(KIND)
        return cls(**record) if isinstance(record, dict) else None


class Scrubber:
    """Scrubs the volumes of one pool, one scrub at a time."""

    def __init__(self, pool: PoolLike, usage: Usage, running: LongOperations) -> None:
        self._pool = pool
        self._usage = usage
        self._running = running

    def start(
        self,
        volume: str | None = None,
        *,
        rate: int | None = None,
        restart: bool = False,
        operation_id: str | None = None,
    ) -> tuple[OperationInfo, bool]:
        """Begin to scrub a volume, or all of them; return the operation and whether it is new.

        Arguments:
            rate: bytes per second that are read at most; None = DEFAULT_RATE.
            restart: begin anew where an earlier scrub was stopped.

        Raises:
            NotFound: there is no such volume.
            Busy: another scrub runs.
            InvalidArgument: the rate makes no sense.
        """
        rate = DEFAULT_RATE if rate is None else rate
        if rate < MIN_RATE:
            raise InvalidArgument(
                f"a rate of {exact_size(rate)}/s would never end: give at least "
                f"{exact_size(MIN_RATE)}"
            )
        request = {"volume": volume, "rate": rate, "restart": restart}
        known = self._running.known(KIND, request, operation_id)
        if known is not None:
            return known, False
        names = [volume] if volume is not None else sorted(self._pool.volumes)
        volumes = [self._usage.find(name) for name in names]
        return self._begin(volumes, request, operation_id)

    def start_due(self, every_s: float, rate: int) -> OperationInfo | None:
        """Begin to scrub the volumes that have not been for `every_s`; None if there are none."""
        now_s = time.time()
        due = [v for v in self._pool.volumes.values() if due_at(v, every_s) <= now_s]
        if not due:
            return None
        due.sort(key=lambda volume: due_at(volume, every_s))
        names = [volume.name for volume in due]
        request = {"volumes": names, "rate": rate, "restart": False}
        return self._begin(due, request, None)[0]

    def next_due(self, every_s: float) -> float:
        """When the next volume is due, in seconds since 1970; `every_s` from now without any."""
        times = [due_at(volume, every_s) for volume in self._pool.volumes.values()]
        return min(times, default=time.time() + every_s)

    def _begin(
        self, volumes: Sequence[VolumeLike], request: dict[str, Any], operation_id: str | None
    ) -> tuple[OperationInfo, bool]:
        for operation in self._running.list():
            if operation.kind == KIND and operation.is_running:
                raise Busy(
                    f"scrub {operation.id} is running ({operation.progress:.0%}): wait for its "
                    "end, or cancel it"
                )
        scrub = _Scrub(self._usage, volumes, request)
        return self._running.start(
            KIND,
            request,
            scrub.run,
            total=scrub.weigh(),
            result={"volumes": 0, "bytes": 0, "damaged": 0, "damage": []},
            operation_id=operation_id,
        )


class _Scrub:
    """One scrub of some volumes."""

    def __init__(
        self,
        usage: Usage,
        volumes: Sequence[VolumeLike],
        request: dict[str, Any],
    ) -> None:
        self._usage = usage
        self._pace = _Pace(request["rate"])
        self._volumes = list(volumes)
        self._run_at = _now()
        if not request["restart"]:
            self._resume()

    def _resume(self) -> None:
        """Go on with the newest scrub that was stopped, leaving out what it got through."""
        records = [record for volume in self._volumes if (record := Progress.of(volume))]
        stopped = [record.run for record in records if record.image is not None]
        if not stopped:
            return
        self._run_at = max(stopped)
        self._volumes = [v for v in self._volumes if not self._is_through(v)]

    def _is_through(self, volume: VolumeLike) -> bool:
        record = Progress.of(volume)
        return record is not None and record.run == self._run_at and record.image is None

    async def run(self, task: Task) -> None:
        """Scrub; `task` learns of everything."""
        for volume in self._volumes:
            try:
                await self._scrub(volume, task)
            except NotFound:
                continue  # deleted on the way
            task.result["volumes"] += 1

    def weigh(self) -> int:
        """Bytes to look at, about: what volumes map, and what only their snapshots do.

        Of a volume that was stopped at, the part that is as long as what is left of its size.
        """
        total = 0
        for volume in self._volumes:
            mapped, record = int(volume.status()["mapped"]), Progress.of(volume)
            if record is not None and record.run == self._run_at and record.image == volume.id:
                mapped -= mapped * min(record.position, volume.size) // max(volume.size, 1)
            own = [int(snapshot.status()["own"]) for snapshot in volume.snapshots.values()]
            total += mapped + sum(own)
        return total

    async def _scrub(self, volume: VolumeLike, task: Task) -> None:
        before = Progress.of(volume)
        progress = Progress(self._run_at, volume.id, done=before.done if before else None)
        images = self._images(volume)
        if before is not None and before.run == self._run_at and before.image is not None:
            ids = [image.id for image, _ in images]
            if before.image in ids:  # else its snapshot is gone: what is newer was done before it
                images = images[ids.index(before.image) :]
                progress = before
                task.result["damaged"] += before.damaged
        saver = _Saver(self._usage, volume, progress)
        await saver.save()
        try:
            for image, newer in images:
                progress.position = progress.position if image.id == progress.image else 0
                progress.image = image.id
                await self._scrub_image(image, newer, saver, task)
        except BaseException:
            await saver.save()
            raise
        progress.image, progress.position, progress.done = None, 0, _now()
        await saver.save()

    def _images(self, volume: VolumeLike) -> list[tuple[ImageLike, ImageLike | None]]:
        """A volume and its snapshots, the newest first, each with the one before it."""
        newest_first = [volume, *reversed([*volume.snapshots.values()])]
        return list(zip(newest_first, [None, *newest_first], strict=False))

    async def _scrub_image(
        self, image: ImageLike, newer: ImageLike | None, saver: _Saver, task: Task
    ) -> None:
        progress = saver.progress
        while progress.position < image.size:
            length = min(STEP_BYTES, image.size - progress.position)
            try:
                found = await image.verify(progress.position, length, unlike=newer)
            except NotFound:
                if image is saver.volume:
                    raise
                if image not in saver.volume.snapshots.values():
                    return  # deleted on the way
                if newer is None:
                    raise
                newer = None  # that one was deleted: what they shared is this one's own now
                continue
            except StoreError:
                if progress.position + length > image.size:
                    continue  # it was shrunk on the way
                raise
            for at, fault in found.faults:
                _report(task, image, at, fault)
            progress.damaged += len(found.faults)
            task.result["bytes"] += found.n_bytes
            task.advance(found.n_bytes)
            progress.position += length
            if found.n_bytes:
                await self._pace.spend(found.n_bytes)
            else:
                progress.position += await _hole_at(image, progress.position)
            await saver.save_now_and_then()


def _report(task: Task, image: ImageLike, offset: int, fault: Exception) -> None:
    task.result["damaged"] += 1
    if len(task.result["damage"]) < MAX_SHOWN:
        task.result["damage"].append({"volume": image.name, "offset": offset, "detail": str(fault)})


async def _hole_at(image: ImageLike, offset: int) -> int:
    """Return how many bytes from `offset` on hold nothing, which need no looking at."""
    size = image.size
    if offset >= size:
        return 0
    try:
        (first,) = await image.extents(offset, size - offset, max_extents=1)
    except StoreError:
        if image.size < size:
            return 0  # it was shrunk on the way
        raise
    return 0 if first.kind.name == "DATA" else first.length


class _Saver:
    """Keeps the record of a volume."""

    def __init__(self, usage: Usage, volume: VolumeLike, progress: Progress) -> None:
        self.volume = volume
        self.progress = progress
        self._usage = usage
        self._saved_s = 0.0

    async def save(self) -> None:
        """Make the record durable."""
        async with self._usage.turn:
            await self._usage.set(self.volume, **{KIND: dict(vars(self.progress))})
        self._saved_s = time.monotonic()

    async def save_now_and_then(self) -> None:
        if time.monotonic() - self._saved_s >= SAVE_EVERY_S:
            await self.save()


class _Pace:
    """Bounds a rate: after each step, waits until it was allowed to take as much."""

    def __init__(self, bytes_per_s: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._next_s = 0.0

    async def spend(self, n_bytes: int) -> None:
        """Wait until `n_bytes` more are within the rate; what was not used is not saved up."""
        now_s = time.monotonic()
        self._next_s = max(self._next_s, now_s) + n_bytes / self._bytes_per_s
        await asyncio.sleep(self._next_s - now_s)


def due_at(volume: VolumeLike, every_s: float) -> float:
    """When a volume is to be scrubbed again, in seconds since 1970; 0 = it was stopped before."""
    record = Progress.of(volume)
    if record is not None and record.image is not None:
        return 0.0
    last = record.done if record is not None and record.done else volume.status()["created"]
    return datetime.datetime.fromisoformat(last).timestamp() + every_s


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
