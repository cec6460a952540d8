"""The client's side of NBD, sans-I/O: for tests, and for tools that speak to a server.

Covers what the server covers, extended headers included, which few clients speak. It is strict:
a reply that breaks a rule of the specification raises ProtocolError, so that every test that uses
it is a conformance test. Knows nothing of sockets.

    ClientHandshake      hello and option replies in, options out
    ClientTransmission   replies in, requests out
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from nbdstore.errors import ProtocolError
from nbdstore.protocol.agreement import ReplyMode
from nbdstore.protocol.constants import (
    BLOCK_STATUS_EXT,
    CLIENT_FLAGS,
    ERROR,
    EXPORT_NAME_PADDING,
    EXPORT_NAME_REPLY,
    EXTENDED_EXTENT,
    EXTENDED_REPLY,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    EXTENT,
    HELLO,
    INFO_EXPORT,
    INIT_PASSWD,
    MAX_STRING,
    OFFSET_HOLE,
    OPTION,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY,
    STRUCTURED_REPLY_MAGIC,
    U16,
    U32,
    U64,
    Chunk,
    ClientFlag,
    Command,
    CommandFlag,
    Errno,
    Option,
    OptionReply,
    ReplyFlag,
)

MAX_OPTION_REPLY = 1 << 20
"""An option reply that announces more is nonsense; waiting for it would mean to hold it."""

MAX_CHUNK = (64 << 20) + U64.size
"""So is a chunk that is longer than any READ."""

_ERRORS = frozenset(map(int, Errno))

# --- Handshake -----------------------------------------------------------------------------------


def build_option(option: int, data: bytes = b"") -> bytes:
    """Build one option."""
    return OPTION.pack(OPTION_MAGIC, option, len(data)) + data


def build_info(name: str, infos: Sequence[int] = ()) -> bytes:
    """Build the data of INFO and GO."""
    encoded = name.encode()
    asked = b"".join(U16.pack(info) for info in infos)
    return U32.pack(len(encoded)) + encoded + U16.pack(len(infos)) + asked


def build_meta_context(name: str, queries: Sequence[str]) -> bytes:
    """Build the data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    strings = [name.encode(), *(query.encode() for query in queries)]
    counted = [U32.pack(len(string)) + string for string in strings]
    return counted[0] + U32.pack(len(queries)) + b"".join(counted[1:])


@dataclass(frozen=True)
class OptionAnswer:
    """One reply to an option."""

    option: int
    reply: int
    data: bytes

    @property
    def is_last(self) -> bool:
        """Whether no more replies to this option follow."""
        return self.reply == OptionReply.ACK or self.is_error

    @property
    def is_error(self) -> bool:
        return bool(self.reply & 1 << 31)


@dataclass(frozen=True)
class ExportSize:
    """What INFO_EXPORT, or the answer to EXPORT_NAME, tells."""

    size: int
    flags: int


class ClientHandshake:
    """Parse what a server sends before the transmission phase."""

    def __init__(self, flags: int = ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES) -> None:
        self.flags = flags
        self.handshake_flags: int | None = None
        self._received = bytearray()

    def receive(self, data: bytes) -> None:
        """Take bytes from the server."""
        self._received += data

    def hello(self) -> bytes | None:
        """Parse the server's hello and return the client flags to send; None if incomplete."""
        raw = self._take(HELLO.size)
        if raw is None:
            return None
        password, magic, self.handshake_flags = HELLO.unpack(raw)
        if (password, magic) != (INIT_PASSWD, OPTION_MAGIC):
            raise ProtocolError("not a newstyle NBD server")
        return CLIENT_FLAGS.pack(self.flags)

    def answer(self) -> OptionAnswer | None:
        """Parse the next option reply; None if it is incomplete."""
        if len(self._received) < OPTION_REPLY.size:
            return None
        magic, option, reply, length = OPTION_REPLY.unpack_from(self._received)
        if magic != OPTION_REPLY_MAGIC:
            raise ProtocolError(f"an option reply starts with {magic:#x}")
        if length > MAX_OPTION_REPLY:
            raise ProtocolError(f"an option reply of {length} bytes")
        raw = self._take(OPTION_REPLY.size + length)
        return None if raw is None else OptionAnswer(option, reply, raw[OPTION_REPLY.size :])

    def export_name_answer(self) -> ExportSize | None:
        """Parse the answer to EXPORT_NAME, which is no option reply; None if incomplete."""
        padding = 0 if self.flags & ClientFlag.NO_ZEROES else len(EXPORT_NAME_PADDING)
        raw = self._take(EXPORT_NAME_REPLY.size + padding)
        return None if raw is None else ExportSize(*EXPORT_NAME_REPLY.unpack_from(raw))

    def unread(self) -> bytes:
        """Bytes behind what was parsed."""
        return bytes(self._received)

    def _take(self, n_bytes: int) -> bytes | None:
        if len(self._received) < n_bytes:
            return None
        raw = bytes(self._received[:n_bytes])
        del self._received[:n_bytes]
        return raw


