"""A connected socket under TLS: the channel that `STARTTLS` makes of a plain one.

Owns the two buffers between OpenSSL and the socket; knows nothing of NBD. OpenSSL is not given the
socket itself: it would receive the header of each record, and then its body, by two system calls,
and send each record by one. So

    socket -- one recv --> _incoming -- a record at a time --> the session's receive buffer
    the session's replies -- a record at a time --> _encrypted -- one sendmsg --> socket

and what a wake-up costs beside encryption is one system call in each direction, whatever the size
of the records. A client sends each request as a record of its own, of 60 bytes for a read, so that
is most of what small requests cost; it is worth the copy from the one buffer to the other.

OpenSSL reads from `_incoming` what it needs for a record and no more, and all there is if that is
not a whole record. So what is left there when it has stopped for lack of room is worth reading
again, and after it has asked for more nothing is left.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable

from nbdstore.protocol.transmission import reserve
from nbdstore.server.channel import Channel, Outbox

RECORD_BYTES = 16 << 10
"""The largest record (RFC 8446, "Record Layer"): small buffers are joined to this much, instead of
one record for each header."""

ENCRYPT_BYTES = 256 << 10
"""How much is encrypted before it is sent: the replies to 32 reads of 4 KiB leave at once."""

RECEIVE_BYTES = 256 << 10
"""Encrypted bytes that are received at once."""

MOST_WAITING_BYTES = 2 * ENCRYPT_BYTES
"""Encrypted bytes that may wait to be sent: replies are no more than half of that."""


class TlsChannel(Channel):
    """A socket under TLS, on which :meth:`shake_hands` must come first."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        super().__init__(sock)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        # Its type knows only what it does without a buffer.
        self._read: Callable[[int, memoryview], int] = self.tls.read  # type: ignore[assignment]
        self._received = memoryview(reserve(RECEIVE_BYTES))
        self._encrypted = Outbox()
        self._has_ended = False
        """Whether the peer's close_notify has been read, which it may wait to be answered."""
        self._callback: Callable[[], None] | None = None

    async def shake_hands(self) -> None:
        """Do the server's side of the TLS handshake; ssl.SSLError if it fails."""
        while True:
            try:
                self.tls.do_handshake()
                return await self._send_all_encrypted()
            except ssl.SSLWantReadError:
                await self._send_all_encrypted()
                await self._receive_more()
            except ssl.SSLError:
                self._send_last_words()
                raise

    async def _send_all_encrypted(self) -> None:
        self._take_encrypted()
        while not super().flush(self._encrypted):
            await self.writable()

    async def _receive_more(self) -> None:
        """Wait for what the peer sends next, and hand it to OpenSSL, as its end if it is that.

        Waits before every read, or a peer that floods would never let the deadline come.
        """
        while True:
            await self.readable()
            with contextlib.suppress(BlockingIOError):
                if not self._fill():
                    self._incoming.write_eof()
                return

    def _fill(self) -> int:
        """Receive once for OpenSSL; see `Channel.recv_into`."""
        n_bytes = self.sock.recv_into(self._received)
        self._incoming.write(self._received[:n_bytes])
        return n_bytes

    def _has_more(self) -> bool:
        """Whether something is left to be read, or the end: the socket will not tell of it."""
        return self._incoming.pending > 0 or self._has_ended or self.tls.pending() > 0

    def recv_into(self, buffer: memoryview) -> int:
        """Receive as many records as have arrived and fit."""
        if not self._has_more() and not self._fill():
            return 0
        read, incoming, room, n_bytes = self._read, self._incoming, len(buffer), 0
        try:
            while n_bytes < room:
                got = read(room - n_bytes, buffer[n_bytes:])
                if not got:
                    self._has_ended = True
                    break
                n_bytes += got
                if not incoming.pending:
                    break
        except ssl.SSLWantReadError:
            if not n_bytes:
                self._send_unasked()
                raise BlockingIOError from None
        self._send_unasked()
        return n_bytes

    def _send_unasked(self) -> None:
        """Send what OpenSSL has to say by itself, such as that it does not renegotiate.

        Else nobody would before the next reply, and a peer that asks again and again without
        reading the answers would fill the memory with them.
        """
        if not self._outgoing.pending:
            return
        self._take_encrypted()
        if not super().flush(self._encrypted) and self._encrypted.n_bytes > MOST_WAITING_BYTES:
            raise ConnectionAbortedError("the client does not read what TLS has to tell it")

    def flush(self, outbox: Outbox) -> bool:
        """Encrypt and send; what is encrypted waits here, and counts as sent."""
        write = self.tls.write
        while super().flush(self._encrypted):
            if not outbox.buffers:
                return True
            left = ENCRYPT_BYTES
            while left > 0 and outbox.buffers:
                left -= write(outbox.take(RECORD_BYTES))
            self._take_encrypted()
        return False

    def n_unsent(self, outbox: Outbox) -> int:
        """As above; what is encrypted counts as it is."""
        return outbox.n_bytes + self._encrypted.n_bytes

    def _take_encrypted(self) -> None:
        """Take from OpenSSL what it wants to be sent."""
        if data := self._outgoing.read():
            self._encrypted.buffers.append(data)
            self._encrypted.n_bytes += len(data)

    def _send_last_words(self) -> None:
        """Send an alert, as far as the socket takes it: the peer is not waited for any more."""
        self._take_encrypted()
        with contextlib.suppress(OSError):
            super().flush(self._encrypted)

    def watch_readable(self, callback: Callable[[], None]) -> None:
        """As above; also calls for bytes that were taken from the socket already."""
        self._callback = callback
        self._loop.add_reader(self.sock, self._on_readable)
        if self._has_more():
            self._loop.call_soon(self._on_readable)

    def unwatch_readable(self) -> None:
        self._callback = None
        super().unwatch_readable()

    def _on_readable(self) -> None:
        if self._callback is not None:
            self._callback()
        if self._callback is not None and self._has_more():
            self._loop.call_soon(self._on_readable)

    def _say_goodbye(self) -> None:
        """Send close_notify; the peer's is not waited for (proto.md, "Termination")."""
        with contextlib.suppress(ssl.SSLError):
            self.tls.unwrap()
        self._send_last_words()


async def start_tls(channel: Channel, context: ssl.SSLContext) -> TlsChannel:
    """Do the server's side of a TLS handshake; `channel` must not be used any more."""
    found = TlsChannel(channel.sock, context)
    try:
        await found.shake_hands()
    except BaseException:
        found.abort()
        raise
    return found
