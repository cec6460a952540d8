"""The request parser: however the stream is cut, the same requests come out."""

import pytest

from nbdstore.errors import ProtocolError
from nbdstore.protocol.agreement import CONTEXTS, Agreement, Offer, ReplyMode
from nbdstore.protocol.client import ClientTransmission
from nbdstore.protocol.constants import (
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    U32,
    U64,
    Command,
    CommandFlag,
    Errno,
    TransmissionFlag,
)
from nbdstore.protocol.rules import NOTHING_TO_DO, Rules
from nbdstore.protocol.transmission import DIRECT_BYTES, RECEIVE_BYTES, RequestParser
from tests.protocol.conversation import FLAGS

SIZE = 1 << 30
COOKIE = b"\xde\xad\xbe\xef\x00\x01\x02\x03"
SIMPLE, STRUCTURED, EXTENDED = ReplyMode
HEADERS = {
    SIMPLE: (REQUEST, REQUEST_MAGIC),
    STRUCTURED: (REQUEST, REQUEST_MAGIC),
    EXTENDED: (EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC),
}
DIRECT = 1000
"""The parsers here receive longer payloads directly, so that small tests reach all paths."""


def parser(mode=SIMPLE, contexts=(), read_only=False, minimum_block=1, **limits) -> RequestParser:
    flags = FLAGS
    if read_only:
        flags |= TransmissionFlag.READ_ONLY
    if mode is not SIMPLE:
        flags |= TransmissionFlag.SEND_DF
    if mode is EXTENDED and contexts:
        flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
    offer = Offer("disk", SIZE, flags, minimum_block=minimum_block)
    rules = Rules(Agreement(offer, flags, mode, contexts))
    limits = {"receive_bytes": 4 * DIRECT, "direct_bytes": DIRECT} | limits
    return RequestParser(rules, **limits)


def request(command, offset=0, length=0, flags=0, mode=SIMPLE, payload=b"", cookie=COOKIE):
    layout, magic = HEADERS[mode]
    return layout.pack(magic, flags, command, cookie, offset, length) + payload


def write(data: bytes, offset=0, flags=0, mode=SIMPLE) -> bytes:
    if mode is EXTENDED:
        flags |= CommandFlag.PAYLOAD_LEN
    return request(Command.WRITE, offset, len(data), flags, mode, data)


def feed(target: RequestParser, data: bytes, step: int | None = None) -> list[tuple]:
    """Deliver bytes at most ``step`` at a time; return requests with their payloads copied."""
    found = []
    while data:
        buffer = target.get_buffer()
        assert len(buffer) > 0
        n = min(len(buffer), len(data), step or len(data))
        buffer[:n] = data[:n]
        data = data[n:]
        for *head, payload, verdict in target.received(n):
            found.append((*head, None if payload is None else bytes(payload), verdict))
    return found


def pattern(length: int) -> bytes:
    return bytes(i * 7 % 251 for i in range(length))


STREAMS = {
    "reads": [request(Command.READ, 4096 * i, 4096, cookie=U64.pack(i)) for i in range(50)],
    "small writes": [write(pattern(i)) for i in range(1, 60)],
    "large writes": [write(pattern(n), 5) for n in (999, 1000, 1001, 5000, 1, 20000, 1000)],
    "refused writes": [
        write(pattern(300), SIZE),
        write(pattern(9000), SIZE - 5),
        write(pattern(2000), flags=CommandFlag.DF),
        write(b"ok"),
    ],
    "without payload": [
        request(command, 0, 0 if command == Command.FLUSH else 512)
        for command in (
            Command.READ,
            Command.FLUSH,
            Command.TRIM,
            Command.CACHE,
            Command.WRITE_ZEROES,
            Command.BLOCK_STATUS,
            99,
        )
    ],
    "no bytes": [write(b""), request(Command.READ), request(Command.TRIM), write(b"x"), write(b"")],
    "everything mixed": [
        write(pattern(1500)),
        request(Command.READ, 1, 1),
        write(pattern(7)),
        request(Command.FLUSH),
        write(pattern(3900), SIZE),
        request(Command.READ, SIZE, 1),
        write(pattern(4000)),
        request(Command.DISC),
    ],
}


