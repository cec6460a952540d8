"""A connected socket: non-blocking, without a buffer of its own to receive.

Owns the socket and its registration with the event loop; knows nothing of NBD. Two ways to use
it, for the two phases of a connection:

- coroutines (`receive`, `send_all`) for the handshake, where clarity counts;
- callbacks (`watch_readable`, `recv_into`, `flush`) for the transmission phase, where one wake-up
  should cost one recvmsg and one sendmsg and nothing else. Transports and streams of asyncio cost
  a copy and several calls per direction more.

A plain channel becomes a TLS one between two bytes: as nothing is received that was not asked for,
no plaintext can be left in a buffer at that moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable

from nbdstore.protocol.replies import Buffer

IOV_MAX = 1024
"""Buffers that one sendmsg takes (Linux, UIO_MAXIOV)."""

HANDSHAKE_RECV_BYTES = 16 << 10


class Outbox:
    """Replies on their way out: buffers in order, and how many bytes they have together."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.n_bytes = 0

    def clear(self) -> None:
        self.buffers.clear()
        self.n_bytes = 0

    def sent(self, n_bytes: int) -> None:
        """Forget the first ``n_bytes``."""
        self.n_bytes -= n_bytes
        if not self.n_bytes:
            self.buffers.clear()
            return
        n_whole = 0
        for buffer in self.buffers:
            if n_bytes < len(buffer):
                break
            n_bytes -= len(buffer)
            n_whole += 1
        del self.buffers[:n_whole]
        if n_bytes:
            self.buffers[0] = memoryview(self.buffers[0])[n_bytes:]

    def take(self, max_bytes: int) -> Buffer:
        """Remove and return up to ``max_bytes``: of a large buffer, or small ones joined."""
        if len(self.buffers[0]) >= max_bytes:
            piece = memoryview(self.buffers[0])[:max_bytes]
            self.sent(max_bytes)
            return piece
        parts: list[Buffer] = []
        room = max_bytes
        for buffer in self.buffers:
            parts.append(buffer if len(buffer) <= room else memoryview(buffer)[:room])
            room -= len(parts[-1])
            if not room:
                break
        self.sent(max_bytes - room)
        return b"".join(parts)


class Channel:
    """A plain socket.

    Arguments:
        sock: connected; made non-blocking here. Owned from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._loop = asyncio.get_running_loop()

    # --- Callbacks ---------------------------------------------------------------------------

    def recv_into(self, buffer: memoryview) -> int:
        """Receive once; 0 = the peer sends no more. BlockingIOError if there is nothing."""
        return self.sock.recv_into(buffer)

    def flush(self, outbox: Outbox) -> bool:
        """Send what the socket takes; return whether that was everything."""
        while outbox.buffers:
            buffers = outbox.buffers
            try:
                n_bytes = self.sock.sendmsg(
                    buffers if len(buffers) <= IOV_MAX else buffers[:IOV_MAX]
                )
            except (BlockingIOError, InterruptedError):
                return False
            outbox.sent(n_bytes)
        return True

    def n_unsent(self, outbox: Outbox) -> int:
        """How many bytes of what was flushed, or is to be, the socket has not taken."""
        return outbox.n_bytes

    def has_hung_up(self) -> bool:
        """Whether the peer sends no more, though some of what it has sent may be unread."""
        watch = select.poll()
        watch.register(self.sock, select.POLLRDHUP)
        return bool(watch.poll(0))

    def watch_readable(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever there is something to receive, until unwatched."""
        self._loop.add_reader(self.sock, callback)

    def unwatch_readable(self) -> None:
        self._loop.remove_reader(self.sock)

    def watch_writable(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever the socket takes more, until unwatched."""
        self._loop.add_writer(self.sock, callback)

    def unwatch_writable(self) -> None:
        self._loop.remove_writer(self.sock)

    # --- Coroutines --------------------------------------------------------------------------

    async def readable(self) -> None:
        """Wait until there is something to receive."""
        ready = self._loop.create_future()
        self._loop.add_reader(self.sock, _set_once, ready)
        try:
            await ready
        finally:
            self._loop.remove_reader(self.sock)

    async def writable(self) -> None:
        """Wait until the socket takes more."""
        ready = self._loop.create_future()
        self._loop.add_writer(self.sock, _set_once, ready)
        try:
            await ready
        finally:
            self._loop.remove_writer(self.sock)

    async def receive(self) -> bytes:
        """Receive some bytes, waiting for them; empty = the peer sends no more."""
        buffer = bytearray(HANDSHAKE_RECV_BYTES)
        while True:
            try:
                return bytes(buffer[: self.recv_into(memoryview(buffer))])
            except BlockingIOError:
                await self.readable()

    async def send_all(self, data: bytes) -> None:
        """Send ``data`` whole, by one write if the socket has room for it."""
        outbox = Outbox()
        outbox.buffers.append(data)
        outbox.n_bytes = len(data)
        while not self.flush(outbox):
            await self.writable()

    # --- Closing -----------------------------------------------------------------------------

    async def close(self, linger_s: float) -> None:
        """Close, but let the peer read what was sent.

        Closing a socket with unread bytes resets the connection, which can destroy replies on
        their way: so say that no more is sent, then read on until the peer closes, or in vain
        for ``linger_s``.
        """
        try:
            self._say_goodbye()
            self.sock.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(linger_s):
                await self._discard()
        except (OSError, TimeoutError):
            pass
        finally:
            self.abort()

    async def _discard(self) -> None:
        """Read past what the peer still sends, undecrypted, to its end.

        Waits before every read, or a peer that floods would never let the deadline come.
        """
        while True:
            await self.readable()
            if not self.sock.recv(HANDSHAKE_RECV_BYTES):
                return

    def _say_goodbye(self) -> None:
        """Send what the layer below NBD wants to be sent last."""

    def abort(self) -> None:
        """Close at once."""
        with contextlib.suppress(OSError, ValueError):
            self._loop.remove_reader(self.sock)
            self._loop.remove_writer(self.sock)
        self.sock.close()


def _set_once(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
