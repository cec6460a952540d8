"""Serve, load, kill, recover, verify: the same pool again and again.

Each round loads all volumes over several connections and ends the server in one of the ways of
`Ending`; then the pool is checked as the server left it, sometimes the recovery is killed too, and
what recovery made of it is compared with what the clients know. The page cache outlives a killed
process, so everything that was acknowledged must be there, flushed or not.

The seed decides what is done, and after how many replies the server is killed. What the server is
doing at that moment is up to the machine, so a seed is a start, not a recording.
"""

from __future__ import annotations

import asyncio
import enum
import random
import signal
from dataclasses import dataclass, field
from typing import Final

from nbdstore.control.client import ControlClient
from nbdstore.protocol.agreement import ReplyMode
from tests.clients.served_pool import ServedPool
from tests.kills.administrator import Administrator
from tests.load.figures import Figures
from tests.load.model import VolumeModel
from tests.load.worker import Worker, read_volume
from tests.server.nbd_client import NbdClient, is_refused

MAX_REQUESTS: Final = 1500  # of a round, before the server is ended
MAX_LOAD_S: Final = 3.0
DRAIN_S: Final = 0.15  # a drain under load takes some tens of milliseconds
RECOVERY_KILLS: Final = (0, 0, 0, 1, 1, 3)
READY_S: Final = 0.5  # a start takes about that
MODES: Final = tuple(ReplyMode)
ROOMY: Final = 4 << 30  # bytes: more than a round can write


class Ending(enum.Enum):
    """How the server ends."""

    KILLED = "killed under load"
    KILLED_IN_DRAIN = "killed while it drained"
    STOPPED = "stopped by SIGTERM"


ENDINGS: Final = {Ending.KILLED: 8, Ending.KILLED_IN_DRAIN: 2, Ending.STOPPED: 1}


