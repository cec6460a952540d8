"""Routes about snapshots, clones and the trash."""

from __future__ import annotations

import logging
from urllib.parse import quote

from nbdstore.control.model import OperationInfo, SnapshotInfo, TrashInfo, VolumeInfo
from nbdstore.control.operation_routes import IDEMPOTENCY_KEY, operation_id, started
from nbdstore.control.operations import Operations
from nbdstore.control.routing import Call, Listing, Reply, route

log = logging.getLogger(__name__)

SNAPSHOTS = Listing("snapshots", SnapshotInfo)


class SnapshotRoutes:
    """See the module."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._snapshots = operations.snapshots

    @route("GET", "/v1/snapshots", answer=SNAPSHOTS, query={"volume": "text?", "unique": "flag?"})
    async def snapshots(self, call: Call) -> list[SnapshotInfo]:
        """List snapshots, of one volume or of all, by volume and age.

        If unique is 1, what each holds alone, which is what deleting it frees, is found out for
        this answer: that costs as much as has changed since.
        """
        query = call.query
        return await self._snapshots.listing(query.get("volume"), unique=query.get("unique", False))

    @route(
        "POST",
        "/v1/snapshots",
        body={"snapshots": "names", "uuids": "names?"},
        answer=SNAPSHOTS,
        statuses=(201, 200),
    )
    async def create_snapshots(self, call: Call) -> Reply:
        """Make snapshots, each VOLUME@NAME, all of one moment, durably.

        They hold what was acknowledged before the call; clients are not held up. uuids that the
        caller chose, one for each, make this idempotent: the same names and uuids again are
        answered 200 with the snapshots that are there. What is taken otherwise is 409.
        """
        made, are_new = await self._snapshots.create_once(
            call.body["snapshots"], uuids=call.body.get("uuids")
        )
        if are_new:
            log.info("made %s", ", ".join(info.snapshot for info in made))
        return Reply(made, 201 if are_new else 200)

    @route("GET", "/v1/snapshots/{snapshot}", answer=SnapshotInfo)
    async def snapshot(self, call: Call) -> SnapshotInfo:
        """Describe one snapshot, VOLUME@NAME."""
        return await self._snapshots.show(call["snapshot"])

    @route("DELETE", "/v1/snapshots/{snapshot}", query={"uuid": "text?"}, answer=None)
    async def delete_snapshot(self, call: Call) -> None:
        """Delete a snapshot; what only it holds is free then.

        Busy while it is attached, has clones, or two things continue from it. With its uuid this is
        idempotent: if it is gone already that is no error, and another one of its name stays.
        """
        await self._snapshots.delete(call["snapshot"], uuid=call.query.get("uuid"))
        log.info("snapshot %s deleted", call["snapshot"])

    @route(
        "POST",
        "/v1/snapshots/{snapshot}/rollback",
        body={"fence": "flag?"},
        answer=VolumeInfo,
    )
    async def rollback(self, call: Call) -> VolumeInfo:
        """Make the volume what its snapshot is; all snapshots stay.

        Busy while the volume is leased or attached, unless fence ends that.
        """
        name = call["snapshot"]
        info = await self._operations.rollback(name, fence=call.body.get("fence", False))
        log.info("volume %s rolled back to %s", info.name, name)
        return info

    @route(
        "POST",
        "/v1/snapshots/{snapshot}/clone",
        body={"name": "text", "allow": "names?", "uuid": "text?"},
        answer=VolumeInfo,
        statuses=(201, 200),
    )
    async def clone(self, call: Call) -> Reply:
        """Make a volume that begins as the snapshot and shares its blocks, durably, at once.

        A uuid that the caller chose makes this idempotent: the same snapshot, name and uuid again
        are answered 200 with the clone that is there. A name or uuid that is taken otherwise is
        409.
        """
        body = call.body
        info, is_new = await self._operations.clone_once(
            call["snapshot"], body["name"], body.get("allow", ()), uuid=body.get("uuid")
        )
        if is_new:
            log.info("volume %s cloned from %s", info.name, call["snapshot"])
        return Reply(
            info, 201 if is_new else 200, {"Location": f"/v1/volumes/{quote(info.name, safe='')}"}
        )

    @route(
        "POST",
        "/v1/volumes/{name}/flatten",
        body={"id": "text?"},
        headers=(IDEMPOTENCY_KEY,),
        answer=OperationInfo,
        statuses=(202, 200),
    )
    async def flatten(self, call: Call) -> Reply:
        """Begin to copy what a clone shares with its origin, so that it depends on it no longer.

        The volume may be used meanwhile. One that was cancelled goes on where it was. 202 with the
        new operation; the same call again with the same id is answered 200 with that of before.
        """
        found = self._snapshots.flatten(call["name"], operation_id=operation_id(call))
        return started(*found)

    @route("GET", "/v1/trash", answer=Listing("trash", TrashInfo))
    async def trash(self, _call: Call) -> list[TrashInfo]:
        """List the volumes in the trash, those that came first first."""
        return self._snapshots.trash()

    @route("POST", "/v1/trash/{which}/restore", body={"name": "text?"}, answer=VolumeInfo)
    async def restore(self, call: Call) -> VolumeInfo:
        """Take a volume, by id or the newest of a name, out of the trash."""
        info = await self._operations.restore(call["which"], call.body.get("name"))
        log.info("volume %s restored from the trash", info.name)
        return info

    @route("DELETE", "/v1/trash/{which}", answer=None)
    async def purge(self, call: Call) -> None:
        """Delete a volume in the trash, by id or the newest of a name, for good."""
        await self._snapshots.purge(call["which"])
        log.info("volume %s deleted from the trash", call["which"])
