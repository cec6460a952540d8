"""Routes about volumes and their content."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from urllib.parse import quote

from aiohttp import ClientPayloadError, web

from nbdstore.control import stream
from nbdstore.control.model import VolumeInfo
from nbdstore.control.operations import Operations
from nbdstore.control.routing import Call, Listing, Media, Reply, route
from nbdstore.control.stream import Buffer, StreamReader, StreamWriter
from nbdstore.errors import ControlError, InvalidArgument, NbdstoreError
from nbdstore.sizes import format_size

log = logging.getLogger(__name__)

CONTENT = Media(
    stream.CONTENT_TYPE,
    "A volume's content, holes left out, as frames with checksums; specified in "
    "nbdstore/control/stream.py.",
)


class VolumeRoutes:
    """See the module."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    @route("GET", "/v1/volumes", answer=Listing("volumes", VolumeInfo))
    async def volumes(self, _call: Call) -> list[VolumeInfo]:
        """List all volumes, by name."""
        return self._operations.volumes()

    @route(
        "POST",
        "/v1/volumes",
        body={"name": "text", "size": "bytes", "allow": "names?", "uuid": "text?"},
        answer=VolumeInfo,
        statuses=(201, 200),
    )
    async def create_volume(self, call: Call) -> Reply:
        """Create an empty thin volume, durably.

        A uuid that the caller chose makes this idempotent: the same name, size and uuid again are
        answered 200 with the volume that is there. A name or uuid that is taken otherwise is 409.
        """
        body = call.body
        info, is_new = await self._operations.create_volume_once(
            body["name"], body["size"], body.get("allow", ()), uuid=body.get("uuid")
        )
        if is_new:
            log.info("volume %s created, %s", info.name, format_size(info.size))
        return Reply(info, 201 if is_new else 200, {"Location": _location(info)})

    @route("GET", "/v1/volumes/{name}", answer=VolumeInfo)
    async def volume(self, call: Call) -> VolumeInfo:
        """Describe one volume."""
        return self._operations.volume(call["name"])

    @route(
        "PATCH",
        "/v1/volumes/{name}",
        body={
            "size": "bytes?",
            "name": "text?",
            "allow": "names?",
            "iops": "number?",
            "bandwidth": "bytes?",
            "burst_s": "seconds?",
            "shrink": "flag?",
            "force": "flag?",
        },
        answer=VolumeInfo,
    )
    async def update_volume(self, call: Call) -> VolumeInfo:
        """Resize or rename a volume, or change who may attach it, or how fast it is.

        What is left away stays. A smaller size wants shrink, and is busy while the volume is
        leased or attached; force shrinks below mapped data, which is lost then. iops and bandwidth
        limit all clients of the volume together, at once; 0 is no limit; burst_s is how many
        seconds' worth they may save up. Each change is durable by itself; when one fails, those
        before it, in the order size, name, allow, limits, stay done.
        """
        name, body = call["name"], call.body
        asked = {"new_name" if key == "name" else key: value for key, value in body.items()}
        info = await self._operations.update_volume(name, **asked)
        changes = ", ".join(f"{key} {value}" for key, value in body.items())
        log.info("volume %s changed: %s", name, changes)
        return info

    @route(
        "DELETE",
        "/v1/volumes/{name}",
        query={"fence": "flag?", "snapshots": "flag?", "now": "flag?", "uuid": "text?"},
        answer=None,
    )
    async def delete_volume(self, call: Call) -> None:
        """Put a volume into the trash; if now is 1, delete it and its data for good.

        Busy while it is leased or attached, unless fence is 1: that ends its lease and connections.
        Busy if it has snapshots, unless snapshots is 1: they go along; with now that may take long,
        and if it is cut short, what is left is in the trash. With its uuid this is idempotent: if
        it is gone already that is no error, another one of its name stays, and with now one that is
        in the trash goes from there.
        """
        await self._operations.delete_volume(call["name"], **call.query)
        log.info("volume %s deleted%s", call["name"], " for good" if call.query.get("now") else "")

    @route("GET", "/v1/volumes/{name}/data", answer=CONTENT)
    async def read_content(self, call: Call) -> web.StreamResponse:
        """Read a volume from start to end.

        Once the first byte went out, a failure ends the stream as FAILED. What clients write
        meanwhile may be seen or not: this is not one moment.
        """
        name = call["name"]
        size, pieces = self._operations.read_content(name)
        response = web.StreamResponse(headers={"Content-Type": stream.CONTENT_TYPE})
        await response.prepare(call.request)
        writer = StreamWriter()
        await _send(response, writer.header(size))
        try:
            async for piece in pieces:
                await _send(response, writer.data(piece))
            await _send(response, writer.end())
        except NbdstoreError as error:
            log.error("sending volume %s failed: %s", name, error)
            await _send(response, writer.failed(error))
        await response.write_eof()
        return response

    @route(
        "PUT",
        "/v1/volumes/{name}/data",
        body=CONTENT,
        query={"overwrite": "flag?"},
        answer=VolumeInfo,
    )
    async def write_content(self, call: Call) -> VolumeInfo:
        """Make a stream the content of a volume, durably.

        A volume that is absent is created with the stream's size, and removed again if the import
        fails. One that is there must be large enough, unattached, and empty unless overwrite is 1;
        what the stream does not cover reads as zeros afterwards.
        """
        name = call["name"]
        reader = StreamReader()
        pieces = _received(call.request, reader)
        # The first step reads the header, and with it the size that a new volume gets.
        first = await anext(pieces, None)
        if reader.size is None:
            raise InvalidArgument("the request body is not a data stream: it has no header")
        info = await self._operations.write_content(
            name,
            reader.size,
            _resumed(first, pieces),
            overwrite=call.query.get("overwrite", False),
        )
        log.info("volume %s imported, %s of data", name, format_size(info.mapped))
        return info


def _location(info: VolumeInfo) -> str:
    return f"/v1/volumes/{quote(info.name, safe='')}"


async def _send(response: web.StreamResponse, buffers: list[Buffer]) -> None:
    for buffer in buffers:
        await response.write(buffer)


async def _received(request: web.Request, reader: StreamReader) -> AsyncIterator[stream.Piece]:
    """Yield the pieces of a request's body; InvalidArgument if it is damaged or cut off."""
    try:
        async for chunk in request.content.iter_any():
            for piece in reader.feed(chunk):
                yield piece
        reader.end()
    except (ControlError, ClientPayloadError) as error:
        raise InvalidArgument(f"the import was not sent whole: {error}") from error


async def _resumed(
    first: stream.Piece | None, rest: AsyncIterator[stream.Piece]
) -> AsyncIterator[stream.Piece]:
    if first is not None:
        yield first
    async for piece in rest:
        yield piece
