"""A run as pictures, PNG and SVG: bars for each group, lines over depth, size and number.

The only module that needs matplotlib, so it is imported where it is used.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.model import Unit
from benchmarks.results import OURS, Results, RowResult, Summary

# Colours that are told apart with any kind of sight (Okabe and Ito), nbdstore's first.
_COLOURS: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#999999", "#D55E00", "#56B4E9")
_DPI: Final = 120
_LABEL_WIDTH: Final = 15  # characters
_BAR_GROUP_WIDTH: Final = 0.8
_FOOTER_WIDTH: Final = 110  # characters


def draw(results: Results, directory: Path) -> list[Path]:
    """Draw all plots that the results have figures for; return the files."""
    # Names in the SVG's inside are derived from this instead of at random: the same results give
    # the same file.
    mpl.rcParams["svg.hashsalt"] = "nbdstore"
    written = []
    for name, figure in [*_bars(results), *_lines(results)]:
        figure.text(0, 0, _where(results), fontsize=6, va="top", wrap=False)
        for kind in ("png", "svg"):
            path = directory / f"{name}.{kind}"
            metadata = {"Date": None} if kind == "svg" else {}
            figure.savefig(path, dpi=_DPI, metadata=metadata, bbox_inches="tight")
            written.append(path)
    return written


def _where(results: Results) -> str:
    """Where and with what: a picture may be seen without the report beside it."""
    machine = [text for name, text in results.machine.items() if not name.startswith("load")]
    versions = [results.versions.get(peer, "") for peer in results.peers if peer != OURS]
    lines = [
        f"commit {results.commit}, {results.started}, {results.rounds} x {results.runtime_s:g} s",
        ", ".join(machine),
        ", ".join(dict.fromkeys(filter(None, versions))),
    ]
    return "\n".join(textwrap.fill(line, _FOOTER_WIDTH) for line in lines if line)


def _colour(results: Results, peer: str) -> str:
    return _COLOURS[list(results.peers).index(peer) % len(_COLOURS)]


def _spread(summaries: Sequence[Summary]) -> tuple[list[float], list[float]]:
    """How far below and above the medians the samples reach."""
    return [s.median - s.low for s in summaries], [s.high - s.median for s in summaries]


# --- Bars ----------------------------------------------------------------------------------------


def _bars(results: Results) -> list[tuple[str, Figure]]:
    """One plot for each group and unit, one set of bars for each row."""
    found: dict[tuple[str, Unit], list[RowResult]] = {}
    for row in results.rows:
        if row.samples:
            found.setdefault((row.group, row.unit), []).append(row)
    several = {group for group, _ in found if sum(key[0] == group for key in found) > 1}
    return [
        (
            f"{group}-{unit.name.lower().replace('_', '-')}" if group in several else group,
            _bar_figure(results, group, unit, rows),
        )
        for (group, unit), rows in found.items()
    ]


def _bar_figure(results: Results, group: str, unit: Unit, rows: Sequence[RowResult]) -> Figure:
    peers = [peer for peer in results.peers if any(peer in row.samples for row in rows)]
    figure = Figure(figsize=(2.5 + 1.5 * len(rows), 4.5))
    axes = figure.subplots()
    width = _BAR_GROUP_WIDTH / len(peers)
    for number, peer in enumerate(peers):
        measured = [(x, found) for x, row in enumerate(rows) if (found := row.summary(peer))]
        places = [x + (number + 0.5) * width - _BAR_GROUP_WIDTH / 2 for x, _ in measured]
        summaries = [summary for _, summary in measured]
        axes.bar(
            places,
            [summary.median for summary in summaries],
            width,
            yerr=_spread(summaries),
            label=peer,
            color=_colour(results, peer),
            error_kw={"elinewidth": 0.8, "capsize": 1.5},
        )
    axes.set_xticks(range(len(rows)), [_wrapped(row.name) for row in rows], fontsize=8)
    better = "more" if unit.more_is_better else "less"
    _finish(axes, f"{group}: {unit.label}, {better} is better")
    return figure


def _wrapped(name: str) -> str:
    """A row's name in short lines."""
    return textwrap.fill(name.replace("-", " "), _LABEL_WIDTH)


# --- Lines ---------------------------------------------------------------------------------------


def _lines(results: Results) -> list[tuple[str, Figure]]:
    """One plot for each line of rows that has more than one point."""
    found: dict[str, list[RowResult]] = {}
    for row in results.rows:
        if row.samples and row.point:
            found.setdefault(row.point.line, []).append(row)
    return [
        (f"line-{re.sub('[^a-z0-9]+', '-', line.lower())}", _line_figure(results, line, rows))
        for line, rows in found.items()
        if len(rows) > 1
    ]


def _line_figure(results: Results, line: str, rows: Sequence[RowResult]) -> Figure:
    figure = Figure(figsize=(6, 4.5))
    axes = figure.subplots()
    positions = [row.point.x for row in rows if row.point]
    for peer in results.peers:
        measured = [
            (row.point.x, found) for row in rows if row.point and (found := row.summary(peer))
        ]
        if measured:
            summaries = [summary for _, summary in measured]
            axes.errorbar(
                [x for x, _ in measured],
                [summary.median for summary in summaries],
                yerr=_spread(summaries),
                label=peer,
                color=_colour(results, peer),
                marker="o",
                linewidth=2.5 if peer == OURS else 1.2,
                capsize=2,
            )
    if min(positions) > 0:
        axes.set_xscale("log")
    axes.set_xticks(positions, [f"{x:g}" for x in positions])
    axes.set_xticks([], minor=True)
    first = rows[0]
    axes.set_xlabel(first.point.axis if first.point else "")
    _finish(axes, f"{line}: {first.unit.label}")
    return figure


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.grid(axis="y", linewidth=0.4)
    axes.legend(fontsize=8)
