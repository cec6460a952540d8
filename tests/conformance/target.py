"""What to test: an NBD URI, and the sockets that lead there.

The URIs are those that libnbd and QEMU understand:

    nbd://HOST[:PORT]/EXPORT      nbd+unix:///EXPORT?socket=PATH
    nbds://HOST[:PORT]/EXPORT     nbds+unix:///EXPORT?socket=PATH
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

DEFAULT_PORT = 10809


class BadTarget(Exception):
    """A URI or a TLS file that cannot be used, in a person's words."""


@dataclass(frozen=True)
class TlsFiles:
    """What TLS needs; None = the system's certificates, or no certificate of one's own."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    hostname: str | None = None
    verify: bool = True

    def context(self) -> ssl.SSLContext:
        """Make a client's context of these files."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if not self.verify:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            if self.certificate:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise BadTarget(f"cannot use the TLS files: {error}") from None
        return context


@dataclass(frozen=True)
class Target:
    """One export of one server.

    Arguments:
        uri: as it was given.
        address: ``(host, port)``, or the path of a unix socket.
        export: the export's name.
        tls: whether the URI asks for TLS.
        tls_files: for that, and for the cases about TLS.
    """

    uri: str
    address: tuple[str, int] | str
    export: str
    tls: bool = False
    tls_files: TlsFiles = field(default_factory=TlsFiles)

    @property
    def hostname(self) -> str:
        """The name that the server's certificate must have."""
        host = self.address[0] if isinstance(self.address, tuple) else "localhost"
        return self.tls_files.hostname or host

    def dial(self, timeout_s: float) -> socket.socket:
        """Connect; OSError if that fails."""
        if isinstance(self.address, tuple):
            sock = socket.create_connection(self.address, timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(self.address)
        except OSError:
            sock.close()
            raise
        return sock


def parse_uri(uri: str, tls_files: TlsFiles | None = None) -> Target:
    """Parse an NBD URI; BadTarget if it is none."""
    parts = urlsplit(uri)
    scheme, plus, transport = parts.scheme.partition("+")
    if scheme not in ("nbd", "nbds") or (plus and transport != "unix"):
        raise BadTarget(f"{uri!r} is no NBD URI: it starts with nbd://, nbds:// or nbd+unix://")
    export = unquote(parts.path.removeprefix("/"))
    address: tuple[str, int] | str
    if transport:
        paths = parse_qs(parts.query).get("socket", [])
        if len(paths) != 1:
            raise BadTarget(f"{uri!r} does not say where its socket is: add ?socket=PATH")
        address = paths[0]
    else:
        try:
            address = (parts.hostname or "localhost", parts.port or DEFAULT_PORT)
        except ValueError as error:
            raise BadTarget(f"{uri!r}: {error}") from None
    return Target(uri, address, export, scheme == "nbds", tls_files or TlsFiles())
