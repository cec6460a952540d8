"""TLS: the server's context, and who a client has proved to be.

X.509 only. TLS 1.2 stays allowed: nbd-client speaks nothing newer.

Certificates end, and programs that renew them replace files. So the files are looked at for each
client that comes, and read again if they are others than before; clients that are there stay.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterable
from pathlib import Path

from nbdstore.errors import InvalidArgument
from nbdstore.file_signature import Signature, signature
from nbdstore.server.exports import Identity
from nbdstore.server.options import TlsOptions

log = logging.getLogger(__name__)


class TlsFiles:
    """The context of a server, from its files as they are now.

    Raises:
        InvalidArgument: the files cannot be used.
    """

    def __init__(self, options: TlsOptions) -> None:
        self._options = options
        self._paths = [
            path
            for path in (options.certificate, options.key, options.client_ca)
            if path is not None
        ]
        self._seen = self._look()
        self._context = make_context(options)

    def context(self) -> ssl.SSLContext:
        """Return the context for a client that comes now.

        Files that cannot be used, of which one may be there before the other, change nothing: that
        is logged, and they are read again when they have changed again.
        """
        now = self._look()
        if now != self._seen:
            self._seen = now
            names = " and ".join(str(path) for path in self._paths)
            try:
                self._context = make_context(self._options)
                log.info("read the TLS files %s again", names)
            except InvalidArgument as error:
                log.error("%s; what was read before is used until they change again", error)
        return self._context

    def _look(self) -> list[Signature]:
        return [signature(path) for path in self._paths]


def make_context(options: TlsOptions) -> ssl.SSLContext:
    """Make the server's context from its files.

    Errors:
        InvalidArgument: a file cannot be read, is no PEM, or key and certificate do not match.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    # NBD connections live for days; a ticket would only be written to clients that may be gone.
    context.num_tickets = 0
    for path in (options.certificate, options.key, options.client_ca):
        if path is not None:
            require_readable(path)
    try:
        # An answer is given to OpenSSL's question for a passphrase, or it would ask the terminal.
        context.load_cert_chain(options.certificate, options.key, password="")
    except (ssl.SSLError, OSError, ValueError) as error:
        raise InvalidArgument(
            f"cannot use the TLS certificate {options.certificate} with the key {options.key}: "
            f"{reason(error)}; both must be PEM, belong together, and have no passphrase"
        ) from None
    if options.client_ca is not None:
        try:
            context.load_verify_locations(options.client_ca)
        except (ssl.SSLError, OSError) as error:
            raise InvalidArgument(
                f"cannot use {options.client_ca} as the CA of clients: {reason(error)}"
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def require_readable(path: Path) -> None:
    """Raise InvalidArgument, naming the file, which OpenSSL's errors do not."""
    try:
        if path.is_file():
            path.open("rb").close()
            return
    except OSError as error:
        raise InvalidArgument(f"cannot read the TLS file {path}: {error.strerror}") from None
    raise InvalidArgument(f"the TLS file {path} does not exist, or is not a file")


def reason(error: Exception) -> str:
    """Say what OpenSSL means, in its own words but without its source lines."""
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    return str(error)


def identify(tls: ssl.SSLObject) -> Identity:
    """Read the names in a client's verified certificate: subject CN, then DNS SANs."""
    certificate = tls.getpeercert()
    if not certificate:
        return Identity(tls=True)
    names: list[str] = []
    # The type of getpeercert() covers every field it may have: these two are as annotated.
    subject: Iterable[Iterable[tuple[str, str]]] = certificate.get("subject", ())  # type: ignore[assignment]
    alternatives: Iterable[tuple[str, str]] = certificate.get("subjectAltName", ())  # type: ignore[assignment]
    for relative in subject:
        names += [value for key, value in relative if key == "commonName"]
    names += [value for kind, value in alternatives if kind == "DNS"]
    return Identity(tls=True, names=tuple(dict.fromkeys(names)))
