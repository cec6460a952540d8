"""The relay of the fuse driver: NBD from nbdfuse to the server, through the server's restarts.

nbdfuse answers every request with an error once its connection is gone, as any NBD client without
a kernel behind it. So it never sees the server: it is the child of this process, connected to it
by a socket pair, and this process is the one that reconnects. There is one for each attachment,
which lives as long as nbdfuse does and does not need the agent.

    request from nbdfuse   remembered, sent to the server
    reply from the server  forgotten, sent to nbdfuse
    connection lost, or a request unanswered for request_timeout_s
                           connect again, end what the server has of the old connection, send all
                           that is remembered once more, in its order
    dead_timeout_s over    the end: nbdfuse fails what it has, and all that comes

Speaks oldstyle to nbdfuse (proto.md, "Oldstyle negotiation"), which leaves nothing to agree on:
simple replies, the flags of the server. Bytes of requests and replies pass unchanged, to the
server with TLS if its address says so (see `tls`), but for one thing: nbdfuse asks for the size
once, and is told ROOM or more, so that its file can grow. The loop device over it is limited to the
volume's size, but the page cache under that reads ahead: what is read beyond the volume's end is
zeros, which are made here.

The file that it is given is locked for its life, and says "PID connected SIZE", the volume's bytes
when this connection began, or "PID waiting".
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import socket
import ssl
import struct
import subprocess
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from nbdstore.agent import programs, store_server
from nbdstore.agent.records import AttachRecord
from nbdstore.agent.store_server import Link, StoreServer
from nbdstore.errors import DeviceError, NbdstoreError
from nbdstore.protocol.constants import (
    INIT_PASSWD,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    Command,
)
from nbdstore.sizes import exact_size

OLDSTYLE: Final = struct.Struct(">QQQI124x")
"""NBDMAGIC, the oldstyle magic, size, flags of handshake and transmission, zeros."""
OLDSTYLE_MAGIC: Final = 0x00420281861253
RECEIVE_BYTES: Final = 256 << 10
NOT_NOW: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
"""What a socket that does not block raises instead of waiting."""
RETRY_S: Final = (0.1, 0.2, 0.5, 1.0)
"""Pauses between attempts to connect; the last one repeats."""
LOCK_FILE_MODE: Final = 0o600
STATE_BYTES: Final = 64
ROOM: Final = 256 << 40
"""Bytes: the largest volume that servers make now."""

log = logging.getLogger(__name__)


class Pending(NamedTuple):
    """A request whose reply has not come.

    length: bytes that are asked of the server. beyond: zeros that follow them in the reply. sent_s:
    when it was sent last.
    """

    raw: bytes
    command: int
    length: int
    beyond: int
    sent_s: float


class Lost(Exception):
    """The connection to the server is of no use any more."""


class Relay:
    """Carry requests of one client to a server.

    Arguments:
        client: a socket; the other side speaks NBD to it.
        connect: makes a new connection, having ended those of before; raises NbdstoreError if it
            cannot. Called again and again until `dead_timeout_s` are over.
        report: told how many bytes the server has for us, None while it is away, whenever that
            changes.
    """

    def __init__(
        self,
        client: socket.socket,
        connect: Callable[[], Link],
        *,
        request_timeout_s: float,
        dead_timeout_s: float,
        report: Callable[[int | None], None],
    ) -> None:
        self._client = client
        self._connect = connect
        self._request_timeout_s = request_timeout_s
        self._dead_timeout_s = dead_timeout_s
        self._report = report
        self._server: socket.socket | None = None
        self._flags: int | None = None
        self._size = 0
        self._pending: dict[bytes, Pending] = {}
        self._from_client = bytearray()
        self._from_server = bytearray()
        self._to_client: deque[memoryview] = deque()
        self._to_server: deque[memoryview] = deque()
        self._leaving = False

    def run(self) -> None:
        """Relay until the client leaves.

        Raises:
            DeviceError: the server was away for too long, or does not fit any more.
        """
        self._reconnect()
        room = max(ROOM, self._size)
        hello = OLDSTYLE.pack(INIT_PASSWD, OLDSTYLE_MAGIC, room, self._flags)
        self._to_client.append(memoryview(hello))
        try:
            while not (self._leaving and not self._pending and not self._to_server):
                try:
                    self._step()
                except Lost as loss:
                    if self._leaving and not self._pending:
                        return
                    log.warning("the connection to the server is lost (%s)", loss)
                    self._reconnect()
        finally:
            self._drop()

    # --- One step ----------------------------------------------------------------------------

    def _step(self) -> None:
        assert self._server
        readers = [self._server] if self._leaving else [self._server, self._client]
        writers = [sock for sock, queue in self._outgoing() if queue]
        readable, writable, _ = select.select(readers, writers, [], self._patience_s())
        if not (readable or writable):
            self._require_answers()
        for sock, queue in self._outgoing():
            if sock in writable:
                self._send(sock, queue)
        if self._server in readable:
            self._receive_replies(self._server)
        if self._client in readable:
            self._receive_requests()

    def _outgoing(self) -> list[tuple[socket.socket, deque[memoryview]]]:
        assert self._server
        return [(self._client, self._to_client), (self._server, self._to_server)]

    def _patience_s(self) -> float:
        oldest = next(iter(self._pending.values()), None)
        if oldest is None:
            return self._request_timeout_s
        return max(0.0, oldest.sent_s + self._request_timeout_s - time.monotonic())

    def _require_answers(self) -> None:
        if self._pending and self._patience_s() == 0:
            raise Lost(f"a request was not answered within {self._request_timeout_s:g} s")

    def _send(self, sock: socket.socket, queue: deque[memoryview]) -> None:
        try:
            n_bytes = sock.send(queue[0])
        except NOT_NOW:
            return
        except OSError as error:
            self._ended(sock, error)
            return
        if n_bytes == len(queue[0]):
            queue.popleft()
        else:
            queue[0] = queue[0][n_bytes:]

    def _ended(self, sock: socket.socket, error: OSError | None) -> None:
        if sock is not self._client:
            raise Lost(str(error) if error else "the server closed it")
        self._leaving = True
        self._to_client.clear()

    def _receive(self, sock: socket.socket) -> bytes | None:
        """Return what came; None if nothing did; the end is `_ended`.

        RECEIVE_BYTES hold any TLS record (16 KiB at most), so that nothing of one stays in OpenSSL,
        where select() does not see it.
        """
        try:
            data = sock.recv(RECEIVE_BYTES)
        except NOT_NOW:
            return None
        except OSError as error:
            self._ended(sock, error)
            return None
        if not data:
            self._ended(sock, None)
        return data

    def _receive_requests(self) -> None:
        self._from_client += self._receive(self._client) or b""
        while len(self._from_client) >= REQUEST.size:
            magic, _, command, _, _, length = REQUEST.unpack_from(self._from_client)
            if magic != REQUEST_MAGIC:
                raise DeviceError(f"nbdfuse sent a request that starts with {magic:#x}")
            size = REQUEST.size + (length if command == Command.WRITE else 0)
            if len(self._from_client) < size:
                return
            raw = bytes(self._from_client[:size])
            del self._from_client[:size]
            if command == Command.DISC:
                self._leaving = True
                self._to_server.append(memoryview(raw))
            else:
                self._pass_on(raw)

    def _pass_on(self, raw: bytes) -> None:
        """Send a request to the server; of a READ what lies within the volume."""
        *header, length = REQUEST.unpack_from(raw)
        _, _, command, cookie, offset = header
        beyond = 0
        if command == Command.READ and offset + length > self._size:
            beyond = min(length, offset + length - self._size)
            length -= beyond
            raw = REQUEST.pack(*header, length)
        if beyond and not length:
            zeros = SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie) + bytes(beyond)
            self._to_client.append(memoryview(zeros))
            return
        self._pending[cookie] = Pending(raw, command, length, beyond, time.monotonic())
        self._to_server.append(memoryview(raw))

    def _receive_replies(self, server: socket.socket) -> None:
        self._from_server += self._receive(server) or b""
        while len(self._from_server) >= SIMPLE_REPLY.size:
            magic, error, cookie = SIMPLE_REPLY.unpack_from(self._from_server)
            pending = self._pending.get(cookie)
            if magic != SIMPLE_REPLY_MAGIC or pending is None:
                raise Lost(f"it sent a reply to nothing, or that starts with {magic:#x}")
            with_data = pending.command == Command.READ and not error
            size = SIMPLE_REPLY.size + (pending.length if with_data else 0)
            if len(self._from_server) < size:
                return
            zeros = bytes(pending.beyond) if with_data else b""
            self._to_client.append(memoryview(bytes(self._from_server[:size]) + zeros))
            del self._from_server[:size]
            del self._pending[cookie]

    # --- Connecting --------------------------------------------------------------------------

    def _drop(self) -> None:
        if self._server is not None:
            self._server.close()
        self._server = None
        self._from_server.clear()
        self._to_server.clear()

    def _reconnect(self) -> None:
        """Get a connection, and send over it all that has no reply yet."""
        self._drop()
        self._report(None)
        deadline_s = time.monotonic() + self._dead_timeout_s
        said = ""
        for attempt in range(1 << 62):
            try:
                link = self._connect()
                break
            except NbdstoreError as error:
                first_time = self._flags is None
                if first_time or time.monotonic() > deadline_s:
                    raise DeviceError(
                        f"gave up after {self._dead_timeout_s:g} s: {error}"
                    ) from error
                if str(error) != said:
                    said = str(error)
                    log.info("still without a server: %s", error)
            self._pause(RETRY_S[min(attempt, len(RETRY_S) - 1)])
        self._require_same(link)
        link.socket.setblocking(False)
        self._server = link.socket
        now_s = time.monotonic()
        self._pending = {
            cookie: pending._replace(sent_s=now_s) for cookie, pending in self._pending.items()
        }
        self._to_server.extend(memoryview(pending.raw) for pending in self._pending.values())
        self._report(link.size)

    def _require_same(self, link: Link) -> None:
        """Take note of what the server offers; raises DeviceError if it is less than before."""
        if self._flags is None:
            self._flags = link.flags
        if not store_server.still_fits(self._flags, link.flags) or link.size < self._size:
            link.socket.close()
            raise DeviceError(
                f"the server offers {exact_size(link.size)} with flags {link.flags:#x} now, not "
                f"the {exact_size(self._size)} with {self._flags:#x} of before: what was attached "
                "cannot go on"
            )
        self._size = link.size

    def _pause(self, seconds: float) -> None:
        """Wait; raises DeviceError at once if the client leaves meanwhile."""
        poll = select.poll()
        poll.register(self._client, select.POLLRDHUP)
        if poll.poll(seconds * 1000):
            raise DeviceError("the volume was detached while the server was away")


# --- The process ----------------------------------------------------------------------------------


class StateFile:
    """The file by which others see that a relay lives, and how it fares."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, LOCK_FILE_MODE)
        # Those who look hold a shared lock for a moment.
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self.report(None)

    def report(self, size: int | None) -> None:
        """Say how many bytes the server has, None while it is away."""
        text = f"{os.getpid()} {'waiting' if size is None else f'connected {size}'}"
        os.pwrite(self._descriptor, text.ljust(STATE_BYTES - 1).encode() + b"\n", 0)

    def close(self) -> None:
        os.close(self._descriptor)