@pytest.mark.parametrize("step", [None, 1, 2, 27, 28, 29, 999, 1000, 4096])
@pytest.mark.parametrize("stream", STREAMS)
def test_requests_do_not_depend_on_how_the_stream_is_cut(stream, step):
    parts = STREAMS[stream]
    alone = [found for part in parts for found in feed(parser(), part)]
    assert len(alone) == len(parts)
    assert feed(parser(), b"".join(parts), step) == alone


@pytest.mark.parametrize("stream", STREAMS)
def test_a_request_is_not_seen_before_its_last_byte(stream):
    for part in STREAMS[stream]:
        target = parser()
        assert feed(target, part[:-1]) == []
        assert not target.is_between_requests
        assert len(feed(target, part[-1:])) == 1
        assert target.is_between_requests


@pytest.mark.parametrize("stream", [s for s in STREAMS if s != "everything mixed"])
def test_trailing_bytes_wait_for_their_request(stream):
    parts = STREAMS[stream]
    trailing = request(Command.READ, 0, 1)[:20]
    target = parser()
    assert len(feed(target, b"".join(parts) + trailing)) == len(parts)
    assert not target.is_between_requests
    assert len(feed(target, request(Command.READ, 0, 1)[20:])) == 1


@pytest.mark.parametrize("mode", ReplyMode)
def test_fields(mode):
    (found,) = feed(parser(mode), request(Command.READ, 1 << 20, 4096, mode=mode))
    assert found == (Command.READ, 0, COOKIE, 1 << 20, 4096, None, 0)
    (found,) = feed(parser(mode), write(b"data", 7, mode=mode))
    assert found == (Command.WRITE, 0, COOKIE, 7, 4, b"data", 0)


def test_flags_that_change_nothing_are_dropped():
    stream = request(Command.READ, 0, 1, CommandFlag.FUA) + request(
        Command.FLUSH, flags=CommandFlag.FUA
    )
    assert [found[1] for found in feed(parser(), stream)] == [0, 0]
    stream = write(b"x", flags=CommandFlag.FUA) + request(
        Command.WRITE_ZEROES, 0, 1, CommandFlag.FUA | CommandFlag.NO_HOLE
    )
    assert [found[1] for found in feed(parser(), stream)] == [
        CommandFlag.FUA,
        CommandFlag.FUA | CommandFlag.NO_HOLE,
    ]


