"""Where the space of a pool is: image by image, and summed up so that it adds up.

Every block of data is some image's own: of a snapshot, what its volume wrote since the snapshot
before; of a volume, what it wrote since its last one, or since it was cloned. So::

    data      = own of all images, those in the trash and those being emptied included
    used      = data + maps          maps: of all images, and the pool's own trees
    capacity  = used + reclaimable + free, of which `reserved` is not for clients

What only a snapshot holds (`unique`) is less than its own: the volume shares the rest.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from nbdstore.control.contracts import PoolLike
from nbdstore.control.model import Record
from nbdstore.errors import NotFound


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSpace(Record):
    """The space of one volume or snapshot, in bytes.

    state: "" or "trash". provisioned: its size. mapped: its data. own: of that, what no older image
    has. shared: of mapped, what is another's own. unique: of a snapshot, what only it holds, which
    deleting it frees; None of a volume. reserved: set aside, without data.
    """

    name: str
    kind: str
    state: str
    provisioned: int
    mapped: int
    own: int
    shared: int
    unique: int | None
    reserved: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpaceReport(Record):
    """The space of a pool, in bytes; see the module for how it adds up.

    emptying: of data, what deleted volumes have left, which comes back bit by bit. reclaimable:
    freed, and usable after the next sync. images: volumes, each followed by its snapshots, oldest
    first.
    """

    capacity: int
    used: int
    data: int
    emptying: int
    maps: int
    reclaimable: int
    free: int
    reserved: int
    provisioned: int
    images: list[ImageSpace]

    @classmethod
    def from_json(cls, value: object) -> Self:
        report = super().from_json(value)
        return dataclasses.replace(report, images=[*map(ImageSpace.from_json, report.images)])


async def report(pool: PoolLike) -> SpaceReport:
    """Look up where the space is; costs as much as has changed since each snapshot was made."""
    unique: dict[int, int] = {}
    for volume in _volumes(pool):
        for snapshot in [*volume.snapshots.values()]:
            try:
                unique[snapshot.id] = await pool.bytes_alone(snapshot)
            except NotFound:
                continue  # deleted since it was listed
    # No await from here on: all that follows is of one moment.
    images = [
        _space(image, volume, unique.get(image.id))
        for volume in _volumes(pool)
        for image in (volume, *volume.snapshots.values())
    ]
    status = pool.status()
    data = pool.data_bytes()
    return SpaceReport(
        capacity=status["capacity"],
        used=status["used"],
        data=data,
        emptying=data - sum(image.own for image in images),
        maps=status["used"] - data,
        reclaimable=status["reclaimable"],
        free=status["free"],
        reserved=status["reserved"],
        provisioned=status["provisioned"],
        images=images,
    )


def _volumes(pool: PoolLike) -> list[Any]:
    return [*(volume for _, volume in sorted(pool.volumes.items())), *pool.trash]


def _space(image: Any, volume: Any, unique: int | None) -> ImageSpace:
    status = image.status()
    return ImageSpace(
        name=image.name,
        kind="volume" if image is volume else "snapshot",
        state="trash" if volume.status().get("trashed") else "",
        provisioned=image.size,
        mapped=status["mapped"],
        own=status["own"],
        shared=status["mapped"] - status["own"],
        unique=unique,
        reserved=status.get("reserved", 0),
    )
