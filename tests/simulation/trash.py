"""The trash of a world: volumes that nobody uses, and that must be what they were.

Owns what is known of them: what each holds, whether its deletion has begun, and for whose reason.
A volume is fenced before it is put there; what had been acknowledged by then is in it for good.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nbdstore.errors import NbdstoreError, NotFound
from nbdstore.store import Pool, Volume
from tests.simulation.export import Export
from tests.simulation.oracle import Stamps, Wrong, stamps_of
from tests.simulation.pool_process import ProcessDied

if TYPE_CHECKING:
    from tests.simulation.world import World

LONG_S = 3600.0
"""Nothing rests in the trash of a world for so long."""


@dataclass(eq=False)
class Trashed:
    """A volume in the trash.

    Attributes:
        export: what it was, with its history.
        content: None = nobody has looked yet.
        is_going: its deletion has begun, so it may be gone, and its snapshots before it.
        new_name: it is being restored as.
    """

    export: Export
    content: Stamps | None = None
    is_going: bool = False
    new_name: str | None = None

    def compare(self, found: Stamps, now: int) -> None:
        """Assert that it holds what it must."""
        if self.content is None:
            self.export.history.check_crash(found, now, lossless=True)
            self.content = found
        elif not np.array_equal(self.content, found):
            raise Wrong(f"volume {self.export.id} has changed in the trash")


class Trash:
    """See the module.

    Attributes:
        held: by the ids of volumes.
        n_put, n_restored, n_emptied, n_reclaimed: figures.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.held: dict[int, Trashed] = {}
        self._begun: set[int] = set()
        """What the process that lives now has begun to delete by itself."""
        self.n_put = self.n_restored = self.n_emptied = self.n_reclaimed = 0

    # --- Changes -----------------------------------------------------------------------------

    async def put(self, export: Export) -> None:
        """Fence the users of a volume, and put it into the trash."""
        world, process, server = self._world, self._world.process, self._world.process.server
        assert server is not None
        volume = world.volume(export)
        export.trashing = True
        try:
            with server.barred(volume):
                await process.ask(server.fence(volume, "it is deleted"))
                fenced = export.machine.fenced(world.trace.note("fenced", export.id))
                await process.ask(world.pool.trash_volume(volume))
        except ProcessDied:
            raise  # then recovery tells
        except NbdstoreError:
            export.trashing = False
            raise
        for connection in fenced:  # what the server sent before is not heard any more
            connection.drop("fenced")
        self._take(export)
        self.n_put += 1
        await self._look(volume)

    def _take(self, export: Export) -> None:
        export.trashing = False
        del self._world.exports[export.id]
        export.machine.stop()
        # The pool may have begun to delete it already.
        self.held[export.id] = Trashed(export, is_going=export.leaving)

    async def _look(self, volume: Volume) -> None:
        """Compare what one holds, if it is there yet."""
        held = self.held[volume.id]
        try:
            raw = await self._world.process.ask(self._world.plan.spread.read(volume))
        except NotFound:
            if not held.is_going:
                raise
            return
        held.compare(stamps_of(raw), self._world.trace.now)

    async def restore(self, volume: Volume, name: str) -> None:
        """Take one out, as `name`: it is used again."""
        held = self.held[volume.id]
        if held.content is None:
            return  # the disk made trouble
        held.new_name = name
        try:
            await self._world.process.ask(self._world.pool.restore_volume(volume, name))
        except ProcessDied:
            raise
        except NbdstoreError:
            held.new_name = None
            raise
        self._give_back(held, volume.id, name)
        self._world.snapshots.volume_kept(volume)
        self.n_restored += 1

    def _give_back(self, held: Trashed, volume_id: int, name: str) -> None:
        del self.held[volume_id]
        assert held.content is not None
        self._world.adopt(volume_id, name, held.content)

    async def empty(self, volume: Volume) -> None:
        """Delete one for good."""
        held = self.held[volume.id]
        held.is_going = True
        try:
            await self._world.process.ask(self._world.pool.delete_volume(volume))
        except ProcessDied:
            raise
        except NbdstoreError:
            self._world.snapshots.volume_kept(volume)
            raise
        self.n_emptied += 1
        self._gone(volume.id)

    def _gone(self, volume_id: int) -> None:
        self.held.pop(volume_id, None)
        self._world.snapshots.volume_gone(volume_id)

    def watch(self, pool: Pool) -> None:
        """Take note of what the pool deletes by itself, which it must have a reason for."""
        delete, plan = pool._trash._delete, self._world.plan
        self._begun.clear()

        def noted(volume: Volume, why: str) -> None:
            if why == "its time in the trash is up":
                is_allowed = plan.options.trash_keep_s < LONG_S
            else:
                is_allowed = plan.may_fill
            if not is_allowed:
                self._world.fail(Wrong(f"volume {volume.id} is deleted since {why}"))
            self._world.trace.note("from the trash:", volume.id, why)
            held = self.held.get(volume.id)
            if held is not None:  # else it is being put there, which nobody has been told yet
                held.is_going = True
            else:
                self._world.exports[volume.id].leaving = True
            self._begun.add(volume.id)
            self.n_reclaimed += 1
            delete(volume, why)

        pool._trash._delete = noted  # type: ignore[method-assign]

    def goes(self, volume_id: int) -> bool:
        """Tell whether a volume that is no export may be gone."""
        held = self.held.get(volume_id)
        return held is None or held.is_going

    # --- What is there -----------------------------------------------------------------------

    def choose(self) -> list[Volume]:
        """Those that are there and stay, as far as anybody knows."""
        if self._world.process.has_failed:
            return []  # nothing that it says is for good
        there = [volume for volume in self._world.pool.trash if volume.id in self.held]
        for volume_id in self.held.keys() - {volume.id for volume in there}:
            if not self.held[volume_id].is_going:
                raise Wrong(f"volume {volume_id} is not in the trash any more")
            self._gone(volume_id)
        return there

    async def look_at_all(self) -> None:
        """Compare all that is in the trash."""
        for volume in self.choose():
            await self._look(volume)

    def compare(
        self, found: Mapping[int, Stamps], alive: dict[int, tuple[str, int, Stamps]]
    ) -> None:
        """Assert that what a server came up with may be.

        Arguments:
            found: the content of what is in the trash, by id.
            alive: what the other volumes hold; those that were restored are taken out of it.
        """
        now = self._world.trace.now
        for volume_id, stamps in found.items():
            if volume_id not in self.held:
                export = self._world.exports.get(volume_id)
                if export is None or not export.trashing:
                    raise Wrong(f"volume {volume_id} has come into the trash from nowhere")
                self._take(export)
            self.held[volume_id].compare(stamps, now)
        for volume_id, held in [*self.held.items()]:
            if volume_id in alive and alive[volume_id][0] == held.new_name:
                name, _, stamps = alive.pop(volume_id)
                held.compare(stamps, now)
                self._give_back(held, volume_id, name)
            elif volume_id not in found:
                if not held.is_going:
                    raise Wrong(f"volume {volume_id} is gone from the trash")
                self._gone(volume_id)
            held.is_going, held.new_name = volume_id in self._begun, None
