"""What is kept with the volumes of a world: their leases and their limits.

Owns what is known of both.  Whoever takes a lease is alone with the volume from then on: nothing is
executed any more of what others had sent, and who shows an older lease is refused, whoever dies.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from nbdstore import lease, qos
from nbdstore.protocol.agreement import ReplyMode
from nbdstore.store import Volume
from tests.simulation.connection import Connection, Refused
from tests.simulation.export import Export
from tests.simulation.oracle import Wrong

if TYPE_CHECKING:
    from tests.simulation.world import World

MANY_IOPS: Final = 10**6
"""So many requests per second that nobody is held back."""


@dataclass(frozen=True)
class Kept:
    """What is kept with a volume.

    Attributes:
        holder, epoch: of the lease that is held, if one is, and of the newest there was.
        claim: what its holder shows in the export's name.
    """

    holder: str | None = None
    epoch: int = 0
    iops: int = 0
    claim: str = ""

    @classmethod
    def of(cls, volume: Volume) -> Kept:
        """Read it."""
        properties = volume.properties
        held = lease.current(properties)
        return cls(
            holder=held and held.holder,
            epoch=properties.get("lease_epoch", 0),
            iops=qos.current(properties).iops,
            claim=held.export("") if held else "",
        )

    def is_like(self, other: Kept) -> bool:
        """Tell whether it is the same, whoever has been told the token."""
        return replace(self, claim="") == replace(other, claim="")


class Keeping:
    """What is known of it in one world.

    Attributes:
        n_leases, n_limits: taken and set.
        n_turned_away: who came with an older lease.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._known: dict[int, Kept] = {}
        self._coming: dict[int, Kept] = {}
        self.n_leases = self.n_limits = self.n_turned_away = 0

    def claim(self, volume_id: int) -> str:
        """What has to follow the name of a volume that is leased."""
        return self._known.get(volume_id, Kept()).claim

    async def take_lease(self, export: Export) -> None:
        """Lease a volume to somebody else than who has it now."""
        before = self._known.get(export.id, Kept())
        after = replace(before, holder=f"node-{before.epoch + 1}", epoch=before.epoch + 1)
        leases, name = self._world.process.operations.leases, self._world.volume(export).name
        await self._fencing(export, leases.acquire(name, str(after.holder), force=True), after)
        self.n_leases += 1
        if before.claim:
            await self._turn_away(name + before.claim)

    async def end_lease(self, export: Export) -> None:
        """End the lease of a volume, if there is one."""
        before = self._known.get(export.id, Kept())
        if before.holder is not None:
            leases, name = self._world.process.operations.leases, self._world.volume(export).name
            await self._fencing(export, leases.break_(name), replace(before, holder=None))
            await self._turn_away(name + before.claim)

    async def limit(self, export: Export) -> None:
        """Set another limit."""
        before = self._known.get(export.id, Kept())
        after = replace(before, iops=max(before.iops, MANY_IOPS) + 1)
        name = self._world.volume(export).name
        change = self._world.process.operations.update_volume(name, iops=after.iops)
        await self._change(export, change, after)
        self.n_limits += 1

    async def _fencing(self, export: Export, change: Coroutine[Any, Any, Any], after: Kept) -> None:
        """Make a change that ends all connections of an export."""
        export.leasing = True
        try:
            await self._change(export, change, after)
            connections = export.machine.fenced(self._world.trace.note("leased", export.id))
            for connection in connections:  # what the server sent before is not heard any more
                connection.drop("fenced")
        finally:
            if self._world.process.alive:
                export.leasing = False

    async def _change(self, export: Export, change: Coroutine[Any, Any, Any], after: Kept) -> None:
        self._coming[export.id] = after  # until it is done, or recovery has told
        await self._world.process.ask(change)
        del self._coming[export.id]
        found = Kept.of(self._world.volume(export))
        if not found.is_like(after):
            raise Wrong(f"volume {export.id} has {found}, not {after}")
        self._know(export.id, found)

    def _know(self, volume_id: int, kept: Kept) -> None:
        self._known[volume_id] = kept
        if volume_id in self._world.exports:
            self._world.exports[volume_id].claim = kept.claim

    async def _turn_away(self, name: str) -> None:
        """Come with a lease that has ended."""
        try:
            sock = await self._world.network.connect("late")
            connection = Connection(self._world, sock, ReplyMode.SIMPLE)
            await connection.shake_hands(name)
        except Refused:
            self.n_turned_away += 1
        except OSError:
            pass  # the network, or the server has died
        else:
            connection.drop("it should have been refused")
            raise Wrong(f"{name} can be attached, and its lease has ended")

    def compare(self, found: Mapping[int, Kept]) -> None:
        """Assert that what a server came up with may be, by the ids of volumes."""
        for volume_id, kept in found.items():
            before = self._known.get(volume_id, Kept())
            allowed = [before, self._coming.get(volume_id, before)]
            if not any(kept.is_like(one) for one in allowed):
                raise Wrong(f"volume {volume_id} has kept {kept}, not one of {allowed}")
            self._know(volume_id, kept)
        self._coming.clear()
        for export in self._world.exports.values():
            export.leasing = False
