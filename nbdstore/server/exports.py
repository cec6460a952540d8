"""Exports: which volumes a client may see, under which names, and with which abilities.

Joins the names of the protocol to the volumes of a pool, and is the only place that decides about
access. Nothing is cached: a volume that is created, resized, renamed or deleted is seen by the
next option. A connection keeps the size it negotiated.

A volume's property ``allow`` lists the names (subject CN or DNS SAN) of client certificates that
may attach it; empty means that everybody may whom the server lets in. A volume that is not
allowed to a client is not listed to it. Nor is one with the property ``importing``, which nobody
may attach: what it holds is not whole yet, and would change under its client.

A snapshot is an export of its own, ``VOLUME@NAME``, read-only, for whoever may attach its volume.
What has changed since a snapshot is told of its volume, and of its younger snapshots, as the
metadata context ``qemu:dirty-bitmap:NAME``.

A volume that is leased (`nbdstore.lease`) is attached by showing that lease in the export's name;
without it, or with one that has ended, it is refused. It is not listed, since clients that list
exports try each by its plain name, and nbdinfo gives up at the first that it does not get.
While a lease changes hands, or the volume is shrunk, it is barred: nobody may attach it, so that
whoever grants the next lease can first end all connections of before, and knows that there are no
others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nbdstore import lease
from nbdstore.lease import Claim, Lease
from nbdstore.protocol.agreement import (
    CONTEXTS,
    DIRTY_BITMAP,
    MetaContext,
    Offer,
    OptionRefused,
    TlsMode,
)
from nbdstore.protocol.constants import OptionReply, TransmissionFlag
from nbdstore.server.options import ServerOptions
from nbdstore.store import Image, Snapshot, Volume

READ_ONLY_FLAGS = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.READ_ONLY
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.CAN_MULTI_CONN
    | TransmissionFlag.SEND_CACHE
)

READ_WRITE_FLAGS = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.CAN_MULTI_CONN
    | TransmissionFlag.SEND_CACHE
    | TransmissionFlag.SEND_FAST_ZERO
)
"""CAN_MULTI_CONN is honest: all connections share one volume object, a read sees every write that
was acknowledged on any of them, and a flush covers all of them. FAST_ZERO is, too: zeroing is an
operation on the map, and where it would have to wait for space it fails at once."""


@dataclass(frozen=True)
class Identity:
    """Who a client has proved to be.

    Arguments:
        tls: whether the connection is under TLS.
        names: subject CN and DNS SANs of its verified certificate.
    """

    tls: bool = False
    names: tuple[str, ...] = ()

    @property
    def name(self) -> str | None:
        """The name for logs."""
        return self.names[0] if self.names else None


@dataclass(frozen=True, kw_only=True)
class VolumeOffer(Offer):
    """An offer that knows its volume, or snapshot, and the lease by which it is attached.

    Arguments:
        since: the snapshots that the dirty bitmaps among its contexts are about, by label.
    """

    volume: Image
    lease: Lease | None = None
    since: Mapping[str, Snapshot] = field(default_factory=dict)


class HasVolumes(Protocol):
    """A pool, as far as its exports go."""

    @property
    def volumes(self) -> Mapping[str, Volume]:
        """By name."""


class Exports:
    """The exports of one pool.

    Arguments:
        pool: its ``volumes`` is read anew for each question.
        options: read_only, default_export and the TLS mode are used.
    """

    def __init__(self, pool: HasVolumes, options: ServerOptions) -> None:
        self._pool = pool
        self._owner_only = options.owner_only
        self._read_only = options.read_only
        self._default = options.default_export
        self._tls = options.tls.mode if options.tls else TlsMode.OFF
        self._barred: set[Volume] = set()

    @contextlib.contextmanager
    def barred(self, volume: Volume) -> Iterator[None]:
        """Let nobody attach a volume while the context lasts; not to be nested."""
        assert volume not in self._barred
        self._barred.add(volume)
        try:
            yield
        finally:
            self._barred.remove(volume)

    def __len__(self) -> int:
        return len(self._pool.volumes)

    def offers(self, identity: Identity) -> Iterator[Offer]:
        """List what this client may attach, by name: each volume, and after it its snapshots."""
        for _, volume in sorted(self._pool.volumes.items()):
            if self._refusal(volume, identity) is not None:
                continue
            if self._lease_refusal(volume) is None:
                yield self._offer(volume)
            yield from map(self._offer_snapshot, volume.snapshots.values())

    def find(self, name: str, identity: Identity) -> Offer:
        """Look up an export for a client; OptionRefused says why it cannot have it."""
        if "@" in name:
            return self._find_snapshot(name, identity)
        volume_name, claim = lease.split_export(name)
        volume = self._pool.volumes.get(volume_name) if name else self._default_volume()
        if volume is None:
            raise OptionRefused(OptionReply.ERR_UNKNOWN, self._unknown(volume_name))
        refusal = self._refusal(volume, identity) or self._lease_refusal(volume, claim)
        if refusal is not None:
            raise refusal
        return self._offer(volume, claim)

    def _find_snapshot(self, name: str, identity: Identity) -> Offer:
        """Look up ``VOLUME@NAME``; a lease of the volume is of what can be written, not of this."""
        volume_name, _, snapshot_name = name.partition("@")
        volume = self._pool.volumes.get(volume_name)
        snapshot = volume.snapshots.get(snapshot_name) if volume else None
        if volume is None or snapshot is None:
            raise OptionRefused(OptionReply.ERR_UNKNOWN, self._unknown(name))
        refusal = self._refusal(volume, identity)
        if refusal is not None:
            raise refusal
        return self._offer_snapshot(snapshot)

    def _default_volume(self) -> Volume | None:
        volumes = self._pool.volumes
        if self._default is not None:
            return volumes.get(self._default)
        return next(iter(volumes.values())) if len(volumes) == 1 else None

    def _unknown(self, name: str) -> str:
        if name:
            return f"There is no export {name!r} here."
        if self._default is not None:
            return f"The default export {self._default!r} does not exist."
        return "There is no default export here: name the one you want."

    def _refusal(self, volume: Volume, identity: Identity) -> OptionRefused | None:
        """Say why a client may not have a volume; None if it may."""
        if self._owner_only:
            return None
        allowed = volume.properties.get("allow")
        if allowed and not set(identity.names).intersection(allowed):
            return self._not_allowed(volume, identity)
        if volume.properties.get("importing"):
            return OptionRefused(
                OptionReply.ERR_POLICY,
                f"The import into the export {volume.name!r} is not finished: wait for it, "
                "or import again.",
            )
        return None

    def _not_allowed(self, volume: Volume, identity: Identity) -> OptionRefused:
        """Say what a client lacks that the volume's list does not have."""
        if identity.tls:
            who = " or ".join(repr(name) for name in identity.names) or "without a name"
            return OptionRefused(
                OptionReply.ERR_POLICY,
                f"The export {volume.name!r} is not allowed to a client certificate {who}.",
            )
        if self._tls is TlsMode.OFF:
            # ERR_TLS_REQD would send the client to a STARTTLS that is refused.
            return OptionRefused(
                OptionReply.ERR_POLICY,
                f"The export {volume.name!r} is for TLS clients, and TLS is off on this server.",
            )
        return OptionRefused(
            OptionReply.ERR_TLS_REQD, f"The export {volume.name!r} requires TLS: send STARTTLS."
        )

    def _lease_refusal(self, volume: Volume, claim: Claim | None = None) -> OptionRefused | None:
        """Say why a client may not attach a volume, with or without a claim to a lease of it."""
        if self._owner_only:
            return None
        held = lease.current(volume.properties)
        if held is None and claim is None and volume not in self._barred:
            return None
        name = repr(volume.name)
        if volume in self._barred:
            reason = f"The export {name} is being changed: try again in a moment."
        elif held is None:
            reason = f"That lease of the export {name} has ended: ask for a new one."
        elif claim is None:
            reason = f"The export {name} is leased to {held}: attach it with that lease."
        elif not held.admits(claim):
            reason = f"That lease of the export {name} has ended: it is leased to {held}."
        else:
            return None
        return OptionRefused(OptionReply.ERR_POLICY, reason)

    def _offer(self, volume: Volume, claim: Claim | None = None) -> VolumeOffer:
        held = lease.current(volume.properties) if claim else None
        return VolumeOffer(
            # The name by which a client that reconnects is let in again.
            name=held.export(volume.name) if held else volume.name,
            size=volume.size,
            flags=READ_ONLY_FLAGS if self._read_only else READ_WRITE_FLAGS,
            description=str(volume.properties.get("description", "")),
            preferred_block=max(512, volume.block_size),
            contexts=_contexts([*volume.snapshots]),
            since={DIRTY_BITMAP + name: found for name, found in volume.snapshots.items()},
            volume=volume,
            lease=held,
        )

    def _offer_snapshot(self, snapshot: Snapshot) -> VolumeOffer:
        older = {
            name: other
            for name, other in snapshot.volume.snapshots.items()
            if other.info.epoch < snapshot.info.epoch
        }
        return VolumeOffer(
            name=snapshot.name,
            size=snapshot.size,
            flags=READ_ONLY_FLAGS,
            description=f"{snapshot.volume.name} as it was at {snapshot.status()['created']}",
            preferred_block=max(512, snapshot.block_size),
            contexts=_contexts([*older]),
            since={DIRTY_BITMAP + name: other for name, other in older.items()},
            volume=snapshot,
        )


def _contexts(snapshots: Sequence[str]) -> tuple[MetaContext, ...]:
    """The contexts of an export: what has changed since each of `snapshots`, and what all have."""
    first = CONTEXTS[-1].id + 1
    bitmaps = [MetaContext(first + at, DIRTY_BITMAP + name) for at, name in enumerate(snapshots)]
    return *CONTEXTS, *bitmaps


class ExportsView:
    """The exports as one client sees them; becomes wider once TLS has shown who it is."""

    def __init__(self, exports: Exports) -> None:
        self._exports = exports
        self.identity = Identity()

    def offers(self) -> Iterator[Offer]:
        return self._exports.offers(self.identity)

    def find(self, name: str) -> Offer:
        return self._exports.find(name, self.identity)