@pytest.mark.parametrize("mode", ReplyMode)
@pytest.mark.parametrize(
    "junk", [b"\0" * 32, b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n", b"\xff" * 40]
)
def test_unknown_magic_drops_the_client(mode, junk):
    with pytest.raises(ProtocolError, match="starts with"):
        feed(parser(mode), junk)


@pytest.mark.parametrize(("mode", "other"), [(SIMPLE, EXTENDED), (EXTENDED, SIMPLE)])
def test_headers_of_the_other_mode_drop_the_client(mode, other):
    with pytest.raises(ProtocolError):
        feed(parser(mode), request(Command.READ, 0, 1, mode=other) * 2)


def test_nothing_is_consumed_for_unknown_commands():
    """proto.md: in compact mode only WRITE has a payload, whatever the length says."""
    stream = request(77, 0, 1 << 20) + request(Command.READ, 0, 1)
    assert [found[-1] for found in feed(parser(), stream)] == [Errno.EINVAL, 0]


def test_everything_after_disc_is_ignored():
    target = parser()
    stream = request(Command.READ, 0, 1) + request(Command.DISC) + b"garbage that is not NBD" * 100
    assert [found[0] for found in feed(target, stream)] == [Command.READ, Command.DISC]
    assert target.finished
    assert feed(target, b"more garbage") == []


@pytest.mark.parametrize("mode", ReplyMode)
def test_the_receive_buffer_holds_four_of_the_largest_requests_of_linux(mode):
    target = parser(mode, receive_bytes=RECEIVE_BYTES, direct_bytes=DIRECT_BYTES)
    stream = b"".join(write(bytes(128 << 10), i << 17, mode=mode) for i in range(4))
    buffer = target.get_buffer()
    assert len(buffer) > len(stream)
    buffer[: len(stream)] = stream
    assert len(target.received(len(stream))) == 4


# --- Refused payloads ----------------------------------------------------------------------------


def test_a_refused_write_is_answered_after_its_payload():
    target = parser(read_only=True)
    stream = write(pattern(20000), 0)
    assert feed(target, stream[:-1]) == []
    assert [found[-1] for found in feed(target, stream[-1:])] == [Errno.EPERM]


@pytest.mark.parametrize("mode", ReplyMode)
def test_payloads_above_the_maximum_are_consumed(mode):
    flags = CommandFlag.PAYLOAD_LEN if mode is EXTENDED else 0
    length = (32 << 20) + 1
    target = parser(mode, receive_bytes=1 << 20)
    assert feed(target, request(Command.WRITE, 0, length, flags, mode)) == []
    assert feed(target, bytes(length - 1)) == []
    (refused, read) = feed(target, b"\0" + request(Command.READ, 0, 1, mode=mode))
    assert (refused[-1], read[-1]) == (Errno.EINVAL, 0)


@pytest.mark.parametrize("mode", ReplyMode)
def test_payloads_beyond_all_limits_drop_the_client(mode):
    flags = CommandFlag.PAYLOAD_LEN if mode is EXTENDED else 0
    with pytest.raises(ProtocolError, match="payload of"):
        feed(parser(mode), request(Command.WRITE, 0, (64 << 20) + 1, flags, mode))


# --- Extended headers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [Command.READ, Command.FLUSH, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES, 99]
)
def test_unexpected_payload_is_consumed_and_refused(command):
    stream = request(command, 0, 3000, CommandFlag.PAYLOAD_LEN, EXTENDED, bytes(3000))
    stream += request(Command.READ, 0, 1, mode=EXTENDED)
    assert [found[-1] for found in feed(parser(EXTENDED), stream)] == [Errno.EINVAL, 0]


def test_a_write_without_payload_len_is_consumed_and_refused():
    """Its data must never be taken for requests."""
    forged = request(Command.TRIM, 0, 1 << 20, mode=EXTENDED)
    stream = request(Command.WRITE, 0, len(forged), 0, EXTENDED, forged)
    assert [found[0::6] for found in feed(parser(EXTENDED), stream)] == [
        (Command.WRITE, Errno.EINVAL)
    ]


def test_disc_with_a_payload_is_still_disc():
    target = parser(EXTENDED)
    feed(target, request(Command.DISC, 0, 5, CommandFlag.PAYLOAD_LEN, EXTENDED))
    assert target.finished


def test_effects_have_64_bits():
    big = parser(EXTENDED)
    (trim,) = feed(big, request(Command.TRIM, 0, SIZE, mode=EXTENDED))
    assert trim[4] == SIZE
    assert feed(big, request(Command.TRIM, 0, 1 << 63, mode=EXTENDED))[0][-1] == Errno.EINVAL
    assert feed(big, request(Command.READ, 0, 1 << 40, mode=EXTENDED))[0][-1] == Errno.EINVAL


BOTH = CONTEXTS


def filtered(length: int, ids, flags=0) -> bytes:
    payload = U64.pack(length) + b"".join(U32.pack(number) for number in ids)
    flags |= CommandFlag.PAYLOAD_LEN
    return request(Command.BLOCK_STATUS, 4096, len(payload), flags, EXTENDED, payload)


@pytest.mark.parametrize("step", [None, 1, 40])
def test_a_filter_names_contexts(step):
    (found,) = feed(parser(EXTENDED, BOTH), filtered(1 << 20, [2], CommandFlag.REQ_ONE), step)
    assert found == (
        Command.BLOCK_STATUS,
        CommandFlag.REQ_ONE,
        COOKIE,
        4096,
        1 << 20,
        U32.pack(2),
        0,
    )


