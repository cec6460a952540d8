"""What the control API says: one frozen dataclass per JSON object.

The same classes are built from a pool by `operations`, travel as JSON, are rebuilt by `client`,
and are what the commands print, so ``--json`` on the command line and the API's answers are one
and the same. Sizes are bytes, times are ISO 8601 with zone, and a reader ignores members it does
not know: a client may be older than its server.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from nbdstore.errors import ControlError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """Base of the JSON objects: to and from plain dicts."""

    def to_json(self) -> dict[str, Any]:
        """Return a dict of plain JSON values; nested records become dicts too."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Rebuild a record from JSON; unknown members are ignored.

        Raises:
            ControlError: a member without a default is missing, or `value` is no object.
        """
        if not isinstance(value, Mapping):
            raise ControlError(f"the server sent {value!r:.80} where a {cls.__name__} belongs")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        missing = [
            name
            for name, field in fields.items()
            if name not in value and field.default is field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ControlError(f"the server sent a {cls.__name__} without {', '.join(missing)}")
        return cls(**{name: value[name] for name in fields if name in value})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerInfo(Record):
    """The server that holds a pool.

    addresses: where it listens for NBD, as HOST:PORT or unix:PATH.
    since: when it started.
    """

    version: str
    pid: int
    since: str
    addresses: list[str]
    read_only: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Health(Record):
    """What a load balancer asks for: the pool's state, as in `PoolInfo`."""

    state: str
    version: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolInfo(Record):
    """A pool and its space, in bytes.

    used: blocks that hold data or the pool's own maps. reserved: set aside, by volumes and for
    trim and delete in a full pool. reclaimable: freed, and usable again after the next sync.
    fill: share of the capacity that is taken, 0..1. state: "ok", "warning", "full" or "failed", and
    why in failure. shortage: what a full pool has no space in, its own capacity ("pool") or the
    filesystem below ("host"). held_writes: writes that wait for space now. provisioned: sizes of
    all volumes; mapped: what they hold. corruptions: how often damage was met since it was opened.
    allocated_on_host, free_on_host: of the filesystem below. journal: {"size", "used", "syncs"}.
    server: who serves it; None when the pool was opened just for this look.
    """

    uuid: str
    directory: str
    format_version: int
    block_size: int
    capacity: int
    used: int
    reserved: int
    reclaimable: int
    free: int
    fill: float
    state: str
    failure: str | None
    shortage: str | None = None
    held_writes: int
    corruptions: int
    volumes: int
    provisioned: int
    mapped: int
    allocated_on_host: int
    free_on_host: int
    journal: dict[str, int]
    server: ServerInfo | None = None

    @classmethod
    def from_json(cls, value: object) -> Self:
        info = super().from_json(value)
        if info.server is None:
            return info
        return dataclasses.replace(info, server=ServerInfo.from_json(info.server))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VolumeInfo(Record):
    """A volume: `size` is what clients see, `mapped` the bytes that hold data.

    written: whether blocks hold data or set-aside space, or ever did as far as the pool remembers;
    what was never written is safe to format.
    allow: names of client certificates that may attach it; empty = anyone the server lets in.
    iops, bandwidth: requests and bytes per second that all clients together get; 0 = any number.
    burst_s: seconds' worth of them that may be saved up.
    attached: live NBD connections. importing: an import has not finished (or never did).
    receiving: the snapshot that is half received into it, and named as where it was sent.
    own, shared: of what is mapped, what was written since its last snapshot, or since it was
    cloned, and what it shares with these. origin: of a clone, the snapshot that it began as.
    snapshots: how many it has.
    lease_holder, lease_since: who alone may attach it now, and since when; None = it is not leased.
    scrubbed: when a scrub last got through it, None = never; scrub_damaged: the damaged blocks that
    the last scrub found, in it and its snapshots.
    """

    id: int
    uuid: str
    name: str
    size: int
    block_size: int
    mapped: int
    reserved: int
    epoch: int
    created: str
    written: bool = True
    allow: list[str] = dataclasses.field(default_factory=list)
    own: int = 0
    shared: int = 0
    origin: str | None = None
    snapshots: int = 0
    attached: int = 0
    importing: bool = False
    receiving: str | None = None
    iops: int = 0
    bandwidth: int = 0
    burst_s: float = 1.0
    lease_holder: str | None = None
    lease_since: str | None = None
    scrubbed: str | None = None
    scrub_damaged: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapshotInfo(Record):
    """A snapshot: `snapshot` is VOLUME@NAME, the name of its export.

    mapped: bytes of data in it. own: those that the volume wrote since the snapshot before.
    unique: those that only this snapshot holds, which deleting it frees; None = not looked up.
    clones: volumes (and their snapshots) that continue from it. attached: live NBD connections.
    """

    id: int
    uuid: str
    snapshot: str
    volume: str
    name: str
    size: int
    block_size: int
    mapped: int
    own: int
    unique: int | None = None
    epoch: int
    created: str
    clones: list[str] = dataclasses.field(default_factory=list)
    attached: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrashInfo(Record):
    """A volume in the trash: `name` is what it was called, `trashed` since when it is there.

    snapshots: how many it has.
    """

    id: int
    name: str
    size: int
    mapped: int
    own: int
    snapshots: int
    trashed: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttachmentInfo(Record):
    """One NBD connection: who reads and writes which export since when.

    holder, lease_epoch: of the lease by which it attached; None without one.
    age_s: since it connected. in_flight: requests that have come and are not answered yet.
    requests_per_s, read_per_s, written_per_s: over the last seconds; the latter two in bytes.
    """

    id: int
    peer: str
    export: str
    since: str
    read_only: bool
    tls_name: str | None
    in_flight: int
    bytes_read: int
    bytes_written: int
    holder: str | None = None
    lease_epoch: int | None = None
    age_s: float = 0
    requests_per_s: float = 0
    read_per_s: int = 0
    written_per_s: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeaseInfo(Record):
    """A lease that is held: its holder alone may attach the volume.

    epoch: counts the leases of the volume. connections: live ones of this lease. token, export:
    what the holder shows, and the export's name with it; None except for the holder itself.
    """

    volume: str
    holder: str
    epoch: int
    since: str
    connections: int
    token: str | None = None
    export: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperationInfo(Record):
    """An operation that takes long, while it runs and for an hour after.

    kind: "scrub", "flatten", "send", "receive" or "diff". state: "running", "done", "failed" or
    "cancelled". progress: 0..1; done, total: the same in bytes, where total is an estimate as long
    as it is not done; of the last three they are offsets in the volume, holes included. request: as
    it was asked. result: what it found so far, by kind; of a scrub: volumes, bytes, damaged
    (blocks), and damage, a list of the first of them (volume, offset, detail). error: of what
    failed, as a problem.
    """

    id: str
    kind: str
    state: str
    progress: float
    done: int
    total: int
    request: dict[str, Any]
    result: dict[str, Any]
    error: dict[str, Any] | None = None
    started: str
    ended: str | None = None

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self.state == "running"
