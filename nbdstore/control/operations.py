"""What can be done to an open pool: the one place of its rules, whoever asks.

The control API calls this inside the server; the command line calls it on a pool that it opened
for the moment, with no server. The store checks its own truths (names, sizes, space). Here lives
what the store cannot know: that an import runs into a volume, who may attach it. That it is in use
forbids some of it (`usage`), and a lease decides who uses it (`leases`).

Concurrency: everything runs on the loop of the pool, and changes of volumes take turns, the
beginning and the end of an import included: what one has checked (the name, that no import runs)
still holds when the store has done it. What takes long - deletions, shrinks - leaves its turn to
others once nobody can use any more what it changes. Only clients do not take turns: one may attach
between a check ("nobody is attached") and the store's answer. It then finds its export gone, like
any export that is deleted under its client; an import looks again once nobody new can attach.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Unpack
from uuid import UUID

from nbdstore import __version__, lease, qos
from nbdstore.control import capacity, content, metrics, space
from nbdstore.control.backups import Backups
from nbdstore.control.capacity import CapacityReport, GrowthMeter
from nbdstore.control.changes import Deletion, VolumeChanges
from nbdstore.control.contracts import PoolLike, ServerLike, VolumeLike
from nbdstore.control.events import Events
from nbdstore.control.identity import checked_uuid, in_trash, is_gone, uuid_of
from nbdstore.control.leases import Leases
from nbdstore.control.long_operations import LongOperations
from nbdstore.control.model import AttachmentInfo, PoolInfo, ServerInfo, VolumeInfo
from nbdstore.control.scrub import Progress, Scrubber
from nbdstore.control.snapshots import Snapshots, require_no_snapshots
from nbdstore.control.stream import Piece
from nbdstore.control.usage import Usage
from nbdstore.errors import AlreadyExists, Busy, InvalidArgument, NotFound, StoreError
from nbdstore.sizes import exact_size, format_size

MAX_NAMES_BYTES = 8 << 10
"""Of JSON, all names that may attach a volume; its lease, and what an import, a receive or a scrub
record, must fit the volume's properties beside them."""


