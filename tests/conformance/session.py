"""The client's side of the transmission phase: requests out, replies in, strictly.

A reply that breaks a rule of the specification raises Broken, so that every case in which a reply
is read is a case of all those rules: magics, cookies, chunk types and lengths, offsets echoed,
content that covers every byte once, extents that make sense, errors that exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.conformance.connection import Connection
from tests.conformance.handshake import Export, check_string
from tests.conformance.outcome import Broken, Violation
from tests.conformance.wire import (
    DONE,
    ERROR,
    EXTENDED_EXTENT,
    EXTENDED_REPLY,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    EXTENT,
    OFFSET_HOLE,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STATUS_EXT,
    STRUCTURED_REPLY,
    STRUCTURED_REPLY_MAGIC,
    U32,
    U64,
    ChunkType,
    Cmd,
    CmdFlag,
    Errno,
    Mode,
    name_of,
)

MAX_CHUNK_BYTES = (64 << 20) + U64.size
"""A chunk that announces more than the longest READ of libnbd is taken for nonsense."""


@dataclass(frozen=True)
class Chunk:
    """The header of one chunk of a reply."""

    kind: int
    flags: int
    length: int


@dataclass
class Reply:
    """All that came back for one request.

    Arguments:
        command, offset, length: of the request; ``length`` is the effect's.
        data: a READ's content, None if there was an error.
        extents: (length, status) pairs by context id.
        chunks: none for a simple reply.
    """

    command: int
    offset: int
    length: int
    flags: int
    error: int = 0
    message: str = ""
    data: bytes | None = None
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    chunks: list[Chunk] = field(default_factory=list)
    content: bytearray | None = None
    covered: list[tuple[int, int]] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """Name what came, for a person."""
        return name_of(Errno, self.error) if self.error else "success"

    @property
    def content_chunks(self) -> list[Chunk]:
        kinds = (ChunkType.OFFSET_DATA, ChunkType.OFFSET_HOLE)
        return [chunk for chunk in self.chunks if chunk.kind in kinds]


class Session:
    """One connection in its transmission phase.

    Arguments:
        connection: just behind the handshake.
        mode: what was agreed on.
        export: what the server told of it.
        contexts: the ids of the metadata contexts that were selected, by name.
    """

    def __init__(
        self, connection: Connection, mode: Mode, export: Export, contexts: Mapping[str, int]
    ) -> None:
        self.connection = connection
        self.mode = mode
        self.export = export
        self.contexts = dict(contexts)
        self._pending: dict[int, Reply] = {}
        self._complete: dict[int, Reply] = {}
        self._next_cookie = 0x6E626473_00000001

    # --- Requests ----------------------------------------------------------------------------

    def build(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes | None = None,
        cookie: int | None = None,
    ) -> tuple[int, bytes]:
        """Build a request; return its cookie and its bytes.

        A payload decides the length on the wire, and sets PAYLOAD_LEN if headers are extended.
        """
        if cookie is None:
            cookie = self._next_cookie
            self._next_cookie += 1
        if command != Cmd.DISC:
            effect = len(payload) if command == Cmd.WRITE and payload is not None else length
            self._pending[cookie] = Reply(command, offset, effect, flags)
        if payload is not None:
            length = len(payload)
        if self.mode is Mode.EXTENDED:
            if payload is not None:
                flags |= CmdFlag.PAYLOAD_LEN
            values = (EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length)
            return cookie, EXTENDED_REQUEST.pack(*values) + (payload or b"")
        values = (REQUEST_MAGIC, flags, command, cookie, offset, length)
        return cookie, REQUEST.pack(*values) + (payload or b"")

    def start(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes | None = None,
        cookie: int | None = None,
    ) -> int:
        """Send a request; return its cookie."""
        cookie, data = self.build(
            command, offset, length, flags=flags, payload=payload, cookie=cookie
        )
        self.connection.send(data)
        return cookie

    def do(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes | None = None,
        cookie: int | None = None,
    ) -> Reply:
        """Send a request and receive its reply."""
        return self.reply(
            self.start(command, offset, length, flags=flags, payload=payload, cookie=cookie)
        )

    def read(self, offset: int, length: int) -> bytes:
        """Read; Violation if that fails."""
        reply = self.do(Cmd.READ, offset, length)
        if reply.data is None:
            raise Violation(f"READ of {length} bytes at {offset} fails: {reply.outcome}")
        return reply.data

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        """Write; Violation if that fails."""
        reply = self.do(Cmd.WRITE, offset, payload=data, flags=flags)
        if reply.error:
            raise Violation(f"WRITE of {len(data)} bytes at {offset} fails: {reply.outcome}")

    def must_be_in_sync(self) -> None:
        """Broken unless the next request is understood as it should be."""
        reply = self.do(Cmd.READ, 0, 512)
        if reply.error:
            raise Broken(f"a plain READ afterwards fails: {reply.outcome}")

    # --- Replies -----------------------------------------------------------------------------

    def reply(self, cookie: int) -> Reply:
        """Receive until the reply to a request is complete."""
        while cookie not in self._complete:
            self.take_message()
        return self._complete.pop(cookie)

    def replies(self, cookies: Sequence[int]) -> list[Reply]:
        """Receive the replies to several requests, whatever their order."""
        return [self.reply(cookie) for cookie in cookies]

    def complete(self) -> list[int]:
        """The cookies of the replies that are complete, and not taken yet."""
        return list(self._complete)

    def take_message(self) -> None:
        """Receive one simple reply or one chunk."""
        raw = self.connection.take(U32.size)
        (magic,) = U32.unpack(raw)
        if magic == SIMPLE_REPLY_MAGIC and self.mode is not Mode.EXTENDED:
            self._take_simple(raw)
        elif (magic, self.mode) in (
            (STRUCTURED_REPLY_MAGIC, Mode.STRUCTURED),
            (EXTENDED_REPLY_MAGIC, Mode.EXTENDED),
        ):
            self._take_chunk(raw)
        else:
            raise Broken(f"a reply starts with {magic:#010x} in a {self.mode.value} session")

    def _find(self, cookie: int) -> Reply:
        if cookie not in self._pending:
            raise Broken(f"a reply with the cookie {cookie:#x}, which no request has")
        return self._pending[cookie]

    def _finish(self, cookie: int) -> None:
        reply = self._pending.pop(cookie)
        if reply.error and reply.error not in list(Errno):
            raise Broken(f"the error {reply.error}, which NBD does not have")
        self._complete[cookie] = reply

    def _take_simple(self, start: bytes) -> None:
        header = start + self.connection.take(SIMPLE_REPLY.size - len(start))
        _, error, cookie = SIMPLE_REPLY.unpack(header)
        reply = self._find(cookie)
        if reply.chunks:
            raise Broken("a simple reply behind chunks for the same request")
        if reply.command == Cmd.BLOCK_STATUS and not error:
            raise Broken("a simple reply to BLOCK_STATUS that claims success")
        if reply.command == Cmd.READ and self.mode is Mode.STRUCTURED:
            raise Broken("a simple reply to READ")
        if reply.command == Cmd.READ and not error:
            reply.data = self.connection.take(reply.length)
        reply.error = error
        self._finish(cookie)

    def _take_chunk(self, start: bytes) -> None:
        layout = EXTENDED_REPLY if self.mode is Mode.EXTENDED else STRUCTURED_REPLY
        header = layout.unpack(start + self.connection.take(layout.size - len(start)))
        _, flags, kind, cookie, *echoed, length = header
        reply = self._find(cookie)
        if echoed and echoed[0] != reply.offset:
            raise Broken(f"a chunk echoes offset {echoed[0]}, the request has {reply.offset}")
        if flags & ~DONE:
            raise Broken(f"a chunk with the flags {flags:#x}")
        if length > MAX_CHUNK_BYTES:
            raise Broken(f"a chunk of {length} bytes")
        reply.chunks.append(Chunk(kind, flags, length))
        take_payload(reply, kind, self.connection.take(length), self.mode)
        if flags & DONE:
            conclude(reply)
            self._finish(cookie)
        elif kind == ChunkType.NONE:
            raise Broken("a NONE chunk that is not the last")


# --- Chunks: "Structured reply types" -------------------------------------------------------------


def take_payload(reply: Reply, kind: int, payload: bytes, mode: Mode) -> None:
    """Add one chunk's payload to a reply."""
    if kind == ChunkType.NONE:
        if payload:
            raise Broken("a NONE chunk with a payload")
    elif kind == ChunkType.OFFSET_DATA:
        if len(payload) <= U64.size:
            raise Broken("an OFFSET_DATA chunk without data")
        (start,) = U64.unpack_from(payload)
        take_content(reply, start, len(payload) - U64.size, payload[U64.size :])
    elif kind == ChunkType.OFFSET_HOLE:
        if len(payload) != OFFSET_HOLE.size:
            raise Broken(f"an OFFSET_HOLE chunk of {len(payload)} bytes")
        start, length = OFFSET_HOLE.unpack(payload)
        take_content(reply, start, length, b"")
    elif kind in (ChunkType.BLOCK_STATUS, ChunkType.BLOCK_STATUS_EXT):
        take_status(reply, kind, payload, mode)
    elif kind in (ChunkType.ERROR, ChunkType.ERROR_OFFSET):
        take_error(reply, kind, payload)
    else:
        raise Broken(f"a chunk of the unknown type {kind:#x}")


