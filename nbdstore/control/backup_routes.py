"""Routes about changed blocks and backups."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from aiohttp import ClientPayloadError, web

from nbdstore.control import backup_stream, diff, streaming
from nbdstore.control.backup_stream import BackupWriter, Begin
from nbdstore.control.backups import Backups
from nbdstore.control.operations import Operations
from nbdstore.control.receiving_model import ReceivedInfo, ReceivingInfo
from nbdstore.control.routing import Call, Media, route
from nbdstore.control.stream import Buffer
from nbdstore.errors import InvalidArgument, NbdstoreError
from nbdstore.sizes import format_size

SEND = "send"
DIFF = "diff"
"""The kinds of these operations."""

log = logging.getLogger(__name__)

STREAM = Media(
    backup_stream.CONTENT_TYPE,
    "A snapshot, or what it has beyond an older one, as frames with checksums; specified in "
    "nbdstore/control/backup_stream.py.",
)
CHANGES = Media(
    diff.CONTENT_TYPE,
    "A line of JSON with the sizes, one with offset and length for each extent, one with how many "
    "those were; specified in nbdstore/control/diff.py.",
)


class BackupRoutes:
    """See the module."""

    def __init__(self, operations: Operations) -> None:
        self._backups = operations.backups
        self._running = operations.running

    @route("GET", "/v1/diff", query={"newer": "text", "older": "text?"}, answer=CHANGES)
    async def diff(self, call: Call) -> web.StreamResponse:
        """List what is in one volume or snapshot, and not the same in another.

        Without older, all that it holds. Extents are in bytes of the newer one, ascending, never
        adjacent. What lies beyond the end of a smaller older one, and is not listed, is zeros; what
        lies beyond the end of a smaller newer one is gone, and not listed. The cost goes with what
        has changed. Meanwhile snapshots among the two cannot be deleted: it is one of the
        operations, of kind diff, and when that is cancelled, the list ends as a problem.
        """
        changes = _Changes(self._backups, call.query["newer"], call.query.get("older"))
        return await streaming.send(call.request, diff.CONTENT_TYPE, changes, self._running)

    @route("GET", "/v1/snapshots/{snapshot}/stream", query={"since": "text?"}, answer=STREAM)
    async def send(self, call: Call) -> web.StreamResponse:
        """Send a snapshot as a backup stream, or what it has beyond another one (since).

        Meanwhile neither can be deleted. A failure ends the stream as FAILED. It is one of the
        operations, of kind send: when that is cancelled, the stream ends as FAILED, too.
        """
        name, since = call["snapshot"], call.query.get("since")
        backup = _Backup(lambda writer: self._backups.send(name, since, writer=writer))
        return await self._sent(call, backup)

    @route("GET", "/v1/resumed-stream", query={"token": "text"}, answer=STREAM)
    async def resume(self, call: Call) -> web.StreamResponse:
        """Send the rest of a backup stream, of which a receiver has the beginning.

        The token is from the receiver. It is one of the operations, of kind send.
        """
        token = call.query["token"]
        backup = _Backup(lambda writer: self._backups.resume(token, writer=writer))
        return await self._sent(call, backup)

    async def _sent(self, call: Call, backup: _Backup) -> web.StreamResponse:
        content_type = backup_stream.CONTENT_TYPE
        return await streaming.send(call.request, content_type, backup, self._running)

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


class _Backup:
    """A backup stream on its way; see `streaming.Stream`."""

    kind = SEND

    def __init__(
        self, frames: Callable[[BackupWriter], AsyncGenerator[list[Buffer], None]]
    ) -> None:
        self._writer = BackupWriter()
        self.parts = frames(self._writer)

    @property
    def _begun(self) -> Begin:
        assert self._writer.begun is not None
        return self._writer.begun

    @property
    def request(self) -> dict[str, Any]:
        begin = self._begun
        return {"snapshot": begin.name, "since": begin.base_name, "start": begin.start}

    @property
    def total(self) -> int:
        return self._begun.size

    @property
    def position(self) -> int:
        return max(self._begun.start, self._writer.position)

    def failed(self, error: NbdstoreError) -> list[Buffer]:
        return self._writer.failed(error)

    async def close(self) -> None:
        await self.parts.aclose()


class _Changes:
    """A list of changes on its way; see `streaming.Stream`."""

    kind = DIFF

    def __init__(self, backups: Backups, newer: str, older: str | None) -> None:
        self.request: dict[str, Any] = {"newer": newer, "older": older}
        self.position = 0
        self.total, older_size, self._extents = backups.diff(newer, older)
        self.parts = self._parts(diff.lines(self.total, older_size, self._seen()))

    async def _seen(self) -> AsyncIterator[diff.Extent]:
        async for offset, length in self._extents:
            self.position = offset + length
            yield offset, length

    async def _parts(self, lines: AsyncIterator[bytes]) -> AsyncGenerator[list[Buffer], None]:
        async for some in lines:
            yield [some]

    def failed(self, error: NbdstoreError) -> list[Buffer]:
        return [diff.failed(error)]

    async def close(self) -> None:
        await self.parts.aclose()
        await self._extents.aclose()


async def _chunks(request: web.Request) -> AsyncIterator[Buffer]:
    try:
        async for chunk in request.content.iter_any():
            yield chunk
    except (ClientPayloadError, ConnectionError) as error:
        raise InvalidArgument(f"the stream was not sent whole: {error}") from error
