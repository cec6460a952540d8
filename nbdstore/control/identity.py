"""The uuids by which callers know again what they have made, so that they may call twice.

Who has not heard the answer to a call cannot know whether it was done. With a uuid that the caller
chose it just calls again:

=========  =======================================================================================
call       again, with the same uuid
=========  =======================================================================================
create     finds what is there, if it is the same in name, size and origin; all else that has the
           name or the uuid is AlreadyExists. Who may attach it stays as it is: that may have been
           changed since
delete     is done if nothing has the uuid any more; another thing under the same name stays; one
           that is to go for good, and is in the trash, as a call that was cut short leaves it, goes
           from there
=========  =======================================================================================

Owns how uuids are read, and what of that is the same for volumes and snapshots. A uuid is that of
one volume for ever, those in the trash included; of snapshots there may be copies, received from
another pool or into another volume, with the uuid of what they are copies of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from nbdstore.control.contracts import PoolLike, VolumeLike
from nbdstore.errors import AlreadyExists, InvalidArgument, NotFound


def checked_uuid(text: str) -> UUID:
    """Read a uuid, in any of the ways it may be written; InvalidArgument if it is none."""
    try:
        return UUID(text)
    except ValueError:
        raise InvalidArgument(
            f"'{text:.60}' is no uuid: write it as 01234567-89ab-cdef-0123-456789abcdef"
        ) from None


def uuid_of(image: Any) -> UUID | None:
    """Return the uuid of a volume or snapshot; None if what it has is none, and so no caller's.

    Snapshots of development versions have an empty one, and those that were received may have any
    text, which the reader of streams did not refuse once.
    """
    try:
        return UUID(image.status()["uuid"])
    except ValueError:
        return None


def checked_uuids(texts: Sequence[str], n_wanted: int) -> list[UUID]:
    """Read the uuids of `n_wanted` things, each another one; InvalidArgument if they are not."""
    uuids = [checked_uuid(text) for text in texts]
    if len(uuids) != n_wanted or len(set(uuids)) != n_wanted:
        raise InvalidArgument(
            f"{len(set(uuids))} different uuids for {n_wanted} snapshots: give one for each"
        )
    return uuids


def snapshots_made_before(
    pool: PoolLike, wanted: Sequence[tuple[VolumeLike, str]], uuids: Sequence[UUID]
) -> list[Any]:
    """Return the snapshots, in the order of `wanted`, if these very ones were made; else none.

    Raises:
        AlreadyExists: only some of them are there, or a uuid is that of another one.
    """
    found, missing = [], []
    for (volume, name), uuid in zip(wanted, uuids, strict=True):
        snapshot = volume.snapshots.get(name)
        if snapshot is not None and uuid_of(snapshot) == uuid:
            found.append(snapshot)
        else:
            missing.append(f"{volume.name}@{name}")
            _require_new(pool, uuid)
    if found and missing:
        raise AlreadyExists(
            f"{found[0].name} was made before, and {missing[0]} is not there any more: what is of "
            "one moment is made by one call; take new names and uuids"
        )
    return found


def _require_new(pool: PoolLike, uuid: UUID) -> None:
    for volume in [*pool.volumes.values(), *pool.trash]:
        for snapshot in volume.snapshots.values():
            if uuid_of(snapshot) == uuid:
                raise AlreadyExists(
                    f"the uuid {uuid} is that of snapshot {snapshot.name}: take a new one"
                )


def is_gone(pool: PoolLike, name: str, uuid: UUID) -> bool:
    """Tell whether no volume has `uuid`, but in the trash; False if it is the one called `name`.

    Raises:
        NotFound: it is there, under another name.
    """
    there = pool.volumes.get(name)
    if there is not None and uuid_of(there) == uuid:
        return False
    for volume in pool.volumes.values():
        if uuid_of(volume) == uuid:
            raise NotFound(f"the volume {uuid} is called '{volume.name}' now, not '{name}'")
    return True


def in_trash(pool: PoolLike, name: str, uuid: UUID) -> Any | None:
    """Return the volume in the trash that has `uuid`, if one has.

    Raises:
        NotFound: it was called otherwise.
    """
    for volume in pool.trash:
        if uuid_of(volume) == uuid:
            if volume.name != name:
                raise NotFound(
                    f"the volume {uuid} is in the trash as '{volume.name}', not '{name}'"
                )
            return volume
    return None
