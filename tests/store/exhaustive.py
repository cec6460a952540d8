"""Every short sequence of operations, a crash at every moment, every loss of what was unsynced.

Owns the crashes; which sequences there are is short_sequences.py's, what the operations are and may
leave behind short_plays.py's::

    python -m tests.store.exhaustive                              everything up to length 3
    python -m tests.store.exhaustive --length 3 --share 2/8       the third eighth
    python -m tests.store.exhaustive --with shrink --with grow    those that one of these is in
    python -m tests.store.exhaustive --only used:write,fua,kill   one sequence: to replay a fault

Crashes before the last operation begins belong to the shorter sequences.  Of n unsynced writes,
all 2^n choices are tried if n is at most 4, else those that leave out, or keep, one of them, a
prefix, or a file; and each of them torn in the middle.  Images that are equal, or differ in what
nobody reads, are recovered once (recoveries.py).
"""

from __future__ import annotations

import itertools
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Final

import click

from nbdstore.errors import StoreError
from tests.store.crashes import SECTOR
from tests.store.recoveries import UNITS, Changes, Parts, Recoveries, parts_of, put
from tests.store.short_plays import Play, Sequence, base_of, look, run
from tests.store.short_receives import judge_received
from tests.store.short_sequences import ALL, sequences
from tests.store.short_states import Found, Known, judge
from tests.store.simulated_disk import Event, SimulatedDisk, Truncated, Write, undecided

ALL_SUBSETS: Final = 4
"""Of so many unsynced writes, all subsets are tried."""


# -- crashes -----------------------------------------------------------------------------------


