"""The command line of tests that run seed after seed.

Owns how long they go on, what a person sees meanwhile, and how a failing seed is shown::

    python -m MODULE --seed 7                 that seed alone: how a failing one is replayed
    python -m MODULE --seed 7 --count 100     seeds 7 to 106
    python -m MODULE --seed 7 --minutes 10    from seed 7 on, for ten minutes

The last line sums the figures up; the exit status is 1 if a seed failed.
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NoReturn

import click

RunSeed = Callable[[int], Mapping[str, int]]
"""Runs one seed; returns figures to be summed, or raises what went wrong."""

_PROGRESS_S: Final = 10.0
_MAX_FAILURES: Final = 5  # after so many there is enough to look at


def told(figures: Mapping[str, int]) -> str:
    """Figures in one line."""
    return ", ".join(f"{n:,} {name}" for name, n in figures.items() if n) or "nothing yet"


def _seeds(first: int, count: int | None, minutes: float | None) -> Iterator[int]:
    """The seeds from `first` on, until their number or their time is over."""
    if minutes is None:
        yield from range(first, first + (count or 1))
        return
    end = time.monotonic() + minutes * 60
    for seed in itertools.count(first):
        if time.monotonic() >= end or (count is not None and seed - first >= count):
            return
        yield seed


def run_seeds(
    module: str, run_seed: RunSeed, first: int, count: int | None, minutes: float | None
) -> int:
    """Run seeds; return how many failed."""
    figures: Counter[str] = Counter()
    n_seeds = n_failed = 0
    shown_at = time.monotonic()
    for seed in _seeds(first, count, minutes):
        n_seeds += 1
        try:
            figures.update(run_seed(seed))
        except Exception:
            n_failed += 1
            click.echo(f"\nseed {seed} failed; replay: python -m {module} --seed {seed}")
            click.echo(traceback.format_exc(limit=-6))
            if n_failed == _MAX_FAILURES:
                break
        if time.monotonic() - shown_at > _PROGRESS_S:
            shown_at = time.monotonic()
            click.echo(f"seed {seed}: {told(figures)}")
    click.echo(f"{n_seeds} seeds from {first}, {n_failed} failed: {told(figures)}")
    return n_failed


def main(module: str, run_seed: RunSeed) -> NoReturn:
    """Be the command line of `module`."""

    @click.command(help=f"Run seeds of {module}.")
    @click.option("--seed", type=int, default=0, show_default=True, help="The first.")
    @click.option("--count", type=int, help="How many.")
    @click.option("--minutes", type=float, help="For how long.")
    def command(seed: int, count: int | None, minutes: float | None) -> None:
        logging.disable(logging.CRITICAL)  # trouble is what these tests make
        sys.exit(run_seeds(module, run_seed, seed, count, minutes) > 0)

    command()
    raise AssertionError("click has not left")
