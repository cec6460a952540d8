"""The client is strict: a server that breaks a rule does not get away with it."""

import pytest

from nbdstore.errors import ProtocolError
from nbdstore.protocol.agreement import ReplyMode
from nbdstore.protocol.client import ClientHandshake, ClientTransmission, parse_info_export
from nbdstore.protocol.constants import (
    ERROR,
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

COOKIE = U64.pack(1)


def simple(error=0, cookie=COOKIE) -> bytes:
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def chunk(kind: int, payload: bytes = b"", flags=1, cookie=COOKIE) -> bytes:
    head = STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(payload))
    return head + payload


def data(offset: int, content: bytes, flags=1) -> bytes:
    return chunk(Chunk.OFFSET_DATA, U64.pack(offset) + content, flags)


def error_chunk(error: int, message: bytes, offset: int | None = None) -> bytes:
    payload = ERROR.pack(error, len(message)) + message
    if offset is None:
        return chunk(Chunk.ERROR, payload)
    return chunk(Chunk.ERROR_OFFSET, payload + U64.pack(offset))


@pytest.mark.parametrize(
    ("command", "answer", "fault"),
    [
        (Command.READ, simple(), "simple reply to READ"),
        (Command.WRITE, simple(cookie=U64.pack(2)), "reply to nothing"),
        (Command.WRITE, b"\0\0\0\0", "starts with"),
        (Command.READ, data(100, b"x" * 7), "7 bytes of 8"),
        (Command.READ, data(100, b"x" * 9), "outside"),
        (Command.READ, data(99, b"x" * 8), "outside"),
        (Command.READ, data(100, b"x" * 5, flags=0) + data(104, b"x" * 4), "twice"),
        (Command.READ, chunk(Chunk.OFFSET_DATA, bytes(7)), "OFFSET_DATA of 7 bytes"),
        (Command.READ, chunk(Chunk.OFFSET_HOLE, bytes(11)), "OFFSET_HOLE chunk of 11 bytes"),
        (Command.READ, chunk(Chunk.ERROR, bytes(5)), "ERROR of 5 bytes"),
        (Command.READ, error_chunk(5, b"\xff"), "not UTF-8"),
        (Command.READ, error_chunk(5, b"a\0b"), "NUL"),
        (Command.READ, error_chunk(33, b""), "the error 33"),
        (Command.READ, error_chunk(5, b"", 99), "an error at 99"),
        (Command.READ, chunk(Chunk.NONE, flags=0), "not the last"),
        (Command.READ, chunk(Chunk.NONE, flags=3), "the flags 0x3"),
        (Command.READ, chunk(Chunk.NONE, bytes(1))[:16] + b"\x10\0\0\0", "of 268435456 bytes"),
        (Command.BLOCK_STATUS, chunk(Chunk.BLOCK_STATUS, bytes(3)), "BLOCK_STATUS of 3 bytes"),
        (Command.BLOCK_STATUS, chunk(Chunk.BLOCK_STATUS, bytes(11)), "status of 11 bytes"),
        (Command.BLOCK_STATUS, simple(), "without extents"),
        (Command.WRITE, chunk(Chunk.BLOCK_STATUS, bytes(12)), "nobody asked"),
        (Command.READ, data(100, b"") + data(104, b"x" * 4), "nobody asked"),
        (Command.READ, chunk(Chunk.OFFSET_HOLE, OFFSET_HOLE.pack(100, 9)), "outside"),
        (Command.WRITE, data(100, b"x" * 8), "nobody asked"),
        (Command.READ, chunk(Chunk.NONE, b"x"), "NONE"),
        (Command.READ, chunk(4711), "unknown chunk"),
        (Command.READ, chunk(Chunk.ERROR, bytes(6)), "without an error"),
        (Command.READ, chunk(Chunk.ERROR, bytes.fromhex("00000005 0009 78")), "lies"),
        (Command.BLOCK_STATUS, chunk(Chunk.BLOCK_STATUS, U32.pack(1)), "without extents"),
        (
            Command.BLOCK_STATUS,
            chunk(Chunk.BLOCK_STATUS, U32.pack(1) + EXTENT.pack(0, 1)),
            "empty",
        ),
        (
            Command.BLOCK_STATUS,
            chunk(Chunk.BLOCK_STATUS, U32.pack(1) + EXTENT.pack(8, 1) + EXTENT.pack(8, 0)),
            "more extents",
        ),
        (
            Command.BLOCK_STATUS,
            chunk(Chunk.BLOCK_STATUS, U32.pack(1) + EXTENT.pack(8, 1), flags=0) * 2,
            "twice",
        ),
        (Command.BLOCK_STATUS, chunk(Chunk.BLOCK_STATUS_EXT, bytes(24)), "chunk type 6"),
    ],
)
def test_broken_structured_replies(command, answer, fault):
    client = ClientTransmission(ReplyMode.STRUCTURED)
    client.request(command, 100, 8)
    with pytest.raises(ProtocolError, match=fault):
        client.receive(answer)


@pytest.mark.parametrize(
    ("mode", "answer", "fault"),
    [
        (ReplyMode.SIMPLE, chunk(Chunk.NONE), "in mode simple"),
        (ReplyMode.EXTENDED, simple(), "in mode extended"),
        (
            ReplyMode.EXTENDED,
            EXTENDED_REPLY.pack(EXTENDED_REPLY_MAGIC, 1, Chunk.NONE, COOKIE, 101, 0),
            "echoed",
        ),
    ],
)
def test_replies_of_another_mode(mode, answer, fault):
    client = ClientTransmission(mode)
    client.request(Command.WRITE, 100, payload=b"x" * 8)
    with pytest.raises(ProtocolError, match=fault):
        client.receive(answer)


def test_servers_of_something_else():
    client = ClientHandshake()
    client.receive(b"SSH-2.0-OpenSSH_9.2p1 Debian")
    with pytest.raises(ProtocolError, match="not a newstyle"):
        client.hello()
    client = ClientHandshake()
    client.receive(b"220 mail.example.org ESMTP")
    with pytest.raises(ProtocolError, match="option reply"):
        client.answer()


def test_option_replies_beyond_reason_are_not_waited_for():
    client = ClientHandshake()
    client.receive(OPTION_REPLY.pack(OPTION_REPLY_MAGIC, 7, 1, (1 << 20) + 1))
    with pytest.raises(ProtocolError, match="option reply of 1048577 bytes"):
        client.answer()


def test_export_information_of_a_wrong_length():
    with pytest.raises(ProtocolError, match="11 bytes"):
        parse_info_export(bytes(11))
