"""Routes about leases: who alone may attach a volume."""

from __future__ import annotations

from nbdstore.control.model import LeaseInfo
from nbdstore.control.operations import Operations
from nbdstore.control.routing import Call, Listing, route


class LeaseRoutes:
    """See the module."""

    def __init__(self, operations: Operations) -> None:
        self._leases = operations.leases

    @route("GET", "/v1/leases", answer=Listing("leases", LeaseInfo))
    async def leases(self, _call: Call) -> list[LeaseInfo]:
        """List the leases that are held, without their tokens."""
        return self._leases.list()

    @route(
        "PUT",
        "/v1/volumes/{name}/lease",
        body={"holder": "text", "force": "flag?"},
        answer=LeaseInfo,
    )
    async def acquire_lease(self, call: Call) -> LeaseInfo:
        """Lease a volume to a holder, who alone may attach it from then on.

        The holder of the lease gets the same lease again. If another holds it, or somebody is
        attached without a lease, it is busy; force ends their connections and their lease.
        """
        force = call.body.get("force", False)
        return await self._leases.acquire(call["name"], call.body["holder"], force=force)

    @route(
        "DELETE",
        "/v1/volumes/{name}/lease",
        query={"holder": "text", "epoch": "number?"},
        answer=None,
    )
    async def release_lease(self, call: Call) -> None:
        """End the lease of a holder, and its connections.

        Nothing happens if that holder, or that epoch, has no lease on the volume.
        """
        await self._leases.release(call["name"], call.query["holder"], call.query.get("epoch"))

    @route("POST", "/v1/volumes/{name}/lease/break", body={}, answer=None)
    async def break_lease(self, call: Call) -> None:
        """End whatever lease a volume has, and its connections."""
        await self._leases.break_(call["name"])
