"""The snapshots of a world: what they must hold, and which may be there after a crash.

A snapshot holds what its volume held at one moment between the request for it and the answer, and
those of one request are there all or none.  Once its content was seen, it never changes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nbdstore.errors import NbdstoreError
from nbdstore.store import Snapshot, Volume
from tests.simulation.export import Export
from tests.simulation.oracle import Stamps, Wrong, stamps_of
from tests.simulation.pool_process import ProcessDied

if TYPE_CHECKING:
    from tests.simulation.world import World

Key = tuple[int, str]
"""The id of its volume, and its name."""
Span = tuple[int, int]
"""The moments between which a snapshot was made."""


class Snapshots:
    """What is known of all snapshots.

    Attributes:
        known: what they hold; None = that was not seen yet.
        n_made: so many were.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.known: dict[Key, Stamps | None] = {}
        self.n_made = 0
        self._made: dict[Key, Span] = {}
        self._making: dict[str, dict[Key, int]] = {}
        """By name, those asked for; several if the pool failed, and nobody knows of any."""
        self._dropping: set[Key] = set()

    # --- Changes -----------------------------------------------------------------------------

    async def make(self, exports: Sequence[Export], name: str) -> None:
        """Make one of each of some volumes, all at once, and look at them."""
        world = self._world
        now = world.trace.note("snapshots", name, "of", *(export.id for export in exports))
        self._making[name] = {(export.id, name): now for export in exports}
        for export in exports:
            export.history.begin_read(now)  # what was there then is not forgotten
        try:
            wanted = [(world.volume(export), name) for export in exports]
            made = await world.process.ask(world.pool.create_snapshots(wanted))
            self._is_made(name, world.trace.note("snapshots", name, "made"))
            for export, snapshot in zip(exports, made, strict=True):
                await self._see(export, snapshot)
        except ProcessDied:
            raise  # then recovery tells
        except NbdstoreError:
            self._making.pop(name, None)
            self._made.clear()  # whose content nobody saw then: what it was is not known later
            self._let_go(exports, now)
            raise
        self._let_go(exports, now)

    def _let_go(self, exports: Sequence[Export], start: int) -> None:
        for export in exports:
            export.history.end_read(start)

    def _is_made(self, name: str, now: int) -> None:
        making = self._making.pop(name)
        for key, start in making.items():
            self.known[key] = None
            self._made[key] = start, now
        self.n_made += len(making)

    async def _see(self, export: Export, snapshot: Snapshot) -> None:
        key = export.id, snapshot.info.name
        raw = await self._world.process.ask(export.spread.read(snapshot))
        found = stamps_of(raw)
        self._check_moment(key, found, *self._made.pop(key))
        self.known[key] = found

    def _check_moment(self, key: Key, found: Stamps, start: int, now: int) -> None:
        try:
            self._world.history(key[0]).check_moment(found, start, now)
        except Wrong as error:
            raise Wrong(f"snapshot {key}: {error}") from None

    def choose(self, rng: random.Random) -> Snapshot | None:
        """One of those that there are."""
        found = [
            snapshot
            for volume in self._world.pool.volumes.values()
            for snapshot in volume.snapshots.values()
            if key_of(snapshot) in self.known and volume.id in self._world.exports
        ]
        return rng.choice(found) if found else None

    async def drop(self, snapshot: Snapshot) -> None:
        """Delete one."""
        key = key_of(snapshot)
        self._dropping.add(key)
        try:
            await self._world.process.ask(self._world.pool.delete_snapshot(snapshot))
        except ProcessDied:
            raise
        except NbdstoreError:
            self._dropping.discard(key)
            raise
        self._forget(key)

    async def look(self, snapshot: Snapshot) -> None:
        """Read one, and compare."""
        key = key_of(snapshot)
        raw = await self._world.process.ask(self._world.plan.spread.read(snapshot))
        self._compare_one(key, stamps_of(raw))

    def _compare_one(self, key: Key, found: Stamps) -> None:
        expected = self.known[key]
        if expected is None and key in self._made:
            self._check_moment(key, found, *self._made.pop(key))
        elif expected is not None and (
            len(found) != len(expected) or bool((found != expected).any())
        ):
            raise Wrong(f"snapshot {key} has changed")
        self.known[key] = found

    def volume_kept(self, volume: Volume) -> None:
        """The volume could not be deleted; some of its snapshots may be gone."""
        for key in [*self.known]:
            if key[0] == volume.id and key[1] not in volume.snapshots:
                self._forget(key)

    def volume_gone(self, volume: int) -> None:
        """The volume is gone with its snapshots."""
        for key in [*self.known, *(key for making in self._making.values() for key in making)]:
            if key[0] == volume:
                self._forget(key)

    def _forget(self, key: Key) -> None:
        self.known.pop(key, None)
        self._made.pop(key, None)
        self._making.get(key[1], {}).pop(key, None)
        self._dropping.discard(key)

    # --- After a crash -----------------------------------------------------------------------

    def compare(self, found: Mapping[Key, Stamps], now: int) -> None:
        """Assert that what a server came up with may be left, before volumes begin anew."""
        for key in [*self.known]:
            if key in found:
                self._compare_one(key, found[key])
            elif key in self._dropping or self._goes(key):
                self._forget(key)
            else:
                raise Wrong(f"snapshot {key} is gone")
        for making in self._making.values():
            there = {key for key in making if key in found}
            missing = {key for key in making if key not in found and not self._goes(key)}
            if there and missing:
                raise Wrong(f"of snapshots made at once, {there} are there and {missing} are not")
            for key in there:
                self._check_moment(key, found[key], making[key], now)
                self.known[key] = found[key]
        nowhere = found.keys() - self.known.keys()
        if nowhere:
            raise Wrong(f"snapshots {nowhere} come from nowhere")
        self._making = {}
        self._dropping.clear()

    def _goes(self, key: Key) -> bool:
        export = self._world.exports.get(key[0])
        return self._world.trash.goes(key[0]) if export is None else export.leaving


def key_of(snapshot: Snapshot) -> Key:
    """How a snapshot is known."""
    return snapshot.volume.id, snapshot.info.name
