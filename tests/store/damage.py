"""Any byte of any file of a pool flipped, zeroed, swapped or cut off, and worse: what comes of it.

Owns the kinds of damage and the judgement.  Damage is harmless, or it is reported with place,
expected and found, and costs no more than it must; bad data is never returned.  In detail, for
each case: a check tells of what is lost; what can be read is what was written, no older than the
last flush; salvage gets at all that can be read, and at what repair brings back; after repair the
pool opens, unless both copies of what it stands on are gone, and a check tells exactly what is
lost still::

    python -m tests.store.damage --seed 0 --count 100     a hundred batches; see tests/seeds.py

Batch n takes bytes n, n + 4096, n + 8192 ... of all structures in a fixed shuffled order, one
kind of damage after the other, so that 4 * 4096 batches are every byte that matters; and besides
one case of larger damage, and one page that the disk cannot read.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from nbdstore.errors import Corruption, ReadFailed, WriteFailed
from nbdstore.store.check import CheckReport, check_pool
from nbdstore.store.host import Buffer
from nbdstore.store.salvage import Intact, SalvagedPool
from tests import seeds
from tests.store.simulated_disk import PAGE, PLACE, Images, SimulatedDisk, SimulatedFile
from tests.store.subjects import (
    BLOCK,
    State,
    Subject,
    damaged,
    open_and_look,
    places_in,
    subjects,
)

BYTE_KINDS: Final = ("flip", "zero", "swap", "truncate")
PAGE_KIND: Final = "unreadable"
LARGE_KINDS: Final = ("zero", "random", "copy", "swap", "truncate")
N_SLICES: Final = 4096

Bad = set[tuple[str, int]]
"""Pages that cannot be read: file and offset."""


@dataclass(frozen=True)
class Case:
    """One thing that happens to one file: `kind` of damage to `size` bytes at `offset`.

    `other` is where the bytes come from, or the seed of random ones.
    """

    subject: str
    file: str
    kind: str
    offset: int
    size: int = 1
    other: int = 0

    def apply(self, images: Images) -> bool:
        """Do it; tell whether it changed anything."""
        image = images[self.file]
        before = bytes(image)
        start, stop = self.offset, min(self.offset + self.size, len(image))
        found = image[start:stop]
        if self.kind == PAGE_KIND:
            return True  # nothing is changed: a BadDisk does not read it
        if self.kind == "flip":
            image[start] ^= 1 << self.other
        elif self.kind == "zero":
            image[start:stop] = bytes(stop - start)
        elif self.kind == "truncate":
            del image[start:]
        elif self.kind == "random":
            image[start:stop] = random.Random(self.other).randbytes(stop - start)
        else:
            image[start:stop] = image[self.other : self.other + stop - start]
            if self.kind == "swap":
                image[self.other : self.other + stop - start] = found
        return image != before


class BadDisk(SimulatedDisk):
    """A disk with pages that cannot be read until they are written as a whole.

    Arguments:
        bad: files and offsets of such pages.
    """

    def __init__(self, images: Images, bad: Bad) -> None:
        super().__init__(images)
        self.bad = set(bad)

    def open(self, name: str, *, create: bool = False) -> SimulatedFile:
        plain = super().open(name, create=create)
        self.files[name] = _BadFile(self, name, plain.key, plain.live)
        return self.files[name]


class _BadFile(SimulatedFile):
    def __init__(self, disk: BadDisk, name: str, key: str, live: bytearray) -> None:
        super().__init__(disk, name, key, live)
        self._bad_disk = disk

    def pread(self, length: int, offset: int) -> bytes:
        for name, start in self._bad_disk.bad:
            if name == self.name and offset < start + PAGE and start < offset + length:
                raise ReadFailed(f"{name}: Input/output error while reading at byte {offset}")
        return super().pread(length, offset)

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        length = sum(map(len, buffers))
        for name, start in [*self._bad_disk.bad]:
            if name == self.name and offset < start + PAGE and start < offset + length:
                if not offset <= start < start + PAGE <= offset + length:
                    raise WriteFailed(f"{name}: Input/output error while writing at {offset}")
                self._bad_disk.bad.remove((name, start))
        super().pwritev(buffers, offset)


# -- the judgement -----------------------------------------------------------------------------


def judge(case: Case) -> str:
    """Damage a pool and look at it in every way; return what came of it.

    "unchanged", "harmless" (at most a notice), "lost" (it opens, and some of it is an error),
    "repaired" (it did not open, and does after repair), "beyond repair".
    """
    subject = subjects()[case.subject]
    images = damaged(subject)
    if not case.apply(images):
        return "unchanged"
    bad = {(case.file, case.offset)} if case.kind == PAGE_KIND else set()
    try:
        return _judge(subject, images, bad)
    except Exception as error:
        error.add_note(str(case))
        raise


def _judge(subject: Subject, images: Images, bad: Bad) -> str:
    report = check_pool(PLACE, host=BadDisk(images, bad).host)
    for finding in report.findings:
        assert finding.where and finding.expected and finding.found
    told = {str(finding) for finding in report.findings}
    try:
        state = open_and_look(BadDisk(images, bad))
    except (Corruption, ReadFailed) as error:
        if isinstance(error, Corruption):
            assert error.where and error.expected and error.found
        assert not report.clean, "a check finds nothing wrong with a pool that does not open"
        state = None
    else:
        _assert_legal(subject, state, may_be_old=False)
        assert told or not _lost(subject, state), "a check finds nothing, but something is lost"
        assert not report.clean or not _lost(subject, state)
    salvaged = _salvage(subject, BadDisk(images, bad))
    _assert_no_less(state, salvaged)
    repaired = _repair(subject, BadDisk(images, bad), report)
    assert (repaired is None) == (salvaged is None), "one of salvage and repair can do more"
    _assert_no_less(state, repaired)
    _assert_no_less(salvaged, repaired)
    _assert_no_less(repaired, salvaged)
    if state is None:
        return "beyond repair" if repaired is None else "repaired"
    return "lost" if _lost(subject, state) else "harmless"


def _assert_legal(subject: Subject, state: State, *, may_be_old: bool) -> None:
    """Assert that each volume is as it was at one moment, but for what cannot be read."""
    states = subject.history if may_be_old else subject.history[subject.n_durable :]
    names = [sorted(one) for one in states]
    assert sorted(state) in names, f"volumes {sorted(state)}"
    for name, blocks in state.items():
        assert any(
            name in one
            and one[name].keys() == blocks.keys()
            and all(found in (None, one[name][block]) for block, found in blocks.items())
            for one in states
        ), f"volume {name} is in no state that it may be in"


def _lost(subject: Subject, state: State) -> bool:
    """Tell whether reading something is an error that was none before the damage."""
    before = subject.history[-1]
    return any(
        found is None and before.get(name, {}).get(block, b"") is not None
        for name, blocks in state.items()
        for block, found in blocks.items()
    )


def _assert_no_less(less: State | None, more: State | None) -> None:
    """Assert that what can be read in `less` can be read in `more`, and is the same."""
    for name, blocks in (less or {}).items():
        assert more is not None and name in more, f"volume {name} is gone"
        for block, found in blocks.items():
            assert found is None or more[name][block] == found, f"volume {name}, block {block}"


def _salvage(subject: Subject, disk: SimulatedDisk) -> State | None:
    """What comes out of a damaged pool by salvage, None if nothing; the pool stays as it is."""

    async def main() -> State:
        pool = SalvagedPool(PLACE, host=disk.host)
        state = {name: _copied(pool, name) for name in sorted(pool.images)}
        _assert_legal(subject, state, may_be_old=pool.journal_damaged)
        pool.close()
        return state

    try:
        return asyncio.run(main())
    except Corruption:
        return None
    finally:
        assert not disk.events


def _copied(pool: SalvagedPool, name: str) -> dict[int, bytes | None]:
    volume = pool.images[name]
    found: dict[int, bytes | None] = {block: bytes(BLOCK) for block in places_in(volume)}
    for part in pool.contents(volume):
        if isinstance(part, Intact):
            start, stop = part.offset // BLOCK, -(-(part.offset + len(part.data)) // BLOCK)
            found |= {
                block: bytes(part.data[(block - start) * BLOCK :][:BLOCK])
                for block in range(start, stop)
                if block in found
            }
        else:
            assert part.reason
            found |= {block: None for block in found if part.start <= block * BLOCK < part.stop}
    return found


def _repair(subject: Subject, disk: SimulatedDisk, before: CheckReport) -> State | None:
    """Repair a pool; return what it holds then, None if it is beyond repair."""
    report = check_pool(PLACE, host=disk.host, repair=True)
    left = {f.where for f in report.findings if not f.repaired and f.severity != "notice"}
    try:
        state = open_and_look(disk)
    except Corruption:
        assert left and not before.clean
        return None
    journal_damaged = any("journal" in f.where.split()[0] for f in report.findings)
    _assert_legal(subject, state, may_be_old=journal_damaged)
    again = check_pool(PLACE, host=disk.host)
    assert {f.where for f in again.findings} == left, "repair left, or told, something else"
    assert report.clean == (not left)
    return state


# -- which bytes -------------------------------------------------------------------------------


@functools.cache
def live_bytes() -> list[tuple[str, str, int]]:
    """Every byte of every structure: subject, file, offset; in a fixed shuffled order."""
    found = [
        (subject.name, region.file, offset)
        for subject in subjects().values()
        for region in subject.regions
        if not region.kind.startswith("dead")
        for offset in range(region.start, region.stop)
    ]
    random.Random(1).shuffle(found)
    return found


def byte_case(kind: str, subject: str, file: str, offset: int) -> Case:
    """The case of one kind of damage to one byte; a swap is with the next one."""
    other = offset % 8 if kind == "flip" else offset + 1
    return Case(subject, file, kind, offset, other=other)


def batch(number: int) -> Iterator[Case]:
    """Every 4096th byte with one kind of damage."""
    kind = BYTE_KINDS[number // N_SLICES % len(BYTE_KINDS)]
    for place in live_bytes()[number % N_SLICES :: N_SLICES]:
        yield byte_case(kind, *place)


def page_cases() -> Iterator[Case]:
    """An unreadable page in each structure of each pool: all blocks, and all of the journal."""
    for subject in subjects().values():
        pages = {
            (region.file, offset - offset % PAGE): None
            for region in subject.regions
            if region.kind != "dead slot"
            for offset in range(region.start, region.stop, PAGE)
        }
        for file, offset in pages:
            yield Case(subject.name, file, PAGE_KIND, offset, PAGE)


def large_case(rng: random.Random) -> Case:
    """Damage to a sector or a block somewhere, more often where there is something."""
    subject = rng.choice([*subjects().values()])
    regions = [r for r in subject.regions if rng.random() < 0.1 or not r.kind.startswith("dead")]
    size = rng.choice((64, 512, BLOCK))
    kind = rng.choice(LARGE_KINDS)
    place, source = rng.choice(regions), rng.choice(regions)
    source = rng.choice([r for r in subject.regions if r.file == place.file])
    offset, other = (
        rng.randrange(region.start, region.stop) // size * size for region in (place, source)
    )
    other = other if kind in ("copy", "swap") else rng.randrange(1 << 30)
    return Case(subject.name, place.file, kind, offset, size, other)


def run_seed(seed: int) -> Counter[str]:
    """Judge one batch of bytes, a larger case and a bad page; return what came of them."""
    outcomes = Counter(judge(case) for case in batch(seed))
    pages = [*page_cases()]
    outcomes[f"page: {judge(pages[seed % len(pages)])}"] += 1
    outcomes[f"larger: {judge(large_case(random.Random(seed)))}"] += 1
    return Counter({"cases": outcomes.total()}) + outcomes


if __name__ == "__main__":
    seeds.main("tests.store.damage", run_seed)
