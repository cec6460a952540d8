"""Target: the client's reply parser, fed by a server that means no good.

What must hold: ProtocolError and nothing else; the same replies however the stream is cut, and the
same that the conformance client reads, which shares nothing with this one; each request answered
once at most; replies that keep their promises: content of the length that was
asked for, errors that are none of zero; no more held than one reply may have.
"""

from __future__ import annotations

from typing import cast

from nbdstore.errors import ProtocolError
from nbdstore.protocol.agreement import ReplyMode
from nbdstore.protocol.client import ClientHandshake, ClientTransmission, Reply
from nbdstore.protocol.constants import (
    BLOCK_STATUS_EXT,
    ERROR,
    EXTENDED_EXTENT,
    EXTENDED_REPLY,
    EXTENDED_REPLY_MAGIC,
    EXTENT,
    OFFSET_HOLE,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY,
    STRUCTURED_REPLY_MAGIC,
    U32,
    U64,
    Chunk,
    Command,
)
from tests.conformance.connection import Connection
from tests.conformance.handshake import Export
from tests.conformance.outcome import Closed, Violation
from tests.conformance.session import Session
from tests.conformance.wire import Flag, Mode
from tests.fuzz.cutting import WAYS, cut
from tests.fuzz.program import Program

OFFSET, LENGTH = 4096, 64
REQUESTED = (Command.READ, Command.READ, Command.WRITE, Command.BLOCK_STATUS, Command.FLUSH)
KINDS = (*Chunk, 3, 1 << 15)
STARTS = (OFFSET, OFFSET + 16, OFFSET + 32, OFFSET - 1, 0)
SPANS = (16, 32, 64, 1, 0, 65)


def payload_of(program: Program, kind: int, extended: bool) -> bytes:
    """A chunk's payload that fits its type, most of the time."""
    if program.byte() % 8 == 0:
        return program.text()
    start, span = program.choose(STARTS), program.choose(SPANS)
    if kind == Chunk.OFFSET_DATA:
        return U64.pack(start) + bytes(span)
    if kind == Chunk.OFFSET_HOLE:
        return OFFSET_HOLE.pack(start, span)
    if kind in (Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT):
        layout = EXTENDED_EXTENT if extended else EXTENT
        spans = [program.choose(SPANS) for _ in range(program.byte() % 4)]
        extents = b"".join(layout.pack(span, program.byte()) for span in spans)
        context = program.byte() % 3
        if kind == Chunk.BLOCK_STATUS:
            return U32.pack(context) + extents
        return BLOCK_STATUS_EXT.pack(context, len(spans) + program.byte() % 8 // 7) + extents
    if kind in (Chunk.ERROR, Chunk.ERROR_OFFSET):
        text = program.text()
        tail = U64.pack(start) if kind == Chunk.ERROR_OFFSET else b""
        return (
            ERROR.pack(program.choose((0, 1, 5, 6)), len(text) + program.byte() % 8 // 7)
            + text
            + tail
        )
    return b""


def message(program: Program, mode: ReplyMode) -> bytes:
    """One simple reply or chunk."""
    kind = program.byte() % 8
    if kind == 0:
        return program.text()
    cookie = U64.pack(program.byte() % 7)
    extended = mode is ReplyMode.EXTENDED
    if mode is ReplyMode.SIMPLE or kind == 1:
        error = program.choose((0, 1, 5, 6))
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie) + bytes(program.choose(SPANS))
    flags, chunk = program.byte(), program.choose(KINDS)
    flags = flags % 2 if flags < 0xF0 else flags  # most often, only DONE or not
    payload = payload_of(program, chunk, extended)
    length = len(payload) if kind > 2 else program.number(64 if extended else 32)
    if extended:
        offset = OFFSET if program.byte() % 8 else program.number(64)
        wide = (EXTENDED_REPLY_MAGIC, flags, chunk, cookie, offset, length)
        return EXTENDED_REPLY.pack(*wide) + payload
    return STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, flags, chunk, cookie, length) + payload


