"""A pool of up to three volumes against bytearrays: whatever is done to it, it is as it should be.

A snapshot is a copy of a bytearray, a clone a copy of that; a rollback copies it back.  Of the
trash see trash_rules.py.

Hypothesis chooses what is done, and makes what fails shorter; after each opening, and at the end, a
check must find nothing.  On a real disk, where the simulated ones of power_loss.py cannot err::

    python -m tests.store.state_machine --seed 7 --minutes 10     see tests/seeds.py
"""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
from hypothesis import Phase
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

from nbdstore.errors import AlreadyExists, Busy, InvalidArgument, NoSpace
from nbdstore.store import ExtentKind, Pool, PoolOptions, Snapshot, Volume
from nbdstore.store.check import check_pool
from tests.seeds import main
from tests.store.pools import MIB, findings, killed, make_pool, read, read_now
from tests.store.trash_rules import MOST_VOLUMES, NAMES, SEEDS, TrashRules

R = TypeVar("R")

SECTOR = 512
SIZES = st.one_of(st.integers(1, 40), st.integers(1, 6000)).map(lambda n: n * SECTOR)
SNAPSHOT_NAMES = st.sampled_from(["s", "t"])
MOST_SNAPSHOTS = 4


class PoolAgainstBytearrays(TrashRules):
    """See the module.

    Attributes:
        figures: where operations and comparisons are counted.
    """

    figures: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.figures["pools"] += 1
        self.directory = Path(tempfile.mkdtemp(prefix="nbdstore-"))
        self.loop = asyncio.new_event_loop()
        self.pool: Pool | None = None
        self.models: dict[str, bytearray] = {}
        self.snapshots: dict[tuple[str, str], bytes] = {}
        """By the names of volume and snapshot."""
        self.properties: dict[str, dict[str, Any]] = {}
        self.n_copies = 0

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        self.figures["operations"] += 1
        return self.loop.run_until_complete(asyncio.wait_for(work, 60))

    @initialize(
        block_size=st.sampled_from([4096, 4096, 16384, 65536]),
        capacity=st.sampled_from([64, 128]),
        begins_with_snapshot=st.booleans(),
        seed=SEEDS,
    )
    def make(self, block_size: int, capacity: int, begins_with_snapshot: bool, seed: int) -> None:
        self.place = make_pool(self.directory / "0", capacity * MIB, block_size=block_size)
        self.open()
        if begins_with_snapshot:  # else few histories come to one
            self.create("a", 1 << 20)
            self.write(seed, 3, wait=True)
            self.take_snapshots(seed, "s", 1)

    def open(self) -> None:
        assert findings(check_pool(self.place)) == []
        options = PoolOptions(map_memory=16 * MIB, on_full="error")
        self.pool = self.run(Pool.open(self.place, options))
        self.watch_trash()

    def close(self) -> None:
        if self.pool is not None:
            self.run(self.pool.close())
            self.pool = None
            assert findings(check_pool(self.place)) == []

    def teardown(self) -> None:
        try:
            self.close()
            if hasattr(self, "place"):
                self.open()
                self.everything_is_as_it_should_be()
                self.close()
        finally:
            self.loop.run_until_complete(end_tasks())  # of a pool that was not closed
            self.loop.close()
            shutil.rmtree(self.directory)

    # -- choosing ---------------------------------------------------------------------------

    def volume(self, seed: int) -> tuple[Volume, bytearray]:
        assert self.pool is not None
        name = random.Random(seed).choice(sorted(self.models))
        return self.pool.volumes[name], self.models[name]

    def snapshot(self, seed: int) -> tuple[Snapshot, bytes]:
        assert self.pool is not None
        volume, name = random.Random(seed).choice(sorted(self.snapshots))
        return self.pool.snapshots[f"{volume}@{name}"], self.snapshots[volume, name]

    def a_range(self, seed: int, size: int) -> tuple[int, int]:
        rng = random.Random(seed)
        length = min(rng.choice((1, SECTOR, 4096, 5000, 65536, 200_000, size)), size)
        offset = rng.randrange(size - length + 1)
        if rng.random() < 0.5:  # most of it in the same few blocks
            offset %= 16 * 4096
        if rng.random() < 0.5:
            offset -= offset % 4096
        return offset, size - offset if rng.random() < 0.1 else length

    # -- data -------------------------------------------------------------------------------

    @precondition(lambda self: self.models)
    @rule(seed=SEEDS, n=st.integers(1, 5), wait=st.booleans())
    def write(self, seed: int, n: int, wait: bool) -> None:
        volume, model = self.volume(seed)
        rng = random.Random(seed)
        writes = []
        for number in range(n):
            offset, length = self.a_range(seed + number, len(model))
            writes.append((offset, rng.randbytes(length)))
        if not wait and volume.write_now(writes):
            done = writes
        else:
            done = []
            for offset, data in writes:
                try:
                    self.run(volume.write(offset, data))
                    done.append((offset, data))
                except NoSpace:  # pieces of it may be there: make it known what is
                    self.run(volume.trim(0, volume.size))
                    model[:] = bytes(len(model))
                    done = []
        for offset, data in done:
            model[offset : offset + len(data)] = data

    @precondition(lambda self: self.models)
    @rule(seed=SEEDS)
    def trim(self, seed: int) -> None:
        volume, model = self.volume(seed)
        offset, length = self.a_range(seed, len(model))
        self.run(volume.trim(offset, length))
        size = volume.block_size
        end = offset + length
        start = offset + -offset % size
        stop = end if end == len(model) else end - end % size
        if start < stop:
            model[start:stop] = bytes(stop - start)

    @precondition(lambda self: self.models)
    @rule(seed=SEEDS, no_hole=st.booleans())
    def write_zeroes(self, seed: int, no_hole: bool) -> None:
        volume, model = self.volume(seed)
        offset, length = self.a_range(seed, len(model))
        try:
            self.run(volume.write_zeroes(offset, length, no_hole=no_hole))
        except NoSpace:
            self.run(volume.trim(0, volume.size))
            model[:] = bytes(len(model))
        else:
            model[offset : offset + length] = bytes(length)

    @precondition(lambda self: self.models)
    @rule(seed=SEEDS, n=st.integers(2, 6))
    def write_at_once(self, seed: int, n: int) -> None:
        """Several go on at once, in places of their own within the same blocks."""
        volume, model = self.volume(seed)
        part = len(model) // n
        rng = random.Random(seed)
        writes = []
        for number in range(n):
            offset, length = self.a_range(rng.randrange(1 << 16), part)
            writes.append((number * part + offset, rng.randbytes(min(length, MIB))))

        async def all_of_them() -> None:
            await asyncio.gather(*(volume.write(at, data) for at, data in writes))

        try:
            self.run(all_of_them())
        except NoSpace:
            self.run(volume.trim(0, volume.size))
            model[:] = bytes(len(model))
        else:
            for at, data in writes:
                model[at : at + len(data)] = data

    @precondition(lambda self: self.models)
    @rule(seed=SEEDS)
    def read(self, seed: int) -> None:
        volume, model = self.volume(seed)
        offset, length = self.a_range(seed, len(model))
        assert self.run(read(volume, offset, length)) == model[offset : offset + length]
        assert read_now(volume, offset, length) in (None, model[offset : offset + length])

    @precondition(lambda self: self.models)
    @rule(seed=SEEDS)
    def flush(self, seed: int) -> None:
        volume, _ = self.volume(seed)
        self.run(volume.flush())

    # -- volumes ----------------------------------------------------------------------------

    @precondition(lambda self: self.pool is not None)
    @rule(name=NAMES, size=SIZES)
    def create(self, name: str, size: int) -> None:
        assert self.pool is not None
        if len(self.models) == MOST_VOLUMES:
            return
        try:
            self.run(self.pool.create_volume(name, size, {"size": size}))
        except AlreadyExists:
            assert name in self.models
        except NoSpace:
            assert self.pool.fill >= 0.95
        else:
            assert name not in self.models
            self.models[name] = bytearray(size)
            self.properties[name] = {"size": size}

    @precondition(lambda self: self.models)
    @rule(seed=SEEDS, name=NAMES)
    def rename(self, seed: int, name: str) -> None:
        assert self.pool is not None
        volume, _ = self.volume(seed)
        old = volume.name
        try:
            self.run(self.pool.rename_volume(volume, name))
        except AlreadyExists:
            assert name in self.models and name != old
        else:
            self.models[name] = self.models.pop(old)
            self.properties[name] = self.properties.pop(old)
            self.snapshots = {
                (name if volume == old else volume, snapshot): content
                for (volume, snapshot), content in self.snapshots.items()
            }

    @precondition(lambda self: self.models)
    @rule(seed=SEEDS)
    def change_properties(self, seed: int) -> None:
        assert self.pool is not None
        volume, _ = self.volume(seed)
        self.run(self.pool.set_properties(volume, {"seed": seed}))
        self.properties[volume.name] = {"seed": seed}

    @precondition(lambda self: self.models)
    @rule(seed=SEEDS, size=SIZES, force=st.booleans())
    def resize(self, seed: int, size: int, force: bool) -> None:
        assert self.pool is not None
        volume, model = self.volume(seed)
        try:
            self.run(self.pool.resize_volume(volume, size, force=force))
        except InvalidArgument:
            assert not force and size < len(model)
        else:
            del model[size:]
            model.extend(bytes(size - len(model)))

    @precondition(lambda self: self.models)
    @rule(seed=SEEDS)
    def delete(self, seed: int) -> None:
        assert self.pool is not None
        volume, _ = self.volume(seed)
        has_clones = any(self.clones_of(found) for found in volume.snapshots.values())
        try:
            self.run(self.pool.delete_volume(volume))
        except Busy:
            assert has_clones
        else:
            assert not has_clones
            del self.models[volume.name], self.properties[volume.name]
            for key in [key for key in self.snapshots if key[0] == volume.name]:
                del self.snapshots[key]

    # -- snapshots --------------------------------------------------------------------------

    def clones_of(self, snapshot: Snapshot) -> list[str]:
        assert self.pool is not None
        heirs = [heir for heir in self.pool.heirs(snapshot) if not heir.is_gone]
        own = {snapshot.volume, *snapshot.volume.snapshots.values()}
        return [heir.name for heir in heirs if heir not in own]

    @precondition(lambda self: self.models and len(self.snapshots) < MOST_SNAPSHOTS)
    @rule(seed=SEEDS, name=SNAPSHOT_NAMES, n=st.integers(1, 3))
    def take_snapshots(self, seed: int, name: str, n: int) -> None:
        """Of several volumes at once."""
        assert self.pool is not None
        rng = random.Random(seed)
        chosen = rng.sample(sorted(self.models), min(n, len(self.models)))
        wanted = [(self.pool.volumes[volume], name) for volume in chosen]
        try:
            self.run(self.pool.create_snapshots(wanted))
        except AlreadyExists:
            assert any((volume, name) in self.snapshots for volume in chosen)
        except NoSpace:
            assert self.pool.fill >= 0.95
        else:
            assert not any((volume, name) in self.snapshots for volume in chosen)
            self.snapshots |= {(volume, name): bytes(self.models[volume]) for volume in chosen}
            self.figures["snapshots"] += len(chosen)

    @precondition(lambda self: self.snapshots)
    @rule(seed=SEEDS)
    def read_snapshot(self, seed: int) -> None:
        snapshot, content = self.snapshot(seed)
        offset, length = self.a_range(seed, len(content))
        assert self.run(read(snapshot, offset, length)) == content[offset : offset + length]

    @precondition(lambda self: self.snapshots)
    @rule(seed=SEEDS)
    def delete_snapshot(self, seed: int) -> None:
        assert self.pool is not None
        snapshot, _ = self.snapshot(seed)
        heirs = [heir for heir in self.pool.heirs(snapshot) if not heir.is_gone]
        is_needed = len(heirs) > 1 or bool(self.clones_of(snapshot))
        try:
            self.run(self.pool.delete_snapshot(snapshot))
        except Busy:
            assert is_needed
        else:
            assert not is_needed
            del self.snapshots[snapshot.volume.name, snapshot.info.name]

    @precondition(lambda self: self.snapshots and len(self.models) < MOST_VOLUMES)
    @rule(seed=SEEDS, name=NAMES)
    def clone(self, seed: int, name: str) -> None:
        assert self.pool is not None
        snapshot, content = self.snapshot(seed)
        try:
            self.run(self.pool.clone(snapshot, name, {"seed": seed}))
        except AlreadyExists:
            assert name in self.models
        except NoSpace:
            assert self.pool.fill >= 0.95 or snapshot.info.n_provisioned
        else:
            assert name not in self.models
            self.models[name] = bytearray(content)
            self.properties[name] = {"seed": seed}
            self.figures["clones"] += 1

    @precondition(lambda self: self.snapshots)
    @rule(seed=SEEDS)
    def roll_back(self, seed: int) -> None:
        assert self.pool is not None
        snapshot, content = self.snapshot(seed)
        try:
            self.run(self.pool.rollback(snapshot.volume, snapshot))
        except NoSpace:
            assert snapshot.info.n_provisioned
        else:
            self.models[snapshot.volume.name][:] = content
            self.figures["rollbacks"] += 1

    @precondition(lambda self: self.models)
    @rule(seed=SEEDS)
    def flatten(self, seed: int) -> None:
        assert self.pool is not None
        volume, _ = self.volume(seed)
        try:
            self.run(self.pool.flatten(volume))
        except Busy:
            assert volume.snapshots
        except NoSpace:
            pass  # what it has copied until then, it keeps; it holds the same
        else:
            assert self.pool.origin(volume) is None

    # -- the pool ---------------------------------------------------------------------------

    @precondition(lambda self: self.pool is not None)
    @rule()
    def checkpoint(self) -> None:
        assert self.pool is not None
        self.run(self.pool.checkpoint())

    @precondition(lambda self: self.pool is not None)
    @rule()
    def forget_the_maps(self) -> None:
        assert self.pool is not None
        self.pool._services.memory.balance(1 << 30, 1 << 30)

    @precondition(lambda self: self.pool is not None)
    @rule(by=st.sampled_from([0, 1, 65536, 70 * MIB]))
    def grow(self, by: int) -> None:
        assert self.pool is not None
        self.run(self.pool.grow(self.pool.status()["capacity"] + by))

    @precondition(lambda self: self.pool is not None)
    @rule()
    def close_and_open(self) -> None:
        self.close()
        self.open()
        self.everything_is_as_it_should_be()

    @precondition(lambda self: self.pool is not None)
    @rule(turns=st.integers(0, 3))
    def kill_and_open(self, turns: int) -> None:
        assert self.pool is not None

        async def turn() -> None:
            for _ in range(turns):  # what goes on in the background has come so far
                await asyncio.sleep(0)

        self.run(turn())
        self.n_copies += 1
        self.figures["kills"] += 1
        copy = killed(self.place, self.directory / str(self.n_copies))
        self.run(self.pool.close())
        shutil.rmtree(self.place)
        self.place = copy
        self.open()
        self.everything_is_as_it_should_be()

    def everything_is_as_it_should_be(self) -> None:
        assert self.pool is not None
        self.figures["comparisons of all volumes"] += 1
        assert set(self.pool.volumes) == set(self.models)
        for name, model in self.models.items():
            volume = self.pool.volumes[name]
            assert (volume.size, volume.properties) == (len(model), self.properties[name])
            assert self.run(read(volume)) == model
            self.counts_agree(volume, model)
        names = {f"{volume}@{name}" for volume, name in self.snapshots}
        assert set(self.pool.snapshots) == names
        for (name, snapshot), content in self.snapshots.items():
            assert self.run(read(self.pool.snapshots[f"{name}@{snapshot}"])) == content
        self.trash_is_as_it_should_be()

    def counts_agree(self, volume: Volume, model: bytearray) -> None:
        found = self.run(volume.extents(0, volume.size, max_extents=1 << 20))
        assert sum(extent.length for extent in found) == len(model)
        at = 0
        lengths = dict.fromkeys(ExtentKind, 0)
        for extent in found:
            if extent.kind is not ExtentKind.DATA:
                assert not any(model[at : at + extent.length])
            at += extent.length
            lengths[extent.kind] += extent.length
        status = volume.status()
        for kind, count in ((ExtentKind.DATA, "mapped"), (ExtentKind.ZERO, "reserved")):
            assert 0 <= status[count] - lengths[kind] < volume.block_size


async def end_tasks() -> None:
    """End all but the caller."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def run_seed(
    seed: int, *, max_examples: int = 10, steps: int = 50, shrink: bool = True
) -> Mapping[str, int]:
    """Let Hypothesis choose some pools and what is done to them; return figures.

    Arguments:
        max_examples: pools.
        steps: at most so many are done to each.
        shrink: whether what fails is made as short as can be, which takes minutes.
    """
    counter: Counter[str] = Counter()

    @hypothesis.seed(seed)
    class Counted(PoolAgainstBytearrays):
        figures = counter

    settings = hypothesis.settings(
        deadline=None,
        max_examples=max_examples,
        stateful_step_count=steps,
        database=None,  # a seed is the same each time
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    run_state_machine_as_test(Counted, settings=settings)
    return counter


if __name__ == "__main__":
    main("tests.store.state_machine", run_seed)
