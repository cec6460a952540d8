"""Listening sockets: addresses, binding, accepting.

Owns what a person can get wrong about an address, and what a crowd of clients can do to accept:
there is one batch of accepts per wake-up, and when the process is out of descriptors accepting
pauses instead of spinning.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from nbdstore import unix_socket
from nbdstore.errors import InvalidArgument
from nbdstore.server.options import DEFAULT_PORT

log = logging.getLogger(__name__)

BACKLOG = 1024
ACCEPTS_PER_WAKE_UP = 64

PAUSE_S = 0.2
"""How long accepting pauses when the process, or the system, is out of descriptors."""

EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Listener:
    """Sockets that listen, and hand over whoever connects.

    Arguments:
        addresses: see ServerOptions.listen.
        sockets: sockets that listen already.
        on_connect: called with each accepted socket, which it owns from then on.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        sockets: Sequence[socket.socket],
        on_connect: Callable[[socket.socket], None],
    ) -> None:
        self._addresses = addresses
        self._on_connect = on_connect
        self._sockets = list(sockets)
        self._unix_files: dict[socket.socket, tuple[Path, int]] = {}
        """Of the sockets made here: their path and inode."""
        self._pause: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Bind and begin to accept.

        Errors:
            InvalidArgument: an address makes no sense, or cannot be had.
        """
        try:
            for address in self._addresses:
                self._sockets += self._bind(address)
        except BaseException:
            self.close()
            raise
        for sock in self._sockets:
            sock.setblocking(False)
        self._resume()

    def close(self) -> None:
        """Stop listening, and remove the files of unix sockets made here."""
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        for sock in self._sockets:
            self._loop.remove_reader(sock)
            sock.close()
        self._sockets.clear()
        for path, inode in self._unix_files.values():
            with contextlib.suppress(OSError):
                # Another server may have put its own socket there since.
                if path.stat().st_ino == inode:
                    path.unlink()
        self._unix_files.clear()

    @property
    def addresses(self) -> list[str]:
        """Where clients can connect: ``127.0.0.1:10809``, ``unix:/run/x.sock``."""
        files = self._unix_files
        return [
            f"unix:{files[sock][0]}" if sock in files else name_address(sock)
            for sock in self._sockets
        ]

    # --- Accepting ---------------------------------------------------------------------------

    def _resume(self) -> None:
        self._pause = None
        for sock in self._sockets:
            self._loop.add_reader(sock, self._accept, sock)

    def _accept(self, sock: socket.socket) -> None:
        for _ in range(ACCEPTS_PER_WAKE_UP):
            try:
                client, _address = sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                self._stop_for_a_while(error)
                return
            self._on_connect(client)

    def _stop_for_a_while(self, error: OSError) -> None:
        if error.errno in EXHAUSTED:
            log.error("cannot accept connections: %s; trying again", error.strerror)
        else:
            log.error("accept failed: %s; trying again", error)
        for sock in self._sockets:
            self._loop.remove_reader(sock)
        if self._pause is None:
            self._pause = self._loop.call_later(PAUSE_S, self._resume)

    # --- Binding -----------------------------------------------------------------------------

    def _bind(self, address: str) -> list[socket.socket]:
        if address.startswith("unix:"):
            return [self._bind_unix(Path(address.removeprefix("unix:")).absolute())]
        host, port = parse_address(address)
        return bind_tcp(host, port)

    def _bind_unix(self, path: Path) -> socket.socket:
        remove_stale_socket(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with unix_socket.address(path) as short:
                sock.bind(short)
            self._unix_files[sock] = (path, path.stat().st_ino)
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            raise InvalidArgument(
                f"cannot listen on the unix socket {path}: {error.strerror or error}"
            ) from None
        return sock


def parse_address(address: str) -> tuple[str | None, int]:
    """Split ``HOST:PORT`` and its short forms; host None = all interfaces."""
    host, colon, port = address.rpartition(":")
    if not colon or (address.startswith("[") and address.endswith("]")):
        host, port = address, str(DEFAULT_PORT)
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) <= 65535):
        raise InvalidArgument(
            f"{port!r} in the address {address!r} is not a port; use a number from 0 to 65535"
        )
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise InvalidArgument(
            f"the address {address!r} has more than one colon; write IPv6 as [ADDRESS]:PORT"
        )
    return host.strip("[]") or None, int(port)


def bind_tcp(host: str | None, port: int) -> list[socket.socket]:
    """Listen on all addresses of a host."""
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
    except OSError as error:
        raise InvalidArgument(f"the host {host!r} is not known: {error.strerror}") from None
    except UnicodeError:  # of the encoding of host names, IDNA
        raise InvalidArgument(f"{host!r} is neither a host name nor an IP address") from None
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, where in dict.fromkeys(found):
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # The IPv4 twin of "all interfaces" is bound by itself.
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(where)
            sock.listen(BACKLOG)
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise InvalidArgument(explain_bind(host, port, error)) from None
    return sockets


def explain_bind(host: str | None, port: int, error: OSError) -> str:
    where = f"port {port} on {host or 'all interfaces'}"
    if error.errno == errno.EADDRINUSE:
        return f"{where} is in use; stop what listens there, or choose another port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine"
    if error.errno == errno.EACCES:
        return f"{where} needs more rights; choose a port above 1023"
    return f"cannot listen on {where}: {error.strerror}"


def remove_stale_socket(path: Path) -> None:
    """Remove a socket file that nobody listens on any more; refuse to touch anything else."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # bind will tell what is wrong with the directory
    if not stat.S_ISSOCK(mode):
        raise InvalidArgument(f"{path} exists and is no socket; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            with unix_socket.address(path) as short:
                probe.connect(short)
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            return
        except BlockingIOError:
            pass  # somebody listens, and is too busy to accept: a connect would wait for ever
        except OSError as error:
            raise InvalidArgument(f"cannot use {path}: {error.strerror or error}") from None
    raise InvalidArgument(f"another server listens on {path}; stop it, or choose another path")


def name_address(sock: socket.socket) -> str:
    """Name where a socket listens."""
    where = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        # An abstract address begins with a zero byte, which people write as "@" (unix(7)).
        return f"unix:{os.fsdecode(where).replace(chr(0), '@', 1)}"
    host, port = where[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
