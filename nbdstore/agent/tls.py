"""TLS between this machine and a server's NBD.

An address says whether TLS is spoken, in the words of NBD's URIs (uri.md), and is all that a record
and a relay need to know::

    nbds://HOST[:PORT]                         the server's certificate is signed by an authority
                                               that this system trusts
    nbds://HOST[:PORT]?tls-certificates=DIR    DIR holds ca-cert.pem, which authority is trusted,
                                               and client-cert.pem with client-key.pem if the server
                                               wants to know who comes: names as libnbd's and QEMU's

It is the relay of the fuse driver that speaks it. The kernel's nbd driver sends and receives plain
bytes; nbd-client gives it a socket pair and is itself the other end, a process on which the device
then depends, and so would be a proxy of ours. What carries its connections safely is beneath them.

The files are read for each connection: who renews them replaces them.
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import parse_qs, urlsplit

from nbdstore.errors import DeviceError, InvalidArgument

SCHEME: Final = "nbds"
DEFAULT_PORT: Final = 10809
FORM: Final = "nbds://HOST:PORT?tls-certificates=/DIRECTORY"

KERNEL_CANNOT: Final = (
    "the kernel driver speaks no TLS: use the fuse driver, or an encrypted network as WireGuard's"
)


class TlsAddress(NamedTuple):
    """Where NBD is spoken with TLS. certificates: None = the authorities of this system."""

    host: str
    port: int
    certificates: Path | None


def parse_address(text: str) -> TlsAddress | None:
    """Read an address; None of one without TLS.

    Raises:
        InvalidArgument: it is neither with TLS nor without.
    """
    if "://" not in text:
        return None
    try:
        parts = urlsplit(text)
        port = parts.port or DEFAULT_PORT
        options = parse_qs(parts.query, strict_parsing=True) if parts.query else {}
    except ValueError as error:
        raise InvalidArgument(f"'{text}' is no address: {error}") from None
    well_formed = (
        parts.scheme == SCHEME
        and parts.hostname
        and parts.path in ("", "/")
        and options.keys() <= {"tls-certificates"}
    )
    if not (well_formed and parts.hostname):
        raise InvalidArgument(f"'{text}' is no address: with TLS give {FORM}")
    directory = options.get("tls-certificates", [""])[-1]
    if directory and not directory.startswith("/"):
        raise InvalidArgument(f"'{text}': give the directory with its whole path, as in {FORM}")
    return TlsAddress(parts.hostname, port, Path(directory) if directory else None)


def secure(sock: socket.socket, address: TlsAddress) -> ssl.SSLSocket:
    """Shake hands over a connection whose server has agreed to TLS.

    Raises:
        InvalidArgument: the files cannot be used.
        DeviceError: server and client do not trust each other.
        OSError: the connection ended.
    """
    context = make_context(address)
    try:
        return context.wrap_socket(sock, server_hostname=address.host)
    except ssl.SSLCertVerificationError as error:
        raise DeviceError(
            f"the server at {address.host}:{address.port} is not trusted: {error.verify_message}"
        ) from error
    except ssl.SSLEOFError:
        raise  # it hung up, as a server does that goes away
    except ssl.SSLError as error:
        raise failure(address, error) from error


def failure(address: TlsAddress, error: ssl.SSLError) -> DeviceError:
    """Say what OpenSSL means; a server refuses certificates only when the handshake is over."""
    return DeviceError(f"no TLS with the server at {address.host}:{address.port}: {_reason(error)}")


def make_context(address: TlsAddress) -> ssl.SSLContext:
    """Make a client's context from the files as they are now.

    Raises:
        InvalidArgument: they cannot be used.
    """
    directory = address.certificates
    try:
        context = ssl.create_default_context(
            cafile=directory / "ca-cert.pem" if directory else None
        )
        if directory and (directory / "client-cert.pem").exists():
            # An answer to OpenSSL's question for a passphrase, or it would ask the terminal.
            context.load_cert_chain(
                directory / "client-cert.pem", directory / "client-key.pem", password=""
            )
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise InvalidArgument(
            f"the TLS files in {directory} cannot be used ({_reason(error)}): ca-cert.pem must be "
            "there, and client-cert.pem with client-key.pem if there is one of them, as PEM, with "
            "no passphrase"
        ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    return getattr(error, "strerror", None) or str(error)
