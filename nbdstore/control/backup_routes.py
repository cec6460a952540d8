"""Routes about changed blocks and backups."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any

from aiohttp import ClientPayloadError, web

from nbdstore.control import backup_stream, diff
from nbdstore.control.backup_stream import BackupWriter, Begin
from nbdstore.control.long_operations import LongOperations, Task
from nbdstore.control.operations import Operations
from nbdstore.control.receiving_model import ReceivedInfo, ReceivingInfo
from nbdstore.control.routing import Call, Media, route
from nbdstore.control.stream import Buffer
from nbdstore.errors import Cancelled, ControlError, InvalidArgument, NbdstoreError
from nbdstore.sizes import format_size

SEND = "send"
"""The kind of that operation."""
GOODBYE_S = 1.0
"""Seconds that a cancelled send leaves its reader to take what is on its way, and that it ends."""

log = logging.getLogger(__name__)

STREAM = Media(
    backup_stream.CONTENT_TYPE,
    "A snapshot, or what it has beyond an older one, as frames with checksums; specified in "
    "nbdstore/control/backup_stream.py.",
)
DIFF = Media(
    diff.CONTENT_TYPE,
    "A line of JSON with the sizes, one with offset and length for each extent, one with how many "
    "those were; specified in nbdstore/control/diff.py.",
)


class BackupRoutes:
    """See the module."""

    def __init__(self, operations: Operations) -> None:
        self._backups = operations.backups
        self._running = operations.running

    @route("GET", "/v1/diff", query={"newer": "text", "older": "text?"}, answer=DIFF)
    async def diff(self, call: Call) -> web.StreamResponse:
        """List what is in one volume or snapshot, and not the same in another.

        Without older, all that it holds. Extents are in bytes of the newer one, ascending, never
        adjacent. What lies beyond the end of a smaller older one, and is not listed, is zeros; what
        lies beyond the end of a smaller newer one is gone, and not listed. The cost goes with what
        has changed.
        """
        size, older_size, extents = self._backups.diff(call.query["newer"], call.query.get("older"))
        response = web.StreamResponse(headers={"Content-Type": diff.CONTENT_TYPE})
        await response.prepare(call.request)
        async with aclosing(extents):  # a caller may leave before the end
            async for part in diff.lines(size, older_size, extents):
                await response.write(part)
        await response.write_eof()
        return response

    @route("GET", "/v1/snapshots/{snapshot}/stream", query={"since": "text?"}, answer=STREAM)
    async def send(self, call: Call) -> web.StreamResponse:
        """Send a snapshot as a backup stream, or what it has beyond another one (since).

        Meanwhile neither can be deleted. A failure ends the stream as FAILED. It is one of the
        operations, of kind send: when that is cancelled, the stream ends as FAILED, too.
        """
        writer = BackupWriter()
        since = call.query.get("since")
        frames = self._backups.send(call["snapshot"], since, writer=writer)
        return await _sent(call, self._running, frames, writer)

    @route("GET", "/v1/resumed-stream", query={"token": "text"}, answer=STREAM)
    async def resume(self, call: Call) -> web.StreamResponse:
        """Send the rest of a backup stream, of which a receiver has the beginning.

        The token is from the receiver. It is one of the operations, of kind send.
        """
        writer = BackupWriter()
        frames = self._backups.resume(call.query["token"], writer=writer)
        return await _sent(call, self._running, frames, writer)

    @route("POST", "/v1/volumes/{name}/receive", body=STREAM, answer=ReceivedInfo)
    async def receive(self, call: Call) -> ReceivedInfo:
        """Receive a backup stream into a volume, durably; its snapshot is there then.

        A full stream makes the volume; one that builds on a snapshot wants the volume to have that
        one, and not to have changed since. What has come before a failure, and is whole, is kept,
        and the volume cannot be attached until the rest has been received. It is one of the
        operations, of kind receive; that it was cancelled is such a failure.
        """
        info = await self._backups.receiving.receive(call["name"], _chunks(call.request))
        log.info("received %s, %s of data", info.snapshot, format_size(info.data))
        return info

    @route("GET", "/v1/volumes/{name}/receive", answer=ReceivingInfo)
    async def receiving(self, call: Call) -> ReceivingInfo:
        """Tell what a half-received volume has, and the token for the sender to go on."""
        return self._backups.receiving.show(call["name"])

    @route("DELETE", "/v1/volumes/{name}/receive", answer=None)
    async def abort_receive(self, call: Call) -> None:
        """Give up what a half-received volume has: it is as before, or is gone."""
        await self._backups.receiving.abort(call["name"])
        log.info("volume %s: what was received of it was given up", call["name"])


async def _sent(
    call: Call,
    running: LongOperations,
    frames: AsyncGenerator[list[Buffer], None],
    writer: BackupWriter,
) -> web.StreamResponse:
    """Answer with a stream; as long as that lasts it is one of the operations."""
    async with aclosing(frames):
        first = await anext(frames)  # what is wrong from the start is no stream
        begin = writer.begun
        assert begin is not None
        reader = await _Reader.begin(call.request)

        async def work(task: Task) -> None:
            try:
                task.reach(begin.start)
                await reader.write(first)
                async for some in frames:
                    task.reach(writer.position)
                    await reader.write(some)
            except asyncio.CancelledError:
                await frames.aclose()  # the snapshot is free, whatever the reader does
                await reader.dismiss(writer)
                raise
            except ConnectionError as error:
                raise ControlError("who should receive it has left before the end") from error

        try:
            await running.attend(SEND, _request(begin), work, total=begin.size)
        except NbdstoreError as error:  # the operation says it, and the stream
            log.warning("sending %s: %s", begin.name, error)
    await reader.response.write_eof()
    return reader.response


def _request(begin: Begin) -> dict[str, object]:
    return {"snapshot": begin.name, "since": begin.base_name, "start": begin.start}


class _Reader:
    """Who reads a stream, as slowly as it likes, until the stream is told to end.

    Only waiting for a write is ever cancelled, not the write: aiohttp has one future per connection
    on which all wait until the transport has sent enough; a cancelled one cancels the next, too.
    """

    def __init__(self, request: web.Request, response: web.StreamResponse) -> None:
        self._request = request
        self.response = response

    @classmethod
    async def begin(cls, request: web.Request) -> _Reader:
        """Tell the reader what will come."""
        response = web.StreamResponse(headers={"Content-Type": backup_stream.CONTENT_TYPE})
        await response.prepare(request)
        return cls(request, response)

    async def write(self, frames: list[Buffer]) -> None:
        """Give whole frames to the transport, and return when it has little left to send."""
        await asyncio.shield(_left_alone(self.response.write(b"".join(frames))))

    async def dismiss(self, writer: BackupWriter) -> None:
        """End the stream so that the reader knows that more was to come; hang up if it has stopped.

        Every frame that was begun is with the transport whole, so this one follows it.
        """
        goodbye = writer.failed(Cancelled("the sender was told to end before all was sent"))
        leaving = _left_alone(self._end(goodbye))
        try:
            async with asyncio.timeout(GOODBYE_S):
                await asyncio.shield(leaving)
        except (TimeoutError, ConnectionError):
            pass  # a stream that is cut off has no end, either
        finally:
            if not leaving.done() and self._request.transport is not None:
                self._request.transport.abort()

    async def _end(self, frames: list[Buffer]) -> None:
        await self.response.write(b"".join(frames))
        await self.response.write_eof()


def _left_alone(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Begin what goes on when nobody waits for it any more, nor wants to know how it failed."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return task


async def _chunks(request: web.Request) -> AsyncIterator[Buffer]:
    try:
        async for chunk in request.content.iter_any():
            yield chunk
    except (ClientPayloadError, ConnectionError) as error:
        raise InvalidArgument(f"the stream was not sent whole: {error}") from error
