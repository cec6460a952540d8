"""Routes about the pool as a whole, and about who is connected to it."""

from __future__ import annotations

from aiohttp import web

from nbdstore import __version__
from nbdstore.control import metrics
from nbdstore.control.capacity import CapacityReport
from nbdstore.control.model import AttachmentInfo, Health, PoolInfo
from nbdstore.control.operations import Operations
from nbdstore.control.routing import Access, Call, Listing, Media, Reply, route

METRICS = Media(
    "text/plain", "Prometheus' text format 0.0.4; the metrics are in nbdstore/control/metrics.py."
)


class PoolRoutes:
    """See the module."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    @route("GET", "/healthz", answer=Health, statuses=(200, 503), access=Access.OPEN)
    async def healthz(self, _call: Call) -> Reply:
        """Tell whether the pool acknowledges writes: 200, else 503. Needs no token."""
        state = self._operations.pool().state
        health = Health(state=state, version=__version__)
        return Reply(health, 503 if state == "failed" else 200)

    @route("GET", "/v1/pool", answer=PoolInfo)
    async def pool(self, _call: Call) -> PoolInfo:
        """Describe the pool, its space and its server."""
        return self._operations.pool()

    @route("POST", "/v1/pool/grow", body={"capacity": "bytes"}, answer=PoolInfo)
    async def grow_pool(self, call: Call) -> PoolInfo:
        """Raise the pool's capacity, durably. Writes that were held for space go on."""
        return await self._operations.grow_pool(call.body["capacity"])

    @route("POST", "/v1/pool/checkpoint", body={}, answer=PoolInfo)
    async def checkpoint(self, _call: Call) -> PoolInfo:
        """Write a checkpoint now, so that the next start has no journal to replay."""
        return await self._operations.checkpoint()

    @route("GET", "/v1/capacity", answer=CapacityReport)
    async def capacity(self, _call: Call) -> CapacityReport:
        """Report the capacity model: what fits, was promised, is stored, is left."""
        return self._operations.capacity()

    @route("GET", "/metrics", answer=METRICS)
    async def metrics(self, _call: Call) -> web.StreamResponse:
        """Tell the numbers of the pool and its volumes, for Prometheus.

        A read token is enough. Counters begin anew when the server does.
        """
        text = self._operations.metrics()
        return web.Response(body=text.encode(), headers={"Content-Type": metrics.CONTENT_TYPE})

    @route("GET", "/v1/connections", answer=Listing("connections", AttachmentInfo))
    async def connections(self, _call: Call) -> list[AttachmentInfo]:
        """List the NBD connections that have an export."""
        return self._operations.attachments()

    @route("DELETE", "/v1/connections/{id}", answer=None)
    async def disconnect(self, call: Call) -> None:
        """End an NBD connection, whose requests in flight may be done or not.

        Nothing happens if there is none of that id.
        """
        await self._operations.disconnect(call.number("id"))
