"""The process under test: the real server and the real store, on a disk that can be cut off.

Owns its birth, its proper end and its death.  Death comes at a moment of the disk: before its n-th
operation, or at a failpoint of the store.  From that moment on nothing that the code does has an
effect: the disk's log is cut there, and what is sent goes nowhere.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import xxhash

from nbdstore.errors import NbdstoreError, WriteFailed
from nbdstore.server import Server, ServerOptions
from nbdstore.store import Pool
from nbdstore.store.host import Failpoint
from tests.simulation.oracle import Stamps, Wrong, stamps_of
from tests.simulation.world_loop import Process
from tests.store.crashes import LAZY, Crash, crash_images, killed_at
from tests.store.power_loss import Trouble
from tests.store.simulated_disk import (
    PLACE,
    SimulatedDisk,
    SimulatedHost,
    Write,
    adversarial,
)

if TYPE_CHECKING:
    from tests.simulation.world import World

T = TypeVar("T")

DRAIN_S: Final = 10.0
BALLAST: Final = "ballast"
"""Name of the volume that only takes up space."""


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


class ServerProcess(Process):
    """One life of the server.

    Attributes:
        pool, server: None before they are there.
        died: set when it is dead.
        lossless: its death has taken nothing that was acknowledged.
        death: how it died.
        found: what was in its volumes when it came up, by id: name, size, content.
        found_snapshots: what was in their snapshots, by id and the snapshot's name.
    """

    def __init__(self, world: World, left: SimulatedDisk, number: int) -> None:
        super().__init__(f"server {number}")
        self._world = world
        self._random = random.Random(world.random.random())
        self._planned: Death | None = None
        self._trouble: Trouble | None = None
        self._n_events = 0
        self.pool: Pool | None = None
        self.server: Server | None = None
        self.died = asyncio.Event()
        self.death: Death | None = None
        self.lossless = True
        self.found: dict[int, tuple[str, int, Stamps]] = {}
        self.found_snapshots: dict[tuple[int, str], Stamps] = {}
        self.disk = _Disk(
            left,
            self._random.randrange(1 << 30),
            world.plan.share_uncached,
            self._on_operation,
            self._on_place,
        )

    # --- Life --------------------------------------------------------------------------------

    async def open(self, *, in_trouble: bool) -> None:
        """Open the pool, recovering what there is, and read everything.

        Raises:
            StoreError: the disk made trouble.
        """
        if in_trouble:
            self._begin_trouble().opening = True
        options = adversarial(self._world.plan.options)
        self.pool = pool = await Pool.open(PLACE, options, host=self.disk.host)
        if self._world.plan.ballast and BALLAST not in pool.volumes:
            ballast = await pool.create_volume(BALLAST, self._world.plan.ballast)
            await ballast.write_zeroes(0, ballast.size, no_hole=True)
        for volume in list(pool.volumes.values()):
            if volume.name == BALLAST:
                continue
            spread = self._world.plan.spread
            raw = await spread.read(volume)
            self.found[volume.id] = volume.name, spread.offset(volume.size), stamps_of(raw)
            for snapshot in volume.snapshots.values():
                key = volume.id, snapshot.info.name
                self.found_snapshots[key] = stamps_of(await spread.read(snapshot))

    async def serve(self) -> None:
        """Begin to serve; from here on the disk makes trouble."""
        assert self.pool is not None
        listener: Any = self._world.network.listen()
        options = ServerOptions(sockets=[listener], limits=self._world.plan.limits)
        self.server = Server(self.pool, options)
        await self.server.start()
        self._begin_trouble()

    def _begin_trouble(self) -> Trouble:
        self._trouble = Trouble(self._world.plan.trouble, random.Random(self._random.random()))
        return self._trouble

    async def stop(self) -> None:
        """End properly."""
        assert self.pool is not None and self.server is not None
        await self.server.drain(DRAIN_S)
        await self.pool.close()

    async def ask(self, work: Coroutine[Any, Any, T]) -> T:
        """Have the administrator's `work` done by this process.

        Raises:
            NbdstoreError: it was refused.
            ProcessDied: nobody knows what became of it.
        """
        task = self.start(work)
        dead = asyncio.ensure_future(self.died.wait())
        await asyncio.wait([task, dead], return_when=asyncio.FIRST_COMPLETED)
        dead.cancel()
        if not self.alive:
            raise ProcessDied
        try:
            found: T = task.result()
        except NbdstoreError:
            if self.has_failed:
                raise ProcessDied from None
            raise
        return found

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
        """Let it live, and its disk work, from now on."""
        self._planned = self._trouble = None

    def _on_operation(self, operation: str, name: str) -> None:
        if not self.alive:
            raise WriteFailed("the process is dead")
        planned = self._planned
        if planned is not None and self._operations_left is not None:
            self._operations_left -= 1
            if self._operations_left <= 0:
                self.die(planned)
                raise WriteFailed("the process is dead")
        if self._trouble is not None:
            self._trouble(operation, name)

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


class ProcessDied(Exception):
    """The server died meanwhile."""
