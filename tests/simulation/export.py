"""One export and the machine that uses it: connections that come and go, requests that stay.

Owns what a client's kernel does: requests spread over several connections, sent again over another
one when theirs is lost, connections made anew with patience.  What is asked is jobs.py's.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Final

from nbdstore.protocol.agreement import ReplyMode
from nbdstore.protocol.client import Reply
from tests.simulation.connection import Connection, Lost, Refused
from tests.simulation.oracle import CELL, Effect, History, Stamps
from tests.simulation.requests import Request
from tests.store.workload import Spread

if TYPE_CHECKING:
    from tests.simulation.world import World

BACKOFFS_S: Final = (0.0, 0.01, 0.1, 1.0)


class Removed(Exception):
    """The export does not exist any more."""


class Export:
    """One volume, as far as its users know.

    Attributes:
        id: of the volume.
        block_cells: cells in a block of the store.
        resizing_to: the size that it is to have.
        smallest: the least of its sizes, the one to come included.
        names: those that it may have now; several while it is being renamed.
        n_cells: its size.
        errors: which error replies there is a reason for.
        leaving: its deletion has begun.
        trashing: it is being put into the trash.
        rolling_to: what it is to hold, once it is rolled back to a snapshot.
        claim: what follows its name where it is asked for: the lease that its users have.
        leasing: its lease is changing hands.
    """

    def __init__(
        self, world: World, volume_id: int, name: str, content: Stamps, spread: Spread
    ) -> None:
        self._world = world
        self.id = volume_id
        self.names = [name]
        self.n_cells = len(content)
        self.block_cells = world.plan.block_size // CELL
        self.resizing_to: int | None = None
        self.smallest = len(content)
        self.spread = spread
        self.history = History(content)
        self.leaving = self.trashing = False
        self.rolling_to: Stamps | None = None
        self.claim = ""
        self.leasing = False
        self._shrunk = False
        self.machine = Machine(world, self)

    @property
    def errors(self) -> set[int]:
        return self._world.allowed_errors(self)

    def count_error(self) -> None:
        self._world.n_errors += 1

    @property
    def is_settled(self) -> bool:
        """Whether nothing is being done to it whose outcome nobody knows."""
        return not (self.leaving or self.trashing) and self.resizing_to is None

    @property
    def was_shrunk(self) -> bool:
        """Whether requests may be under way to where it was once.

        They would have an effect if it grew again, which the model does not know of.
        """
        return self.smallest < self.n_cells or self._shrunk

    def begin_resize(self, n_cells: int) -> None:
        """It is to have another size."""
        self.resizing_to = n_cells
        if n_cells < self.n_cells:
            self._shrunk = True
            self.smallest = min(self.smallest, n_cells)
            now = self._world.trace.note("shrinking", self.id, "to", n_cells)
            effect = Effect(0, n_cells, self.n_cells, now, whole=False)
            self.history.begin(effect)

    def resized(self) -> None:
        """It has the size that it was to have."""
        assert self.resizing_to is not None
        self.n_cells, self.resizing_to = self.resizing_to, None
        self.history.grow(self.n_cells)
        self.history.cut(self.n_cells)

    def begin_anew(self, found: Stamps) -> None:
        """After a crash, or a rollback, it is known again what the volume holds."""
        self.history = History(found)
        self.n_cells = len(found)
        self.smallest = min(self.smallest, self.n_cells)
        self.resizing_to = self.rolling_to = None


class Machine:
    """The user of an export: a host with some connections to it.

    Attributes:
        connections: those that work.
        stopped: it wants nothing any more.
    """

    def __init__(self, world: World, export: Export) -> None:
        self._world = world
        self._export = export
        self._random = random.Random(world.random.random())
        self._changed = asyncio.Event()
        self._n_wanted = self._random.choice((1, 1, 2, 3, 4))
        self._mode = self._random.choice([*ReplyMode])
        self.connections: list[Connection] = []
        self.stopped = False

    def start(self) -> None:
        """Begin to connect."""
        for number in range(self._n_wanted):
            self._world.start(self._keep_connected(f"export{self._export.id}-{number}"))

    @property
    def asks_for_status(self) -> bool:
        return self._mode is not ReplyMode.SIMPLE

    @property
    def n_cells(self) -> int:
        """How many cells all connections know of."""
        sizes = [connection.export.size for connection in self.connections]
        spread = self._export.spread
        known = [spread.offset(size) // CELL for size in sizes]
        return min([self._export.n_cells, *known])

    async def submit(self, request: Request) -> Reply | None:
        """Have a request served, whatever happens to connections; None if it makes no sense now.

        Raises:
            Removed: the export does not exist any more.
        """
        while True:
            connection = await self._choose()
            if request.stop > self._export.n_cells:
                # It was shrunk, or a crash has taken back that it grew.
                request.give_up(self._world.trace.now)
                return None
            try:
                return await connection.perform(request)
            except Lost:
                self._world.n_resent += 1

    async def _choose(self) -> Connection:
        while not (usable := [c for c in self.connections if not c.lost]):
            if self.stopped:
                raise Removed
            self._changed.clear()
            await self._changed.wait()
        return self._random.choice(usable)

    async def _keep_connected(self, name: str) -> None:
        patience = 0
        while not self.stopped:
            connection = await self._connect(name)
            if connection is None:
                if self._export.leaving and patience > 20:
                    self.stop()
                patience += 1
                await asyncio.sleep(self._random.choice(BACKOFFS_S[: 1 + min(patience, 3)]))
                continue
            if self.stopped:
                connection.drop("not wanted any more")
                return
            patience = 0
            self.connections.append(connection)
            self._changed.set()
            await connection.ended
            self.connections.remove(connection)

    async def _connect(self, name: str) -> Connection | None:
        try:
            sock = await self._world.network.connect(name)
            connection = Connection(self._world, sock, self._mode)
            name = self._random.choice(self._export.names)
            await connection.shake_hands(name + self._export.claim)
        except (OSError, Refused):
            return None
        self._world.n_attached += 1
        return connection

    async def leave(self) -> None:
        """Let everything be answered, then part properly."""
        self.stopped = True
        await asyncio.gather(*(connection.leave() for connection in self.connections))

    def fenced(self, now: int) -> list[Connection]:
        """The server does nothing any more that comes over the connections that there are."""
        for connection in self.connections:
            connection.fenced = now
        return [*self.connections]

    def stop(self) -> None:
        """The export is gone."""
        self.stopped = True
        for connection in list(self.connections):
            connection.drop("the export is gone")
        self._changed.set()
