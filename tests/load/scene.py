"""Many clients on many exports of one served pool, good and bad ones, for some time.

Owns who is connected, when they leave and come again, and what is demanded of the server at the
end: that all content was right, that no request of a good client was slow however the others
behaved, that memory stayed in its bounds and is given back, that no descriptor is left open, and
that the pool is in perfect order.

Flat is what does not grow with time: after a first part everybody leaves, and after the rest again.
What the server has in these two moments, with nobody connected, is compared.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from nbdstore.control.client import ControlClient
from nbdstore.protocol.agreement import ReplyMode
from tests.clients.served_pool import ServedPool
from tests.load.figures import Figures
from tests.load.hostile import misbehave
from tests.load.model import VolumeModel
from tests.load.vitals import Vitals, look_at
from tests.load.worker import Worker, read_volume
from tests.server.nbd_client import NbdClient

MIB: Final = 1 << 20
EXPORT_BYTES: Final = 2 * MIB
HOSTILE_BYTES: Final = 64 * MIB
HOSTILE_SHARE: Final = 0.1
CLIENT_MEMORY: Final = 512 * MIB
"""Each connection's share of it is as large as the largest request of a good client."""
STALL_TIMEOUT_S: Final = 4
SAMPLE_EVERY_S: Final = 0.5
PROGRESS_EVERY_S: Final = 5.0
WARM_UP_SHARE: Final = 0.4
"""Of the time; then memory has grown to what this load needs."""
MAX_WARM_UP_S: Final = 60.0
LEAVE_TIMEOUT_S: Final = 30.0

SLOWEST_S: Final = 10.0
"""More is starvation. What is usual is a tenth of it, most of it the Python clients' own."""
MAX_GROWTH: Final = 48 * MIB
MAX_IDLE: Final = 160 * MIB
"""What the C library keeps of freed memory grows for some minutes, to some 70 MiB: hostile clients
leave it in pieces. A leak has no bound."""
MAX_MEMORY: Final = CLIENT_MEMORY + 256 * MIB
"""At any time: the budget, half a MiB for each connection, and what an idle server has."""
REQUESTS_PER_VISIT: Final = (20, 600)
NOTHING: Final = Vitals(0, 0)
DEPTHS: Final = (1, 1, 2, 4)
MODES: Final = tuple(ReplyMode)


