"""What thousands of images of one pool recover to, each of those that differ recovered once.

Owns the memory of what was seen.  An image is told by what differs from the pool that it comes
from: by file and number of a unit, the unit's bytes.

Recovery and check are deterministic: what they come to depends on the sizes of the files and on
the bytes that they read.  They read all of ``super`` and ``journal``.  Of ``data`` they read what
something points to, so images that differ in other pages only are one to them: the pages that were
read are remembered with what was found, and an image that has the same bytes in all of these is not
recovered again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from nbdstore.store import Pool
from nbdstore.store.check import check_pool
from tests.store.crashes import KILLED, LAZY, crash_images
from tests.store.power_loss import assert_clean, assert_nothing_found
from tests.store.short_plays import OPTIONS, base_of, look, run
from tests.store.short_states import Found, State
from tests.store.simulated_disk import (
    PAGE,
    PLACE,
    Images,
    SimulatedDisk,
    Synced,
    Truncated,
    Write,
    apply,
    pages,
)

AGAIN_SHARE: Final = 100
"""Of so many images, one recovery is interrupted at every moment."""
UNITS: Final = {"super": 512, "journal": 64, "data": 512}
"""Bytes; of what is written, units that are as they were are left out.  A sector is 512."""

Unit = tuple[str, int]
"""A file, and the number of the unit in it."""
Parts = list[tuple[Unit, bytes | None]]
"""What a write brings; None = what was there at the start."""
Changes = dict[Unit, bytes]
"""What differs from the pool at the start."""


def parts_of(event: Write | Truncated, base: dict[str, bytes]) -> Parts:
    """What a write to a file of `base` brings."""
    image, unit = base[event.file], UNITS[event.file]
    if isinstance(event, Truncated):  # only ever to make the file longer
        event = Write(event.file, len(image), bytes(max(0, event.size - len(image))))
    assert event.offset % unit == len(event.data) % unit == 0
    found: Parts = []
    for at in range(event.offset, event.offset + len(event.data), unit):
        part = event.data[at - event.offset : at - event.offset + unit]
        same = image[at : at + unit] == part  # beyond the end not even zeros are
        found.append(((event.file, at // unit), None if same else part))
    return found


def put(changes: Changes, parts: Iterable[tuple[Unit, bytes | None]]) -> None:
    """Do to `changes` what a write does."""
    for place, data in parts:
        if data is None:
            changes.pop(place, None)
        else:
            changes[place] = data


def image_of(base: str, changes: Changes) -> Images:
    """The files of a pool with `changes`."""
    images: Images = {name: bytearray(raw) for name, raw in base_of(base)[0].items()}
    for (file, number), data in sorted(changes.items()):
        apply(images[file], number * UNITS[file], data)
    return images


@dataclass
class _Alike:
    """What images came to that have ``super``, ``journal`` and sizes in common.

    Attributes:
        by_pages: by the pages of ``data`` that were read, by what these held.
    """

    by_pages: dict[frozenset[int], dict[int, Found]] = field(default_factory=dict)


class Recoveries:
    """Recovers images, and remembers what they came to.

    Attributes:
        figures: images, distinct images and recoveries so far.
    """

    def __init__(self, figures: Counter[str]) -> None:
        self.figures = figures
        self._found: dict[tuple[str, int], Found] = {}
        self._alike: dict[tuple[str, int, int], _Alike] = {}
        self._states: dict[State, State] = {}  # each once: thousands of images have the same one

    def recover(self, base: str, changes: Changes) -> Found:
        """Return what the pool `base` with `changes` recovers to.

        Raises:
            AssertionError: a check finds something, or an interrupted recovery ends elsewhere.
        """
        self.figures["images"] += 1
        key = (base, hash(frozenset(changes.items())))
        if key not in self._found:
            self._found[key] = self._recover_distinct(base, changes)
        return self._found[key]

    def _recover_distinct(self, base: str, changes: Changes) -> Found:
        self.figures["distinct images"] += 1
        data = [(number, raw) for (file, number), raw in changes.items() if file == "data"]
        others = frozenset(item for item in changes.items() if item[0][0] != "data")
        size = len(base_of(base)[0]["data"]) // UNITS["data"]
        end = max([size - 1, *(number for number, _ in data)])
        alike = self._alike.setdefault((base, hash(others), end), _Alike())
        for read, seen in alike.by_pages.items():
            held = _held(data, read)
            if held in seen:
                return seen[held]
        found, read = self._recover_unlike(image_of(base, changes))
        alike.by_pages.setdefault(read, {})[_held(data, read)] = found
        return found

    def _recover_unlike(self, images: Images) -> tuple[Found, frozenset[int]]:
        """Return what an image comes to, and the pages of ``data`` that this depends on."""
        self.figures["recoveries"] += 1
        disk = SimulatedDisk(images)
        disk.reads = []
        assert_nothing_found(check_pool(PLACE, host=disk.host))
        assert not disk.events
        found = run(_opened(disk))
        read = frozenset(
            page
            for name, offset, length in disk.reads
            if name == "data"
            for page in pages(offset, length)
        )
        disk.reads = None
        if self.figures["recoveries"] % AGAIN_SHARE == 0:
            self._interrupt(disk, found)
        return {name: self._states.setdefault(s, s) for name, s in found.items()}, read

    def _interrupt(self, disk: SimulatedDisk, found: Found) -> None:
        """Crash at each moment of a recovery that has been done on `disk`, and recover again."""
        assert_clean(disk.images)
        for at in range(1, len(disk.events) + 1):
            if at < len(disk.events) and not isinstance(disk.events[at - 1], Write | Synced):
                continue
            for crash in (LAZY, KILLED):
                self.figures["interrupted recoveries"] += 1
                second = SimulatedDisk(crash_images(disk, at, crash, disk.random))
                assert run(_opened(second)) == found, (
                    f"recovery interrupted at event {at} ended in another state"
                )


def _held(data: list[tuple[int, bytes]], read: frozenset[int]) -> int:
    """Hash what of the changes to ``data`` lies in the pages `read`."""
    per_page = PAGE // UNITS["data"]
    return hash(frozenset(item for item in data if item[0] // per_page in read))


async def _opened(disk: SimulatedDisk) -> Found:
    return await look(await Pool.open(PLACE, OPTIONS, host=disk.host))
