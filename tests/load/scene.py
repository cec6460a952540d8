"""Many clients on many exports of one served pool, good and bad ones, for some time.

Owns who is connected, when they leave and come again, and what is demanded of the server at the
end: that all content was right, that no request of a good client was slow however the others
behaved, that memory and descriptors stayed flat, and that the pool is in perfect order.
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
from tests.load.model import VolumeModel
from tests.load.vitals import Sample, growth, sample
from tests.load.worker import Worker, read_volume
from tests.server.nbd_client import NbdClient

MIB: Final = 1 << 20
EXPORT_BYTES: Final = 2 * MIB
HOSTILE_BYTES: Final = 64 * MIB
HOSTILE_SHARE: Final = 0.1
CLIENT_MEMORY: Final = 128 * MIB
STALL_TIMEOUT_S: Final = 4
SAMPLE_EVERY_S: Final = 0.5
PROGRESS_EVERY_S: Final = 5.0
WARM_UP_SHARE: Final = 0.25
"""Of the time; until then memory grows to what this load needs."""

SLOWEST_S: Final = 10.0
"""More is starvation. What is usual is a tenth of it, most of it the Python clients' own."""
MAX_GROWTH: Final = 24 * MIB
MAX_DESCRIPTOR_GROWTH: Final = 16
"""Connections come and go, so the number of open ones swings a little."""
REQUESTS_PER_VISIT: Final = (20, 600)
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
    samples: list[Sample] = field(default_factory=list)
    models: dict[str, VolumeModel] = field(default_factory=dict)

    def prepare(self) -> None:
        """Make the pool and its volumes, and serve them."""
        self.pool.create("--capacity", "1G", "--journal-size", "32M")
        self.pool.start(
            *("--client-memory", str(CLIENT_MEMORY), "--stall-timeout", str(STALL_TIMEOUT_S)),
            *("--full-timeout", "0", "--max-connections", str(self.n_connections + 8)),
        )
        control = ControlClient(f"unix:{self.pool.directory}/control.sock")
        control.create_volume("hostile", HOSTILE_BYTES)
        for number in range(1, self.n_exports + 1):
            control.create_volume(f"volume-{number}", EXPORT_BYTES)
            self.models[f"volume-{number}"] = VolumeModel(number, EXPORT_BYTES, 4096)

    def address(self, source: random.Random) -> str:
        """Choose the way to the server."""
        return source.choice([f"127.0.0.1:{self.pool.port}", f"unix:{self.pool.socket_path}"])

    # --- The run ---

    async def run(self, seed: int, seconds: float, report: Callable[[str], None]) -> None:
        """Load the server for so long; raise what goes wrong."""
        from tests.load.hostile import misbehave

        source = random.Random(seed)
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
        assert self.pool.process
        pid, begin = self.pool.process.pid, time.monotonic()
        shown_s, shown_requests = begin, 0
        while go_on():
            now = time.monotonic()
            self.samples.append(sample(pid, now - begin))
            if now - shown_s >= PROGRESS_EVERY_S:
                n_requests = self.figures.n_requests
                rate = (n_requests - shown_requests) / (now - shown_s)
                report(f"{now - begin:4.0f} s: {rate:6.0f} requests/s, {self.told(-1)}")
                shown_s, shown_requests = now, n_requests
            await asyncio.sleep(SAMPLE_EVERY_S)

    def told(self, position: int) -> str:
        """The state at one sample, in a line."""
        one = self.samples[position]
        return (
            f"{one.rss >> 20} MiB resident, {one.n_descriptors} descriptors; "
            f"slowest {self.figures.slowest_s * 1000:.0f} ms ({self.figures.slowest})"
        )

    # --- Demands ---

    def check_vitals(self) -> None:
        """Raise AssertionError if something was slow, or has grown."""
        assert self.figures.slowest_s < SLOWEST_S, f"starved: {self.told(-1)}"
        settled = self.samples[int(len(self.samples) * WARM_UP_SHARE) :]
        memory, descriptors = growth(settled)
        assert memory < MAX_GROWTH, f"memory has grown by {memory >> 20} MiB: {self.told(-1)}"
        assert descriptors < MAX_DESCRIPTOR_GROWTH, f"{descriptors} descriptors more than before"

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

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        settled = self.samples[int(len(self.samples) * WARM_UP_SHARE) :]
        memory, descriptors = growth(settled)
        return {
            "connections": self.n_connections,
            "exports": self.n_exports,
            "visits": self.visits,
            "misdeeds": dict(sorted(self.misdeeds.items())),
            "growth_bytes": memory,
            "growth_descriptors": descriptors,
            "peak_bytes": max(one.rss for one in self.samples),
            "peak_descriptors": max(one.n_descriptors for one in self.samples),
            **self.figures.to_json(),
        }
