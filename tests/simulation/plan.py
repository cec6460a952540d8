"""What one seed stands for: the properties of a world, chosen at random.

Owns the choices and nothing else: two worlds of one plan and seed are the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Final

from nbdstore.server import Limits
from nbdstore.store import PoolOptions
from tests.simulation.network import Weather
from tests.store.workload import WINDOW, Spread

LAN: Final = (0.00005, 0.0001, 0.0005)
WAN: Final = (0.001, 0.01, 0.03)

NARROW: Final = Limits(max_in_flight=8, max_held_bytes=256 << 10, max_unsent_bytes=64 << 10)
"""Bounds that honest clients meet all the time."""

SCARCE: Final = Limits(max_connections=64, max_client_bytes=512 << 10)
"""So little memory that clients wait for each other."""


@dataclass(frozen=True)
class Plan:
    """One world.

    Attributes:
        weather: of the network.
        capacity: of the pool, in bytes.
        ballast: what of it is taken up by a volume that nobody writes, in bytes.
        block_size: of the pool.
        punches: freed space goes back to the host as soon as may be.
        n_exports, n_jobs, n_requests: how many; jobs are per export, requests per job.
        cells: sizes of exports, in cells, are drawn up to this.
        spread: where the content of an export lies.
        limits: of the server.
        options: of the pool.
        share_uncached: how often a read finds nothing in the page cache.
        trouble: what the disk does: "", "full", "errors", "broken" (power_loss.Trouble).
        stalls: how often a client reads nothing for a while.
        patience_s: after which a client gives a silent connection up.
        moments_s: between two things that the administrator does.
        actions: what he does, and how often.
        n_transfers: backups that are sent, to another pool and back.
    """

    weather: Weather = field(default_factory=Weather)
    capacity: int = 24 << 20
    ballast: int = 0
    block_size: int = 4096
    punches: bool = False
    n_exports: int = 2
    n_jobs: int = 2
    n_requests: int = 100
    cells: int = 2048
    spread: Spread = field(default_factory=Spread)
    limits: Limits = field(default_factory=Limits)
    options: PoolOptions = field(default_factory=PoolOptions)
    share_uncached: float = 0.1
    trouble: str = ""
    stalls: float = 0.0
    patience_s: float = 1000.0
    moments_s: tuple[float, ...] = (0.05, 0.2, 1.0)
    actions: dict[str, int] = field(default_factory=dict)
    n_transfers: int = 0

    @property
    def may_fill(self) -> bool:
        """Whether writes may find no space."""
        much = self.block_size > 4096 or self.cells > 2048
        kept = self.actions.get("snapshot", 0) > 0
        return bool(self.ballast) or much or kept or self.trouble == "full"


def choose_plan(seed: int, *, scale: float = 1.0) -> Plan:
    """The plan of a seed; `scale` multiplies the number of requests."""
    rng = random.Random(seed)
    small = rng.random() < 0.2
    plan = Plan(
        weather=_choose_weather(rng),
        capacity=(16 if small else 24) << 20,
        ballast=rng.choice((26, 28, 29)) << 19 if small else 0,
        block_size=4096 if small else rng.choice((4096, 4096, 4096, 16384, 65536)),
        punches=rng.random() < 0.2,
        n_exports=rng.choice((1, 2, 3)),
        n_jobs=rng.choice((1, 2, 3)),
        n_requests=int(rng.choice((30, 100, 200)) * scale),
        cells=rng.choice((4096, 8192) if small else (64, 512, 512, 4096, 16384)),
        spread=Spread(rng.choice((WINDOW, WINDOW, WINDOW, 300 << 20, 70 << 30))),
        limits=rng.choice((Limits(), Limits(), NARROW, SCARCE)),
        options=_choose_options(rng),
        share_uncached=rng.choice((0.0, 0.1, 0.9)),
        trouble=rng.choice(("", "", "", "", "full", "errors", "broken")),
        stalls=rng.choice((0.0, 0.0, 0.02)),
        patience_s=rng.choice((10.0, 1000.0)),
        moments_s=rng.choice(((0.005, 0.02), (0.02, 0.1), (0.05, 0.2, 1.0), (1.0, 4.0))),
        actions={
            "crash": rng.choice((0, 1, 4)),
            "restart": rng.choice((0, 0, 1)),
            "create": 1,
            "delete": rng.choice((0, 0, 1)),
            "rename": 1,
            "grow": 1,
            "shrink": rng.choice((0, 0, 1)),
            "enlarge": int(small),
            "settle": rng.choice((0, 2)),
            "evict": rng.choice((0, 2)),
            "relieve": int(small),
            "checkpoint": rng.choice((0, 1)),
            "wait": 2,
            **_choose_snapshots(rng),
        },
    )
    if "snapshot" in plan.actions:
        plan = replace(plan, n_transfers=rng.choice((0, 5, 15)))
    if rng.random() < 0.5:
        trash = {"trash": rng.choice((1, 2)), "restore": 1, "empty": rng.choice((0, 1))}
        keep_s = rng.choice((0.5, 20.0, 1e6))
        options = replace(plan.options, trash_keep_s=keep_s)
        plan = replace(plan, actions={**plan.actions, **trash}, options=options)
    return plan


def _choose_snapshots(rng: random.Random) -> dict[str, int]:
    if rng.random() < 0.4:
        return {}
    return {
        "snapshot": rng.choice((1, 3)),
        "drop": rng.choice((1, 2)),
        "look": 1,
        "clone": rng.choice((0, 0, 1)),
        "flatten": rng.choice((0, 1)),
        "roll_back": rng.choice((0, 1, 2)),
    }


def _choose_weather(rng: random.Random) -> Weather:
    bad = rng.random() < 0.6
    return Weather(
        delays=rng.choice((LAN, LAN, WAN)),
        whole=rng.choice((1.0, 0.9, 0.3)),
        pauses=rng.choice((0.0, 0.002)) if bad else 0.0,
        resets=rng.choice((0.001, 0.01)) if bad else 0.0,
        vanishes=rng.choice((0.0, 0.001)) if bad else 0.0,
        buffer_bytes=rng.choice(((1 << 20,), (4 << 10, 64 << 10), (300, 5000))),
    )


def _choose_options(rng: random.Random) -> PoolOptions:
    return PoolOptions(
        on_full=rng.choice(("wait", "wait", "error")),
        full_timeout_s=rng.choice((5.0, 30.0)),
        sync_interval_s=rng.choice((0.3, 5.0)),
        checkpoint_interval_s=rng.choice((0.5, 60.0)),
        in_place_sync_s=rng.choice((0.0, 0.01, 1e9)),
    )
