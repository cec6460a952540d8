"""The administrator of a world: volumes come, go and change; the server is restarted, or dies.

Owns what he asks for, and what is known of the outcome: done, refused, or unknown because the
server died meanwhile; then the next recovery tells.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final

from nbdstore.errors import NbdstoreError
from nbdstore.store.host import Failpoint
from tests.simulation.export import Export
from tests.simulation.oracle import CELL, Stamps, Wrong, zero_stamps
from tests.simulation.pool_process import Death, ProcessDied
from tests.simulation.server_process import BALLAST
from tests.simulation.snapshots import key_of

if TYPE_CHECKING:
    from nbdstore.store import Image, Volume
    from tests.simulation.world import World

_PLACES: Final = [place for place in Failpoint if not place.name.startswith("POOL_")]
MOST_EXPORTS: Final = 6
_SCRUB_BYTES: Final = 64 << 10
_MOST_SNAPSHOTS: Final = 4
_MOST_NAMES: Final = 50
"""Whose volumes are made anew again and again never comes to an end."""
_MOST_ENDS: Final = 20
"""Restarts and crashes; with too many, on a slow network, nobody would get anything done."""


class Administrator:
    """Does one thing after the other, until he is told to stop."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = random.Random(world.random.random())
        self._n_names = 0
        self._n_ends = 0
        self.stopped = False

    async def run(self) -> None:
        actions = self._world.plan.actions
        while not self.stopped:
            await asyncio.sleep(self._random.choice(self._world.plan.moments_s))
            if self.stopped or not self._world.is_up:
                continue
            action = self._random.choices([*actions], [*actions.values()])[0]
            self._world.trace.note("administrator:", action)
            try:
                await getattr(self, f"_{action}")()
                self._world.n_changes += 1
            except ProcessDied:
                await self._world.until_up()
            except NbdstoreError as error:
                self._world.trace.note("administrator: refused:", type(error).__name__)
                self._world.n_refused += 1

    async def _wait(self) -> None:
        pass

    # --- Volumes -----------------------------------------------------------------------------

    def new_name(self) -> str:
        self._n_names += 1
        return f"v{self._n_names}"

    def _some_export(self) -> Export | None:
        exports = [e for e in self._world.exports.values() if e.is_settled]
        return self._random.choice(exports) if exports else None

    async def _create(self) -> None:
        if self._world.has_room and self._n_names < _MOST_NAMES:
            await self.create()

    async def create(self) -> None:
        """Make a volume and let it be used."""
        world, name = self._world, self.new_name()
        n_cells = self._random.randint(8, world.plan.cells)
        await self._add(
            world.pool.create_volume(name, world.plan.spread.end(n_cells * CELL)),
            name,
            zero_stamps(n_cells),
        )

    async def _add(self, making: Coroutine[Any, Any, Volume], name: str, content: Stamps) -> None:
        """Have a volume made that holds `content`."""
        world = self._world
        world.maybe_created[name] = content
        try:
            volume = await world.process.ask(making)
        except ProcessDied:
            raise
        except NbdstoreError:
            del world.maybe_created[name]
            raise
        del world.maybe_created[name]
        world.adopt(volume.id, name, content)

    async def _delete(self) -> None:
        world, export = self._world, self._some_export()
        if export is None or len(world.exports) < 2:
            return
        export.leaving = True
        try:
            await world.process.ask(world.pool.delete_volume(world.volume(export)))
        except NbdstoreError:
            export.leaving = False
            world.snapshots.volume_kept(world.volume(export))
            raise
        world.forget(export)

    async def _rename(self) -> None:
        world, export = self._world, self._some_export()
        if export is None:
            return
        before, new = export.names, self.new_name()
        export.names = [*before, new]
        try:
            await world.process.ask(world.pool.rename_volume(world.volume(export), new))
        except NbdstoreError:
            export.names = before
            raise
        export.names = [new]

    async def _grow(self) -> None:
        export = self._some_export()
        if export and not export.was_shrunk and export.n_cells < 2 * self._world.plan.cells:
            await self._resize(export, export.n_cells + self._random.choice((1, 8, 1000)))

    async def _shrink(self) -> None:
        export = self._some_export()
        if export and export.n_cells > 8:
            await self._resize(export, self._random.randint(8, export.n_cells - 1))

    async def _resize(self, export: Export, n_cells: int) -> None:
        world, size = self._world, export.spread.end(n_cells * CELL)
        export.begin_resize(n_cells)
        change = world.pool.resize_volume(world.volume(export), size, force=True)
        try:
            await world.process.ask(change)
        except NbdstoreError:
            export.resizing_to = None
            raise
        export.resized()

    async def _lease(self) -> None:
        export = self._some_export()
        if export is not None:
            await self._world.keeping.take_lease(export)

    async def _end_lease(self) -> None:
        export = self._some_export()
        if export is not None:
            await self._world.keeping.end_lease(export)

    async def _limit(self) -> None:
        export = self._some_export()
        if export is not None:
            await self._world.keeping.limit(export)

    # --- The trash ---------------------------------------------------------------------------

    async def _trash(self) -> None:
        export = self._some_export()
        if export is not None and len(self._world.exports) > 1:
            await self._world.trash.put(export)

    async def _restore(self) -> None:
        volumes = self._world.trash.choose()
        if volumes and self._world.has_room and self._n_names < _MOST_NAMES:
            await self._world.trash.restore(self._random.choice(volumes), self.new_name())

    async def _empty(self) -> None:
        volumes = self._world.trash.choose()
        if volumes:
            await self._world.trash.empty(self._random.choice(volumes))

    # --- Snapshots ---------------------------------------------------------------------------

    async def _snapshot(self) -> None:
        """Of some volumes at once."""
        world = self._world
        exports = [e for e in world.exports.values() if e.is_settled]
        if exports and len(world.snapshots.known) < _MOST_SNAPSHOTS:
            self._n_names += 1
            chosen = self._random.sample(exports, self._random.randint(1, len(exports)))
            await world.snapshots.make(chosen, f"s{self._n_names}")

    async def _drop(self) -> None:
        snapshot = self._world.snapshots.choose(self._random)
        if snapshot is not None:
            await self._world.snapshots.drop(snapshot)

    async def _look(self) -> None:
        snapshot = self._world.snapshots.choose(self._random)
        if snapshot is not None:
            await self._world.snapshots.look(snapshot)

    async def _clone(self) -> None:
        world, snapshot = self._world, self._world.snapshots.choose(self._random)
        if snapshot is None or not world.has_room or self._n_names >= _MOST_NAMES:
            return
        content = world.snapshots.known[key_of(snapshot)]
        if content is not None:
            name = self.new_name()
            await self._add(world.pool.clone(snapshot, name), name, content)

    async def _roll_back(self) -> None:
        """Fence the users of a volume, and make it what one of its snapshots is."""
        world, snapshot = self._world, self._world.snapshots.choose(self._random)
        if snapshot is None:
            return
        export, content = world.exports[snapshot.volume.id], world.snapshots.known[key_of(snapshot)]
        if content is None or not export.is_settled:
            return
        process, server, volume = world.process, world.process.server, snapshot.volume
        assert server is not None
        export.rolling_to = content
        try:
            with server.barred(volume):
                await process.ask(server.fence(volume, "it is rolled back"))
                fenced = export.machine.fenced(world.trace.note("fenced", export.id))
                await process.ask(world.pool.rollback(volume, snapshot))
                for connection in fenced:  # what the server sent before is not heard any more
                    connection.drop("fenced")
                export.begin_anew(content)
                world.n_rollbacks += 1
        except ProcessDied:
            raise  # then recovery tells
        except NbdstoreError:
            export.rolling_to = None
            raise

    async def _flatten(self) -> None:
        export = self._some_export()
        if export is not None:
            await self._world.process.ask(self._world.pool.flatten(self._world.volume(export)))

    # --- Scrubbing ---------------------------------------------------------------------------

    async def _scrub(self) -> None:
        """Verify a volume, then what its newest snapshot has alone, as a scrub does."""
        export = self._some_export()
        if export is None:
            return
        volume = self._world.volume(export)
        await self._verify(volume, None)
        for snapshot in [*volume.snapshots.values()][-1:]:
            await self._verify(snapshot, volume)

    async def _verify(self, image: Image, unlike: Image | None) -> None:
        at = 0
        while (n_bytes := min(_SCRUB_BYTES, image.size - at)) > 0:
            found = await self._world.process.ask(image.verify(at, n_bytes, unlike=unlike))
            for _, fault in found.faults:  # no world has a disk that damages anything
                raise Wrong(f"a scrub takes what is intact for damaged: {fault}")
            at += n_bytes
        self._world.n_scrubs += 1

    # --- The pool ----------------------------------------------------------------------------

    async def _enlarge(self) -> None:
        """Make the pool larger."""
        capacity = self._world.pool.status()["capacity"]
        if capacity < 64 << 20:
            await self._world.process.ask(self._world.pool.grow(capacity + (1 << 20)))

    async def _relieve(self) -> None:
        """Give some of the space back that the ballast takes, or take it again."""
        world = self._world
        ballast = world.pool.volumes[BALLAST]
        at = self._random.randrange(0, ballast.size, 4096)
        length = min(4 << 20, ballast.size - at)
        if self._random.random() < 0.5:
            await world.process.ask(ballast.trim(at, length))
        else:
            await world.process.ask(ballast.write_zeroes(at, length, no_hole=True, fast=True))

    async def _checkpoint(self) -> None:
        await self._world.process.ask(self._world.pool.checkpoint())

    async def _settle(self) -> None:
        """Do what the pool's own housekeeping does after seconds: free slots as soon as may be."""
        await self._world.process.ask(self._world.pool._committer.settle())

    async def _evict(self) -> None:
        """Do what it does for want of memory: forget all leaves that are clean."""
        self._world.pool._services.memory.balance(1 << 20)

    # --- The server --------------------------------------------------------------------------

    def _may_end(self) -> bool:
        self._n_ends += 1
        return self._n_ends <= _MOST_ENDS

    async def _restart(self) -> None:
        if not self._may_end():
            return
        await self._world.restart()

    async def _crash(self) -> None:
        """Let the server die, at once or when it comes to a place."""
        if not self._may_end():
            return
        rng, process = self._random, self._world.process
        power, kind = rng.random() < 0.7, rng.random()
        if kind < 0.2:
            process.die(Death(power))
        elif kind < 0.7:
            process.plan(Death(power, operation=rng.randint(1, rng.choice((5, 50, 500)))))
        else:
            process.plan(Death(power, place=rng.choice(_PLACES), n_times=rng.choice((1, 1, 3))))
