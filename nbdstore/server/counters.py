"""What the metrics tell of each volume: requests, how long they took, bytes, errors.

Owns the counters, which outlive connections but not the server. They are kept per round, not per
request, since a round is what the hot path is made of: a round of 32 reads is one look at the
clock and one addition to a bucket. Bytes are those of the sessions, added up when somebody asks.

Latencies are kept in buckets by powers of two: bucket b counts what took less than 2**b ns, and no
less than half of that; so the bucket is the bit length of the time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from nbdstore.protocol.constants import Command, Errno
from nbdstore.protocol.transmission import Request

N_BUCKETS = 64
SHOWN_BUCKETS = range(14, 38, 2)
"""From 16 us to 69 s, each four times the one before: what is told of the buckets."""
_S_PER_NS = 1e-9
_READ, _WRITE = int(Command.READ), int(Command.WRITE)


class Counted(Protocol):
    """A session, as far as its counters matter here."""

    bytes_read: int
    bytes_written: int

    @property
    def n_pending(self) -> int: ...


class _Latency:
    """How long the requests of one command took."""

    __slots__ = ("buckets", "sum_ns")

    def __init__(self) -> None:
        self.buckets = [0] * N_BUCKETS
        self.sum_ns = 0


class ImageCounters:
    """The counters of one volume or snapshot.

    Attributes:
        errors: replies that were errors, by NBD's number.
    """

    def __init__(self) -> None:
        self.errors: Counter[int] = Counter()
        self._latencies: dict[int, _Latency] = {}
        self._sessions: dict[Counted, None] = {}
        self._n_ended_bytes = [0, 0]

    def observe(self, command: int, n: int, elapsed_ns: int) -> None:
        """Count `n` requests that took `elapsed_ns` each, from being parsed to being answered."""
        latency = self._latencies.get(command)
        if latency is None:
            latency = self._latencies[command] = _Latency()
        latency.buckets[elapsed_ns.bit_length()] += n
        latency.sum_ns += n * elapsed_ns

    def observe_round(self, n_reads: int, n_writes: int, elapsed_ns: int) -> None:
        """Count what a round has served at once; see `observe`."""
        if n_reads:
            self.observe(_READ, n_reads, elapsed_ns)
        if n_writes:
            self.observe(_WRITE, n_writes, elapsed_ns)

    def observe_all(self, requests: Sequence[Request], elapsed_ns: int) -> None:
        """Count each of some requests by its command; see `observe`."""
        if len(requests) == 1:
            self.observe(requests[0][0], 1, elapsed_ns)
            return
        for command, n in Counter([request[0] for request in requests]).items():
            self.observe(command, n, elapsed_ns)

    def begin(self, session: Counted) -> None:
        """Count a session's bytes, too."""
        self._sessions[session] = None

    def end(self, session: Counted) -> None:
        """Keep what a session has counted that is over."""
        if session in self._sessions:
            del self._sessions[session]
            self._n_ended_bytes[0] += session.bytes_read
            self._n_ended_bytes[1] += session.bytes_written

    @property
    def in_use(self) -> bool:
        """Whether a session counts here."""
        return bool(self._sessions)

    def measures(self, name: str) -> ImageMeasures:
        """Describe what was counted so far, under the name that the image has now."""
        latencies = [
            _describe(Command(command).name, latency)
            for command, latency in sorted(self._latencies.items())
        ]
        return ImageMeasures(
            name=name,
            latencies=latencies,
            bytes_read=self._n_ended_bytes[0] + sum(s.bytes_read for s in self._sessions),
            bytes_written=self._n_ended_bytes[1] + sum(s.bytes_written for s in self._sessions),
            errors={Errno(number).name: n for number, n in sorted(self.errors.items())},
            in_flight=sum(session.n_pending for session in self._sessions),
            connections=len(self._sessions),
        )


def _describe(command: str, latency: _Latency) -> LatencyMeasures:
    return LatencyMeasures(
        command=command.lower(),
        n_requests=sum(latency.buckets),
        sum_s=latency.sum_ns * _S_PER_NS,
        buckets=[
            (2**shown * _S_PER_NS, sum(latency.buckets[: shown + 1])) for shown in SHOWN_BUCKETS
        ],
    )


@dataclass(frozen=True)
class LatencyMeasures:
    """How long the requests of one command took: (bound in seconds, how many took less)."""

    command: str
    n_requests: int
    sum_s: float
    buckets: Sequence[tuple[float, int]]


@dataclass(frozen=True)
class ImageMeasures:
    """What is told of one volume or snapshot; counters since the server's start."""

    name: str
    latencies: Sequence[LatencyMeasures]
    bytes_read: int
    bytes_written: int
    errors: dict[str, int]
    in_flight: int
    connections: int


class Named(Protocol):
    """A volume or snapshot, as far as its name and number matter here."""

    @property
    def id(self) -> int: ...
    @property
    def name(self) -> str: ...


class Counters:
    """The counters of all volumes of a server that were attached, by the image's number."""

    def __init__(self) -> None:
        self._by_id: dict[int, ImageCounters] = {}

    def of(self, image: Named) -> ImageCounters:
        """Return the counters of an image."""
        return self._by_id.setdefault(image.id, ImageCounters())

    def measures(self, images: Iterable[Named]) -> Iterator[ImageMeasures]:
        """Describe the images that were attached; forget those that are not there any more."""
        names = {image.id: image.name for image in images}
        for number, counters in list(self._by_id.items()):
            if number in names:
                yield counters.measures(names[number])
            elif not counters.in_use:
                del self._by_id[number]
