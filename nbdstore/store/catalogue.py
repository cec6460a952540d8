"""The catalogue: which volumes a pool has, and what may be said of them.

Owns names, sizes and properties of volumes, their form on disk, and what each administrative
change does to them; knows neither maps nor slots.

Format: UTF-8 JSON, an object ``{"next_id": n, "volumes": [...]}``; each volume is the object of
:meth:`VolumeInfo.to_json`, with the root of its map.  It lies in slots like a volume's blocks do,
as many as its length needs, and it does so twice: no volume could be found without it.  The tree
above either copy has the entries of its own blocks, then those of the other's, so that whoever
finds one of them damaged knows which slots it had.
Administrative changes go to the journal as ADMIN groups, objects with an "op" and the fields of one
of: create (a volume's object), resize (size), rename (name), properties (properties), delete (none:
the volume loses its name at once and its space bit by bit), remove (none: it was deleted and is
empty now), grow (n_slots, of the pool).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Final

from nbdstore.errors import InvalidArgument
from nbdstore.store import layout
from nbdstore.store.superblock import NULL, Pointer

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}")


@dataclass
class VolumeInfo:
    """What the catalogue says of one volume.

    Attributes:
        id: number in the journal; never used twice in a pool.
        size: bytes.
        created: seconds since 1970.
        epoch: counts snapshots, from 1; the birth epoch of what is written now.
        root: entry of the map's root at the last checkpoint.
        n_mapped, n_provisioned: blocks with a slot, and blocks with space set aside.
        deleted: it has lost its name; its blocks are being freed.
        properties: what others keep with it; any JSON.
    """

    id: int
    name: str
    size: int
    uuid: str
    created: int
    epoch: int = 1
    root: Pointer = NULL
    n_mapped: int = 0
    n_provisioned: int = 0
    deleted: bool = False
    properties: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the object that stands in the catalogue."""
        return {
            "id": self.id,
            "name": self.name,
            "size": self.size,
            "uuid": self.uuid,
            "epoch": self.epoch,
            "root": [f"{self.root[0]:x}", f"{self.root[1]:x}"],
            "n_mapped": self.n_mapped,
            "n_provisioned": self.n_provisioned,
            "deleted": self.deleted,
            "created": self.created,
            "properties": self.properties,
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> VolumeInfo:
        """Rebuild from :meth:`to_json`; unknown fields are ignored (feature flags guard them)."""
        known = {k: v for k, v in found.items() if k in cls.__dataclass_fields__}
        location, checksum = found["root"]
        known["root"] = (int(location, 16), int(checksum, 16))
        return cls(**known)


def encode(next_id: int, volumes: list[VolumeInfo]) -> bytes:
    """Return the catalogue's bytes."""
    found = {"next_id": next_id, "volumes": [v.to_json() for v in volumes]}
    return json.dumps(found, separators=(",", ":")).encode()


def decode(raw: bytes) -> tuple[int, list[VolumeInfo]]:
    """Return next_id and the volumes of a catalogue whose checksums were right."""
    found = json.loads(raw)
    return found["next_id"], [VolumeInfo.from_json(v) for v in found["volumes"]]


def check_name(name: str) -> None:
    """Refuse what cannot be a volume's name.

    A name is 1 to 255 of ``A-Z a-z 0-9 _ . -``, the first a letter or digit: it must fit a file
    name, a URI and a Kubernetes object; '@' is kept for snapshots.

    Raises:
        InvalidArgument: with the name and the rule.
    """
    if not _NAME.fullmatch(name):
        shown = name if len(name) <= 64 else name[:64] + "..."
        raise InvalidArgument(
            f"volume name {shown!r}: use 1 to 255 letters, digits, '_', '.' or '-', "
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
            f"volume size {size}: the largest is {layout.MAX_VOLUME_SIZE} bytes (256 TiB)"
        )