@dataclass(frozen=True)
class Geometry:
    """A pool: so small that slots are used again and the journal goes round within a round.

    Some are too small for their volumes: they fill up, and writes are held when the kill comes.
    Others have so much room that whatever is in the trash stays there.
    """

    block_size: int
    capacity: int
    journal_size: int
    volume_sizes: tuple[int, ...]

    @classmethod
    def chosen(cls, source: random.Random) -> Geometry:
        block_size = source.choice([4, 4, 4, 16, 64]) << 10
        sizes = [source.choice([1, 2, 4]) << 20 for _ in range(source.randint(1, 4))]
        return cls(
            block_size=block_size,
            capacity=source.choice([max(16 << 20, sum(sizes) * source.choice([5, 8]) // 4), ROOMY]),
            journal_size=source.choice([1, 2, 8]) << 20,
            volume_sizes=tuple(sizes) if source.random() < 0.8 else (16 << 20, 16 << 20),
        )


@dataclass
class Tally:
    """What a loop has come to."""

    figures: Figures = field(default_factory=Figures)
    endings: dict[str, int] = field(default_factory=dict)
    kills_in_recovery: int = 0
    administered: int = 0
    lost_in_flight: int = 0
    """Changes that were on their way when a server ended."""
    refused: int = 0
    """Attempts of whoever was fenced before a server ended."""

    @property
    def n_kills(self) -> int:
        stopped = self.endings.get(Ending.STOPPED.value, 0)
        return sum(self.endings.values()) - stopped + self.kills_in_recovery

    def figures_by_name(self) -> dict[str, int]:
        """The figures as a person reads them."""
        return {
            "kills": self.n_kills,
            "kills of a recovery": self.kills_in_recovery,
            **{f"servers {ending}": n for ending, n in sorted(self.endings.items())},
            "changes in flight at an end": self.lost_in_flight,
            "changes of volumes acknowledged": self.administered,
            "fenced clients refused afterwards": self.refused,
            "requests acknowledged": self.figures.n_requests,
            "bytes verified under load": self.figures.bytes_verified,
        }


class KillLoop:
    """One pool, its volumes and their models.

    Arguments:
        pool: not made yet.
        geometry: how to make it.
        source: decides everything.
        tally: what is counted.
    """

    def __init__(
        self, pool: ServedPool, geometry: Geometry, source: random.Random, tally: Tally
    ) -> None:
        self.pool = pool
        self.source = source
        self.tally = tally
        self.models: dict[str, VolumeModel] = {}
        pool.create(
            *("--block-size", str(geometry.block_size), "--capacity", str(geometry.capacity)),
            *("--journal-size", str(geometry.journal_size)),
        )
        self.administrator = Administrator(
            ControlClient(f"unix:{pool.directory}/control.sock"),
            random.Random(source.random()),
            keeps_trash=geometry.capacity >= ROOMY,
        )
        for number, size in enumerate(geometry.volume_sizes, start=1):
            name = f"volume-{number}"
            pool.create_volume(name, str(size))
            self.models[name] = VolumeModel(number, size, geometry.block_size)

    def round(self) -> None:
        """Serve and load until the server is ended in some way; check and verify what is left."""
        (ending,) = self.source.choices(list(ENDINGS), list(ENDINGS.values()))
        self.pool.start("--full-timeout", "0")
        asyncio.run(self._load(ending))
        self._collect(ending)
        self.tally.endings[ending.value] = self.tally.endings.get(ending.value, 0) + 1
        self.pool.check()
        for _ in range(self.source.choice(RECOVERY_KILLS)):
            self.pool.kill_while_starting(self.source.uniform(0, READY_S))
            self.tally.kills_in_recovery += 1
        self.pool.start("--full-timeout", "0")
        asyncio.run(self._verify())
        if self.source.random() < 0.5:
            self.pool.stop()
        else:
            self.pool.kill()

    def _collect(self, ending: Ending) -> None:
        """Wait for the end of the server's process."""
        assert self.pool.process
        status = self.pool.process.wait(60)
        expected = {-signal.SIGKILL} if ending is Ending.KILLED else {0, -signal.SIGKILL}
        if ending is Ending.STOPPED:
            expected = {0}
        assert status in expected, f"the server ended with status {status}"
        self.pool.process = None

    # --- Load ---

    async def _load(self, ending: Ending) -> None:
        """Load the server over several connections until it is gone."""
        names = list(self.models)
        chosen = names + self.source.choices(names, k=self.source.randint(1, 6))
        workers = [await self._worker(name) for name in chosen]
        target = self.tally.figures.n_requests + self.source.randint(1, MAX_REQUESTS)
        has_ended = False

        def end() -> None:
            nonlocal has_ended
            if not has_ended:
                has_ended = True
                self._end(ending)

        def go_on() -> bool:
            if self.tally.figures.n_requests >= target:
                end()
            return True

        # In a full pool all connections may end up with a write that is held.
        asyncio.get_running_loop().call_later(MAX_LOAD_S, end)
        results = await asyncio.gather(
            self.administrator.run(),
            *(worker.run(go_on) for worker in workers),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, ConnectionError):
                raise result
        for worker in workers:
            worker.client.writer.transport.abort()
        self.tally.administered += self.administrator.n_calls
        self.administrator.n_calls = 0
        n_in_flight = sum(len(model.in_flight) for model in self.models.values())
        self.tally.lost_in_flight += n_in_flight

    async def _worker(self, name: str) -> Worker:
        address = self.source.choice(
            [f"127.0.0.1:{self.pool.port}", f"unix:{self.pool.socket_path}"]
        )
        client = await NbdClient.connect(address)
        mode = self.source.choice(MODES)
        await client.go(name, mode, () if mode is ReplyMode.SIMPLE else ("base:allocation",))
        source = random.Random(self.source.random())
        depth = self.source.choice([1, 4, 16])
        return Worker(client, self.models[name], source, self.tally.figures, depth)

    def _end(self, ending: Ending) -> None:
        process = self.pool.process
        assert process
        if ending is Ending.KILLED:
            process.kill()
            return
        process.send_signal(signal.SIGTERM)
        if ending is Ending.KILLED_IN_DRAIN:
            after_s = self.source.uniform(0, DRAIN_S)
            asyncio.get_running_loop().call_later(after_s, process.kill)

    # --- Afterwards ---

    async def _verify(self) -> None:
        self.administrator.recovered()
        address = f"unix:{self.pool.socket_path}"
        for export in self.administrator.granted():
            assert not await is_refused(address, export), f"{export} was granted, and is refused"
        for export in self.administrator.fenced:
            assert await is_refused(address, export), f"{export} was fenced, and can be attached"
            self.tally.refused += 1
        for name, model in self.models.items():
            client = await NbdClient.connect(address)
            await client.go(name)
            model.recovered(await read_volume(client, model))
            client.close()
            await client.writer.wait_closed()