def take_content(reply: Reply, start: int, length: int, data: bytes) -> None:
    first, last = start - reply.offset, start - reply.offset + length
    if reply.command != Cmd.READ or length < 1:
        raise Broken("content that nobody asked for")
    if first < 0 or last > reply.length:
        raise Broken(f"content [{start}, {start + length}) outside of the request")
    if any(first < stop and begin < last for begin, stop in reply.covered):
        raise Broken(f"content [{start}, {start + length}) comes twice")
    reply.covered.append((first, last))
    if reply.content is None:
        reply.content = bytearray(reply.length)
    if data:
        reply.content[first:last] = data


def take_status(reply: Reply, kind: int, payload: bytes, mode: Mode) -> None:
    extended = mode is Mode.EXTENDED
    if reply.command != Cmd.BLOCK_STATUS or (kind == ChunkType.BLOCK_STATUS_EXT) is not extended:
        raise Broken(f"a chunk {ChunkType(kind).name} in a {mode.value} session")
    head, layout = (STATUS_EXT, EXTENDED_EXTENT) if extended else (U32, EXTENT)
    n_bytes = len(payload) - head.size
    if n_bytes < layout.size or n_bytes % layout.size:
        raise Broken(f"a block status of {len(payload)} bytes")
    context, *count = head.unpack_from(payload)
    extents = [(length, status) for length, status in layout.iter_unpack(payload[head.size :])]
    if count and count[0] != len(extents):
        raise Broken(f"{count[0]} extents announced, {len(extents)} sent")
    if context in reply.extents:
        raise Broken(f"the metadata context {context} comes twice")
    if any(length == 0 for length, _ in extents):
        raise Broken("an extent without length")
    if len(extents) > 1 and sum(length for length, _ in extents[:-1]) >= reply.length:
        raise Broken("more extents than the request covers")
    if reply.flags & CmdFlag.REQ_ONE:
        if len(extents) > 1:
            raise Broken(f"{len(extents)} extents to a request for one")
        if extents[0][0] > reply.length:
            raise Broken("an extent longer than the request for one")
    reply.extents[context] = extents


