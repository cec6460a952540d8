"""The trash of a pool against a model; a part of state_machine.py.

A volume in the trash is what it was, with its snapshots, but for the name: whatever else is done.
It goes away when it is emptied, and the oldest one that nobody needs when the pool needs its space.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from nbdstore.errors import AlreadyExists, Busy
from nbdstore.store import Pool, Volume
from tests.store.pools import read

R = TypeVar("R")

SEEDS = st.integers(0, 1 << 16)
NAMES = st.sampled_from(["a", "b", "c", "d"])
MOST_VOLUMES = 3
MOST_IN_TRASH = 2


@dataclass
class Trashed:
    """A volume in the trash.

    Attributes:
        snapshots: what they hold, by their own names.
        is_going: the pool has begun to delete it; its snapshots go first.
    """

    content: bytearray
    properties: dict[str, Any]
    snapshots: dict[str, bytes]
    is_going: bool = False


class TrashRules(RuleBasedStateMachine):
    """See the module.

    Attributes:
        trash: by the ids of volumes.
    """

    figures: Counter[str]
    pool: Pool | None
    models: dict[str, bytearray]
    properties: dict[str, dict[str, Any]]
    snapshots: dict[tuple[str, str], bytes]

    def __init__(self) -> None:
        super().__init__()
        self.trash: dict[int, Trashed] = {}

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        """Have `work` done."""
        raise NotImplementedError

    def watch_trash(self) -> None:
        """Take note of what the pool deletes by itself; to be called when it was opened."""
        assert self.pool is not None
        trash = self.pool._trash
        delete = trash._delete

        def noted(volume: Volume, why: str) -> None:
            assert why == "the pool needs its space"
            self.trash[volume.id].is_going = True
            delete(volume, why)

        trash._delete = noted  # type: ignore[method-assign]

    def is_needed(self, volume: Volume) -> bool:
        """Tell whether a snapshot of it has clones."""
        assert self.pool is not None
        own = {volume, *volume.snapshots.values()}
        heirs = [heir for s in volume.snapshots.values() for heir in self.pool.heirs(s)]
        return any(heir not in own and not heir.is_gone for heir in heirs)

    def a_trashed(self, seed: int) -> Volume:
        assert self.pool is not None
        return random.Random(seed).choice(self.pool.trash)

    # -- rules ------------------------------------------------------------------------------

    @precondition(lambda self: self.models and len(self.trash) < MOST_IN_TRASH)
    @rule(seed=SEEDS)
    def put_into_trash(self, seed: int) -> None:
        assert self.pool is not None
        name = random.Random(seed).choice(sorted(self.models))
        volume = self.pool.volumes[name]
        self.run(self.pool.trash_volume(volume))
        keys = [key for key in self.snapshots if key[0] == name]
        held = {key[1]: self.snapshots.pop(key) for key in keys}
        self.trash[volume.id] = Trashed(self.models.pop(name), self.properties.pop(name), held)
        self.figures["volumes put into the trash"] += 1

    @precondition(lambda self: self.pool and self.pool.trash and len(self.models) < MOST_VOLUMES)
    @rule(seed=SEEDS, name=NAMES)
    def restore(self, seed: int, name: str) -> None:
        assert self.pool is not None
        volume = self.a_trashed(seed)
        try:
            self.run(self.pool.restore_volume(volume, name))
        except AlreadyExists:
            assert name in self.models
            return
        assert name not in self.models
        held = self.trash.pop(volume.id)
        assert not held.is_going
        self.models[name], self.properties[name] = held.content, held.properties
        self.snapshots |= {(name, snapshot): raw for snapshot, raw in held.snapshots.items()}
        self.figures["volumes restored"] += 1

    @precondition(lambda self: self.pool and self.pool.trash)
    @rule(seed=SEEDS)
    def empty_trash(self, seed: int) -> None:
        assert self.pool is not None
        volume = self.a_trashed(seed)
        needed = self.is_needed(volume)
        try:
            self.run(self.pool.delete_volume(volume))
        except Busy:
            assert needed
        else:
            assert not needed
            del self.trash[volume.id]

    @precondition(lambda self: self.pool and self.pool.trash)
    @rule()
    def need_its_space(self) -> None:
        """As a write does that finds none: the oldest that can go does."""
        assert self.pool is not None
        free = [volume for volume in self.pool.trash if not self.is_needed(volume)]

        async def reclaim(pool: Pool) -> None:
            assert pool._trash.reclaim() or not free
            while pool._trash._deleting is not None:
                await asyncio.sleep(0)

        self.run(reclaim(self.pool))
        if free:
            assert self.trash.pop(free[0].id).is_going
            assert free[0] not in self.pool.trash
            self.figures["volumes of the trash whose space was needed"] += 1

    # -- comparing --------------------------------------------------------------------------

    def trash_is_as_it_should_be(self) -> None:
        assert self.pool is not None
        found = {volume.id: volume for volume in self.pool.trash}
        gone = self.trash.keys() - found.keys()
        assert all(self.trash[number].is_going for number in gone), "the trash has lost a volume"
        self.trash = {number: self.trash[number] for number in found}
        for number, held in self.trash.items():
            volume = found[number]
            assert volume.properties == held.properties
            assert self.run(read(volume)) == held.content
            there = {name: self.run(read(snapshot)) for name, snapshot in volume.snapshots.items()}
            assert there.items() <= held.snapshots.items()
            assert there == held.snapshots or held.is_going, "a snapshot in the trash is gone"
