"""Channels under TLS: bytes pass in order and whole, however records and segments are cut."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
from pathlib import Path

import pytest

from nbdstore.server import tls_channel
from nbdstore.server.channel import Channel
from nbdstore.server.options import TlsMode, TlsOptions
from nbdstore.server.tls import make_context
from nbdstore.server.tls_channel import (
    ENCRYPT_BYTES,
    MOST_WAITING_BYTES,
    RECORD_BYTES,
    TlsChannel,
    start_tls,
)
from tests.clients.certificates import Authority
from tests.server.renegotiation import ALERT, CIPHER, DATA, GREETING, HANDSHAKE, Records
from tests.server.test_channel import outbox_of

DEADLINE_S = 20
SIZES = [1, 28, RECORD_BYTES, 300, 3 * RECORD_BYTES + 5, 60, 60, 60]


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls-channel") / "authority")


@pytest.fixture(scope="module")
def options(authority) -> TlsOptions:
    issued = authority.issue_server()
    return TlsOptions(TlsMode.REQUIRED, issued.certificate, issued.key)


class Peer:
    """The client's side, which sees every encrypted byte: OpenSSL without a socket."""

    def __init__(
        self,
        sock: socket.socket,
        authority: Authority,
        version: ssl.TLSVersion,
        key_log: Path | None = None,
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.create_default_context(cafile=str(authority.certificate))
        context.maximum_version = version
        if key_log is not None:
            context.set_ciphers(CIPHER)
            context.keylog_filename = str(key_log)
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        self.n_received = 0
        self.first_received = b""

    async def send_all(self) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, self.outgoing.read())

    async def receive_more(self) -> None:
        data = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16)
        self.n_received += len(data)
        self.first_received = self.first_received or data
        if data:
            self.incoming.write(data)
        else:
            self.incoming.write_eof()

    async def shake_hands(self) -> None:
        """Shake hands, but leave it to the caller to send the last of it."""
        while True:
            try:
                return self.tls.do_handshake()
            except ssl.SSLWantReadError:
                await self.send_all()
                await self.receive_more()

    async def read(self, n_bytes: int) -> bytes:
        """Read so many bytes, fewer only at the end that close_notify announces."""
        data = b""
        while len(data) < n_bytes:
            try:
                part = self.tls.read(n_bytes - len(data))
            except ssl.SSLWantReadError:
                await self.receive_more()
                continue
            if not part:
                break
            data += part
        return data


