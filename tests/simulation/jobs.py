"""What users of an export do: databases, copies, a bit of everything; all from one seed.

Owns the choice of requests; several jobs share a machine, and their requests overlap.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdstore.protocol.constants import Command, CommandFlag
from tests.simulation.export import Export, Removed
from tests.simulation.oracle import CELL
from tests.simulation.requests import Request
from tests.store.workload import WINDOW

if TYPE_CHECKING:
    from tests.simulation.world import World

_WINDOW_CELLS: Final = WINDOW // CELL

_NO_HOLE, _FAST, _FUA = CommandFlag.NO_HOLE, CommandFlag.FAST_ZERO, CommandFlag.FUA


@dataclass(frozen=True)
class Style:
    """How a job works.

    Attributes:
        weights: how often each command comes, in the order of _COMMANDS.
        longest: cells of the longest requests.
        depth: requests in flight.
        fua: share of the changes with FUA.
        pauses_s: between two requests.
        hot: cells where half of the requests begin.
    """

    weights: tuple[int, ...]
    longest: int
    depth: int
    fua: float = 0.1
    pauses_s: tuple[float, ...] = (0.0, 0.001, 0.01)
    hot: int = 64


_COMMANDS: Final = (
    Command.READ,
    Command.WRITE,
    Command.FLUSH,
    Command.WRITE_ZEROES,
    Command.TRIM,
    Command.CACHE,
    Command.BLOCK_STATUS,
)

STYLES: Final = (
    Style((4, 6, 1, 1, 1, 1, 1), longest=64, depth=4),  # a bit of everything
    Style((1, 6, 6, 0, 0, 0, 0), longest=16, depth=2, fua=0.3),  # a database
    Style((1, 6, 0, 0, 1, 0, 0), longest=256, depth=16, fua=0.0, pauses_s=(0.0,)),  # a copy
    Style((6, 2, 0, 1, 0, 1, 2), longest=512, depth=8, fua=0.0),  # a reader
    Style((2, 8, 1, 1, 1, 0, 0), longest=8, depth=32, pauses_s=(0.0,), hot=16),  # a crowd
    Style((1, 2, 1, 4, 4, 0, 2), longest=1024, depth=3),  # a cleaner
    Style((1, 3, 1, 0, 0, 0, 0), longest=10_000, depth=2, fua=0.0),  # one with large pages
)


class Job:
    """One job of a machine.

    Arguments:
        n_requests: after these it is done.
    """

    def __init__(self, world: World, export: Export, n_requests: int) -> None:
        self._world = world
        self._export = export
        self._random = random.Random(world.random.random())
        self._style = self._random.choice(STYLES)
        self._left = n_requests

    async def run(self) -> None:
        """Do it all; return early if the export is removed."""
        workers = [self._world.start(self._work()) for _ in range(self._style.depth)]
        await asyncio.gather(*workers)

    async def _work(self) -> None:
        machine = self._export.machine
        while self._left > 0 and not machine.stopped:
            self._left -= 1
            pause = self._random.choice(self._style.pauses_s)
            if pause:
                await asyncio.sleep(self._random.uniform(0, 2 * pause))
            try:
                await machine.submit(self._request())
            except Removed:
                return

    def _request(self) -> Request:
        command = self._random.choices(_COMMANDS, self._style.weights)[0]
        if command == Command.BLOCK_STATUS and not self._export.machine.asks_for_status:
            command = Command.READ
        if command == Command.FLUSH:
            return Request(self._export, command, 0, 0, 0, 0)
        first, stop = self._range()
        return Request(
            self._export, command, first, stop, self._flags(command), self._world.next_serial()
        )

    def _flags(self, command: Command) -> int:
        flags = 0
        if command in (Command.WRITE, Command.WRITE_ZEROES, Command.TRIM):
            flags |= _FUA if self._random.random() < self._style.fua else 0
        if command == Command.WRITE_ZEROES:
            flags |= self._random.choice((0, 0, _NO_HOLE, _FAST, _NO_HOLE | _FAST))
        return flags

    def _range(self) -> tuple[int, int]:
        rng, n_cells = self._random, self._export.machine.n_cells
        longest = min(n_cells, self._style.longest)
        length = rng.randint(1, longest if rng.random() < 0.3 else min(longest, 16))
        near = self._style.hot if rng.random() < 0.5 else n_cells
        first = rng.randrange(max(1, min(near, n_cells - length + 1)))
        if rng.random() < 0.5:  # whole blocks
            first -= first % self._export.block_cells
            length += -length % self._export.block_cells
        stop = min(first + length, n_cells, (first // _WINDOW_CELLS + 1) * _WINDOW_CELLS)
        return first, stop
