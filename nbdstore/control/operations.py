"""What can be done to an open pool: the one place of its rules, whoever asks.

The control API calls this inside the server; the command line calls it on a pool that it opened
for the moment, with no server. The store checks its own truths (names, sizes, space). Here lives
what the store cannot know: that a volume is attached, that an import runs into it, who may attach.

Concurrency: everything runs on the loop of the pool, and changes of volumes take turns, the
beginning and the end of an import included: what one has checked (the name, that no import runs)
still holds when the store has done it. Only clients do not take turns: one may attach between a
check ("nobody is attached") and the store's answer. It then finds its export gone, like any export
that is deleted under its client; an import looks again once nobody new can attach.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from nbdstore.control import capacity, content
from nbdstore.control.capacity import CapacityReport, GrowthMeter
from nbdstore.control.contracts import PoolLike, ServerLike, VolumeLike
from nbdstore.control.model import AttachmentInfo, PoolInfo, ServerInfo, VolumeInfo
from nbdstore.control.stream import Piece
from nbdstore.errors import AlreadyExists, Busy, InvalidArgument, NotFound, StoreError
from nbdstore.sizes import format_size


class Operations:
    """The operations on one pool.

    Arguments:
        pool: an open pool.
        server: who knows the connections; None when nobody serves the pool.
        server_info: how the server introduces itself.
        growth: how used space developed, for the forecast.
    """

    def __init__(
        self,
        pool: PoolLike,
        server: ServerLike | None = None,
        *,
        server_info: ServerInfo | None = None,
        growth: GrowthMeter | None = None,
    ) -> None:
        self._pool = pool
        self._server = server
        self._server_info = server_info
        self._growth = growth
        self._imports: set[int] = set()
        """Ids of the volumes that are imported into."""
        self._turn = asyncio.Lock()

    # The pool

    def pool(self) -> PoolInfo:
        """Describe the pool."""
        return replace(PoolInfo.from_json(self._pool.status()), server=self._server_info)

    async def grow_pool(self, new_capacity: int) -> PoolInfo:
        """Raise the pool's capacity to `new_capacity` bytes, durably."""
        await self._pool.grow(new_capacity)
        return self.pool()

    async def checkpoint(self) -> PoolInfo:
        """Write a checkpoint now."""
        await self._pool.checkpoint()
        return self.pool()

    def capacity(self) -> CapacityReport:
        """Report the capacity model."""
        pool = self.pool()
        return capacity.report(
            block_size=pool.block_size,
            capacity=pool.capacity,
            used=pool.used,
            free=max(pool.free - pool.reserved, 0),
            mapped=pool.mapped,
            sizes=[volume.size for volume in self._pool.volumes.values()],
            growth=self._growth.growth() if self._growth else None,
        )

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
                in_flight=connection.in_flight,
                bytes_read=connection.bytes_read,
                bytes_written=connection.bytes_written,
            )
            for connection in connections
            if connection.export is not None
        ]

    # Volumes

    def volumes(self) -> list[VolumeInfo]:
        """List all volumes, by name."""
        return [self._describe(volume) for _, volume in sorted(self._pool.volumes.items())]

    def volume(self, name: str) -> VolumeInfo:
        """Describe one volume."""
        return self._describe(self._find(name))

    async def create_volume(self, name: str, size: int, allow: Sequence[str] = ()) -> VolumeInfo:
        """Create a thin volume of `size` bytes, durably; `allow` as in `VolumeInfo`."""
        properties = {"allow": checked_names(allow)} if allow else {}
        return self._describe(await self._pool.create_volume(name, size, properties))

    async def update_volume(
        self,
        name: str,
        *,
        size: int | None = None,
        new_name: str | None = None,
        allow: Sequence[str] | None = None,
        force: bool = False,
    ) -> VolumeInfo:
        """Resize, rename, or change who may attach; what is None stays.

        Each change is durable by itself; when one fails those before it, in the order of the
        arguments, stay done.
        """
        names = None if allow is None else checked_names(allow)
        async with self._turn:
            volume = self._find(name)
            if size is not None and size != volume.size:
                if size < volume.size:
                    self._require_detached(volume, "shrinking it")
                await self._pool.resize_volume(volume, size, force=force)
            if new_name is not None and new_name != name:
                await self._pool.rename_volume(volume, new_name)
            if names is not None:
                await self._set(volume, allow=names)
            return self._describe(volume)

    async def delete_volume(self, name: str) -> None:
        """Delete a volume that nobody is attached to."""
        async with self._turn:
            volume = self._find(name)
            self._require_detached(volume, "deleting it")
            await self._pool.delete_volume(volume)

    # Content

    def read_content(self, name: str) -> tuple[int, AsyncIterator[Piece]]:
        """Return a volume's size and its data in ascending order, holes left out."""
        volume = self._find(name)
        return volume.size, content.read_pieces(volume)

    async def write_content(
        self, name: str, size: int, pieces: AsyncIterator[Piece], *, overwrite: bool = False
    ) -> VolumeInfo:
        """Make `pieces` the content of a volume, creating it if absent; see `VolumeService`.

        While this runs, and for good if it is killed, the volume is marked as `importing`.
        """
        async with self._turn:
            created = name not in self._pool.volumes
            if created:
                volume = await self._pool.create_volume(name, size, {"importing": True})
            else:
                volume = await self._marked(self._importable(name, size, overwrite))
            self._imports.add(volume.id)
        try:
            await content.write_pieces(volume, pieces, erase=not created)
            await volume.flush()
            async with self._turn:
                await self._set(volume, importing=False)
        except BaseException:
            if created:
                await self._discard(volume)
            raise
        finally:
            self._imports.discard(volume.id)
        return self._describe(volume)

    async def _marked(self, volume: VolumeLike) -> VolumeLike:
        """Mark a volume as `importing`, after which nobody can attach it; Busy if one just did."""
        before = bool(volume.properties.get("importing"))
        await self._set(volume, importing=True)
        try:
            self._require_detached(volume, "importing into it")
        except Busy:
            await self._set(volume, importing=before)
            raise
        return volume

    def _importable(self, name: str, size: int, overwrite: bool) -> VolumeLike:
        volume = self._find(name)
        self._require_detached(volume, "importing into it")
        if size > volume.size:
            raise InvalidArgument(
                f"{format_size(size)} ({size} bytes) do not fit into volume '{name}' of "
                f"{format_size(volume.size)} ({volume.size} bytes): resize it first"
            )
        info = self._describe(volume)
        if info.mapped and not overwrite and not info.importing:
            raise AlreadyExists(
                f"volume '{name}' holds {format_size(info.mapped)} of data: import under another "
                "name, or replace what it holds with --overwrite"
            )
        return volume

    async def _discard(self, volume: VolumeLike) -> None:
        """Remove a new volume whose import failed; if that fails too it stays `importing`."""
        try:
            await self._pool.delete_volume(volume)
        except (StoreError, NotFound):
            pass  # the reason is the import's own error, which goes up

    # Shared parts

    def _find(self, name: str) -> VolumeLike:
        volume = self._pool.volumes.get(name)
        if volume is None:
            raise NotFound(f"there is no volume '{name}': 'nbdstore volume list' shows what is")
        return volume

    def _describe(self, volume: VolumeLike) -> VolumeInfo:
        status = volume.status()
        properties = status.pop("properties", None) or {}
        return VolumeInfo.from_json(
            status
            | {
                "allow": list(properties.get("allow", ())),
                "importing": bool(properties.get("importing")),
                "attached": self._server.attached(volume) if self._server else 0,
            }
        )

    async def _set(self, volume: VolumeLike, **properties: object) -> None:
        await self._pool.set_properties(volume, {**volume.properties, **properties})

    def _require_detached(self, volume: VolumeLike, before: str) -> None:
        """Raise Busy, saying who, while the volume is attached or imported into."""
        if volume.id in self._imports:
            raise Busy(f"an import into volume '{volume.name}' is running: wait before {before}")
        n_attached = self._server.attached(volume) if self._server else 0
        if not n_attached:
            return
        peers = sorted({item.peer for item in self.attachments() if item.export == volume.name})
        who = f" by {', '.join(peers[:5])}" if peers else ""
        plural = "s" if n_attached > 1 else ""
        raise Busy(
            f"volume '{volume.name}' is attached{who} ({n_attached} connection{plural}): "
            f"detach it before {before}"
        )


def checked_names(names: Sequence[str]) -> list[str]:
    """Return the names of certificates, or raise InvalidArgument for one that cannot be any."""
    for name in names:
        if not name or not name.isprintable():
            raise InvalidArgument(
                f"{name!r} cannot be the name of a client certificate: give its subject CN or one "
                "of its DNS names"
            )
    return list(names)
