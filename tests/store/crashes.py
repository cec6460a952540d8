"""Crashes: what could be on the platter when the power fails at any moment of a disk's log.

Owns the choice of what becomes of the changes that no sync covers; the log is simulated_disk.py's.

What a crash leaves of each of them: nothing, all of it, or any of its sectors of 512 bytes; or the
pages of 4096 bytes that it touches hold anything at all, other bytes in them included.  Names are
kept or lost each by itself, too.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.store.simulated_disk import (
    DIRECTORY,
    NAMES,
    PAGE,
    Event,
    Images,
    Named,
    SimulatedDisk,
    Write,
    put,
    undecided,
)

SECTOR: Final = 512

Fate = Callable[[int, Event], Iterable[Event]]
"""Tells what of a change, which may or may not be on the platter, is there."""


def platter(disk: SimulatedDisk, at: int, fate: Fate) -> Images:
    """Return what the platter holds if the power fails after `at` events, by name."""
    events = disk.events[:at]
    pending, lost = undecided(events)
    unsure = set(pending)
    files = {key: bytearray(image) for key, image in disk.start.items()}
    names = {name: name for name in disk.start}
    for index, event in enumerate(events):
        if index in lost:
            continue
        for change in fate(index, event) if index in unsure else (event,):
            if isinstance(change, Named):
                _name(names, change)
            elif key := getattr(change, "file", None):
                put(files.setdefault(key, bytearray()), change, key)
    return {name: files.get(key, bytearray()) for name, key in names.items()}


def _name(names: dict[str, str], change: Named) -> None:
    for name, key in change.changes:
        if key is None:
            names.pop(name, None)
        else:
            names[name] = key


@dataclass
class Crash:
    """What a power loss does to the writes that no sync covers.

    Attributes:
        applied: by file, the share of them that is on the platter whole; 1 by default.
        torn: the share of which only some sectors are.
        ruined: the share whose pages hold garbage.
        in_order: once one is lost, all later ones of that file are.
    """

    applied: dict[str, float] = field(default_factory=dict)
    torn: float = 0.0
    ruined: float = 0.0
    in_order: bool = False

    @classmethod
    def random(cls, rng: random.Random) -> Crash:
        """Choose one of the kinds that have found bugs, or could."""
        extremes = (0.0, 0.1, 0.5, 0.9, 1.0)
        return cls(
            applied={name: rng.choice(extremes) for name in (*NAMES, DIRECTORY)},
            torn=rng.choice((0.0, 0.1, 0.5)),
            ruined=rng.choice((0.0, 0.0, 0.1)),
            in_order=rng.random() < 0.2,
        )


KILLED: Final = Crash()
"""The process dies, the machine lives: nothing is lost."""
LAZY: Final = Crash(applied=dict.fromkeys((*NAMES, DIRECTORY), 0.0))
"""The power fails before the kernel wrote anything that it had not to."""


def crash_images(disk: SimulatedDisk, at: int, crash: Crash, rng: random.Random) -> Images:
    """Return what the platter could hold if the power failed after `at` events."""
    gone: set[str] = set()

    def fate(_index: int, event: Event) -> Iterable[Event]:
        file: str = getattr(event, "file", "")
        if file in gone:
            return
        if crash.in_order and rng.random() >= crash.applied.get(file, 1.0):
            gone.add(file)
        yield from _some_of(event, crash.applied.get(file, 1.0), crash, rng)

    return platter(disk, at, fate)


def _some_of(event: Event, applied: float, crash: Crash, rng: random.Random) -> Iterable[Event]:
    choice = rng.random() if isinstance(event, Write) else 1.0
    if choice < crash.torn:
        yield from (piece for piece in sectors(event) if rng.random() < 0.5)
    elif choice < crash.torn + crash.ruined:
        assert isinstance(event, Write)
        start, stop = event.offset, event.offset + len(event.data)
        start, stop = start - start % PAGE, stop + -stop % PAGE
        yield Write(event.file, start, rng.randbytes(stop - start))
    elif rng.random() < applied:
        yield event


def sectors(event: Event) -> list[Event]:
    """The parts of a write that a disk writes whole or not at all."""
    assert isinstance(event, Write)
    cuts = [0, *range(-event.offset % SECTOR or SECTOR, len(event.data), SECTOR), len(event.data)]
    return [
        Write(event.file, event.offset + a, event.data[a:b]) for a, b in itertools.pairwise(cuts)
    ]


def killed_at(disk: SimulatedDisk, at: int, seed: int = 0) -> SimulatedDisk:
    """Return the disk as a new process finds it, if the old one was killed after `at` events.

    Everything is there, and what no sync has covered is still not known to be on the platter: it
    is what the log begins with.
    """
    events = disk.events[:at]
    pending, _ = undecided(events)
    assert not any(isinstance(events[index], Named) for index in pending)
    after = SimulatedDisk(platter(disk, at, lambda _index, _event: ()), seed)
    after.events = [events[index] for index in pending]
    for event in after.events:
        for name, image in after.images.items():
            put(image, event, name)
    return after


def load_images(directory: Path) -> Images:
    """The files of a pool on a real disk."""
    return {name: bytearray((directory / name).read_bytes()) for name in NAMES}


def save_images(images: Images, directory: Path) -> None:
    """Write the files of a pool to a real disk."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        (directory / name).write_bytes(image)
