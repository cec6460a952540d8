"""The process under test: the real server and the real store; see pool_process.py."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING, Any, Final

from nbdstore.control.operations import Operations
from nbdstore.errors import NotFound
from nbdstore.server import Server, ServerOptions
from nbdstore.store import Pool, Volume
from tests.simulation.kept import Kept
from tests.simulation.oracle import Stamps, stamps_of
from tests.simulation.pool_process import PoolProcess
from tests.simulation.received import Found, look
from tests.store.power_loss import Trouble
from tests.store.simulated_disk import PLACE, SimulatedDisk, adversarial

if TYPE_CHECKING:
    from tests.simulation.world import World

DRAIN_S: Final = 10.0
BALLAST: Final = "ballast"
"""Name of the volume that only takes up space."""


class ServerProcess(PoolProcess):
    """One life of the server.

    Attributes:
        server: None before it is there.
        found: what was in its volumes when it came up, by id: name, size, content.
        found_snapshots: what was in their snapshots, by id and the snapshot's name.
        found_trash: what volumes in the trash held, by id.
        found_kept: what was kept with volumes, those in the trash too, by id.
        found_received: what was there of volumes that backups are received into, by name.
    """

    def __init__(self, world: World, left: SimulatedDisk, number: int) -> None:
        super().__init__(f"server {number}", world, left)
        self._trouble: Trouble | None = None
        self.server: Server | None = None
        self.found: dict[int, tuple[str, int, Stamps]] = {}
        self.found_snapshots: dict[tuple[int, str], Stamps] = {}
        self.found_trash: dict[int, Stamps] = {}
        self.found_kept: dict[int, Kept] = {}
        self.found_received: dict[str, Found] = {}

    # --- Life --------------------------------------------------------------------------------

    async def open(self, *, in_trouble: bool) -> None:
        """Open the pool, recovering what there is, and read everything.

        Raises:
            StoreError: the disk made trouble.
        """
        if in_trouble:
            self._begin_trouble().opening = True
        plan = self._world.plan
        options = adversarial(plan.options)
        self.pool = pool = await Pool.open(PLACE, options, host=self.disk.host)
        self._world.trash.watch(pool)
        if plan.ballast and BALLAST not in pool.volumes:
            ballast = await pool.create_volume(BALLAST, plan.ballast)
            await ballast.write_zeroes(0, ballast.size, no_hole=True)
        for volume in [*pool.volumes.values(), *pool.trash]:
            self.found_kept[volume.id] = Kept.of(volume)
        for volume in list(pool.volumes.values()):
            if volume.name == BALLAST:
                continue
            if volume.name in self._world.received:
                self.found_received[volume.name] = await look(volume, plan.spread)
                continue
            raw = await plan.spread.read(volume)
            self.found[volume.id] = volume.name, plan.spread.offset(volume.size), stamps_of(raw)
            await self._read_snapshots(volume)
        for volume in pool.trash:
            with contextlib.suppress(NotFound):  # it is being deleted, which was noted
                raw = await plan.spread.read(volume)
                self.found_trash[volume.id] = stamps_of(raw)
                await self._read_snapshots(volume)

    async def _read_snapshots(self, volume: Volume) -> None:
        for snapshot in [*volume.snapshots.values()]:
            stamps = stamps_of(await self._world.plan.spread.read(snapshot))
            self.found_snapshots[volume.id, snapshot.info.name] = stamps

    async def serve(self) -> None:
        """Begin to serve; from here on the disk makes trouble."""
        assert self.pool is not None
        listener: Any = self._world.network.listen()
        options = ServerOptions(sockets=[listener], limits=self._world.plan.limits)
        self.server = Server(self.pool, options)
        self.operations = Operations(self.pool, self.server)
        await self.operations.begin()
        await self.server.start()
        self._begin_trouble()

    def _begin_trouble(self) -> Trouble:
        self._trouble = Trouble(self._world.plan.trouble, random.Random(self._random.random()))
        return self._trouble

    async def stop(self) -> None:
        """End properly."""
        assert self.pool is not None and self.server is not None
        await self._end_operations()
        await self.server.drain(DRAIN_S)
        await self.pool.close()

    def spare(self) -> None:
        """Let it live, and its disk work, from now on."""
        super().spare()
        self._trouble = None

    def _on_operation(self, operation: str, name: str) -> None:
        super()._on_operation(operation, name)
        if self._trouble is not None:
            self._trouble(operation, name)