def take_error(reply: Reply, kind: int, payload: bytes) -> None:
    tail = U64.size if kind == ChunkType.ERROR_OFFSET else 0
    if len(payload) < ERROR.size + tail:
        raise Broken(f"an error chunk of {len(payload)} bytes")
    error, length = ERROR.unpack_from(payload)
    if not error:
        raise Broken("an error chunk without an error")
    if length > len(payload) - ERROR.size - tail:
        raise Broken(f"a message of {length} bytes in an error chunk of {len(payload)}")
    reply.message = check_string(payload[ERROR.size : ERROR.size + length], "an error's message")
    reply.error = error
    if tail:
        (offset,) = U64.unpack_from(payload, ERROR.size + length)
        if not reply.offset <= offset < reply.offset + max(1, reply.length):
            raise Broken(f"an error at {offset}, outside of the request")


def conclude(reply: Reply) -> None:
    """Check what holds once the last chunk has come."""
    if reply.error:
        return
    if reply.command == Cmd.READ:
        covered = sum(stop - start for start, stop in reply.covered)
        if covered != reply.length:
            raise Broken(f"{covered} bytes of {reply.length} in a reply that claims success")
        reply.data = bytes(reply.content or b"")
    elif reply.command == Cmd.BLOCK_STATUS and not reply.extents:
        raise Broken("a block status without extents")
    if reply.flags & CmdFlag.DF and reply.command == Cmd.READ and len(reply.content_chunks) > 1:
        raise Broken(f"{len(reply.content_chunks)} content chunks to a READ with DF")
