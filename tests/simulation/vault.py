"""The other pool of a world, which backups are taken to and come from.

Owns its processes, which die as the server does, and what is known of its volumes.  It has no
clients: nobody but the carrier asks anything of it.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Final

from nbdstore.control.operations import Operations
from nbdstore.store import Pool, PoolOptions
from tests.simulation.oracle import Wrong
from tests.simulation.pool_process import Death, PoolProcess, ProcessDied, new_pool
from tests.simulation.received import Found, Received, look
from tests.store.simulated_disk import PLACE, Images, SimulatedDisk, adversarial

if TYPE_CHECKING:
    from tests.simulation.world import World

_CAPACITY: Final = 64 << 20
_OPTIONS: Final = PoolOptions(on_full="error")


class Vault:
    """See the module.

    Attributes:
        received: its volumes, by name.
        n_deaths: of its processes.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = random.Random(world.random.random())
        block_size = self._random.choice((4096, world.plan.block_size))
        self._disk = SimulatedDisk(new_pool(_CAPACITY, block_size))
        self._process: PoolProcess | None = None
        self._n_processes = 0
        self.received: dict[str, Received] = {}
        self.n_deaths = 0

    async def up(self) -> PoolProcess:
        """Return its process; one that has died is brought up again, and what it has compared."""
        while self._process is None or not self._process.alive:
            if self._process is not None:
                self.n_deaths += 1
                self._disk = await self._process.remains()
            await self._boot()
        return self._process

    async def _boot(self) -> None:
        self._n_processes += 1
        process = PoolProcess(f"vault {self._n_processes}", self._world, self._disk)
        self._process = process
        if self._random.random() < 0.2:
            self.let_die(process, 60)
        opening = process.start(self._open(process))
        await asyncio.wait([opening])
        if process.alive:
            opening.result()
            await self._compare(process)

    async def _open(self, process: PoolProcess) -> None:
        process.pool = await Pool.open(PLACE, adversarial(_OPTIONS), host=process.disk.host)
        process.operations = Operations(process.pool)
        await process.operations.begin()

    async def _compare(self, process: PoolProcess) -> None:
        try:
            found = await process.ask(self._read(process))
        except ProcessDied:
            return
        if nowhere := found.keys() - self.received.keys():
            raise Wrong(f"volumes {nowhere} of the vault come from nowhere")
        for name, received in self.received.items():
            received.compare(found.get(name))

    async def _read(self, process: PoolProcess) -> dict[str, Found]:
        assert process.pool is not None
        volumes = [*process.pool.volumes.items()]
        return {name: await look(volume, self._world.plan.spread) for name, volume in volumes}

    def let_die(self, process: PoolProcess, most: int) -> None:
        """Have it die within so many operations of its disk."""
        power = self._random.random() < 0.7
        process.plan(Death(power, operation=self._random.randint(1, most)))

    async def end(self) -> list[Images]:
        """End it properly, with all that was ever received; return what is on its disk."""
        process = await self.up()
        process.spare()
        await self._compare(process)
        await asyncio.wait([stopping := process.start(process.stop())])
        await asyncio.sleep(0)
        stopping.result()
        return [process.disk.images, process.end().images]