@pytest.fixture
async def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture(params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def connected(request, pair, authority, options):
    """A channel and its peer, both done with the handshake."""
    ours, theirs = pair
    peer = Peer(theirs, authority, request.param)
    starting = asyncio.ensure_future(start_tls(Channel(ours), make_context(options)))
    await peer.shake_hands()
    await peer.send_all()
    channel = await starting
    yield channel, peer
    channel.abort()


def receive(channel: TlsChannel, n_bytes: int, buffer_bytes: int) -> asyncio.Future[bytes]:
    """Receive so many bytes as a session does, a buffer at a time."""
    received = bytearray()
    done = asyncio.get_running_loop().create_future()
    buffer = memoryview(bytearray(buffer_bytes))

    def on_readable() -> None:
        try:
            received.extend(buffer[: channel.recv_into(buffer)])
        except BlockingIOError:
            return
        if len(received) >= n_bytes:
            channel.unwatch_readable()
            done.set_result(bytes(received))

    channel.watch_readable(on_readable)
    return done


@pytest.mark.parametrize("cut", [1, 5, 23, 1000, 1 << 20])
@pytest.mark.parametrize("buffer_bytes", [7, 7000, 1 << 20])
async def test_records_come_whole_however_they_are_cut(connected, cut, buffer_bytes):
    channel, peer = connected
    sizes = SIZES if cut > 23 and buffer_bytes > 7 else [1, 28, 300, 60, 60]
    sent = [random.randbytes(size) for size in sizes]
    for data in sent:
        for at in range(0, len(data), RECORD_BYTES):
            peer.tls.write(data[at : at + RECORD_BYTES])
    encrypted = peer.outgoing.read()
    async with asyncio.timeout(DEADLINE_S):
        received = receive(channel, sum(sizes), buffer_bytes)
        for at in range(0, len(encrypted), cut):
            await asyncio.get_running_loop().sock_sendall(peer.sock, encrypted[at : at + cut])
            await asyncio.sleep(0)  # the channel may look at this piece alone
        assert await received == b"".join(sent)


async def test_small_records_are_received_at_once(connected):
    channel, peer = connected
    for _ in range(100):
        peer.tls.write(bytes(28))
    await peer.send_all()
    await channel.readable()
    assert channel.recv_into(memoryview(bytearray(1 << 16))) == 2800
    with pytest.raises(BlockingIOError):
        channel.recv_into(memoryview(bytearray(1 << 16)))


async def test_what_comes_with_the_end_of_the_handshake_is_not_lost(pair, authority, options):
    ours, theirs = pair
    peer = Peer(theirs, authority, ssl.TLSVersion.TLSv1_3)
    starting = asyncio.ensure_future(start_tls(Channel(ours), make_context(options)))
    async with asyncio.timeout(DEADLINE_S):
        await peer.shake_hands()
        peer.tls.write(b"first")
        await peer.send_all()
        channel = await starting
        assert await channel.receive() == b"first"
    channel.abort()


async def test_replies_leave_whole_however_much_the_socket_takes(connected):
    channel, peer = connected
    channel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    buffers = [random.randbytes(size) for size in [*SIZES, 5 * ENCRYPT_BYTES, *SIZES]]
    outbox = outbox_of(buffers)
    expected = b"".join(buffers)
    assert not channel.flush(outbox)
    async with asyncio.timeout(DEADLINE_S):
        reading = asyncio.ensure_future(peer.read(len(expected)))
        while not channel.flush(outbox):
            await channel.writable()
        assert await reading == expected
    assert (outbox.n_bytes, outbox.buffers) == (0, [])


async def test_what_is_encrypted_counts_as_unsent_until_the_socket_takes_it(connected):
    """Else a client that reads its replies slowly would look like one that has stopped."""
    channel, peer = connected
    channel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    outbox = outbox_of([bytes(ENCRYPT_BYTES // 2)])
    assert not channel.flush(outbox)
    before = channel.n_unsent(outbox)
    assert outbox.n_bytes == 0 < before
    peer.sock.recv(1 << 16)
    assert not channel.flush(outbox)
    assert 0 < channel.n_unsent(outbox) < before


async def test_small_replies_share_records(connected):
    channel, peer = connected
    peer.n_received = 0
    outbox = outbox_of([bytes(16), bytes(4096)] * 32)
    n_bytes = outbox.n_bytes
    assert channel.flush(outbox)
    async with asyncio.timeout(DEADLINE_S):
        await peer.read(n_bytes)
    assert peer.n_received - n_bytes <= 40 * -(-n_bytes // RECORD_BYTES)


async def test_a_peer_that_is_refused_is_told_why(pair, authority, options):
    ours, theirs = pair
    guarded = TlsOptions(options.mode, options.certificate, options.key, authority.certificate)
    peer = Peer(theirs, authority, ssl.TLSVersion.TLSv1_3)
    starting = asyncio.ensure_future(start_tls(Channel(ours), make_context(guarded)))
    async with asyncio.timeout(DEADLINE_S):
        await peer.shake_hands()  # the client is done before the server has seen its certificate
        await peer.send_all()
        with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
            await starting
        with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
            await peer.read(1)


async def test_a_peer_that_hangs_up_in_the_handshake(pair, options):
    ours, theirs = pair
    starting = asyncio.ensure_future(start_tls(Channel(ours), make_context(options)))
    theirs.close()
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(ssl.SSLEOFError):
            await starting


async def test_a_peer_that_floods_lets_others_have_their_turn(pair, options, monkeypatch):
    """A greeting of 10,000 bytes in records of one byte each, all of it there from the start."""
    monkeypatch.setattr(tls_channel, "RECEIVE_BYTES", 4096)
    ours, theirs = pair
    greeting = b"\x01" + (10_000).to_bytes(3) + bytes(10_000)
    records = b"".join([b"\x16\x03\x01\x00\x01" + bytes([byte]) for byte in greeting])
    theirs.sendall(records)
    starting = asyncio.ensure_future(start_tls(Channel(ours), make_context(options)))
    n_turns = 0
    while not starting.done():
        await asyncio.sleep(0)
        n_turns += 1
    assert n_turns > len(records) // tls_channel.RECEIVE_BYTES
    with pytest.raises(ssl.SSLError):
        await starting


@pytest.mark.parametrize("by", ["close_notify", "end of stream"])
async def test_the_peers_end_is_told_behind_its_last_bytes(connected, by):
    channel, peer = connected
    peer.tls.write(b"last")
    if by == "close_notify":
        with pytest.raises(ssl.SSLWantReadError):
            peer.tls.unwrap()
    await peer.send_all()
    if by == "end of stream":
        peer.sock.shutdown(socket.SHUT_WR)
    async with asyncio.timeout(DEADLINE_S):
        assert await channel.receive() == b"last"
        assert await channel.receive() == b""


async def test_bytes_that_nobody_encrypted_end_the_channel(connected):
    channel, peer = connected
    await asyncio.get_running_loop().sock_sendall(peer.sock, bytes(100))
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(ssl.SSLError):
            await channel.receive()


async def test_closing_says_goodbye_behind_the_last_reply(connected):
    channel, peer = connected
    async with asyncio.timeout(DEADLINE_S):
        await channel.send_all(b"bye")
        closing = asyncio.ensure_future(channel.close(DEADLINE_S))
        assert await peer.read(100) == b"bye"
        peer.sock.close()
        await closing


@pytest.fixture
async def renegotiating(pair, authority, options, tmp_path):
    """A channel, its peer's socket, and what makes more records of the peer's."""
    ours, theirs = pair
    peer = Peer(theirs, authority, ssl.TLSVersion.TLSv1_2, tmp_path / "keys")
    starting = asyncio.ensure_future(start_tls(Channel(ours), make_context(options)))
    await peer.shake_hands()
    channel = await starting
    keys = (tmp_path / "keys").read_text().splitlines()[-1]
    yield channel, theirs, Records(keys, peer.first_received)
    channel.abort()


async def test_a_peer_that_asks_to_renegotiate_hears_at_once_that_nobody_does(renegotiating):
    channel, sock, records = renegotiating
    buffer = memoryview(bytearray(100))
    sock.send(records.next(HANDSHAKE, GREETING))
    with pytest.raises(BlockingIOError):
        channel.recv_into(buffer)
    assert sock.recv(1000)[0] == ALERT
    sock.send(records.next(DATA, b"first") + records.next(HANDSHAKE, GREETING))
    assert (channel.recv_into(buffer), buffer[:5]) == (5, b"first")
    with pytest.raises(BlockingIOError):
        channel.recv_into(buffer)
    assert sock.recv(1000)[0] == ALERT


async def test_a_peer_that_asks_to_renegotiate_for_ever_is_given_up(renegotiating):
    channel, sock, records = renegotiating
    buffer, n_sent = memoryview(bytearray(100)), 0
    with pytest.raises(ConnectionAbortedError):
        while n_sent < 4 * MOST_WAITING_BYTES:
            n_sent += sock.send(b"".join([records.next(HANDSHAKE, GREETING) for _ in range(1000)]))
            with contextlib.suppress(BlockingIOError):
                channel.recv_into(buffer)
    assert n_sent > MOST_WAITING_BYTES
