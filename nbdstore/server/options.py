"""What a server is told when it starts: where it listens, whom it lets in, how much it holds.

Plain values; the command line fills them in.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nbdstore.protocol.agreement import TlsMode

DEFAULT_PORT = 10809


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients can make the server hold. Numbers are per connection if not said.

    Arguments:
        max_connections: of the whole server; more are accepted and closed at once.
        handshake_timeout_s: from the accept to the first byte of the transmission phase.
        max_options: options in a handshake, beside four for each export.
        max_in_flight: requests that are being served. Linux keeps at most 128 per connection,
            and a TRIM that frees a full pool must not queue behind the writes that wait for it.
        max_held_bytes: payloads of requests in flight, and replies not yet sent. One request
            is always served, however large, so a connection holds at most this and 32 MiB.
        max_client_bytes: the same of all connections together, see `Budget`.
        stall_timeout_s: how long a client may leave its replies unread, or a request unfinished,
            if others wait for the memory that it holds. It need not do much to show that it
            lives. 0 = for ever.
        max_unsent_bytes: replies that wait for the client to read; with more of them, nothing
            new is begun.
        max_round_bytes: content of READs served in one go, before others get their turn.
        max_extents: extents in one reply to BLOCK_STATUS, per metadata context. Finding them holds
            up all others: 20 ms for 4096 that are blocks.
        linger_s: how long a closed connection may take to read its last replies.
    """

    max_connections: int = 256
    handshake_timeout_s: float = 10.0
    max_options: int = 64
    max_in_flight: int = 1024
    max_held_bytes: int = 64 << 20
    max_client_bytes: int = 1 << 30
    stall_timeout_s: float = 10.0
    max_unsent_bytes: int = 4 << 20
    max_round_bytes: int = 4 << 20
    max_extents: int = 4 << 10
    linger_s: float = 2.0


@dataclass(frozen=True)
class TlsOptions:
    """How TLS is done.

    Arguments:
        mode: OPTIONAL lets clients do without, except on exports with an allow list.
        certificate: PEM file with the server's certificate and what leads to its CA.
        key: PEM file with its private key.
        client_ca: PEM file; if given, clients must show a certificate signed by it.
    """

    mode: TlsMode
    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True)
class ServerOptions:
    """Everything a server is told.

    Arguments:
        listen: addresses, ``HOST:PORT``, ``[IPV6]:PORT``, ``:PORT`` (all interfaces), ``HOST``
            or ``unix:PATH``.
        sockets: sockets that listen already (systemd's socket activation).
        read_only: refuse everything that writes, on all exports.
        owner_only: nobody but the pool's owner can connect, who may attach every volume.
        default_export: what the empty name means; without it, the only volume if there is one.
        tls: None = TLS is off.
        limits: see Limits.
    """

    listen: Sequence[str] = ()
    sockets: Sequence[socket.socket] = ()
    read_only: bool = False
    owner_only: bool = False
    default_export: str | None = None
    tls: TlsOptions | None = None
    limits: Limits = field(default_factory=Limits)
