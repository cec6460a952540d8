"""Crash after crash: run a workload, cut the power, recover, check, go on.

Owns the course of one seed.  `run_seed` is what the tests call, and what one calls by hand with
thousands of seeds::

    python -m tests.store.power_loss 1000 2000
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nbdstore.errors import NoSpace, PoolFailed, ReadFailed, WriteFailed
from nbdstore.store import Pool, PoolOptions
from nbdstore.store.check import check_pool
from tests.store import virtual_clock
from tests.store.crash_model import History, Model
from tests.store.simulated_disk import (
    PLACE,
    Crash,
    Images,
    Mark,
    SimulatedDisk,
    adversarial,
    crash_images,
    load_images,
)
from tests.store.workload import WINDOW, Settings, Spread, Workload

OPTIONS: Final = PoolOptions(full_timeout_s=5, sync_interval_s=0.7, checkpoint_interval_s=2.0)

Found = dict[str, tuple[int, dict[str, Any], bytes]]
"""What an open pool holds, by name: id, properties, content."""


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
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory) / "pool"
        Pool.create(place, block_size=block_size, capacity=capacity, journal_size=1 << 20)
        return {name: bytes(image) for name, image in load_images(place).items()}


async def read_all(pool: Pool, spread: Spread) -> Found:
    """All volumes and what is in them."""
    return {
        name: (v.id, dict(v.properties), await spread.read(v)) for name, v in pool.volumes.items()
    }


def recover(disk: SimulatedDisk, spread: Spread) -> Found:
    """Open the pool on `disk`, read everything, close it."""

    async def main() -> Found:
        pool = await Pool.open(PLACE, adversarial(), host=disk.host)
        try:
            return await read_all(pool, spread)
        finally:
            await pool.close()

    return virtual_clock.run(main())


def assert_clean(images: Images) -> None:
    """Assert that a check finds nothing."""
    report = check_pool(PLACE, host=SimulatedDisk(images).host)
    serious = [str(f) for f in report.findings if f.severity != "notice"]
    assert not serious, serious


class Trouble:
    """What a disk does to a pool that has done nothing wrong."""

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
                raise NoSpace("data: No space left on device while writing")
        elif self._kind == "errors" and name == "data" and self._rng.random() < 0.02:
            if operation == "read":
                raise ReadFailed("data: Input/output error while reading")
            if operation == "write" and self._left < 0:
                raise WriteFailed("data: Input/output error while writing")
            self._left -= 1
        elif self._kind == "broken" and operation == "sync":
            self._left -= 5
            if self._left <= 0 and self._rng.random() < 0.5:
                raise WriteFailed(f"{name}: Input/output error while syncing")


def run_workload(disk: SimulatedDisk, model: Model, seed: int, course: Course) -> None:
    """Open the pool on `disk` and use it, leaving marks; it is not closed."""

    async def main() -> None:
        try:
            pool = await Pool.open(PLACE, adversarial(course.options), host=disk.host)
        except (NoSpace, PoolFailed, ReadFailed):
            return  # the disk is in trouble already
        work = Workload(pool, disk, seed, course.settings)
        work.adopt(model.volumes)
        with contextlib.suppress(PoolFailed):
            await work.run()
        # The process ends here: what still runs is never heard of again.
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    virtual_clock.run(main())


def model_at(base: dict[int, History], disk: SimulatedDisk, at: int) -> Model:
    """What a client knows after `at` events of the disk."""
    model = Model()
    model.volumes = {n: History(h.base, h.about) for n, h in base.items()}
    for event in disk.events[:at]:
        if isinstance(event, Mark):
            model.feed(event.what)
    return model


def check_crash(
    images: Images, model: Model, rng: random.Random, spread: Spread
) -> tuple[Images, Found]:
    """Assert that recovery makes of `images` what it must; return the pool after it."""
    assert_clean(images)
    disk = SimulatedDisk(images, rng.randrange(1 << 30), slow=True)
    found = recover(disk, spread)
    model.check(found)
    closed = {name: file.live for name, file in disk.files.items()}
    assert_clean(closed)
    # Another crash during recovery, or after it, changes nothing.
    again = crash_images(disk, rng.randrange(len(disk.events) + 1), Crash.random(rng), rng)
    assert recover(SimulatedDisk(again), spread) == found, (
        "a crash during recovery changed the result"
    )
    return closed, found


def base_of(found: Found) -> dict[int, History]:
    """Begin new histories with what was found."""
    return {
        number: History(raw, {"name": name, "size": len(raw), "properties": properties})
        for name, (number, properties, raw) in found.items()
    }


def run_seed(seed: int, course: Course) -> int:
    """Run one seed; return the number of crashes that were survived."""
    rng = random.Random(seed)
    new = new_pool(course.block_size, course.capacity)
    images: Images = {name: bytearray(image) for name, image in new.items()}
    base: dict[int, History] = {}
    n_survived = 0
    for _ in range(course.n_generations):
        disk = SimulatedDisk(
            images, rng.randrange(1 << 30), share_uncached=rng.choice((0, 0.1, 0.9)), slow=True
        )
        disk.fault = Trouble(course.trouble, random.Random(rng.random()))
        model = Model()
        model.volumes = base
        run_workload(disk, model, rng.randrange(1 << 30), course)
        n_events = len(disk.events)
        # Soon after the start old and new records lie next to each other.
        ends = [n_events if rng.random() < 0.8 else 60 for _ in range(course.n_crashes)]
        for moment in sorted(rng.randint(0, min(end, n_events)) for end in ends):
            crashed = crash_images(disk, moment, Crash.random(rng), rng)
            context = f"seed {seed}, generation {_}, crash at event {moment} of {n_events}"
            try:
                model = model_at(base, disk, moment)
                images, found = check_crash(crashed, model, rng, course.settings.spread)
            except BaseException as error:
                error.add_note(context)
                raise
            n_survived += 1
        base = base_of(found)
    return n_survived


def courses(seed: int) -> Course:
    """The course of a seed that was given by hand."""
    rng = random.Random(~seed)
    settings = Settings(
        n_steps=rng.choice((5, 15, 40)),
        max_volumes=rng.choice((1, 2, 3)),
        max_size=rng.choice((1 << 18, 3 << 20, 6 << 20)),
        large=rng.choice((0, 0.05, 0.3)),
        administration=rng.random() < 0.7,
        spread=Spread(rng.choice((WINDOW, WINDOW, 300 << 20, 70 << 30))),
    )
    return Course(
        settings,
        n_generations=rng.choice((1, 3)),
        block_size=rng.choice((4096, 4096, 4096, 65536)),
        capacity=rng.choice((24, 16)) << 20,
        trouble=rng.choice(("", "", "", "full", "broken", "errors")),
    )


def main() -> None:
    logging.disable(logging.CRITICAL)
    n_survived = n_failed = 0
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        try:
            n_survived += run_seed(seed, courses(seed))
        except Exception:
            n_failed += 1
            print(f"--- seed {seed}")
            traceback.print_exc(limit=-4)
            with contextlib.suppress(BrokenPipeError):
                sys.stdout.flush()
    print(f"{n_survived} crashes survived, {n_failed} seeds failed")


if __name__ == "__main__":
    main()
