"""Answers that are streams of unknown length, as slow as their readers.

Owns how such an answer goes on and how it ends. As long as it lasts it is one of the operations:
what it reads from is in use meanwhile, so that somebody else must be able to end it, whether its
reader still reads or not. What the stream looks like is known to who makes it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Protocol

from aiohttp import web

from nbdstore.control.long_operations import LongOperations, Task
from nbdstore.control.stream import Buffer
from nbdstore.errors import Cancelled, ControlError, NbdstoreError

GOODBYE_S = 1.0
"""Seconds that a cancelled stream leaves its reader to take what is on its way, and its end."""

log = logging.getLogger(__name__)


class Stream(Protocol):
    """What is sent.

    Attributes:
        kind, request: of the operation; the latter may be asked for once the first part is there.
        total, position: bytes of what is sent, and of these how many are done; as `request`.
        parts: its bytes, each part whole in itself. A failure is its last part, and raised then.
    """

    kind: str
    parts: AsyncGenerator[list[Buffer], None]

    @property
    def request(self) -> dict[str, Any]: ...

    @property
    def total(self) -> int: ...

    @property
    def position(self) -> int: ...

    def failed(self, error: NbdstoreError) -> list[Buffer]:
        """Return the last part of a stream that ends after any other, before all was sent."""

    async def close(self) -> None:
        """Let go of what it reads from."""


async def send(
    request: web.Request, content_type: str, stream: Stream, running: LongOperations
) -> web.StreamResponse:
    """Answer `request` with a stream."""
    try:
        first = await anext(stream.parts)  # what is wrong from the start is no stream
        reader = await _Reader.begin(request, content_type)

        async def work(task: Task) -> None:
            try:
                task.reach(stream.position)
                await reader.write(first)
                async for part in stream.parts:
                    task.reach(stream.position)
                    await reader.write(part)
                task.reach(stream.total)
            except asyncio.CancelledError:
                await stream.close()  # what it reads from is free, whatever the reader does
                told = Cancelled(f"the {stream.kind} was told to end before all was sent")
                await reader.dismiss(stream.failed(told))
                raise
            except ConnectionError as error:
                raise ControlError("who should receive it has left before the end") from error

        try:
            await running.attend(stream.kind, stream.request, work, total=stream.total)
        except NbdstoreError as error:  # the operation says it, and the stream
            log.warning("%s %s: %s", stream.kind, stream.request, error)
    finally:
        await stream.close()
    await reader.response.write_eof()
    return reader.response


class _Reader:
    """Who reads a stream, as slowly as it likes, until the stream is told to end.

    Only waiting for a write is ever cancelled, not the write: aiohttp has one future per connection
    on which all wait until the transport has sent enough; a cancelled one cancels the next, too.
    """

    def __init__(self, request: web.Request, response: web.StreamResponse) -> None:
        self._request = request
        self.response = response

    @classmethod
    async def begin(cls, request: web.Request, content_type: str) -> _Reader:
        """Tell the reader what will come."""
        response = web.StreamResponse(headers={"Content-Type": content_type})
        await response.prepare(request)
        return cls(request, response)

    async def write(self, part: list[Buffer]) -> None:
        """Give a whole part to the transport, and return when it has little left to send."""
        await asyncio.shield(_left_alone(self.response.write(b"".join(part))))

    async def dismiss(self, goodbye: list[Buffer]) -> None:
        """End the stream so that the reader knows that more was to come; hang up if it has stopped.

        Every part that was begun is with the transport whole, so this one follows it.
        """
        leaving = _left_alone(self._end(goodbye))
        try:
            async with asyncio.timeout(GOODBYE_S):
                await asyncio.shield(leaving)
        except (TimeoutError, ConnectionError):
            pass  # a stream that is cut off has no end, either
        finally:
            if not leaving.done() and self._request.transport is not None:
                self._request.transport.abort()

    async def _end(self, part: list[Buffer]) -> None:
        await self.response.write(b"".join(part))
        await self.response.write_eof()


def _left_alone(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Begin what goes on when nobody waits for it any more, nor wants to know how it failed."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return task