def _halves(parts: Parts) -> list[Parts]:
    """The two ways of tearing a write between two sectors, in the middle."""
    per_sector = SECTOR // UNITS[parts[0][0][0]] if parts else 1
    sectors = sorted({number // per_sector for (_, number), _ in parts})
    if len(sectors) < 2:
        return []
    middle = sectors[len(sectors) // 2] * per_sector
    return [
        [part for part in parts if part[0][1] < middle],
        [part for part in parts if part[0][1] >= middle],
    ]


def choices(writes: list[tuple[str, Parts]]) -> Iterator[tuple[str, list[Parts]]]:
    """The ways in which unsynced writes may be on the platter: a name, and what is."""
    n = len(writes)
    everything = [parts for _, parts in writes]
    if n <= ALL_SUBSETS:
        kept = [list(mask) for mask in itertools.product((True, False), repeat=n)]
    else:
        files = sorted({file for file, _ in writes})
        kept = [[True] * n, [False] * n]
        kept += [[i != j for j in range(n)] for i in range(n)]
        kept += [[i == j for j in range(n)] for i in range(n)]
        kept += [[j < i for j in range(n)] for i in range(2, n - 1)]
        for some in itertools.product((True, False), repeat=len(files)):
            there = dict(zip(files, some, strict=True))
            kept.append([there[file] for file, _ in writes])
    for mask in kept:
        name = "".join("+" if keep else "-" for keep in mask)
        yield name, list(itertools.compress(everything, mask))
    for index, parts in enumerate(everything):
        for number, half in enumerate(_halves(parts)):
            torn = f"{index} torn, half {number}"
            yield f"{torn}, rest lost", [half]
            yield f"{torn}, rest there", [*everything[:index], half, *everything[index + 1 :]]


@dataclass
class Explorer:
    """Tries sequences and remembers what it has seen.

    Attributes:
        figures: sequences, crash points, images, distinct images and recoveries so far.
    """

    figures: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._recoveries = Recoveries(self.figures)

    def explore(self, base: str, sequence: Sequence) -> None:
        """Crash at every moment of the last operation of `sequence`.

        Raises:
            AssertionError: with the sequence and the crash, which it is replayed by.
        """
        self.figures["sequences"] += 1
        images, found = base_of(base)
        disk = SimulatedDisk(images)
        play = Play(disk, found)
        try:
            start = run(self._play(play, sequence))
            self._crash_everywhere(base, play, start)
        except BaseException as error:
            told = f"{base}:{','.join(sequence)}"
            error.add_note(f"replay: python -m tests.store.exhaustive --only {told}")
            raise

    @staticmethod
    async def _play(play: Play, sequence: Sequence) -> int:
        """Do `sequence`; return the number of events before its last operation."""
        await play.open()
        start = 0
        for number, name in enumerate(sequence):
            play.number = number
            start = len(play.disk.events)
            play.note()
            await ALL[name](play)
        assert await look(play.pool) == {
            name: h.now for name, h in play.histories.items() if h.now is not None
        }, "before any crash"
        return start

    def _crash_everywhere(self, base: str, play: Play, start: int) -> None:
        events = play.disk.events
        parts = {
            index: parts_of(event, play.disk.start)
            for index, event in enumerate(events)
            if isinstance(event, Write | Truncated)
        }
        outcomes: list[tuple[str, bool, Found]] = []
        before: tuple[int, list[int]] | None = None
        for at in range(start, len(events) + 1):
            self.figures["crash points"] += 1
            known = next(known for moment, known in reversed(play.moments) if moment <= at)
            pending, _ = undecided(events[:at])
            n_written = sum(index < at for index in parts)
            try:
                if (n_written, pending) != before:  # else nothing has happened to the disk
                    outcomes = [*self._outcomes(base, parts, at, pending, events)]
                    before = n_written, pending
                for name, killed, found in outcomes:
                    _judge(name, found, known, killed=killed)
            except (AssertionError, StoreError) as error:
                error.add_note(f"crash at event {at} ({events[at - 1]!r:.60})")
                raise

    def _outcomes(
        self, base: str, parts: dict[int, Parts], at: int, pending: list[int], events: list[Event]
    ) -> Iterator[tuple[str, bool, Found]]:
        """Recover what a crash after `at` events may leave: its name, nothing is lost, found."""
        sure: Changes = {}
        for index in sorted(parts.keys() - set(pending)):
            if index < at:
                put(sure, parts[index])
        writes = [(_file(events[index]), parts[index]) for index in pending]
        for name, some in choices(writes):
            changes = dict(sure)
            for part in some:
                put(changes, part)
            try:
                found = self._recoveries.recover(base, changes)
            except (AssertionError, StoreError) as error:
                error.add_note(f"writes {name}")
                raise
            yield name, len(some) == len(writes) and "torn" not in name, found


def _judge(name: str, found: Found, known: Known, *, killed: bool) -> None:
    try:
        judge(found, known, killed=killed)
        judge_received(found)
    except AssertionError as error:
        error.add_note(f"writes {name}")
        raise


def _file(event: Event) -> str:
    assert isinstance(event, Write | Truncated)
    return event.file


# -- enumeration -------------------------------------------------------------------------------


def main(
    length: int,
    share: tuple[int, int],
    minutes: float | None,
    seed: int | None,
    having: Collection[str] = (),
) -> int:
    """Explore all up to `length`; return the number of sequences with a fault."""
    explorer, n_failed = Explorer(), 0
    begun = shown = time.monotonic()
    everything = [s for n in range(1, length + 1) for s in sequences(n, having=having)]
    n_all = len(everything)
    everything = everything[n_all * share[0] // share[1] : n_all * (share[0] + 1) // share[1]]
    if seed is not None:
        random.Random(seed).shuffle(everything)
    for base, sequence in everything:
        try:
            explorer.explore(base, sequence)
        except (AssertionError, StoreError, RuntimeError) as error:
            n_failed += 1
            click.echo(f"{error}\n  " + "\n  ".join(getattr(error, "__notes__", [])))
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            click.echo(f"{base}:{','.join(sequence)}: {_figures(explorer)}")
        if minutes is not None and time.monotonic() - begun > minutes * 60:
            break
    click.echo(f"{_figures(explorer)}; {n_failed} sequences failed")
    return n_failed


def _figures(explorer: Explorer) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in explorer.figures.items())


@click.command()
@click.option("--length", type=int, default=3, show_default=True, help="Of the longest ones.")
@click.option(
    "--share",
    default="0/1",
    show_default=True,
    help="i/n, from 0/n to n-1/n: those of a share begin alike.",
)
@click.option("--minutes", type=float, help="At most so long.")
@click.option("--seed", type=int, help="Go through them in an order of this seed.")
@click.option(
    "--with",
    "having",
    multiple=True,
    type=click.Choice([*ALL]),
    help="Those with this operation, or another one that is given.",
)
@click.option("--only", help="One sequence: base:operation,operation,...")
def command(
    length: int,
    share: str,
    minutes: float | None,
    seed: int | None,
    having: tuple[str, ...],
    only: str | None,
) -> None:
    """Crash every short sequence of operations at every moment."""
    logging.disable(logging.CRITICAL)
    if only is not None:
        base, _, names = only.partition(":")
        Explorer().explore(base, tuple(names.split(",")))
        return
    first, _, n = share.partition("/")
    sys.exit(main(length, (int(first), int(n)), minutes, seed, having) > 0)


if __name__ == "__main__":
    command()
