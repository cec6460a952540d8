"""Crash after crash: run a workload, cut the power, recover, check, go on.

Owns the course of one seed.  `run_seed` is what the tests call, and what one calls by hand with
thousands of seeds (see tests/seeds.py)::

    python -m tests.store.power_loss --seed 1000 --count 1000
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from nbdstore.errors import NoSpace, PoolFailed, ReadFailed, StoreError, WriteFailed
from nbdstore.store import Pool, PoolOptions
from nbdstore.store.check import CheckReport, check_pool
from nbdstore.store.host import Failpoint
from tests.control.sums import assert_all_adds_up, count
from tests.seeds import main
from tests.store import virtual_clock
from tests.store.crash_model import History, Model, snapshots_in
from tests.store.crashes import KILLED, Crash, crash_images, killed_at
from tests.store.simulated_disk import (
    PLACE,
    Images,
    Mark,
    Reached,
    ShortWrite,
    SimulatedDisk,
    SyncFailed,
    adversarial,
)
from tests.store.snapshot_model import Key
from tests.store.snapshot_work import trash_name
from tests.store.workload import WINDOW, Settings, Spread, Workload

OPTIONS: Final = PoolOptions(full_timeout_s=5, sync_interval_s=0.7, checkpoint_interval_s=2.0)

Found = dict[str, tuple[int, dict[str, Any], bytes]]
"""What an open pool holds, by name: id, properties, content."""


@dataclass
class Base:
    """What a pool holds when a workload begins: volumes by id, and snapshots."""

    volumes: dict[int, History] = field(default_factory=dict)
    snapshots: dict[Key, bytes] = field(default_factory=dict)


@dataclass
class Course:
    """What one seed does.

    Attributes:
        n_generations: crashes that the pool has to outlive, one after the other.
        n_crashes: moments of each generation at which the power is cut for a look.
        trouble: what the disk does: "full" now and then, "errors" for some reads and writes, or
            from some sync on "broken".
    """

    settings: Settings
    n_generations: int = 2
    n_crashes: int = 5
    block_size: int = 4096
    capacity: int = 24 << 20
    trouble: str = ""
    options: PoolOptions = OPTIONS


@functools.cache
def new_pool(block_size: int, capacity: int) -> dict[str, bytes]:
    """The files of a pool that was just made."""
    disk = SimulatedDisk(None, capacity + block_size)  # each with a uuid of its own
    Pool.create(
        PLACE, block_size=block_size, capacity=capacity, journal_size=1 << 20, host=disk.host
    )
    return {name: bytes(image) for name, image in disk.images.items()}


async def read_all(pool: Pool, spread: Spread) -> Found:
    """All volumes, those in the trash too, all snapshots, and what is in them."""
    volumes = {**pool.volumes, **{trash_name(volume): volume for volume in pool.trash}}
    found: Found = {}
    for name, volume in volumes.items():
        found[name] = volume.id, dict(volume.properties), await spread.read(volume)
        for snapshot in volume.snapshots.values():
            content = await spread.read(snapshot)
            found[f"{name}@{snapshot.info.name}"] = snapshot.id, {"volume": volume.id}, content
    return found


@dataclass(frozen=True)
class Opened:
    """Mark: the pool is open, so all that recovery found is durable."""


def recover(disk: SimulatedDisk, spread: Spread) -> Found:
    """Open the pool on `disk`, read everything, close it; what it says of space must add up."""

    async def main() -> Found:
        pool = await Pool.open(PLACE, adversarial(), host=disk.host)
        disk.mark(Opened())
        try:
            found = await read_all(pool, spread)
            await assert_all_adds_up(pool)
        finally:
            await pool.close()
        said = pool.data_bytes(), pool.status()["used"]
        assert said == count(PLACE, disk.host), f"{said} bytes of data, and in all, are not there"
        return found

    return virtual_clock.run(main())


def assert_clean(images: Images) -> None:
    """Assert that a check finds nothing."""
    assert_nothing_found(check_pool(PLACE, host=SimulatedDisk(images).host))


def assert_nothing_found(report: CheckReport) -> None:
    """Assert that nothing was found that is not harmless."""
    serious = [str(f) for f in report.findings if f.severity != "notice"]
    assert not serious, f"{len(serious)} findings: {serious[:5]}"


class Trouble:
    """What a disk does to a pool that has done nothing wrong.

    Attributes:
        opening: the pool is being opened.  Reads do not fail then: a copy of the catalogue that
            cannot be read keeps its slots until `check --repair`.
    """

    opening = False

    def __init__(self, kind: str, rng: random.Random) -> None:
        self._rng = rng
        self._kind = kind
        self._left = rng.randrange(1, 300)
        self._full = False

    def __call__(self, operation: str, name: str) -> None:
        if self._kind == "full" and (operation, name) == ("write", "data"):
            self._left -= 1
            if self._left <= 0:
                self._full = not self._full
                self._left = self._rng.randrange(1, 30 if self._full else 200)
            if self._full:
                self._fail_write(NoSpace("data: No space left on device while writing"))
        elif self._kind == "errors" and name == "data" and self._rng.random() < 0.02:
            if operation == "read" and not self.opening:
                raise ReadFailed("data: Input/output error while reading")
            if operation == "write" and self._left < 0:
                self._fail_write(WriteFailed("data: Input/output error while writing"))
            self._left -= 1
        elif self._kind == "broken" and operation == "sync":
            self._left -= 5
            if self._left <= 0 and self._rng.random() < 0.5:
                raise WriteFailed(f"{name}: Input/output error while syncing")

    def _fail_write(self, error: StoreError) -> NoReturn:
        if self._rng.random() < 0.5:
            raise error
        raise ShortWrite(self._rng.random(), error)


def run_workload(
    disk: SimulatedDisk, base: Base | None, seed: int, course: Course, figures: Counter[str]
) -> Base:
    """Open the pool on `disk` and use it, leaving marks; it is not closed.

    Arguments:
        base: what is in the pool; None = look, and return that.
        figures: are added to.
    """

    async def main() -> Base:
        try:
            pool = await Pool.open(PLACE, adversarial(course.options), host=disk.host)
        except (NoSpace, PoolFailed, ReadFailed, WriteFailed):
            return base or Base()  # the disk is in trouble already
        found = base_of(await read_all(pool, course.settings.spread)) if base is None else base
        disk.mark(Opened())
        if isinstance(disk.fault, Trouble):
            disk.fault.opening = False
        work = Workload(pool, disk, seed, course.settings)
        work.adopt(found.volumes, found.snapshots)
        with contextlib.suppress(PoolFailed):
            await work.run()
        figures.update(work.figures)
        # The process ends here: what still runs is never heard of again.
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        return found

    return virtual_clock.run(main())


def model_at(base: Base, disk: SimulatedDisk, since: int, at: int) -> Model:
    """What a client knows after `at` events of the disk, `base` having been there `since` one."""
    model = Model()
    model.volumes = {n: History(h.base, h.about) for n, h in base.volumes.items()}
    model.snapshots.known = dict(base.snapshots)
    for event in disk.events[since:at]:
        if isinstance(event, Mark) and not isinstance(event.what, Opened):
            model.feed(event.what)
        elif event == Reached(Failpoint.CHECKPOINT_FROZEN):
            model.checkpoint_began()
    return model


def check_crash(
    after: SimulatedDisk, model: Model, rng: random.Random, spread: Spread, *, killed: bool = False
) -> Found:
    """Assert that recovery makes of the disk `after` a crash what it must; return what it found.

    Arguments:
        killed: only the process has died: what was acknowledged is there until the power fails.
    """
    assert_clean(after.images)
    found = recover(after, spread)
    model.check(found, everything=killed)
    assert_clean(after.images)
    # Another crash during recovery, or after it, changes nothing.
    moment = rng.randrange(len(after.events) + 1)
    images = crash_images(after, moment, Crash.random(rng), rng)
    second = recover(SimulatedDisk(images), spread)
    if killed and Mark(Opened()) not in after.events[:moment]:
        model.check(second)
    else:
        assert second == found, "a crash during recovery changed the result"
    return found


def base_of(found: Found) -> Base:
    """Begin new histories with what was found."""
    volumes = {
        number: History(raw, {"name": name, "size": len(raw), "properties": properties})
        for name, (number, properties, raw) in found.items()
        if "@" not in name
    }
    return Base(volumes, snapshots_in(found))


def found_of(base: Base) -> Found:
    """The inverse of :func:`base_of`, but for the ids of snapshots."""
    volumes = {n: (h.about["name"], h.about["properties"], h.base) for n, h in base.volumes.items()}
    found: Found = {name: (n, about, raw) for n, (name, about, raw) in volumes.items()}
    for (volume, name), raw in base.snapshots.items():
        found[f"{volumes[volume][0]}@{name}"] = 0, {"volume": volume}, raw
    return found


def run_seed(seed: int, course: Course | None = None) -> Counter[str]:
    """Run one seed, by default on a course that it chooses; return figures."""
    return _Seed(seed, course or courses(seed)).run()


class _Seed:
    """The course of one seed.

    Attributes:
        base: what is in the pool at the start of a generation.
    """

    def __init__(self, seed: int, course: Course) -> None:
        self._seed = seed
        self._course = course
        self._rng = random.Random(seed)
        self._images: Images = {
            name: bytearray(image)
            for name, image in new_pool(course.block_size, course.capacity).items()
        }
        self.base = Base()
        self._figures = Counter[str]()

    def run(self) -> Counter[str]:
        for generation in range(self._course.n_generations):
            try:
                self._generation()
            except BaseException as error:
                error.add_note(f"seed {self._seed}, generation {generation}")
                raise
        return self._figures

    def _generation(self) -> None:
        rng, course = self._rng, self._course
        share = rng.choice((0, 0.1, 0.9))
        seed = rng.randrange(1 << 30)
        disk = SimulatedDisk(self._images, seed, share_uncached=share, slow=True)
        disk.fault = trouble = Trouble(course.trouble, random.Random(rng.random()))
        trouble.opening = True
        run_workload(disk, self.base, rng.randrange(1 << 30), course, self._figures)
        since = 0
        if course.trouble == "broken" and rng.random() < 0.5:
            since = self._restart(disk)
        n_events = len(disk.events)
        # Soon after the start old and new records lie next to each other.
        soon = min(since + 60, n_events)
        ends = [n_events if rng.random() < 0.8 else soon for _ in range(course.n_crashes)]
        found: Found = {}
        for moment in sorted(rng.randint(since, end) for end in ends):
            found = self._crash(disk, since, moment)
        self.base = base_of(found)

    def _restart(self, disk: SimulatedDisk) -> int:
        """The pool failed, and is opened again on the same machine, whose disk is well again.

        Returns the number of the event when it was open.
        """
        disk.fault = None
        n_events = len(disk.events)
        model = model_at(self.base, disk, 0, n_events)
        self.base = run_workload(
            disk, None, self._rng.randrange(1 << 30), self._course, self._figures
        )
        model.check(found_of(self.base))
        self._figures["restarts after a failed sync"] += 1
        return disk.events.index(Mark(Opened()), n_events)

    def _crash(self, disk: SimulatedDisk, since: int, moment: int) -> Found:
        rng = self._rng
        crash = KILLED if rng.random() < 0.15 else Crash.random(rng)
        killed = crash is KILLED and not any(isinstance(e, SyncFailed) for e in disk.events)
        if killed:
            after = killed_at(disk, moment, rng.randrange(1 << 30))
        else:
            after = SimulatedDisk(crash_images(disk, moment, crash, rng), rng.randrange(1 << 30))
        after.slow = True
        model = model_at(self.base, disk, since, moment)
        try:
            found = check_crash(after, model, rng, self._course.settings.spread, killed=killed)
        except BaseException as error:
            error.add_note(f"crash at event {moment} of {len(disk.events)}: {crash}")
            raise
        self._images = after.images
        self._figures["kills" if killed else "crashes"] += 1
        return found


def courses(seed: int) -> Course:
    """The course of a seed that was given by hand."""
    rng = random.Random(~seed)
    settings = Settings(
        n_steps=rng.choice((5, 20, 50)),
        max_volumes=rng.choice((1, 2, 3, 3)),
        max_size=rng.choice((1 << 18, 1 << 18, 3 << 20, 6 << 20)),
        large=rng.choice((0, 0.05, 0.3)),
        administration=rng.random() < 0.5,
        spread=Spread(rng.choice((WINDOW, WINDOW, 300 << 20, 70 << 30))),
        patience=rng.choice((0.3, 1.0, 30.0, 1000.0)),
        snapshots=rng.random() < 0.6,
    )
    return Course(
        settings,
        n_generations=rng.choice((1, 3)),
        block_size=rng.choice((4096, 4096, 4096, 65536)),
        capacity=rng.choice((24, 16)) << 20,
        n_crashes=rng.choice((5, 12)),
        trouble=rng.choice(("", "", "", "full", "broken", "errors")),
    )


if __name__ == "__main__":
    main("tests.store.power_loss", run_seed)