@pytest.mark.parametrize(
    "stream",
    [
        filtered(512, []),
        filtered(512, [1, 1]),
        filtered(512, [3]),
        filtered(512, [1, 2, 1]),
        filtered(512, list(range(5000))),
        filtered(0, [1]),
        filtered(SIZE, [1]),
        filtered(1 << 63, [1]),
        request(Command.BLOCK_STATUS, 0, 4, CommandFlag.PAYLOAD_LEN, EXTENDED, bytes(4)),
        request(Command.BLOCK_STATUS, 0, 13, CommandFlag.PAYLOAD_LEN, EXTENDED, bytes(13)),
        request(Command.BLOCK_STATUS, 0, 0, CommandFlag.PAYLOAD_LEN, EXTENDED),
    ],
)
def test_filters_that_make_no_sense_are_consumed_and_refused(stream):
    found = feed(parser(EXTENDED, BOTH), stream + request(Command.READ, 0, 1, mode=EXTENDED))
    assert [entry[-1] for entry in found] == [Errno.EINVAL, 0]


def test_a_filter_without_contexts_is_refused():
    assert feed(parser(EXTENDED), filtered(512, [1]))[0][-1] == Errno.EINVAL


# --- Buffers -------------------------------------------------------------------------------------


def receive(target: RequestParser, data: bytes) -> list[tuple]:
    """Deliver bytes as one receive; payloads stay where they are."""
    target.get_buffer()[: len(data)] = data
    return target.received(len(data))


def test_small_payloads_lie_in_the_receive_buffer():
    target = parser()
    buffer = target.get_buffer()
    ((*_, payload, _),) = receive(target, write(b"abcd"))
    assert payload.obj is buffer.obj
    kept = target.keep(payload)
    receive(target, write(b"WXYZ"))
    assert bytes(payload) == b"WXYZ"
    assert bytes(kept) == b"abcd"


def receive_long(target: RequestParser, data: bytes) -> memoryview:
    """Deliver a write whose payload is received directly."""
    stream = write(data)
    assert receive(target, stream[:100]) == []
    ((*_, payload, _),) = receive(target, stream[100:])
    return payload


def test_long_payloads_are_received_in_place_into_a_buffer_that_is_used_again():
    target = parser()
    first = receive_long(target, pattern(3000))
    assert bytes(first) == pattern(3000)
    second = receive_long(target, pattern(2000))
    assert bytes(second) == pattern(2000)
    assert first.obj is second.obj


def test_a_long_payload_that_is_kept_is_not_copied_and_not_used_again():
    target = parser()
    first = receive_long(target, pattern(3000))
    assert target.keep(first) is first
    second = receive_long(target, pattern(2000))
    assert bytes(first) == pattern(3000)
    assert first.obj is not second.obj


def test_requests_of_the_client_are_understood_by_the_server():
    for mode in ReplyMode:
        client = ClientTransmission(mode)
        _, raw = client.request(Command.WRITE, 5, payload=b"hello")
        (found,) = feed(parser(mode), raw)
        assert (found[0], found[3:6]) == (Command.WRITE, (5, 5, b"hello"))
        assert feed(parser(mode), client.request(Command.WRITE, 5, payload=b"")[1])[0][-1] == (
            NOTHING_TO_DO
        )


@pytest.mark.parametrize("mode", ReplyMode)
@pytest.mark.parametrize(("offset", "verdict"), [(512, 0), (511, Errno.EINVAL)])
def test_the_shortcut_of_plain_requests_keeps_to_the_minimum_block(mode, offset, verdict):
    stream = request(Command.READ, offset, 512, mode=mode) + write(bytes(512), offset, mode=mode)
    found = feed(parser(mode, minimum_block=512), stream)
    assert [verdict for *_, verdict in found] == [verdict, verdict]