@dataclass
class Scene:
    """One run.

    Arguments:
        pool: not made yet.
        n_connections: at a time, of which HOSTILE_SHARE are hostile.
        n_exports: beside the hostile clients' own.
    """

    pool: ServedPool
    n_connections: int
    n_exports: int
    figures: Figures = field(default_factory=Figures)
    misdeeds: Counter[str] = field(default_factory=Counter)
    visits: int = 0
    most: Vitals = NOTHING
    idle: list[Vitals] = field(default_factory=list)
    """With nobody connected: before all, after the warm-up, at the end."""
    models: dict[str, VolumeModel] = field(default_factory=dict)

    def prepare(self) -> None:
        """Make the pool and its volumes, and serve them."""
        self.pool.create("--capacity", "1G", "--journal-size", "32M")
        self.pool.start(
            *("--client-memory", str(CLIENT_MEMORY), "--stall-timeout", str(STALL_TIMEOUT_S)),
            # Connections that have left count until what they were sent has been read.
            *("--full-timeout", "0", "--max-connections", str(self.n_connections * 5 // 4)),
        )
        control = self._control
        control.create_volume("hostile", HOSTILE_BYTES)
        for number in range(1, self.n_exports + 1):
            control.create_volume(f"volume-{number}", EXPORT_BYTES)
            self.models[f"volume-{number}"] = VolumeModel(number, EXPORT_BYTES, 4096)

    @property
    def _control(self) -> ControlClient:
        return ControlClient(f"unix:{self.pool.directory}/control.sock")

    def address(self, source: random.Random) -> str:
        """Choose the way to the server."""
        return source.choice([f"127.0.0.1:{self.pool.port}", f"unix:{self.pool.socket_path}"])

    # --- The run ---

    async def run(self, seed: int, seconds: float, report: Callable[[str], None]) -> None:
        """Load the server for so long; raise what goes wrong."""
        source = random.Random(seed)
        warm_up_s = min(seconds * WARM_UP_SHARE, MAX_WARM_UP_S)
        await self._note_idle(report)
        for part_s in (warm_up_s, seconds - warm_up_s):
            await self._load(source, part_s, report)
            await self._note_idle(report)

    async def _note_idle(self, report: Callable[[str], None]) -> None:
        """Wait until nobody is connected, also in a handshake, and look at the server."""
        deadline = time.monotonic() + LEAVE_TIMEOUT_S
        while True:
            now = self._look()
            if not self.idle or now.n_descriptors <= self.idle[0].n_descriptors:
                break
            assert time.monotonic() < deadline, f"descriptors are left open: {told(now)}"
            await asyncio.sleep(SAMPLE_EVERY_S)
        self.idle.append(now)
        report(f"nobody connected: {told(now)}")

    def _look(self) -> Vitals:
        assert self.pool.process
        return look_at(self.pool.process.pid)

    async def _load(
        self, source: random.Random, seconds: float, report: Callable[[str], None]
    ) -> None:
        end = time.monotonic() + seconds
        n_hostile = round(self.n_connections * HOSTILE_SHARE)

        def go_on() -> bool:
            return time.monotonic() < end

        async with asyncio.TaskGroup() as group:
            for number in range(self.n_connections):
                own = random.Random(source.random())
                if number < n_hostile:
                    group.create_task(misbehave(self, own, go_on))
                else:
                    group.create_task(self._visit_again_and_again(own, go_on))
            group.create_task(self._watch(go_on, report))

    async def _visit_again_and_again(
        self, source: random.Random, go_on: Callable[[], bool]
    ) -> None:
        """Be one client that attaches an export, works, leaves, and attaches another."""
        while go_on():
            name = source.choice(list(self.models))
            client = await NbdClient.connect(self.address(source))
            mode = source.choice(MODES)
            await client.go(name, mode, () if mode is ReplyMode.SIMPLE else ("base:allocation",))
            depth, left = source.choice(DEPTHS), source.randint(*REQUESTS_PER_VISIT)
            worker = Worker(client, self.models[name], source, self.figures, depth)

            def still() -> bool:
                nonlocal left
                left -= 1
                return left > 0 and go_on()

            await worker.run(still)
            await worker.leave()
            self.visits += 1

    async def _watch(self, go_on: Callable[[], bool], report: Callable[[str], None]) -> None:
        """Look at the server's process, and tell how it goes."""
        shown_s, shown_requests = time.monotonic(), self.figures.n_requests
        while go_on():
            now = self._look()
            self.most = Vitals(
                max(now.memory, self.most.memory), max(now.n_descriptors, self.most.n_descriptors)
            )
            if (since_s := time.monotonic() - shown_s) >= PROGRESS_EVERY_S:
                rate = (self.figures.n_requests - shown_requests) / since_s
                report(f"{rate:6.0f} requests/s, {told(now)}; slowest {self._slowest()}")
                shown_s, shown_requests = time.monotonic(), self.figures.n_requests
            await asyncio.sleep(SAMPLE_EVERY_S)

    def _slowest(self) -> str:
        return f"{self.figures.slowest_s * 1000:.0f} ms ({self.figures.slowest})"

    # --- Demands ---

    def check_vitals(self) -> None:
        """Raise AssertionError if something was slow, too large, or has grown."""
        assert self.figures.slowest_s < SLOWEST_S, f"starved: {self._slowest()}"
        assert self.most.memory < MAX_MEMORY, f"at most: {told(self.most)}"
        _, warm, end = self.idle
        grown = f"memory has grown: warm {told(warm)}, at the end {told(end)}"
        assert end.memory - warm.memory < MAX_GROWTH, grown
        assert end.memory < MAX_IDLE, grown

    def check_pool(self) -> None:
        """Stop, check, start again, and compare every volume with its model."""
        self.pool.stop()
        self.pool.check()
        self.pool.restart()
        asyncio.run(self._verify())
        self.pool.close()

    async def _verify(self) -> None:
        for name, model in self.models.items():
            assert not model.in_flight, "everything was answered"
            client = await NbdClient.connect(f"unix:{self.pool.socket_path}")
            await client.go(name)
            model.recovered(await read_volume(client, model))
            client.close()
            await client.writer.wait_closed()

    def figures_by_name(self) -> dict[str, int]:
        """The figures that say how much was done, as a person reads them."""
        return {
            "connections at a time": self.n_connections,
            "exports": self.n_exports,
            "visits": self.visits,
            "misdeeds": self.misdeeds.total(),
            "requests answered": self.figures.n_requests,
            "bytes verified under load": self.figures.bytes_verified,
            "ms for the slowest": round(self.figures.slowest_s * 1000),
            "MiB at most": self.most.memory >> 20,
        }

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        before, warm, end = self.idle
        return {
            "connections": self.n_connections,
            "exports": self.n_exports,
            "visits": self.visits,
            "misdeeds": dict(sorted(self.misdeeds.items())),
            "memory_before": before.memory,
            "memory_warm": warm.memory,
            "memory_end": end.memory,
            "memory_most": self.most.memory,
            "descriptors_most": self.most.n_descriptors,
            "descriptors_end": end.n_descriptors,
            **self.figures.to_json(),
        }


def told(vitals: Vitals) -> str:
    """Vitals in a few words."""
    return f"{vitals.memory >> 20} MiB, {vitals.n_descriptors} descriptors"
