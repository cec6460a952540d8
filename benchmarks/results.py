"""What a run has measured, and what follows from it: medians, ratios, goals. As JSON and back.

``results.json`` holds all there is to a report, so `python -m benchmarks report` renders a run of
long ago, or of another machine, without measuring anything.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.model import Goal, Point, Row, Sample, Unit

FORMAT: Final = 1
OURS: Final = "nbdstore"
FILE_NAME: Final = "results.json"


@dataclass(frozen=True)
class Summary:
    """Several samples in three numbers."""

    median: float
    low: float
    high: float


@dataclass
class RowResult:
    """One row's samples.

    Attributes:
        samples: by peer, in order of rounds.
        left_out: why a peer was not measured, by peer.
        failed: what went wrong, by peer.
    """

    name: str
    group: str
    question: str
    unit: Unit
    stage: str
    cache: str
    goal: Goal | None
    point: Point | None
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, peer: str, sample: Sample) -> None:
        self.samples.setdefault(peer, []).append(sample)

    def summary(self, peer: str) -> Summary | None:
        """A peer's figures; None if it was not measured."""
        values = [sample.value for sample in self.samples.get(peer, [])]
        return Summary(statistics.median(values), min(values), max(values)) if values else None

    def cpu_us(self, peer: str) -> float | None:
        """Microseconds of the server's CPU for each operation, over all rounds."""
        samples = self.samples.get(peer, [])
        operations = sum(sample.operations for sample in samples)
        if not operations:
            return None
        return sum(sample.server_cpu_s for sample in samples) / operations * 1e6

    def fastest_peer(self) -> str | None:
        """The best of the others, which nbdstore of another checkout is not one of."""
        medians = {
            peer: found.median
            for peer in self.samples
            if not peer.startswith(OURS) and (found := self.summary(peer))
        }
        if not medians:
            return None
        best = max if self.unit.more_is_better else min
        return best(medians, key=lambda peer: medians[peer])

    def ratio(self) -> float | None:
        """How many times as good as the fastest peer nbdstore is; None if one is missing."""
        ours, fastest = self.summary(OURS), self.fastest_peer()
        theirs = self.summary(fastest) if fastest else None
        return _times_as_good(self.unit, ours, theirs) if ours and theirs else None


def _times_as_good(unit: Unit, one: Summary, other: Summary) -> float | None:
    better, worse = (one, other) if unit.more_is_better else (other, one)
    return better.median / worse.median if worse.median else None


@dataclass
class Results:
    """A run.

    Attributes:
        started, finished: UTC, ISO 8601; `finished` is None for a run that was interrupted.
        peers: how each was run, by name.
        machine, versions: what it ran on and with.
    """

    started: str
    scale: str
    rounds: int
    runtime_s: float
    commit: str
    machine: dict[str, str]
    versions: dict[str, str]
    peers: dict[str, str]
    rows: list[RowResult] = field(default_factory=list)
    finished: str | None = None

    def row(self, name: str) -> RowResult | None:
        return next((row for row in self.rows if row.name == name), None)

    def reached(self, row: RowResult) -> float | None:
        """What the row's goal is compared with: None if there is nothing to compare."""
        if row.goal is None or row.goal.baseline is None:
            return row.ratio()
        baseline = self.row(row.goal.baseline)
        ours = row.summary(OURS)
        before = baseline.summary(OURS) if baseline else None
        return _times_as_good(row.unit, ours, before) if ours and before else None

    def is_goal_met(self, row: RowResult) -> bool | None:
        """Whether the row's goal is met; None if there is none, or not all was measured for it."""
        reached = self.reached(row)
        if row.goal is None or reached is None or not self.is_whole(row):
            return None
        baseline = self.row(row.goal.baseline) if row.goal.baseline else None
        if baseline and not self.is_whole(baseline):
            return None
        return reached >= row.goal.ratio

    def is_whole(self, row: RowResult) -> bool:
        """Whether all were measured in all rounds who were to be: none failed, none is missing."""
        return all(
            len(row.samples.get(peer, [])) == self.rounds
            for peer in self.peers
            if peer not in row.left_out
        )

    def n_failed(self) -> int:
        return sum(len(row.failed) for row in self.rows)


def row_result(row: Row, stage: str) -> RowResult:
    """An empty result for a row."""
    return RowResult(
        row.name, row.group, row.question, row.unit, stage, row.cache, row.goal, row.point
    )


def save(results: Results, directory: Path) -> Path:
    """Write ``results.json``, whole or not at all."""
    path = directory / FILE_NAME
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(to_json(results), indent=1) + "\n")
    return partial.rename(path)


def load(directory: Path) -> Results:
    """Read ``results.json``.

    Raises:
        OSError, ValueError: there is none, or it is of another format.
    """
    return from_json(json.loads((directory / FILE_NAME).read_text()))


def to_json(results: Results) -> dict[str, Any]:
    """The run as JSON; what is derived from samples is there for readers, and not read back."""
    body = dataclasses.asdict(results) | {"format": FORMAT}
    for row, content in zip(results.rows, body["rows"], strict=True):
        content["unit"] = row.unit.name
        content["summary"] = {
            peer: dataclasses.asdict(found) | {"cpu_us": row.cpu_us(peer)}
            for peer in row.samples
            if (found := row.summary(peer))
        }
        content["ratio"] = row.ratio()
        content["goal_met"] = results.is_goal_met(row)
    return body


def from_json(body: dict[str, Any]) -> Results:
    """Read what `to_json` wrote.

    Raises:
        ValueError: it is of another format.
    """
    if body.get("format") != FORMAT:
        raise ValueError(f"results of format {body.get('format')}: this program knows {FORMAT}")
    rows = [_row_from_json(content) for content in body["rows"]]
    fields = {key: value for key, value in body.items() if key not in ("format", "rows")}
    return Results(**fields, rows=rows)


def _row_from_json(content: dict[str, Any]) -> RowResult:
    goal, point = content["goal"], content["point"]
    return RowResult(
        name=content["name"],
        group=content["group"],
        question=content["question"],
        unit=Unit[content["unit"]],
        stage=content["stage"],
        cache=content["cache"],
        goal=Goal(**goal) if goal else None,
        point=Point(**point) if point else None,
        samples={
            peer: [Sample(**sample) for sample in samples]
            for peer, samples in content["samples"].items()
        },
        left_out=content["left_out"],
        failed=content["failed"],
    )
