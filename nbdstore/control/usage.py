"""Who uses a volume now - attached, leased, imported into - and what that forbids.

Owns the turns that changes of volumes take, and the refusals that name who is in the way. Knows
nothing of what the changes do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from nbdstore import lease
from nbdstore.control.contracts import MeasuresLike, PoolLike, ServerLike, VolumeLike
from nbdstore.control.model import AttachmentInfo
from nbdstore.errors import Busy, NotFound

SHOWN_PEERS = 5


class Usage:
    """The use of the volumes of one pool.

    Arguments:
        pool: an open pool.
        server: who knows the connections; None when nobody serves the pool.

    Attributes:
        turn: held while a volume is changed.
        imports: ids of the volumes that are imported into.
    """

    def __init__(self, pool: PoolLike, server: ServerLike | None) -> None:
        self.turn = asyncio.Lock()
        self.imports: set[int] = set()
        self._shrinking: set[int] = set()
        self._pool = pool
        self._server = server

    def find(self, name: str) -> VolumeLike:
        """Return the volume of that name, or raise NotFound."""
        volume = self._pool.volumes.get(name)
        if volume is not None:
            return volume
        if any(trashed.name == name for trashed in self._pool.trash):
            raise NotFound(
                f"volume '{name}' was deleted: 'nbdstore trash restore {name}' brings it back, "
                f"'nbdstore trash empty {name}' deletes it for good"
            )
        if name in self._pool.snapshots:
            raise NotFound(
                f"'{name}' is a snapshot, where a volume is wanted: clients can attach it, "
                "'nbdstore send' copies it, and 'nbdstore clone' makes a volume of it"
            )
        raise NotFound(f"there is no volume '{name:.300}': 'nbdstore volume list' shows what is")

    def find_again(self, volume: VolumeLike) -> VolumeLike:
        """Return a volume that was found before others had a turn; NotFound if it is gone since."""
        if self._pool.volumes.get(volume.name) is not volume:
            raise NotFound(f"volume '{volume.name}' was deleted meanwhile")
        return volume

    async def set(self, volume: VolumeLike, **properties: object) -> None:
        """Change some of a volume's properties, durably."""
        await self._pool.set_properties(volume, {**volume.properties, **properties})

    def attached(self, volume: VolumeLike) -> int:
        """Count the connections that have a volume attached."""
        return self._server.attached(volume) if self._server else 0

    def measures(self) -> Sequence[MeasuresLike]:
        """Tell what clients did to the volumes and snapshots since the server started."""
        if self._server is None:
            return []
        return self._server.measures([*self._pool.volumes.values(), *self._pool.snapshots.values()])

    def attachments(self) -> list[AttachmentInfo]:
        """List the NBD connections that have an export."""
        connections = self._server.connections if self._server else ()
        return [
            AttachmentInfo(
                id=connection.id,
                peer=connection.peer,
                export=connection.export,
                since=str(connection.since),
                read_only=connection.read_only,
                tls_name=connection.tls_name,
                holder=connection.holder,
                lease_epoch=connection.lease_epoch,
                age_s=round(connection.age_s, 1),
                in_flight=connection.in_flight,
                bytes_read=connection.bytes_read,
                bytes_written=connection.bytes_written,
                requests_per_s=round(connection.requests_per_s, 1),
                read_per_s=round(connection.read_per_s),
                written_per_s=round(connection.written_per_s),
            )
            for connection in connections
            if connection.export is not None
        ]

    # Refusals

    def require_free(self, volume: VolumeLike, before: str, or_else: str = "") -> None:
        """Raise Busy, saying who, while a volume is leased, attached or imported into.

        Arguments:
            or_else: what else than detaching it would do, if anything.
        """
        self.require_no_import(volume, before)
        self.require_unleased(volume, before + or_else)
        self.require_detached(volume, before + or_else)

    def require_no_import(self, volume: VolumeLike, before: str) -> None:
        """Raise Busy while an import into a volume runs, or as long as it is half received.

        And while it is being shrunk, which forbids as much.
        """
        name = volume.name
        self.require_not_shrinking(volume, before)
        if volume.id in self.imports:
            raise Busy(f"an import into volume '{name}' is running: wait before {before}")
        if volume.properties.get("receiving"):
            raise Busy(
                f"volume '{name}' is half received: receive the rest, or give it up with "
                f"'nbdstore receive --abort {name}', before {before}"
            )

    def require_not_shrinking(self, volume: VolumeLike, before: str) -> None:
        """Raise Busy while a volume is being shrunk."""
        if volume.id in self._shrinking:
            raise Busy(f"volume '{volume.name}' is being shrunk: wait for that before {before}")

    def require_unleased(self, volume: VolumeLike, before: str) -> None:
        """Raise Busy, saying to whom, while a volume is leased."""
        held = lease.current(volume.properties)
        if held is not None:
            raise Busy(
                f"volume '{volume.name}' is leased to {held}, with {self._connections(volume)}: "
                f"detach it there before {before}; 'nbdstore lease break {volume.name}' ends the "
                "lease of a holder that is gone"
            )

    def require_detached(self, volume: VolumeLike, before: str) -> None:
        """Raise Busy, saying by whom, while a volume or snapshot is attached."""
        if not self.attached(volume):
            return
        peers = sorted({item.peer for item in self.attachments() if item.export == volume.name})
        who = f" by {', '.join(peers[:SHOWN_PEERS])}" if peers else ""
        kind = "snapshot" if "@" in volume.name else "volume"
        raise Busy(
            f"{kind} '{volume.name}' is attached{who} ({self._connections(volume)}): "
            f"detach it before {before}"
        )

    def _connections(self, volume: VolumeLike) -> str:
        n_attached = self.attached(volume)
        return f"{n_attached or 'no'} connection{'' if n_attached == 1 else 's'}"

    def grown(self, volume: VolumeLike) -> None:
        """Let those who have a volume attached use its new end."""
        if self._server is not None:
            self._server.grown(volume)

    def limits_changed(self, volume: VolumeLike) -> None:
        """Hold those who have a volume attached to its limits of now."""
        if self._server is not None:
            self._server.limits_changed(volume)

    # Clearing the way

    def barred(self, volume: VolumeLike) -> AbstractContextManager[None]:
        """Let nobody attach a volume while the context lasts; who holds `turn` may do this."""
        return self._server.barred(volume) if self._server else nullcontext()

    @contextmanager
    def shrinking(self, volume: VolumeLike) -> Iterator[None]:
        """Let nobody attach a volume or change its data while this lasts, also without `turn`.

        Who holds `turn` may begin this.
        """
        with self.barred(volume):
            self.require_free(volume, "shrinking it")
            self._shrinking.add(volume.id)
            try:
                yield
            finally:
                self._shrinking.discard(volume.id)

    async def fence(self, volume: VolumeLike, why: str) -> None:
        """End all connections of a volume: on return none of their requests is executed any more.

        Only while the volume is barred nobody can come in their place.
        """
        if self._server is not None:
            await self._server.fence(volume, why)

    async def disconnect(self, connection_id: int) -> None:
        """End one connection as `fence` does, if there is one of that id."""
        if self._server is not None:
            await self._server.disconnect(connection_id, "an administrator disconnected it")