def receive(mode: ReplyMode, stream: bytes, way: str) -> tuple[list[Reply], bool]:
    """Give a stream to a client, cut one way; return the replies, and whether it protested."""
    client = ClientTransmission(mode)
    for command in REQUESTED:
        client.request(command, OFFSET, LENGTH)
    replies: list[Reply] = []
    try:
        for piece in cut(stream, way):
            replies += client.receive(piece)
    except ProtocolError as fault:
        assert str(fault)
        return replies, True
    assert client.n_pending == len(REQUESTED) - len(replies)
    return replies, False


def run(data: bytes) -> None:
    """Run one input."""
    program = Program(data)
    mode = program.choose((*ReplyMode, None))
    if mode is None:
        return run_handshake(program)
    stream = b""
    while program:
        stream += message(program, mode)
    found, protested = receive(mode, stream, "byte by byte")
    for way in WAYS:
        again, also = receive(mode, stream, way)
        assert also is protested, way
        # What came in one piece with nonsense goes with it.
        assert again == (found[: len(again)] if protested else found), way
    assert (found, protested) == read_again(mode, stream)
    assert len({reply.cookie for reply in found}) == len(found)
    for reply in found:
        check(reply)


class Stream:
    """A connection that ends where the stream does."""

    def __init__(self, stream: bytes) -> None:
        self._left = stream

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > len(self._left):
            raise Closed("the end")
        taken, self._left = self._left[:n_bytes], self._left[n_bytes:]
        return taken


def read_again(mode: ReplyMode, stream: bytes) -> tuple[list[Reply], bool]:
    """Read a stream by the conformance client, which was written for itself."""
    session = Session(cast(Connection, Stream(stream)), Mode(mode.value), Export(0, Flag(0)), {})
    for cookie, command in enumerate(REQUESTED, 1):
        session.build(command, OFFSET, LENGTH, cookie=cookie)
    replies: list[Reply] = []
    try:
        while True:
            session.take_message()
            for cookie in session.complete():
                found = session.reply(cookie)
                chunks = [(chunk.kind, chunk.length) for chunk in found.chunks]
                replies.append(
                    Reply(
                        *(cookie, found.command, found.error, found.message, found.data),
                        *(found.extents, chunks),
                    )
                )
    except Closed:
        return replies, False
    except Violation:
        return replies, True


def check(reply: Reply) -> None:
    """What users of the client rely on."""
    assert reply.error >= 0
    if reply.command == Command.READ and not reply.error:
        assert reply.data is not None and len(reply.data) == LENGTH
    for extents in reply.extents.values():
        assert extents and all(length > 0 for length, _ in extents)
    if reply.command != Command.READ:
        assert reply.data is None
    if reply.command != Command.BLOCK_STATUS:
        assert not reply.extents


# --- The client's handshake ----------------------------------------------------------------------


def handshake_stream(program: Program) -> bytes:
    stream = b"NBDMAGICIHAVEOPT\0\3" if program.byte() % 8 else program.text()
    while program:
        if program.byte() % 8 == 0:
            stream += program.text()
            continue
        text = program.text()
        length = len(text) if program.byte() % 8 else program.number(32)
        values = (OPTION_REPLY_MAGIC, program.byte() % 12, program.number(32), length)
        stream += OPTION_REPLY.pack(*values) + text
    return stream


def run_handshake(program: Program) -> None:
    """The same for hello and option replies."""
    stream = handshake_stream(program)
    seen = [shake_hands(stream, way) for way in WAYS]
    assert seen[1:] == seen[:-1]


def shake_hands(stream: bytes, way: str) -> list[object]:
    client, seen, greeted = ClientHandshake(), [], False
    try:
        for piece in cut(stream, way):
            client.receive(piece)
            if not greeted:
                greeted = client.hello() is not None
            while greeted and (answer := client.answer()):
                seen.append(answer)
    except ProtocolError as fault:
        return [*seen, str(fault)]
    return list(seen)
