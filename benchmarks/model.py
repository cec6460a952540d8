"""What is measured: rows, the stages they are measured on, the samples they give.

    stage    what the servers serve, how it was written, and how clients reach them
    row      one question, asked of every peer on the same stage
    sample   one answer: one peer, one round

Rows that share a stage are measured one after the other on the same disks, so a stage lists rows
that only read before rows that write.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from benchmarks.server import Server
    from benchmarks.tools import Tools


SCATTERED_BLOCK_BYTES: Final = 4096


class BenchmarkFailed(Exception):
    """A peer could not be measured; the run goes on without this figure, and says so."""


class LeftOut(Exception):
    """This machine, or this peer, has no such thing: not a fault, but told in the table."""


class Unit(enum.Enum):
    """What a figure counts, and which way is better."""

    IOPS = ("op/s", True)
    MB_PER_S = ("MB/s", True)
    SECONDS = ("s", False)
    MIB = ("MiB", False)

    def __init__(self, label: str, more_is_better: bool) -> None:
        self.label = label
        self.more_is_better = more_is_better


class Need(enum.Enum):
    """What a row needs that not every peer has."""

    TLS = "TLS"
    TRIM = "trim"
    MANY_VOLUMES = "many volumes in one server"
    JOURNAL = "a journal that is replayed after a crash"
    SNAPSHOTS = "snapshots of a volume that is in use"


class Transport(enum.Enum):
    """How clients reach the server."""

    UNIX = "a unix socket"
    TCP = "TCP on 127.0.0.1"
    TLS = "TLS on 127.0.0.1"


class Filling(enum.Enum):
    """What a volume holds before the first row."""

    NOTHING = "nothing written"
    WHOLE = "written once, in order"
    SCATTERED = "blocks of 4 KiB written at even distances"
    MAPPED = "mapped in full, to zeros that are holes of the host"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What the servers serve.

    Attributes:
        name: tells stages apart that are otherwise alike: each has disks of its own.
        size: bytes of each volume.
        filled_bytes: how much is written with SCATTERED.
        aging_writes: random overwrites of 4 KiB after filling.
        n_snapshots: how many the first volume has, with overwrites between them.
    """

    name: str
    size: int
    n_volumes: int = 1
    filling: Filling = Filling.WHOLE
    filled_bytes: int = 0
    aging_writes: int = 0
    n_snapshots: int = 0
    transport: Transport = Transport.UNIX

    @property
    def stored_bytes(self) -> int:
        """What each volume stores."""
        is_whole = self.filling in (Filling.WHOLE, Filling.MAPPED)
        return self.size if is_whole else self.filled_bytes

    @property
    def written_bytes(self) -> int:
        """What of that is written to the disk."""
        return self.size // 128 if self.filling is Filling.MAPPED else self.stored_bytes

    @property
    def n_scattered(self) -> int:
        """How many blocks SCATTERED writes."""
        return self.filled_bytes // SCATTERED_BLOCK_BYTES

    @property
    def spacing_bytes(self) -> int:
        """From the start of one such block to that of the next."""
        return self.size // self.n_scattered


@dataclass(frozen=True)
class Goal:
    """What nbdstore is to reach in a row.

    Attributes:
        ratio: how many times as good as the best peer (for a time, as short).
        baseline: a row of nbdstore's own to compare with instead of the peers.
    """

    ratio: float
    baseline: str | None = None


@dataclass(frozen=True)
class Point:
    """A row's place in a line plot: which line, and where on the x axis."""

    line: str
    axis: str
    x: float


@dataclass(frozen=True)
class Sample:
    """One measurement.

    Attributes:
        value: in the row's unit.
        operations: what `server_cpu_s` was spent on; 0 where operations are not counted.
        server_cpu_s: CPU seconds of all processes of the server meanwhile.
        details: further figures, by name and unit.
    """

    value: float
    operations: int = 0
    server_cpu_s: float = 0.0
    details: Mapping[str, float] = field(default_factory=dict)


class Measure(Protocol):
    """A way of measuring; called once for each sample."""

    def __call__(self, server: Server, stage: Stage, tools: Tools) -> Sample:
        """Measure one server.

        Raises:
            tools.FAULTS: it went wrong.
            LeftOut: this machine cannot do it.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question.

    Attributes:
        needs: what a peer must be able to do.
        needs_host: programs, paths and "root", which this machine must have.
        cache: in which state the host's page cache is.
        is_quick: whether `--quick` measures it if no rows are named.
        warms_up: whether a run that does not count comes before the first sample.
        is_timed: whether a sample lasts as long as the run's runtime says.
        cost_s: about how long one sample takes beyond that: clients start (fio takes 0.3 s until
            it has begun and told its figures), what is dirty is synced.
    """

    name: str
    group: str
    question: str
    unit: Unit
    stage: Stage
    measure: Measure
    goal: Goal | None = None
    needs: frozenset[Need] = frozenset()
    needs_host: tuple[str, ...] = ()
    point: Point | None = None
    cache: str = "warm"
    is_quick: bool = False
    warms_up: bool = False
    is_timed: bool = True
    cost_s: float = 0.4
