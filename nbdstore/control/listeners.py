"""Where the control API listens: a unix socket in the pool's directory, and TCP if asked.

The unix socket (`control.sock`, mode 0600) is how every command finds the server that holds a
pool: whoever holds the pool's lock may replace one that a killed server left behind. It is there
before NBD clients are served, so that who finds a server there may ask it at once, and before HTTP
is imported, which takes as long as all the rest of the start. This module must not know HTTP:
connections wait in the sockets until an `Endpoint` answers on them.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nbdstore import unix_socket
from nbdstore.control import SOCKET_NAME
from nbdstore.errors import ControlError, InvalidArgument

if TYPE_CHECKING:
    import ssl

    from nbdstore.control.tokens import Tokens

    GetContext = Callable[[], ssl.SSLContext]

log = logging.getLogger(__name__)


class Listeners:
    """Sockets that listen from now on, until `close`.

    Arguments:
        directory: the pool's directory, whose lock the caller holds.
        tcp: (host, port) to listen on besides; needs tokens.
        tokens: of which callers over TCP must present one.
        tls: returns the context for a caller who comes over TCP; None = plain HTTP.
        passed: listening sockets handed down by systemd; those over TCP need tokens.

    Raises:
        InvalidArgument: TCP without tokens, or an address that cannot be listened on.
        ControlError: the unix socket cannot be made. In both cases nothing is left behind.
    """

    def __init__(
        self,
        directory: Path,
        *,
        tcp: tuple[str, int] | None = None,
        tokens: Tokens | None = None,
        tls: GetContext | None = None,
        passed: Sequence[socket.socket] = (),
    ) -> None:
        self.path = directory / SOCKET_NAME
        self.unix = [sock for sock in passed if sock.family == socket.AF_UNIX]
        self.tcp = [sock for sock in passed if sock.family != socket.AF_UNIX]
        self.tokens = tokens
        self.tls = tls
        if tokens is None and (tcp or self.tcp):
            raise InvalidArgument(
                "the control API does not listen on TCP without a token: "
                "give one with --control-token-file"
            )
        if tcp:
            self.tcp.append(_bind(*tcp))
        try:
            self.unix.insert(0, unix_socket.listen(self.path))
        except OSError as error:
            self._close_sockets()
            raise ControlError(f"cannot make {self.path}: {error.strerror}") from error
        self.addresses = [f"unix:{self.path}", *map(self._address, self.tcp)]
        """URLs of the unix socket in the pool and of all TCP sockets."""

    def close(self) -> None:
        """Take the unix socket's name away and listen no more; those who wait are let go."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._close_sockets()

    def _close_sockets(self) -> None:
        for sock in (*self.unix, *self.tcp):
            sock.close()

    def _address(self, sock: socket.socket) -> str:
        """Return the URL of a TCP socket; warn if it shows tokens to a network."""
        scheme = "https" if self.tls else "http"
        host, port = sock.getsockname()[:2]
        url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
        if scheme == "http" and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
            log.warning(
                "tokens cross the network in the clear at %s, for all to see who are on the way: "
                "give --control-tls-cert and --control-tls-key",
                url,
            )
        return url


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family)
    except UnicodeError:  # of the encoding of host names, IDNA
        raise InvalidArgument(
            f"{host!r} is neither a host name nor an IP address: give another for --control"
        ) from None
    except OSError as error:
        reason = error.strerror or os.strerror(error.errno or 0)
        raise InvalidArgument(
            f"the control API cannot listen on {host}:{port}: {reason.lower()}: "
            "choose another address for --control"
        ) from error
