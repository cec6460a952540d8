"""A run as Markdown: a table for each group, which rows are below their goal, who was left out,
what failed, and where it ran.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from benchmarks.figures import format_ratio, format_value
from benchmarks.model import Goal
from benchmarks.results import Results, RowResult, Summary

FILE_NAME: Final = "results.md"
_LEGEND: Final = """\
Each figure is the median of {rounds} of {runtime_s:g} s, the smallest and the largest in
brackets. *Ratio* is how many times as good nbdstore is as the best peer of that row, or as the row
that its goal names: 2.0 is twice as many operations, or half the time or memory. *CPU* is what the
server's processes used for each operation.
"""


def markdown(results: Results) -> str:
    """The whole report."""
    parts = [_head(results)]
    groups = dict.fromkeys(row.group for row in results.rows)
    for group in groups:
        rows = [row for row in results.rows if row.group == group]
        parts += [f"## {group}\n", _figures(results, rows), _cpu(results, rows), _questions(rows)]
    parts += [_below(results), _reasons(results), _machine(results)]
    return "\n".join(part for part in parts if part)


def save(results: Results, directory: Path) -> Path:
    """Write ``results.md``."""
    path = directory / FILE_NAME
    path.write_text(markdown(results))
    return path


def format_goal(goal: Goal | None) -> str:
    """A goal in a few characters: ``1.5``, ``0.83 of random-read``."""
    if goal is None:
        return "no goal"
    ratio = f"{goal.ratio:.2f}".rstrip("0").rstrip(".")
    return f">= {ratio} x {goal.baseline or 'the best peer'}"


def format_summary(summary: Summary | None) -> str:
    """``101,000 [99,000-104,000]``; a dash where there is nothing."""
    if summary is None:
        return "-"
    low, high = format_value(summary.low), format_value(summary.high)
    return f"{format_value(summary.median)} [{low}-{high}]"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of Markdown, aligned for those who read the source; numbers to the right."""
    cells = [list(header), *map(list, lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "".join(
        f"| {' | '.join(_padded(line, widths))} |\n" for line in (cells[0], rule, *cells[1:])
    )


def _padded(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *others = (
        cell.rjust(width) if n else cell.ljust(width)
        for n, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    return [first, *others]


def _head(results: Results) -> str:
    unfinished = "" if results.finished else "\n**This run was interrupted: rows are missing.**\n"
    met = [results.is_goal_met(row) for row in results.rows if row.goal]
    goals = f"Goals met: {met.count(True)} of {met.count(True) + met.count(False)}.\n"
    if None in met:
        goals += f"Not measured in full, so that nobody knows: {met.count(None)} more.\n"
    rounds = "1 round" if results.rounds == 1 else f"{results.rounds} rounds"
    legend = _LEGEND.format(rounds=rounds, runtime_s=results.runtime_s)
    return f"# nbdstore and its peers\n\n{legend}{unfinished}\n{goals}"


def _figures(results: Results, rows: Sequence[RowResult]) -> str:
    peers = _measured(results, rows)
    header = ["row", "unit", *peers, "ratio", "goal", "met"]
    lines = []
    for row in rows:
        ratio, met = results.reached(row), results.is_goal_met(row)
        lines.append(
            [
                row.name,
                row.unit.label,
                *(format_summary(row.summary(peer)) for peer in peers),
                "-" if ratio is None else format_ratio(ratio),
                format_goal(row.goal) if row.goal else "-",
                {True: "yes", False: "**no**", None: "-"}[met],
            ]
        )
    return table(header, lines)


def _cpu(results: Results, rows: Sequence[RowResult]) -> str:
    """Microseconds of CPU for each operation; nothing if no row counts operations."""
    peers = _measured(results, rows)
    lines = [
        [
            row.name,
            *("-" if (used := row.cpu_us(peer)) is None else format_value(used) for peer in peers),
        ]
        for row in rows
        if any(row.cpu_us(peer) is not None for peer in peers)
    ]
    return table(["CPU, us per operation", *peers], lines) if lines else ""


def _questions(rows: Sequence[RowResult]) -> str:
    """What each row asks, and of what."""
    lines = []
    for row in rows:
        lines.append(f"- `{row.name}`: {row.question}\n")
    for stage, cache in dict.fromkeys((row.stage, row.cache) for row in rows):
        lines.append(f"\nMeasured on {stage}; page cache: {cache}.\n")
    return "".join(lines)


def _measured(results: Results, rows: Sequence[RowResult]) -> list[str]:
    return [peer for peer in results.peers if any(peer in row.samples for row in rows)]


def _below(results: Results) -> str:
    """Each row that is below its goal, and by how much; benchmarks/README.md says why."""
    lines = []
    for row in results.rows:
        reached = results.reached(row)
        if row.goal is None or reached is None or results.is_goal_met(row) is not False:
            continue
        other = row.goal.baseline or row.fastest_peer()
        lines.append(f"- `{row.name}`: {format_ratio(reached)} of {row.goal.ratio:.3g} x {other}\n")
    return "".join(["## Below their goal\n\n", *lines]) if lines else ""


def _reasons(results: Results) -> str:
    """Who is missing, and why; peers and rows with the same reason in one line."""
    parts = []
    for title, attribute in (("Left out", "left_out"), ("Failed", "failed")):
        lines: dict[tuple[str, str], list[str]] = {}
        for row in results.rows:
            peers_of: dict[str, list[str]] = {}
            for peer, reason in getattr(row, attribute).items():
                peers_of.setdefault(reason, []).append(peer)
            for reason, peers in peers_of.items():
                who = "all" if len(peers) == len(results.peers) else ", ".join(peers)
                lines.setdefault((who, reason), []).append(f"`{row.name}`")
        if lines:
            told = [f"- {who}: {why} ({', '.join(rows)})\n" for (who, why), rows in lines.items()]
            parts.append("".join([f"## {title}\n\n", *told]))
    return "\n".join(parts)


def _machine(results: Results) -> str:
    lines = [f"- {name}: {text}\n" for name, text in results.machine.items()]
    peers = [f"- {name}: {about}\n" for name, about in results.peers.items()]
    versions = [f"- {name}: {text}\n" for name, text in results.versions.items()]
    ended = f"finished {results.finished}" if results.finished else "not finished"
    when = f"- commit: {results.commit}\n- scale {results.scale}\n"
    when += f"- started {results.started}, {ended}\n"
    return "".join(["## Where and with what\n\n", when, *lines, "\n", *peers, "\n", *versions])
