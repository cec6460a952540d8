"""A socket on which nothing waits for ever.

Owns one connection's bytes in both directions, and the deadline that a case has for all of them.
Knows no messages.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Iterator

from tests.conformance.outcome import Broken, Closed, Hung, Unreachable, Violation
from tests.conformance.target import Target

RECEIVE_BYTES = 256 << 10
SEND_BYTES = 64 << 10

MAX_CLOSING_BYTES = 64 << 20
"""More than this in place of the end of a connection is no end."""


class Deadline:
    """A moment until which a case may wait for the server."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._at = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Say how long there is left; Hung if there is nothing left."""
        left = self._at - time.monotonic()
        if left <= 0:
            raise Hung(f"no answer within {self.timeout_s:g} s")
        return left


class Connection:
    """One connection to a server.

    Arguments:
        target: where to.
        deadline: for everything that happens on this connection.
    """

    def __init__(self, target: Target, deadline: Deadline) -> None:
        self.target = target
        self.deadline = deadline
        self.ended_properly = True
        """False if a TLS connection ended without close_notify."""

        self._received = bytearray()
        try:
            self.sock = target.dial(deadline.left_s())
        except OSError as error:
            raise Unreachable(f"cannot connect: {error.strerror or error}") from None

    def close(self) -> None:
        self.sock.close()

    def start_tls(self, context: ssl.SSLContext | None = None) -> None:
        """Do the client's side of a TLS handshake; ssl.SSLError or OSError if it fails."""
        assert not self._received, "nothing may come between STARTTLS's ACK and TLS"
        context = context or self.target.tls_files.context()
        self.sock.settimeout(self.deadline.left_s())
        self.sock = context.wrap_socket(
            self.sock, server_hostname=self.target.hostname, suppress_ragged_eofs=False
        )

    # --- Sending -----------------------------------------------------------------------------

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of ``data``; Closed or Hung if the server does not take it.

        Receives what comes meanwhile: a server may wait until its replies are read.
        """
        view = memoryview(data)
        with self._faults():
            while view:
                self._wait_for_room()
                self.sock.settimeout(self.deadline.left_s())
                view = view[self.sock.send(view[:SEND_BYTES]) :]

    def _wait_for_room(self) -> None:
        """Wait until the socket takes something; what arrives before that is kept.

        Under TLS the socket alone does not tell, and sending simply blocks.
        """
        while not isinstance(self.sock, ssl.SSLSocket):
            ends = [self.sock]
            readable, writable, _ = select.select(ends, ends, [], self.deadline.left_s())
            if writable:
                return
            if readable:
                data = self.sock.recv(RECEIVE_BYTES)
                if not data:
                    raise Closed("closed by the server while it is sent to")
                self._received += data

    def send_bytewise(self, data: bytes) -> None:
        """Send one byte at a time, each in a write of its own."""
        for byte in data:
            self.send(bytes([byte]))

    def send_some(self, data: bytes, timeout_s: float) -> int:
        """Send until the server takes no more for a while; return how many bytes it took."""
        view, sent = memoryview(data), 0
        while sent < len(view):
            self.sock.settimeout(min(timeout_s, self.deadline.left_s()))
            with self._faults():
                try:
                    sent += self.sock.send(view[sent:])
                except TimeoutError:
                    break
        return sent

    def finish_sending(self) -> None:
        """Say that nothing more will be sent."""
        with self._faults():
            self.sock.shutdown(socket.SHUT_WR)

    # --- Receiving ---------------------------------------------------------------------------

    def take(self, n_bytes: int) -> bytes:
        """Receive exactly so many bytes."""
        if n_bytes > RECEIVE_BYTES:
            return self._take_large(n_bytes)
        while len(self._received) < n_bytes:
            data = self._receive(RECEIVE_BYTES)
            if not data:
                raise Closed(f"closed by the server, {n_bytes} bytes short of a message")
            self._received += data
        taken = bytes(self._received[:n_bytes])
        del self._received[:n_bytes]
        return taken

    def _take_large(self, n_bytes: int) -> bytes:
        """Receive into the result, without a copy."""
        result = bytearray(n_bytes)
        filled = min(n_bytes, len(self._received))
        result[:filled] = self._received[:filled]
        del self._received[:filled]
        view = memoryview(result)
        while filled < n_bytes:
            with self._faults():
                self.sock.settimeout(self.deadline.left_s())
                got = self.sock.recv_into(view[filled:])
            if not got:
                raise Closed("closed by the server in the middle of a reply")
            filled += got
        return bytes(result)

    def _receive(self, n_bytes: int) -> bytes:
        with self._faults():
            self.sock.settimeout(self.deadline.left_s())
            return self.sock.recv(n_bytes)

    def is_quiet(self, timeout_s: float) -> bool:
        """Whether the connection stays open and nothing comes for a while."""
        if self._received:
            return False
        self.sock.settimeout(min(timeout_s, self.deadline.left_s()))
        try:
            self._received += self.sock.recv(RECEIVE_BYTES)
        except (TimeoutError, ssl.SSLWantReadError):
            return True
        except OSError:
            pass
        return False

    def must_close(
        self, why: str, *, allow_data: bool = False, within_s: float | None = None
    ) -> bytes:
        """Wait for the end of the connection; Violation if it does not come.

        Arguments:
            why: what the server ought to close the connection for.
            allow_data: whether something may come before the end.
            within_s: instead of the deadline; for what servers are known to leave open.
        """
        if within_s is not None:
            self.deadline = Deadline(min(within_s, self.deadline.left_s()))
        received = bytes(self._received)
        self._received.clear()
        try:
            while data := self._receive(RECEIVE_BYTES):
                received += data
                if len(received) > MAX_CLOSING_BYTES:
                    raise Violation(f"sends without end instead of closing after {why}")
        except Hung:
            raise Violation(f"the connection stays open after {why}") from None
        except Closed:
            pass
        if received and not allow_data:
            raise Violation(f"{len(received)} bytes come before the end after {why}")
        return received

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """Translate what sockets raise."""
        try:
            yield
        except TimeoutError:
            raise Hung(f"no answer within {self.deadline.timeout_s:g} s") from None
        except ssl.SSLEOFError:
            self.ended_properly = False
            raise Closed("closed by the server without close_notify") from None
        except ssl.SSLError as error:
            raise Broken(f"TLS: {error.reason or error}") from None
        except OSError as error:
            self.ended_properly = False
            raise Closed(f"closed by the server: {error.strerror or error}") from None
