"""A process that has a pool open, on a disk that can be cut off.

Owns its birth and its death.  Death comes at a moment of the disk: before its n-th operation, or at
a failpoint of the store.  From that moment on nothing that the code does has an effect: the disk's
log is cut there, and what is sent goes nowhere.
"""

from __future__ import annotations

import asyncio
import functools
import random
import tempfile
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash

from nbdstore.control.operations import Operations
from nbdstore.errors import NbdstoreError, WriteFailed
from nbdstore.store import Pool
from nbdstore.store.host import Failpoint
from nbdstore.store.local_host import LocalHost
from tests.simulation.oracle import Wrong
from tests.simulation.world_loop import Process
from tests.store.crashes import LAZY, Crash, crash_images, killed_at, load_images
from tests.store.simulated_disk import SimulatedDisk, SimulatedHost, Write

if TYPE_CHECKING:
    from tests.simulation.world import World

T = TypeVar("T")


@dataclass(frozen=True)
class Death:
    """When and how a process dies.

    Attributes:
        power: the power fails; else the process alone is killed.
        operation: before so many more operations of the disk are done, or None.
        place: when the store has come there `n_times` more, or None.
    """

    power: bool
    operation: int | None = None
    place: Failpoint | None = None
    n_times: int = 1


class ProcessDied(Exception):
    """The process died meanwhile."""


class _Host(SimulatedHost):
    """A host that knows when the end has come."""

    def __init__(self, disk: _Disk) -> None:
        super().__init__(disk)
        self._world_disk = disk

    def reached(self, place: Failpoint) -> None:
        super().reached(place)
        self._world_disk.on_place(place)


class _Disk(SimulatedDisk):
    """A disk that stops at the death of its process."""

    def __init__(
        self,
        left: SimulatedDisk,
        seed: int,
        share_uncached: float,
        on_operation: Callable[[str, str], None],
        on_place: Callable[[Failpoint], None],
    ) -> None:
        super().__init__(
            left.start, seed, share_uncached=share_uncached, slow=True, fault=on_operation
        )
        # What its last user had in the page cache, and did not sync, is there, and may be lost yet.
        self.images, self.events = left.images, left.events
        self.host = _Host(self)
        self.on_place = on_place


class _SeededHost(LocalHost):
    """This machine, but for its chance."""

    def new_uuid(self) -> uuid.UUID:
        return uuid.UUID(int=4711, version=4)

    def time(self) -> float:
        return 1_700_000_000.0


