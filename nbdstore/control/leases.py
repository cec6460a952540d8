"""Leases of volumes: taken, released, broken, listed.

Owns the course of each: one at a time, with the volume barred meanwhile, so that no connection
comes in between. What a lease looks like is `nbdstore.lease`'s, closing connections the server's.

The order makes fencing safe at every moment, a kill of the server included::

    bar the volume                      nobody can attach it from here on
    end the connections there are       when that returns, none of their requests is executed
    record the next lease, durably      from here on the old epoch is refused for ever
    lift the bar, answer with the token

A server that dies before the record is durable comes back with the old lease, and the new holder
has not been told anything; one that dies after it comes back with the new one, for which its
holder asks again and gets the same.
"""

from __future__ import annotations

from datetime import UTC, datetime

from nbdstore import lease
from nbdstore.control.contracts import PoolLike, VolumeLike
from nbdstore.control.events import Events
from nbdstore.control.model import LeaseInfo
from nbdstore.control.usage import Usage
from nbdstore.lease import Lease


class Leases:
    """The leases of one pool's volumes.

    Arguments:
        usage: who uses them.
        pool: its ``volumes`` is read anew for each question.
        events: are told of what becomes of leases.
    """

    def __init__(self, usage: Usage, pool: PoolLike, events: Events) -> None:
        self._usage = usage
        self._pool = pool
        self._events = events

    def list(self) -> list[LeaseInfo]:
        """List the leases that are held, by volume, without their tokens."""
        held = [
            (volume, lease.current(volume.properties))
            for _, volume in sorted(self._pool.volumes.items())
        ]
        return [self._describe(volume, found) for volume, found in held if found is not None]

    async def acquire(self, name: str, holder: str, *, force: bool = False) -> LeaseInfo:
        """Lease a volume to `holder`, who alone can attach it from then on; durable on return.

        Who holds it already gets the same lease again. With `force` whoever else holds it, or has
        it attached, is fenced.

        Raises:
            Busy: it is leased to another, attached without a lease, or imported into.
        """
        lease.check_holder(holder)
        async with self._usage.turn:
            volume = self._usage.find(name)
            held = lease.current(volume.properties)
            if held is None or held.holder != holder:
                held = await self._grant(volume, holder, force)
            return self._describe(volume, held, with_token=True)

    async def _grant(self, volume: VolumeLike, holder: str, force: bool) -> Lease:
        leasing = f"leasing it to '{holder}'"
        self._usage.require_no_import(volume, leasing)
        with self._usage.barred(volume):
            if not force:
                self._usage.require_free(volume, leasing, ", or take it with force")
            await self._usage.fence(volume, f"the volume was leased to '{holder}'")
            since = datetime.now(UTC).isoformat(timespec="seconds")
            granted, properties = lease.grant(volume.properties, holder, since)
            await self._usage.set(volume, **properties)
        self._events.tell("lease.granted", volume.name, holder=holder, epoch=granted.epoch)
        return granted

    async def release(self, name: str, holder: str, epoch: int | None = None) -> None:
        """End the lease of `holder`, if it holds one (and if that has `epoch`): durable on return.

        Its connections are ended first. Another's lease, or a newer one, stays.
        """
        async with self._usage.turn:
            volume = self._usage.find(name)
            held = lease.current(volume.properties)
            if held is not None and held.holder == holder and epoch in (None, held.epoch):
                await self.end(volume, f"'{holder}' released its lease")

    async def break_(self, name: str) -> None:
        """End whatever lease there is, whoever holds it, and its connections."""
        async with self._usage.turn:
            volume = self._usage.find(name)
            if lease.current(volume.properties) is not None:
                await self.end(volume, "its lease was broken")

    async def end(self, volume: VolumeLike, why: str) -> None:
        """End the connections of a volume and its lease; to be called by who holds the turn."""
        with self._usage.barred(volume):
            await self._usage.fence(volume, why)
            held = lease.current(volume.properties)
            if held is not None:
                await self._usage.set(volume, **lease.ended())
                about = {"holder": held.holder, "epoch": held.epoch, "why": why}
                self._events.tell("lease.ended", volume.name, **about)

    def _describe(self, volume: VolumeLike, held: Lease, *, with_token: bool = False) -> LeaseInfo:
        connections = [
            item
            for item in self._usage.attachments()
            if item.export == volume.name and item.lease_epoch == held.epoch
        ]
        return LeaseInfo(
            volume=volume.name,
            holder=held.holder,
            epoch=held.epoch,
            since=held.since,
            connections=len(connections),
            token=held.token if with_token else None,
            export=held.export(volume.name) if with_token else None,
        )
