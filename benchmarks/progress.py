"""What a person sees while a run goes on: where it is, what came out, how long it still takes."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from benchmarks.figures import format_value
from benchmarks.results import RowResult

_CLEAR_LINE = "\r\x1b[K"


class Progress:
    """Tells on ``out``, which is not where the results go.

    A line for each stage and row; on a terminal, also what is being measured now.
    """

    def __init__(self, out: TextIO = sys.stderr) -> None:
        self._out = out
        self._is_terminal = out.isatty()
        self._planned_s = self._done_s = 0.0
        self._began = time.monotonic()

    def begin(self, planned_s: float) -> None:
        """Start; ``planned_s`` is about how long everything takes."""
        self._planned_s = planned_s
        self._began = time.monotonic()
        self.say(f"takes about {format_time(planned_s)}")

    def advance(self, planned_s: float) -> None:
        """What was planned to take ``planned_s`` is done."""
        self._done_s += planned_s

    def left_s(self) -> float:
        """About how long it still takes, if all goes on as it went."""
        left_s = max(0.0, self._planned_s - self._done_s)
        if not self._done_s:
            return left_s
        return left_s * (time.monotonic() - self._began) / self._done_s

    def stage(self, what: str) -> None:
        self.say(f"\n{what}  (about {format_time(self.left_s())} left)")

    def sample(self, what: str) -> None:
        if self._is_terminal:
            self._out.write(f"{_CLEAR_LINE}  {what}  (about {format_time(self.left_s())} left)")
            self._out.flush()

    def row(self, result: RowResult) -> None:
        figures = []
        for peer in result.samples:
            found = result.summary(peer)
            if found:
                figures.append(f"{peer} {format_value(found.median)}")
        nothing = "failed" if result.failed else "left out"
        self.say(f"  {result.name} [{result.unit.label}]  {'  '.join(figures) or nothing}")

    def say(self, line: str) -> None:
        self._out.write(f"{_CLEAR_LINE if self._is_terminal else ''}{line}\n")
        self._out.flush()


def format_time(seconds: float) -> str:
    """A time for a person: ``40 s``, ``12 min``, ``1 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