class Operations:
    """The operations on one pool.

    Arguments:
        pool: an open pool.
        server: who knows the connections; None when nobody serves the pool.
        growth: how used space developed, for the forecast.
    """

    def __init__(
        self,
        pool: PoolLike,
        server: ServerLike | None = None,
        *,
        growth: GrowthMeter | None = None,
    ) -> None:
        self._pool = pool
        self._growth = growth
        self.server_info: ServerInfo | None = None
        """How the server introduces itself, once it listens."""
        self._usage = Usage(pool, server)
        self.events = Events()
        """What happens to it."""
        self.leases = Leases(self._usage, pool, self.events)
        """The leases of its volumes."""
        self.running = LongOperations(self.events)
        """Its operations that take long."""
        self.scrubs = Scrubber(pool, self._usage, self.running)
        self.snapshots = Snapshots(self._usage, pool, self.leases, self.running, self.events)
        """Its snapshots, and its trash."""
        self.backups = Backups(self._usage, pool, self.snapshots, self.running, self.events)
        """Changed blocks and backups."""

    async def begin(self) -> None:
        """Complete what a crash has left between two steps; before anybody can attach a volume."""
        await self.backups.receiving.unmark_received()

    async def close(self) -> None:
        """Stop what takes long, where it can go on later; before the pool is closed."""
        await self.running.close()

    # The pool

    def pool(self) -> PoolInfo:
        """Describe the pool."""
        return replace(PoolInfo.from_json(self._pool.status()), server=self.server_info)

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

    def metrics(self) -> str:
        """Tell the numbers of the pool and its volumes in Prometheus' text format."""
        measures = self._usage.measures()
        return metrics.page(__version__, self._pool.status(), self.volumes(), measures)

    async def space(self) -> space.SpaceReport:
        """Tell where the space is, image by image."""
        return await space.report(self._pool)

    def attachments(self) -> list[AttachmentInfo]:
        """List the NBD connections that have an export."""
        return self._usage.attachments()

    async def disconnect(self, connection_id: int) -> None:
        """End a connection, if there is one of that id; what it has not written it never will."""
        await self._usage.disconnect(connection_id)

    # Volumes

    def volumes(self) -> list[VolumeInfo]:
        """List all volumes, by name."""
        return [self._describe(volume) for _, volume in sorted(self._pool.volumes.items())]

    def volume(self, name: str) -> VolumeInfo:
        """Describe one volume."""
        return self._describe(self._usage.find(name))

    async def create_volume(
        self, name: str, size: int, allow: Sequence[str] = (), *, uuid: str | None = None
    ) -> VolumeInfo:
        """Create a thin volume of `size` bytes, durably; `allow` as in `VolumeInfo`.

        With the `uuid` of a volume that has this name and size, made by a call before, return that.
        """
        info, _ = await self.create_volume_once(name, size, allow, uuid=uuid)
        return info

    async def create_volume_once(
        self, name: str, size: int, allow: Sequence[str] = (), *, uuid: str | None = None
    ) -> tuple[VolumeInfo, bool]:
        """Create a volume as `create_volume`; tell whether it is new."""
        wanted = None if uuid is None else checked_uuid(uuid)
        properties = self._allowing(allow, name, wanted)
        async with self._usage.turn:
            there = self._pool.volumes.get(name)
            if (
                there is not None
                and wanted is not None
                and uuid_of(there) == wanted
                and there.size == size
            ):
                return self._describe(there), False
            volume = await self._pool.create_volume(name, size, properties, uuid=wanted)
            self.events.tell("volume.created", name, size=size)
            return self._describe(volume), True

    def _allowing(self, allow: Sequence[str], name: str, wanted: UUID | None) -> dict[str, Any]:
        """The properties of a volume to be made; if a call before has made it, of any length."""
        there = self._pool.volumes.get(name)
        is_made = there is not None and wanted is not None and uuid_of(there) == wanted
        return {"allow": checked_names(allow, allow if is_made else ())} if allow else {}

    async def update_volume(self, name: str, **changes: Unpack[VolumeChanges]) -> VolumeInfo:
        """Resize, rename, change who may attach or how fast.

        Each change is durable by itself; when one fails those before it, in the order of
        `VolumeChanges`, stay done.
        """
        size, new_name, allow = (changes.get("size"), changes.get("new_name"), changes.get("allow"))
        asked = (changes.get("iops"), changes.get("bandwidth"), changes.get("burst_s"))
        # What makes no sense is refused before anything is done.
        properties = self._usage.find(name).properties
        qos.current(properties).changed(*asked)
        names = None if allow is None else checked_names(allow, properties.get("allow", ()))
        resized = None
        if size is not None:
            shrink, force = changes.get("shrink", False), changes.get("force", False)
            resized = await self._resize(name, size, shrink=shrink, force=force)
        async with self._usage.turn:
            # Others had their turns: another volume may have the name by now.
            volume = self._usage.find_again(resized or self._usage.find(name))
            name = volume.name
            limits = qos.current(volume.properties).changed(*asked)
            if new_name is not None and new_name != name:
                # Its holder could not come back: it knows the volume by its name.
                self._usage.require_unleased(volume, "renaming it")
                await self._pool.rename_volume(volume, new_name)
            if names is not None:
                await self._usage.set(volume, allow=names)
            if limits != qos.current(volume.properties):
                await self._usage.set(volume, **qos.recorded(limits))
                self._usage.limits_changed(volume)
            self._tell_changed(name, changes)
            return self._describe(volume)

    def _tell_changed(self, name: str, changes: VolumeChanges) -> None:
        told = {
            "name" if key == "new_name" else key: value
            for key, value in changes.items()
            if value is not None and key not in ("shrink", "force")
        }
        self.events.tell("volume.changed", name, **told)

    async def _resize(self, name: str, size: int, *, shrink: bool, force: bool) -> VolumeLike:
        with ExitStack() as shrinking:
            async with self._usage.turn:
                volume = self._usage.find(name)
                if size == volume.size:
                    return volume
                self._usage.require_no_import(volume, "resizing it")
                if size > volume.size:
                    await self._pool.resize_volume(volume, size)
                    self._usage.grown(volume)
                    return volume
                if not shrink:
                    raise InvalidArgument(
                        f"volume '{name}' has {exact_size(volume.size)}, more than "
                        f"{exact_size(size)}: if its end shall be cut off, say so with --shrink"
                    )
                shrinking.enter_context(self._usage.shrinking(volume))
            # This may take long; nobody uses the volume, and others may have their turns.
            await self._pool.resize_volume(volume, size, force=force)
            return volume

    async def delete_volume(self, name: str, **how: Unpack[Deletion]) -> None:
        """Put a volume that nobody uses into the trash, or delete it for good.

        If the latter, with its snapshots, is cut short or fails, what is left is in the trash, and
        with its uuid the same call goes on with that.
        """
        snapshots, now = how.get("snapshots", False), how.get("now", False)
        uuid = how.get("uuid")
        wanted = None if uuid is None else checked_uuid(uuid)
        async with self._usage.turn:
            if wanted is not None and is_gone(self._pool, name, wanted):
                volume = in_trash(self._pool, name, wanted) if now else None
                if volume is not None and not snapshots:
                    require_no_snapshots(volume)
                rest = volume is not None
            else:
                volume = self._usage.find(name)
                rest = await self._delete(
                    volume, fence=how.get("fence", False), snapshots=snapshots, now=now
                )
        if rest:
            await self._pool.delete_volume(volume)

    async def _delete(self, volume: VolumeLike, *, fence: bool, snapshots: bool, now: bool) -> bool:
        """Delete a volume that is not in the trash; True if it is there now, and must not stay."""
        if fence:
            self._usage.require_no_import(volume, "deleting it")
            await self.leases.end(volume, "the volume is deleted")
        self._usage.require_free(volume, "deleting it", ", or end that with --fence")
        name = volume.name
        rest = await self.snapshots.discard(volume, snapshots=snapshots, now=now)
        self.events.tell("volume.deleted", name)
        return rest

    # Volumes and snapshots

    async def rollback(self, name: str, *, fence: bool = False) -> VolumeInfo:
        """Make a volume what its snapshot ``VOLUME@NAME`` is; see `VolumeService`."""
        info = self._describe(await self.snapshots.rollback(name, fence=fence))
        self.events.tell("volume.changed", info.name, rolled_back_to=name)
        return info

    async def clone(
        self, name: str, new_name: str, allow: Sequence[str] = (), *, uuid: str | None = None
    ) -> VolumeInfo:
        """Make a volume that begins as a snapshot, durably; `allow` as in `VolumeInfo`.

        With the `uuid` of the clone of this name, made by a call before, return that.
        """
        info, _ = await self.clone_once(name, new_name, allow, uuid=uuid)
        return info

    async def clone_once(
        self, name: str, new_name: str, allow: Sequence[str] = (), *, uuid: str | None = None
    ) -> tuple[VolumeInfo, bool]:
        """Clone as `clone`; tell whether it is new."""
        wanted = None if uuid is None else checked_uuid(uuid)
        properties = self._allowing(allow, new_name, wanted)
        volume, is_new = await self.snapshots.clone(name, new_name, properties, wanted)
        info = self._describe(volume)
        if is_new:
            self.events.tell("volume.created", info.name, size=info.size)
        return info, is_new

    async def restore(self, which: str, name: str | None = None) -> VolumeInfo:
        """Take a volume out of the trash."""
        info = self._describe(await self.snapshots.restore(which, name))
        self.events.tell("volume.created", info.name, size=info.size)
        return info

    # Content

    def read_content(self, name: str) -> tuple[int, AsyncIterator[Piece]]:
        """Return a volume's size and its data in ascending order, holes left out."""
        volume = self._usage.find(name)
        return volume.size, content.read_pieces(volume)

    async def write_content(
        self, name: str, size: int, pieces: AsyncIterator[Piece], *, overwrite: bool = False
    ) -> VolumeInfo:
        """Make `pieces` the content of a volume, creating it if absent; see `VolumeService`.

        While this runs, and for good if it is killed, the volume is marked as `importing`.
        """
        async with self._usage.turn:
            created = name not in self._pool.volumes
            if created:
                volume = await self._pool.create_volume(name, size, {"importing": True})
            else:
                volume = await self._marked(self._importable(name, size, overwrite))
            self._usage.imports.add(volume.id)
        try:
            await content.write_pieces(volume, pieces, erase=not created)
            await volume.flush()
            async with self._usage.turn:
                await self._usage.set(volume, importing=False)
        except BaseException:
            if created:
                await self._discard(volume)
            raise
        finally:
            self._usage.imports.discard(volume.id)
        info = self._describe(volume)
        self.events.tell("volume.imported", name, size=info.size, mapped=info.mapped)
        return info

    async def _marked(self, volume: VolumeLike) -> VolumeLike:
        """Mark a volume as `importing`, after which nobody can attach it; Busy if one just did."""
        before = bool(volume.properties.get("importing"))
        await self._usage.set(volume, importing=True)
        try:
            self._usage.require_free(volume, "importing into it")
        except Busy:
            await self._usage.set(volume, importing=before)
            raise
        return volume

    def _importable(self, name: str, size: int, overwrite: bool) -> VolumeLike:
        volume = self._usage.find(name)
        self._usage.require_free(volume, "importing into it")
        if size > volume.size:
            raise InvalidArgument(
                f"{exact_size(size)} do not fit into volume '{name}' of {exact_size(volume.size)}: "
                "resize it first"
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

    def _describe(self, volume: VolumeLike) -> VolumeInfo:
        status = volume.status()
        properties = status.pop("properties", None) or {}
        held, limits = lease.current(properties), qos.current(properties)
        scrub = Progress.of(volume)
        origin = self._pool.origin(volume)
        return VolumeInfo.from_json(
            status
            | {
                "written": bool(status.get("written") or status["mapped"] or status["reserved"]),
                "origin": origin.name if origin else None,
                "shared": status["mapped"] - status.get("own", status["mapped"]),
                "allow": list(properties.get("allow", ())),
                "importing": bool(properties.get("importing")),
                "receiving": (properties.get("receiving") or {}).get("name"),
                "iops": limits.iops,
                "bandwidth": limits.bandwidth,
                "burst_s": limits.burst_s,
                "attached": self._usage.attached(volume),
                "lease_holder": held.holder if held else None,
                "lease_since": held.since if held else None,
                "scrubbed": scrub.done if scrub else None,
                "scrub_damaged": scrub.damaged if scrub else 0,
            }
        )


def checked_names(names: Sequence[str], kept: Sequence[str] = ()) -> list[str]:
    """Return the names of certificates, or raise InvalidArgument for one that cannot be any.

    Arguments:
        kept: names that the volume has; a list of some of these may be too long, since pools from
            before there was a limit have such, which must get shorter somehow.
    """
    for name in names:
        if not name or not name.isprintable():
            raise InvalidArgument(
                f"{name!r} cannot be the name of a client certificate: give its subject CN or one "
                "of its DNS names"
            )
    is_part = Counter(names) <= Counter(kept)
    if not is_part and len(json.dumps(list(names))) > MAX_NAMES_BYTES:
        raise InvalidArgument(
            f"{len(names)} names of client certificates are more than "
            f"{exact_size(MAX_NAMES_BYTES)} together: give clients certificates with a name in "
            "common, and name that"
        )
    return list(names)