@functools.cache
def new_pool(capacity: int, block_size: int) -> dict[str, bytes]:
    """The files of a pool that was just made, always the same."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory) / "pool"
        Pool.create(
            place,
            block_size=block_size,
            capacity=capacity,
            journal_size=1 << 20,
            host=_SeededHost(),
        )
        return {name: bytes(image) for name, image in load_images(place).items()}


class PoolProcess(Process):
    """One life of a process, from the opening of its pool on.

    Attributes:
        pool, operations: None before they are there.
        died: set when it is dead.
        lossless: its death has taken nothing that was acknowledged.
        death: how it died.
        is_stopping: it comes to its proper end.
    """

    def __init__(self, name: str, world: World, left: SimulatedDisk) -> None:
        super().__init__(name)
        self._world = world
        self._random = random.Random(world.random.random())
        self._planned: Death | None = None
        self._n_events = 0
        self._asked: dict[asyncio.Task[Any], None] = {}
        self._streams: dict[asyncio.Task[Any], None] = {}
        self.pool: Pool | None = None
        self.operations: Operations | None = None
        self.died = asyncio.Event()
        self.death: Death | None = None
        self.lossless = True
        self.is_stopping = False
        self.disk = _Disk(
            left,
            self._random.randrange(1 << 30),
            world.plan.share_uncached,
            self._on_operation,
            self._on_place,
        )

    async def ask(self, work: Coroutine[Any, Any, T]) -> T:
        """Have `work` done by this process.

        Raises:
            NbdstoreError: it was refused.
            ProcessDied: nobody knows what became of it.
        """
        if not self.alive or self.is_stopping:
            work.close()
            raise ProcessDied
        task = self.start(work)
        self._asked[task] = None
        dead = asyncio.ensure_future(self.died.wait())
        await asyncio.wait([task, dead], return_when=asyncio.FIRST_COMPLETED)
        dead.cancel()
        self._asked.pop(task)
        if not self.alive:
            raise ProcessDied
        try:
            found: T = task.result()
        except NbdstoreError:
            if self.has_failed:
                raise ProcessDied from None
            raise
        return found

    def stream(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Have `work` done until its end, or until the process stops."""
        task = self.start(work)
        self._streams[task] = None
        task.add_done_callback(lambda _: self._streams.pop(task))
        return task

    async def stop(self) -> None:
        """End properly."""
        assert self.pool is not None
        await self._end_operations()
        await self.pool.close()

    async def _end_operations(self) -> None:
        """Cut off what takes long, and answer the rest, before the pool is closed."""
        self.is_stopping = True
        for stream in [*self._streams]:
            stream.cancel()
        if self.operations is not None:
            await self.operations.close()
        while calls := [*self._asked, *self._streams]:
            await asyncio.wait(calls)
            await asyncio.sleep(0)

    @property
    def has_failed(self) -> bool:
        """Whether the pool has stopped acknowledging."""
        return self.pool is not None and self.pool.status()["state"] == "failed"

    # --- Death -------------------------------------------------------------------------------

    def plan(self, death: Death) -> None:
        """Let it die some time."""
        self._planned = death
        self._operations_left = death.operation
        self._times_left = death.n_times

    def spare(self) -> None:
        """Let it live from now on."""
        self._planned = None

    def _on_operation(self, operation: str, name: str) -> None:
        if not self.alive:
            raise WriteFailed("the process is dead")
        planned = self._planned
        if planned is not None and self._operations_left is not None:
            self._operations_left -= 1
            if self._operations_left <= 0:
                self.die(planned)
                raise WriteFailed("the process is dead")

    def _on_place(self, place: Failpoint) -> None:
        planned = self._planned
        if self.alive and planned is not None and planned.place is place:
            self._times_left -= 1
            if self._times_left <= 0:
                self.die(planned)

    def die(self, death: Death) -> None:
        """Be dead from this moment on."""
        assert self.alive
        self.lossless = not death.power and not self.has_failed
        self.alive = False
        self.death = death
        self._n_events = len(self.disk.events)
        self._world.trace.note(self.name, "dies", death)
        self.died.set()

    async def remains(self) -> SimulatedDisk:
        """The disk as the next process finds it, after its ghosts have gone."""
        assert self.death is not None
        await self.bury()
        return self._left(Crash.random(self._random) if self.death.power else None)

    def end(self) -> SimulatedDisk:
        """The disk after its proper end, with all of it there, even if the power fails now."""
        self.alive = False
        if self.tasks:
            raise Wrong(f"{self.name} has ended, but not its tasks: {[*self.tasks]}")
        self._n_events = len(self.disk.events)
        return self._left(self._random.choice((None, LAZY, Crash.random(self._random))))

    def _left(self, crash: Crash | None) -> SimulatedDisk:
        """What `crash` leaves of what was done until its death; None = the machine lives."""
        digest = xxhash.xxh3_64()
        for event in self.disk.events[: self._n_events]:
            if isinstance(event, Write):
                digest.update(f"{event.file} {event.offset} ".encode())
                digest.update(event.data)
        self._world.trace.note(self.name, "left", self._n_events, digest.hexdigest())
        if crash is None:
            return killed_at(self.disk, self._n_events)
        return SimulatedDisk(crash_images(self.disk, self._n_events, crash, self._random))
