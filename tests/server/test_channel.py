"""Channels and outboxes: bytes leave in order and whole, however much the socket takes."""

from __future__ import annotations

import asyncio
import socket

from hypothesis import given
from hypothesis import strategies as st

from nbdstore.server.channel import IOV_MAX, Channel, Outbox


def outbox_of(buffers) -> Outbox:
    outbox = Outbox()
    outbox.buffers.extend(buffers)
    outbox.n_bytes = sum(len(buffer) for buffer in buffers)
    return outbox


def content(outbox: Outbox) -> bytes:
    data = b"".join(outbox.buffers)
    assert outbox.n_bytes == len(data)
    return data


@given(st.lists(st.binary(min_size=1, max_size=9), max_size=9), st.lists(st.integers(0, 20)))
def test_an_outbox_forgets_what_was_sent(buffers, steps):
    outbox, expected = outbox_of(buffers), b"".join(buffers)
    for step in steps:
        n_bytes = min(step, len(expected))
        outbox.sent(n_bytes)
        expected = expected[n_bytes:]
        assert content(outbox) == expected


@given(st.lists(st.binary(min_size=1, max_size=9), max_size=9), st.integers(1, 20))
def test_an_outbox_is_taken_in_pieces(buffers, max_bytes):
    outbox, expected = outbox_of(buffers), b"".join(buffers)
    taken = b""
    while outbox.buffers:
        piece = outbox.take(max_bytes)
        assert 0 < len(piece) <= max_bytes
        taken += piece
    assert (taken, outbox.n_bytes) == (expected, 0)


async def test_more_buffers_than_one_sendmsg_takes():
    ours, theirs = socket.socketpair()
    with theirs:
        channel = Channel(ours)
        buffers = [bytes([i % 251]) * (1 + i % 700) for i in range(5 * IOV_MAX)]
        outbox = outbox_of(buffers)
        reader, writer = await asyncio.open_connection(sock=theirs)
        receiving = asyncio.ensure_future(reader.readexactly(outbox.n_bytes))
        while not channel.flush(outbox):
            await channel.writable()
        assert await receiving == b"".join(buffers)
        channel.abort()
        writer.close()


async def test_a_reply_of_the_handshake_is_one_write():
    """nbd-client takes short reads for whole ones."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        channel = Channel(ours)
        await channel.send_all(b"first")
        await channel.send_all(b"second")
        assert [theirs.recv(100), theirs.recv(100)] == [b"first", b"second"]
        channel.abort()