class RelayState(NamedTuple):
    """How a relay fares. size: bytes of the volume, 0 while that is not told."""

    pid: int
    connected: bool
    size: int


def read_state(path: Path) -> RelayState | None:
    """Return the state of the relay that keeps the file; None if there is none alive."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        words = os.pread(descriptor, STATE_BYTES, 0).decode().split()
        if not words:
            return None
        size = int(words[2]) if len(words) > 2 else 0
        return RelayState(int(words[0]), words[1] == "connected", size)
    finally:
        os.close(descriptor)
    return None


def run_with_nbdfuse(
    directory: Path,
    state: StateFile,
    connect: Callable[[], Link],
    *,
    read_only: bool,
    request_timeout_s: float,
    dead_timeout_s: float,
) -> None:
    """Mount nbdfuse on `directory`, which then holds the file ``nbd``, and relay until it ends."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            options = ("--readonly",) if read_only else ()
            fuse = subprocess.Popen(
                ["nbdfuse", *options, str(directory), "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={"PATH": programs.SBIN},
                stdin=subprocess.DEVNULL,
            )
        ours.setblocking(False)
        relay = Relay(
            ours,
            connect,
            request_timeout_s=request_timeout_s,
            dead_timeout_s=dead_timeout_s,
            report=state.report,
        )
        try:
            relay.run()
        finally:
            ours.close()
            fuse.wait()


def connector(server: StoreServer, record: AttachRecord) -> Callable[[], Link]:
    """Return what connects to a record's export, having ended the connections of before."""

    def connect() -> Link:
        server.end_connections(record.volume, record.epoch)
        return store_server.dial(record.address, record.export)

    return connect
