"""Replies: what the server builds, its strict client takes, in every mode and however cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstore.protocol.agreement import CONTEXTS, ReplyMode
from nbdstore.protocol.client import ClientTransmission, Reply
from nbdstore.protocol.constants import U64, Chunk, Command, Errno
from nbdstore.protocol.options import MAX_MESSAGE
from nbdstore.protocol.replies import ZEROES, Buffer, make_replies

CHUNKED = [ReplyMode.STRUCTURED, ReplyMode.EXTENDED]
OFFSET = 1 << 33


class Exchange:
    """One client, and the replies of one server to it."""

    def __init__(self, mode: ReplyMode) -> None:
        self.client = ClientTransmission(mode)
        self.replies = make_replies(mode)
        self.out: list[Buffer] = []

    def ask(self, command, length=0, offset=OFFSET) -> bytes:
        cookie, _ = self.client.request(command, offset, length)
        return U64.pack(cookie)

    def get(self, n_bytes: int, step: int | None = None) -> list[Reply]:
        """Deliver what the server built; it must have counted its bytes right."""
        data = b"".join(self.out)
        self.out.clear()
        assert len(data) == n_bytes
        step = step or max(1, len(data))
        pieces = [data[i : i + step] for i in range(0, len(data), step)]
        found = [reply for piece in pieces for reply in self.client.receive(piece)]
        assert self.client.n_pending == 0
        return found


@pytest.fixture(params=ReplyMode)
def exchange(request) -> Exchange:
    return Exchange(request.param)


def test_done(exchange):
    cookie = exchange.ask(Command.WRITE)
    (reply,) = exchange.get(exchange.replies.done(exchange.out, cookie, OFFSET))
    assert (reply.error, reply.data) == (0, None)


def test_many_are_done_by_one_buffer(exchange):
    requests = [
        (Command.WRITE, 0, exchange.ask(Command.WRITE, offset=i), i, 0, None, 0) for i in range(99)
    ]
    n_bytes = exchange.replies.all_done(exchange.out, requests)
    assert len(exchange.out) == 1
    assert [reply.cookie for reply in exchange.get(n_bytes)] == list(range(1, 100))


@pytest.mark.parametrize("command", [Command.READ, Command.WRITE, Command.FLUSH])
def test_errors(exchange, command):
    cookie = exchange.ask(command, 4096)
    n_bytes = exchange.replies.error(exchange.out, cookie, OFFSET, Errno.ENOSPC, "It is full.")
    (reply,) = exchange.get(n_bytes, step=1)
    simple = exchange.client.mode is ReplyMode.SIMPLE
    assert (reply.error, reply.data) == (Errno.ENOSPC, None)
    assert reply.message == ("" if simple else "It is full.")


@pytest.mark.parametrize("mode", CHUNKED)
def test_long_messages_are_clipped(mode):
    exchange = Exchange(mode)
    cookie = exchange.ask(Command.READ, 1)
    (reply,) = exchange.get(exchange.replies.error(exchange.out, cookie, OFFSET, 5, "x" * 5000))
    assert len(reply.message) <= MAX_MESSAGE


def content(segments) -> bytes:
    return b"".join(bytes(segment) for segment in segments)


SEGMENTS = [
    [b"x" * 4096],
    [4096],
    [b"a" * 512, memoryview(b"b" * 512), bytearray(b"c" * 512)],
    [512, 512, 512],
    [b"a" * 512, 512, b"c" * 512],
    [512, b"b" * 512, 512, 512, b"c" * 512, b"d" * 512],
    [3 << 20, b"\0" * 512],
    [len(ZEROES)],
    [],
]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_reads(exchange, segments, whole):
    expected = content(segments)
    cookie = exchange.ask(Command.READ, len(expected))
    n_bytes = exchange.replies.read(exchange.out, cookie, OFFSET, len(expected), segments, whole)
    (reply,) = exchange.get(n_bytes)
    assert reply.data == expected
    if whole:
        # proto.md, "NBD_CMD_FLAG_DF": at most one content chunk.
        assert len(reply.chunks) <= 1


def test_many_reads_are_answered_as_each_by_itself(exchange):
    contents = [memoryview(bytes([i]) * 512) for i in range(20)]
    cookies = [exchange.ask(Command.READ, 512) for _ in contents]
    requests = [(int(Command.READ), 0, cookie, OFFSET, 512, None, 0) for cookie in cookies]
    n_bytes = exchange.replies.read_batch(exchange.out, requests, contents)
    one_by_one = []
    for (_, _, cookie, _, _, _, _), content in zip(requests, contents, strict=True):
        exchange.replies.read(one_by_one, cookie, OFFSET, 512, [content])
    assert exchange.out == one_by_one
    assert n_bytes == sum(map(len, one_by_one))
    assert all(sent is content for sent, content in zip(exchange.out[1::2], contents, strict=True))


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize(
    ("segments", "chunks"),
    [
        ([b"x" * 512], [Chunk.OFFSET_DATA]),
        ([512, 512], [Chunk.OFFSET_HOLE]),
        ([b"x" * 512, b"y" * 512], [Chunk.OFFSET_DATA]),
        ([512, b"x" * 512, 512], [Chunk.OFFSET_HOLE, Chunk.OFFSET_DATA, Chunk.OFFSET_HOLE]),
        ([], [Chunk.NONE]),
    ],
)
def test_holes_are_chunks_of_their_own(mode, segments, chunks):
    exchange = Exchange(mode)
    length = len(content(segments))
    cookie = exchange.ask(Command.READ, length)
    (reply,) = exchange.get(exchange.replies.read(exchange.out, cookie, OFFSET, length, segments))
    assert [chunk for chunk, _ in reply.chunks] == chunks


def test_payloads_are_passed_through_untouched(exchange):
    data = memoryview(bytearray(8192))
    cookie = exchange.ask(Command.READ, 8192)
    exchange.replies.read(exchange.out, cookie, OFFSET, 8192, [data])
    assert exchange.out[-1] is data


def test_zeroes_are_not_allocated(exchange):
    exchange.replies.read(exchange.out, exchange.ask(Command.READ, 32 << 20), 0, 32 << 20, [1, 2])
    views = [buffer for buffer in exchange.out if isinstance(buffer, memoryview)]
    assert all(view.obj is ZEROES.obj for view in views)


@pytest.mark.parametrize("mode", CHUNKED)
def test_block_status_has_a_chunk_per_context(mode):
    exchange = Exchange(mode)
    cookie = exchange.ask(Command.BLOCK_STATUS, 8192)
    base, depth = CONTEXTS
    statuses = [(base, [(4096, 3), (4096, 0)]), (depth, [(4096, 0), (4096, 1)])]
    n_bytes = exchange.replies.block_status(exchange.out, cookie, OFFSET, statuses)
    (reply,) = exchange.get(n_bytes, step=7)
    assert reply.extents == {context.id: extents for context, extents in statuses}
    assert len(reply.chunks) == 2


runs = st.lists(
    st.one_of(st.integers(1, 5000), st.binary(min_size=1, max_size=3000)), min_size=1, max_size=20
)


@given(mode=st.sampled_from(ReplyMode), segments=runs, step=st.integers(1, 3000))
def test_any_segments_arrive_whole(mode, segments, step):
    exchange = Exchange(mode)
    expected = content(segments)
    cookie = exchange.ask(Command.READ, len(expected))
    n_bytes = exchange.replies.read(exchange.out, cookie, OFFSET, len(expected), segments)
    (reply,) = exchange.get(n_bytes, step)
    assert reply.data == expected
