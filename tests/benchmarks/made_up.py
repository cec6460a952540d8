"""Results that nobody measured, for the tests of what is made of results."""

from __future__ import annotations

from benchmarks.model import Goal, Point, Sample, Unit
from benchmarks.results import Results, RowResult


def row(
    name: str = "reads",
    unit: Unit = Unit.IOPS,
    *,
    goal: Goal | None = None,
    point: Point | None = None,
    group: str = "random",
    **values: list[float],
) -> RowResult:
    """A row with the given values by peer; ``_`` stands for ``-`` in a peer's name."""
    result = RowResult(name, group, "How many?", unit, "a volume", "warm", goal, point)
    for peer, numbers in values.items():
        for value in numbers:
            result.add(peer.replace("_", "-"), Sample(value, operations=100, server_cpu_s=0.002))
    return result


def run(*rows: RowResult) -> Results:
    """A finished run of nbdstore and two peers; who has no figures in a row was left out of it."""
    peers = {"nbdstore": "checksums", "nbdkit": "file", "nbd-server": "in place"}
    for row in rows:
        absent = peers.keys() - row.samples.keys() - row.left_out.keys()
        row.left_out |= dict.fromkeys(absent, "not asked for")
    return Results(
        started="2026-01-02T03:04:05Z",
        scale="quick",
        rounds=max((len(found) for row in rows for found in row.samples.values()), default=3),
        runtime_s=0.5,
        commit="0123abc",
        machine={"kernel": "Linux 6.1"},
        versions={"fio": "fio-3.33"},
        peers=peers,
        rows=list(rows),
        finished="2026-01-02T03:05:05Z",
    )