def parse_info_export(data: bytes) -> ExportSize:
    """Parse the data of a REP_INFO with INFO_EXPORT."""
    if len(data) != INFO_EXPORT.size:
        raise ProtocolError(f"an INFO_EXPORT of {len(data)} bytes")
    _, size, flags = INFO_EXPORT.unpack(data)
    return ExportSize(size, flags)


# --- Transmission --------------------------------------------------------------------------------


@dataclass
class Reply:
    """All that came back for one request.

    Arguments:
        data: a READ's content, None if there was an error.
        extents: (length, status) pairs by context id.
        chunks: (type, payload length) of each chunk; empty for a simple reply.
    """

    cookie: int
    command: int
    error: int = 0
    message: str = ""
    data: bytes | None = None
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    chunks: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class _Pending:
    """A request whose reply is not complete."""

    reply: Reply
    offset: int
    length: int
    content: bytearray | None = None
    covered: list[tuple[int, int]] = field(default_factory=list)


class ClientTransmission:
    """Build requests and parse replies.

    Arguments:
        mode: the family of requests and replies that was agreed on.
    """

    def __init__(self, mode: ReplyMode) -> None:
        self.mode = mode
        self._pending: dict[int, _Pending] = {}
        self._received = bytearray()
        self._next_cookie = 1

    @property
    def n_pending(self) -> int:
        return len(self._pending)

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        payload: bytes | None = None,
    ) -> tuple[int, bytes]:
        """Build a request; return its cookie and its bytes.

        With a payload, ``length`` is the effect's (for a filtered BLOCK_STATUS) or ignored.
        """
        cookie = self._next_cookie
        self._next_cookie += 1
        extended = self.mode is ReplyMode.EXTENDED
        sent_length = length if payload is None else len(payload)
        if payload is not None and extended:
            flags |= CommandFlag.PAYLOAD_LEN
        layout, magic = (
            (EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC) if extended else (REQUEST, REQUEST_MAGIC)
        )
        if command != Command.DISC:
            self._pending[cookie] = _Pending(Reply(cookie, command), offset, length)
        header = layout.pack(magic, flags, command, U64.pack(cookie), offset, sent_length)
        return cookie, header + (payload or b"")

    def filtered_block_status(
        self, offset: int, length: int, context_ids: Sequence[int], flags: int = 0
    ) -> tuple[int, bytes]:
        """Build a BLOCK_STATUS that asks for some of the contexts only (extended headers)."""
        payload = U64.pack(length) + b"".join(U32.pack(number) for number in context_ids)
        return self.request(Command.BLOCK_STATUS, offset, length, flags, payload)

    def receive(self, data: bytes) -> list[Reply]:
        """Take bytes from the server; return the replies that are complete now."""
        self._received += data
        return [reply for reply in iter(self._take_message, False) if isinstance(reply, Reply)]

    # --- Parsing -----------------------------------------------------------------------------

    def _take_message(self) -> Reply | bool:
        """Parse one reply or chunk: the Reply it completes, True if none, False if incomplete."""
        if len(self._received) < U32.size:
            return False
        (magic,) = U32.unpack_from(self._received)
        if magic == SIMPLE_REPLY_MAGIC and self.mode is not ReplyMode.EXTENDED:
            return self._take_simple()
        if magic == STRUCTURED_REPLY_MAGIC and self.mode is ReplyMode.STRUCTURED:
            return self._take_chunk()
        if magic == EXTENDED_REPLY_MAGIC and self.mode is ReplyMode.EXTENDED:
            return self._take_chunk()
        raise ProtocolError(f"a reply starts with {magic:#010x} in mode {self.mode.value}")

    def _take_simple(self) -> Reply | bool:
        if len(self._received) < SIMPLE_REPLY.size:
            return False
        _, error, cookie = SIMPLE_REPLY.unpack_from(self._received)
        pending = self._find(cookie)
        if pending.reply.chunks:
            raise ProtocolError("a simple reply behind chunks for the same request")
        reads = pending.reply.command == Command.READ
        if self.mode is ReplyMode.STRUCTURED and reads:
            raise ProtocolError("a simple reply to READ although structured ones were agreed on")
        stop = SIMPLE_REPLY.size + (pending.length if reads and not error else 0)
        if len(self._received) < stop:
            return False
        if reads and not error:
            pending.reply.data = bytes(self._received[SIMPLE_REPLY.size : stop])
        pending.reply.error = error
        del self._received[:stop]
        return self._finish(pending)

    def _take_chunk(self) -> Reply | bool:
        extended = self.mode is ReplyMode.EXTENDED
        layout = EXTENDED_REPLY if extended else STRUCTURED_REPLY
        if len(self._received) < layout.size:
            return False
        _, flags, chunk, cookie, *echoed, length = layout.unpack_from(self._received)
        pending = self._find(cookie)
        if echoed and echoed[0] != pending.offset:
            raise ProtocolError(f"offset {echoed[0]} echoed instead of {pending.offset}")
        if flags & ~int(ReplyFlag.DONE):
            raise ProtocolError(f"a chunk with the flags {flags:#x}")
        if length > MAX_CHUNK:
            raise ProtocolError(f"a chunk of {length} bytes")
        stop = layout.size + length
        if len(self._received) < stop:
            return False
        payload = bytes(self._received[layout.size : stop])
        del self._received[:stop]
        pending.reply.chunks.append((chunk, length))
        self._take_payload(pending, chunk, payload)
        if flags & ReplyFlag.DONE:
            return self._finish(pending)
        if chunk == Chunk.NONE:
            raise ProtocolError("a NONE chunk that is not the last")
        return True

    def _find(self, cookie: bytes) -> _Pending:
        pending = self._pending.get(U64.unpack(cookie)[0])
        if pending is None:
            raise ProtocolError(f"a reply to nothing: cookie {cookie.hex()}")
        return pending

    def _take_payload(self, pending: _Pending, chunk: int, payload: bytes) -> None:
        if chunk == Chunk.NONE:
            if payload:
                raise ProtocolError("a NONE chunk with a payload")
        elif chunk == Chunk.OFFSET_DATA:
            require_bytes(payload, U64.size, "OFFSET_DATA")
            (start,) = U64.unpack_from(payload)
            self._take_content(pending, start, len(payload) - U64.size, payload[U64.size :])
        elif chunk == Chunk.OFFSET_HOLE:
            if len(payload) != OFFSET_HOLE.size:
                raise ProtocolError(f"an OFFSET_HOLE chunk of {len(payload)} bytes")
            start, length = OFFSET_HOLE.unpack(payload)
            self._take_content(pending, start, length, b"")
        elif chunk in (Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT):
            self._take_status(pending, chunk, payload)
        elif chunk in (Chunk.ERROR, Chunk.ERROR_OFFSET):
            self._take_error(pending, chunk, payload)
        else:
            raise ProtocolError(f"unknown chunk type {chunk}")

    def _take_content(self, pending: _Pending, start: int, length: int, data: bytes) -> None:
        first, last = start - pending.offset, start - pending.offset + length
        if pending.reply.command != Command.READ or length < 1:
            raise ProtocolError("content that nobody asked for")
        if first < 0 or last > pending.length:
            raise ProtocolError(f"content [{start}, {start + length}) outside of the request")
        if any(first < stop and begin < last for begin, stop in pending.covered):
            raise ProtocolError(f"content [{start}, {start + length}) came twice")
        pending.covered.append((first, last))
        if pending.content is None:
            pending.content = bytearray(pending.length)
        if data:
            pending.content[first:last] = data

    def _take_status(self, pending: _Pending, chunk: int, payload: bytes) -> None:
        extended = self.mode is ReplyMode.EXTENDED
        if (chunk == Chunk.BLOCK_STATUS_EXT) is not extended:
            raise ProtocolError(f"chunk type {chunk} in mode {self.mode.value}")
        if pending.reply.command != Command.BLOCK_STATUS:
            raise ProtocolError("a block status that nobody asked for")
        layout = EXTENDED_EXTENT if extended else EXTENT
        head = BLOCK_STATUS_EXT if extended else U32
        require_bytes(payload, head.size, "BLOCK_STATUS")
        if (len(payload) - head.size) % layout.size:
            raise ProtocolError(f"a block status of {len(payload)} bytes")
        context_id, *count = head.unpack_from(payload)
        extents = list(layout.iter_unpack(payload[head.size :]))
        if count and count[0] != len(extents):
            raise ProtocolError(f"{count[0]} extents announced, {len(extents)} sent")
        if context_id in pending.reply.extents:
            raise ProtocolError(f"context {context_id} answered twice")
        if not extents or any(length == 0 for length, _ in extents):
            raise ProtocolError("block status without extents, or with an empty one")
        if sum(length for length, _ in extents[:-1]) >= pending.length:
            raise ProtocolError("more extents than the request covers")
        pending.reply.extents[context_id] = extents

    def _take_error(self, pending: _Pending, chunk: int, payload: bytes) -> None:
        require_bytes(payload, ERROR.size, "ERROR")
        error, length = ERROR.unpack_from(payload)
        tail = U64.size if chunk == Chunk.ERROR_OFFSET else 0
        if not error or length > min(MAX_STRING, len(payload) - ERROR.size - tail):
            raise ProtocolError("an error chunk without an error, or with a length that lies")
        try:
            message = payload[ERROR.size : ERROR.size + length].decode()
        except UnicodeDecodeError:
            raise ProtocolError("an error's message is not UTF-8") from None
        if "\0" in message:
            raise ProtocolError("an error's message contains a NUL")
        if tail:
            (offset,) = U64.unpack_from(payload, ERROR.size + length)
            if not pending.offset <= offset < pending.offset + max(1, pending.length):
                raise ProtocolError(f"an error at {offset}, outside of the request")
        pending.reply.error, pending.reply.message = error, message

    def _finish(self, pending: _Pending) -> Reply:
        reply = pending.reply
        if reply.error and reply.error not in _ERRORS:
            raise ProtocolError(f"the error {reply.error}, which NBD does not have")
        if reply.command == Command.BLOCK_STATUS and not (reply.error or reply.extents):
            raise ProtocolError("a block status without extents")
        if reply.command == Command.READ and reply.chunks and not reply.error:
            covered = sum(stop - start for start, stop in pending.covered)
            if covered != pending.length:
                raise ProtocolError(f"{covered} bytes of {pending.length} were sent")
            reply.data = bytes(pending.content or b"")
        del self._pending[reply.cookie]
        return reply


def require_bytes(payload: bytes, n_bytes: int, what: str) -> None:
    if len(payload) < n_bytes:
        raise ProtocolError(f"a chunk {what} of {len(payload)} bytes")


def option_exchange(name: str, mode: ReplyMode, queries: Sequence[str] = ()) -> Iterator[bytes]:
    """Yield the options that lead to the transmission phase, in their order; GO is the last."""
    if mode is ReplyMode.STRUCTURED:
        yield build_option(Option.STRUCTURED_REPLY)
    elif mode is ReplyMode.EXTENDED:
        yield build_option(Option.EXTENDED_HEADERS)
    if queries:
        yield build_option(Option.SET_META_CONTEXT, build_meta_context(name, queries))
    yield build_option(Option.GO, build_info(name))
