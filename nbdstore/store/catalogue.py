"""The catalogue: which volumes and snapshots a pool has, and what may be said of them.

Owns names, sizes and properties of volumes, their form on disk, and what each administrative
change does to them; knows neither maps nor slots.

Format: UTF-8 JSON, an object ``{"next_id": n, "volumes": [...], "snapshots": [...]}``; each volume
is the object of :meth:`VolumeInfo.to_json`, each snapshot that of :meth:`SnapshotInfo.to_json`,
with the root of its map.  It lies in slots like a volume's blocks do, as many as its length needs,
and it does so twice: no volume could be found without it.  The tree above either copy has the
entries of its own blocks, then those of the other's, so that whoever finds one of them damaged
knows which slots it had.

Snapshots come and go with the catalogue of a checkpoint, not by the journal (snapshots.py).  All
other administrative changes go there as ADMIN groups, objects with an "op" and the fields of one
of: create (a volume's object; with a root, a clone), resize (size), rename (name), properties
(properties), trash (at, seconds since 1970: the volume loses its name, and keeps what it holds),
restore (name), delete (none: it loses its name at once and its space bit by bit), remove (none: it
was deleted and is empty now), rollback (snapshot, and discard: the id of a new, deleted volume that
gets what the volume has held), flatten (none: it shares nothing with its origin any more), grow
(n_slots, of the pool).

Ids are of one sequence, and never used twice in a pool.  A **parent** is the snapshot that an image
(a volume or a snapshot) continues from, by id, 0 = none.  The blocks and nodes of an image that
were born after its parent's epoch are its own, the others are its parent's, or further up.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from typing import Any, Final

from nbdstore.errors import InvalidArgument
from nbdstore.sizes import exact_size
from nbdstore.store import layout
from nbdstore.store.superblock import NULL, Pointer

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}")


@dataclass
class VolumeInfo:
    """What the catalogue says of one volume.

    Attributes:
        id: number in the journal.
        size: bytes.
        created: seconds since 1970.
        epoch: counts snapshots, from 1; the birth epoch of what is written now.
        parent: the snapshot that it continues from; a clone's is another volume's at first.
        root: entry of the map's root at the last checkpoint.
        n_mapped, n_provisioned: blocks with a slot, and blocks with space set aside.
        n_own: blocks with a slot of its own.
        written: it held data at some checkpoint, since it was made.
        trashed: when it was put into the trash, seconds since 1970; 0 = it was not.
        deleted: it has lost its name; its blocks are being freed.
        properties: what others keep with it; any JSON.
    """

    id: int
    name: str
    size: int
    uuid: str
    created: int
    epoch: int = 1
    parent: int = 0
    root: Pointer = NULL
    n_mapped: int = 0
    n_provisioned: int = 0
    n_own: int = 0
    written: bool = False
    trashed: int = 0
    deleted: bool = False
    properties: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the object that stands in the catalogue."""
        return _to_json(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> VolumeInfo:
        """Rebuild from :meth:`to_json`; unknown fields are ignored (feature flags guard them)."""
        # Without snapshots, before there was this field, all was a volume's own.
        return cls(**{"n_own": found["n_mapped"]} | _known(cls, found))


@dataclass
class SnapshotInfo:
    """What the catalogue says of one snapshot.

    Attributes:
        id: of the sequence that volumes have, too.
        volume: the id of the volume that it is a snapshot of.
        name: what follows the '@'.
        size: of the volume then, bytes.
        uuid: what it is, wherever it is: a copy of it in another pool has the same.
        epoch: the volume's epoch then: nothing in it was born later.
        parent: the snapshot that the volume continued from then.
        root: entry of the map's root.
        n_mapped, n_provisioned: blocks with a slot, and blocks that read as zeros but had space
            set aside; a snapshot itself sets none aside.
        n_own: blocks that were born after its parent's epoch.
    """

    id: int
    volume: int
    name: str
    size: int
    uuid: str
    created: int
    epoch: int
    parent: int = 0
    root: Pointer = NULL
    n_mapped: int = 0
    n_provisioned: int = 0
    n_own: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the object that stands in the catalogue."""
        return _to_json(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> SnapshotInfo:
        """Rebuild from :meth:`to_json`, as :meth:`VolumeInfo.from_json`."""
        # Without one, as development versions wrote it, it is like no other.
        return cls(**{"uuid": ""} | _known(cls, found))


def _to_json(info: VolumeInfo | SnapshotInfo) -> dict[str, Any]:
    found = {field.name: getattr(info, field.name) for field in fields(info)}
    return found | {"root": [f"{info.root[0]:x}", f"{info.root[1]:x}"]}


def _known(cls: type[VolumeInfo | SnapshotInfo], found: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(cls)}
    location, checksum = found["root"]
    known = {name: value for name, value in found.items() if name in names}
    return known | {"root": (int(location, 16), int(checksum, 16))}


@dataclass
class Catalogue:
    """All of it.

    Attributes:
        next_id: of the next volume or snapshot.
    """

    next_id: int = 1
    volumes: list[VolumeInfo] = field(default_factory=list)
    snapshots: list[SnapshotInfo] = field(default_factory=list)

    def encode(self) -> bytes:
        """Return the catalogue's bytes."""
        found = {
            "next_id": self.next_id,
            "volumes": [volume.to_json() for volume in self.volumes],
            "snapshots": [snapshot.to_json() for snapshot in self.snapshots],
        }
        return json.dumps(found, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, raw: bytes) -> Catalogue:
        """Return a catalogue whose checksums were right."""
        found = json.loads(raw)
        return cls(
            found["next_id"],
            [VolumeInfo.from_json(volume) for volume in found["volumes"]],
            [SnapshotInfo.from_json(snapshot) for snapshot in found.get("snapshots", ())],
        )


def check_name(name: str, what: str = "volume") -> None:
    """Refuse what cannot be the name of a volume, or (`what`) of a snapshot.

    A name is 1 to 255 of ``A-Z a-z 0-9 _ . -``, the first a letter or digit: it must fit a file
    name, a URI and a Kubernetes object; '@' is kept for snapshots.

    Raises:
        InvalidArgument: with the name and the rule.
    """
    if not _NAME.fullmatch(name):
        shown = name if len(name) <= 64 else name[:64] + "..."
        raise InvalidArgument(
            f"{what} name {shown!r}: use 1 to 255 letters, digits, '_', '.' or '-', "
            "beginning with a letter or digit"
        )


def check_size(size: int) -> None:
    """Refuse what cannot be a volume's size in bytes.

    Raises:
        InvalidArgument: with the size and the rule.
    """
    if size <= 0:
        raise InvalidArgument(f"volume size {size}: must be above 0")
    if size % layout.SECTOR:
        nearest = size + -size % layout.SECTOR
        raise InvalidArgument(
            f"volume size {size}: must be a multiple of {layout.SECTOR} bytes; "
            f"the next one is {nearest}"
        )
    if size > layout.MAX_VOLUME_SIZE:
        raise InvalidArgument(
            f"volume size {exact_size(size)}: the largest is {exact_size(layout.MAX_VOLUME_SIZE)}"
        )
