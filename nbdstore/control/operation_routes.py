"""Routes about long operations, what starts them, and the events of all that happens."""

from __future__ import annotations

import json

from aiohttp import web

from nbdstore.control.model import OperationInfo
from nbdstore.control.operations import Operations
from nbdstore.control.routing import Call, Listing, Media, Reply, route
from nbdstore.errors import InvalidArgument

MAX_WAIT_S = 60
HEARTBEAT_S = 15.0
"""How often a stream without events shows that it lives."""
EVENTS = Media(
    "application/x-ndjson",
    "A line of JSON for each event: id, time, kind, subject, detail; specified in "
    "nbdstore/control/events.py. Empty lines only show that the stream lives. It ends when the "
    "server stops, and is cut off when its reader falls 1000 events behind.",
)
IDEMPOTENCY_KEY = "Idempotency-Key"


class OperationRoutes:
    """See the module."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    @route(
        "POST",
        "/v1/scrub",
        body={"volume": "text?", "rate": "bytes?", "restart": "flag?", "id": "text?"},
        headers=(IDEMPOTENCY_KEY,),
        answer=OperationInfo,
        statuses=(202, 200),
    )
    async def scrub(self, call: Call) -> Reply:
        """Begin to compare all that a volume, or every volume, maps with its checksums, on disk.

        A scrub that was stopped goes on where it was, unless restart is true. rate is the bytes
        per second that are read at most. 202 with the new operation; the same call again with the
        same id (or Idempotency-Key) is answered 200 with the operation of before.
        """
        body = call.body
        info, is_new = self._operations.scrubs.start(
            body.get("volume"),
            rate=body.get("rate"),
            restart=body.get("restart", False),
            operation_id=operation_id(call),
        )
        return started(info, is_new)

    @route("GET", "/v1/operations", answer=Listing("operations", OperationInfo))
    async def operations(self, _call: Call) -> list[OperationInfo]:
        """List the operations that run, and those that ended within the hour, oldest first."""
        return self._operations.running.list()

    @route("GET", "/v1/operations/{id}", query={"wait": "number?"}, answer=OperationInfo)
    async def operation(self, call: Call) -> OperationInfo:
        """Describe an operation; with wait, at its end, or after as many seconds (up to 60)."""
        wait_s = min(call.query.get("wait", 0), MAX_WAIT_S)
        return await self._operations.running.wait(call["id"], wait_s)

    @route("DELETE", "/v1/operations/{id}", answer=OperationInfo)
    async def cancel_operation(self, call: Call) -> OperationInfo:
        """Cancel an operation, and describe it when it has ended; one that has ended stays."""
        return await self._operations.running.cancel(call["id"])

    @route("GET", "/v1/events", answer=EVENTS)
    async def events(self, call: Call) -> web.StreamResponse:
        """Follow what happens, from now on."""
        listener = self._operations.events.listen()
        transport = call.request.transport
        # Who does not read holds up the writing below: only this ends it.
        listener.on_drop = transport.abort if transport is not None else None
        response = web.StreamResponse(headers={"Content-Type": EVENTS.content_type})
        try:
            await response.prepare(call.request)
            await response.write(b"\n")
            while not listener.is_closed:
                event = await listener.next(HEARTBEAT_S)
                line = json.dumps(event.to_json()) if event else ""
                await response.write(line.encode() + b"\n")
            await response.write_eof()
        finally:
            listener.close()
        return response


def started(info: OperationInfo, is_new: bool) -> Reply:
    """Answer with an operation, and whether this call has started it."""
    return Reply(info, 202 if is_new else 200, {"Location": f"/v1/operations/{info.id}"})


def operation_id(call: Call) -> str | None:
    """Return the id that the caller gives to an operation, in the body or the header."""
    given = {call.body.get("id"), call.request.headers.get(IDEMPOTENCY_KEY)} - {None}
    if len(given) > 1:
        raise InvalidArgument(f"id and {IDEMPOTENCY_KEY} differ: give one of them")
    return next(iter(given), None)
