"""Every short sequence of operations, a crash at every moment, every loss of what was unsynced.

Owns the enumeration; what the operations are and may leave behind is short_plays.py's::

    python -m tests.store.exhaustive                              everything up to length 3
    python -m tests.store.exhaustive --length 3 --share 2/8       one share of it
    python -m tests.store.exhaustive --only used:write,fua,kill   one sequence: to replay a fault

Crashes before the last operation begins belong to the shorter sequences.  Of n unsynced writes,
all 2^n choices are tried if n is at most 4, else those that leave out, or keep, one of them, a
prefix, or a file; and each of them torn in the middle.  Images that are equal are recovered once.
"""

from __future__ import annotations

import itertools
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import click

from nbdstore.errors import StoreError
from nbdstore.store import Pool
from tests.store.crashes import KILLED, LAZY, SECTOR, crash_images
from tests.store.power_loss import assert_clean
from tests.store.short_plays import (
    BASES,
    OPERATIONS,
    OPTIONS,
    Found,
    Play,
    Sequence,
    State,
    base_of,
    judge,
    look,
    makes_sense,
    run,
)
from tests.store.simulated_disk import (
    PLACE,
    Event,
    Images,
    SimulatedDisk,
    Synced,
    Truncated,
    Write,
    apply,
    undecided,
)

ALL_SUBSETS: Final = 4
"""Of so many unsynced writes, all subsets are tried."""
AGAIN_SHARE: Final = 100
"""Of so many images, one recovery is interrupted at every moment."""


# -- crashes -----------------------------------------------------------------------------------

UNIT: Final = 64
"""Bytes; of a sector, parts that are as they were are left out."""

Sectors = dict[tuple[str, int], bytes]
"""What differs from the pool at the start, by file and number of the unit."""


def _sectors(event: Event, base: dict[str, bytes]) -> list[tuple[tuple[str, int], bytes | None]]:
    """What a write brings; None = what was there at the start."""
    assert isinstance(event, Write | Truncated)
    image = base[event.file]
    if isinstance(event, Truncated):  # only ever to make the file longer
        event = Write(event.file, len(image), bytes(max(0, event.size - len(image))))
    assert event.offset % UNIT == 0
    found: list[tuple[tuple[str, int], bytes | None]] = []
    for at in range(event.offset, event.offset + len(event.data), UNIT):
        part = event.data[at - event.offset : at - event.offset + UNIT]
        same = image[at : at + UNIT] == part  # beyond the end not even zeros are
        found.append(((event.file, at // UNIT), None if same else part))
    return found


Parts = list[tuple[tuple[str, int], bytes | None]]


def _halves(parts: Parts) -> list[Parts]:
    """The two ways of tearing a write between two sectors, in the middle."""
    sectors = sorted({number * UNIT // SECTOR for (_, number), _ in parts})
    if len(sectors) < 2:
        return []
    middle = sectors[len(sectors) // 2] * SECTOR // UNIT
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
    _recovered: dict[tuple[str, int], Found] = field(default_factory=dict)
    _states: dict[State, State] = field(default_factory=dict)
    """Each once: thousands of images recover to the same one."""

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
            await OPERATIONS[name](play)
        assert await look(play.pool) == {
            name: h.now for name, h in play.histories.items() if h.now is not None
        }, "before any crash"
        return start

    def _crash_everywhere(self, base: str, play: Play, start: int) -> None:
        events = play.disk.events
        image = play.disk.start
        parts = {
            index: _sectors(event, image)
            for index, event in enumerate(events)
            if isinstance(event, Write | Truncated)
        }
        for at in range(start, len(events) + 1):
            self.figures["crash points"] += 1
            known = next(known for moment, known in reversed(play.moments) if moment <= at)
            pending, _ = undecided(events[:at])
            unsure = set(pending)
            sure: Sectors = {}
            for index in range(at):
                if index in parts and index not in unsure:
                    _put(sure, parts[index])
            writes = [(_file(events[index]), parts[index]) for index in pending]
            for name, some in choices(writes):
                self.figures["images"] += 1
                sectors = dict(sure)
                for part in some:
                    _put(sectors, part)
                killed = len(some) == len(writes) and "torn" not in name
                try:
                    found = self._recover(base, sectors)
                    judge(found, known, killed=killed)
                except (AssertionError, StoreError) as error:
                    error.add_note(f"crash at event {at} ({events[at - 1]!r:.60}), writes {name}")
                    raise

    def _recover(self, base: str, sectors: Sectors) -> Found:
        key = (base, hash(frozenset(sectors.items())))
        if key not in self._recovered:
            self.figures["distinct images"] += 1
            images: Images = {name: bytearray(raw) for name, raw in base_of(base)[0].items()}
            for (file, number), data in sorted(sectors.items()):
                apply(images[file], number * UNIT, data)
            assert_clean(images)
            again = self.figures["distinct images"] % AGAIN_SHARE == 0
            self._recovered[key] = {
                name: self._states.setdefault(state, state)
                for name, state in self._recover_image(images, again).items()
            }
        return self._recovered[key]

    def _recover_image(self, images: Images, again: bool) -> Found:
        self.figures["recoveries"] += 1
        disk = SimulatedDisk(images)

        async def main() -> Found:
            return await look(await Pool.open(PLACE, OPTIONS, host=disk.host))

        found: Found = run(main())
        if again:
            assert_clean(disk.images)
            for at in range(1, len(disk.events) + 1):
                if at < len(disk.events) and not isinstance(disk.events[at - 1], Write | Synced):
                    continue
                for crash in (LAZY, KILLED):
                    second = crash_images(disk, at, crash, disk.random)
                    assert self._recover_image(second, False) == found, (
                        f"recovery interrupted at event {at} ended in another state"
                    )
        return found


def _file(event: Event) -> str:
    assert isinstance(event, Write | Truncated)
    return event.file


def _put(sectors: Sectors, parts: Iterable[tuple[tuple[str, int], bytes | None]]) -> None:
    for place, data in parts:
        if data is None:
            sectors.pop(place, None)
        else:
            sectors[place] = data


# -- enumeration -------------------------------------------------------------------------------


def sequences(length: int, share: tuple[int, int] = (0, 1)) -> list[tuple[str, Sequence]]:
    """All sequences of `length` that make sense, or share i of n of them."""
    found = [
        (base, sequence)
        for base in BASES
        for sequence in itertools.product(OPERATIONS, repeat=length)
        if makes_sense(base, sequence)
    ]
    return found[share[0] :: share[1]]


def main(length: int, share: tuple[int, int], minutes: float | None, seed: int | None) -> int:
    """Explore all up to `length`; return the number of sequences with a fault."""
    explorer, n_failed = Explorer(), 0
    begun = shown = time.monotonic()
    everything = [s for n in range(1, length + 1) for s in sequences(n, share)]
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
@click.option("--share", default="0/1", show_default=True, help="i/n: every n-th, from i on.")
@click.option("--minutes", type=float, help="At most so long.")
@click.option("--seed", type=int, help="Go through them in an order of this seed.")
@click.option("--only", help="One sequence: base:operation,operation,...")
def command(
    length: int, share: str, minutes: float | None, seed: int | None, only: str | None
) -> None:
    """Crash every short sequence of operations at every moment."""
    logging.disable(logging.CRITICAL)
    if only is not None:
        base, _, names = only.partition(":")
        Explorer().explore(base, tuple(names.split(",")))
        return
    first, _, n = share.partition("/")
    sys.exit(main(length, (int(first), int(n)), minutes, seed) > 0)


if __name__ == "__main__":
    command()
