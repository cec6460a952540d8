"""``nbdstore serve``: from the options to a running daemon, and what it says when it is ready."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from nbdstore import systemd
from nbdstore.commands import logs, parameters
from nbdstore.commands.session import Session, complete_volume, pass_session
from nbdstore.errors import InvalidArgument, NbdstoreError

if TYPE_CHECKING:
    from nbdstore.control.tokens import TokenFile
    from nbdstore.daemon import DaemonOptions
    from nbdstore.server import Server, ServerOptions, TlsOptions
    from nbdstore.store import Pool

MIN_CLIENT_MEMORY = 64 << 20
DEFAULT_LISTEN = "127.0.0.1:10809"
CONTROL_SOCKET_NAME = "control"
"""FileDescriptorName= of a passed socket that is for the control API, not for NBD."""


@click.command(short_help="Serve the volumes over NBD.")
@click.option(
    "--listen",
    type=parameters.listen_address,
    multiple=True,
    metavar="ADDRESS",
    help=f"HOST:PORT or unix:PATH; may be repeated. Default: {DEFAULT_LISTEN}, or the sockets "
    "that systemd passes.",
)
@click.option("--read-only", is_flag=True, help="Clients may read, not write.")
@click.option(
    "--default-export",
    metavar="NAME",
    shell_complete=complete_volume,
    help="What a client gets that asks for no name.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    metavar="N",
    help="Clients beyond it are refused.",
)
@click.option(
    "--client-memory",
    type=parameters.size,
    default="1G",
    show_default=True,
    metavar="SIZE",
    help="Memory for the requests and replies of all clients; beyond it they wait for each other.",
)
@click.option(
    "--stall-timeout",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="When to cut off who leaves its replies unread or a request unfinished, if others wait "
    "for the memory that it holds; 0 is never.",
)
@click.option(
    "--tls",
    type=click.Choice(["off", "optional", "required"]),
    default="off",
    show_default=True,
    help="Whether clients may or must use TLS.",
)
@click.option(
    "--tls-cert",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Server certificate, PEM. Like all TLS files, it is read again when it has changed.",
)
@click.option(
    "--tls-key", type=click.Path(path_type=Path), metavar="FILE", help="Its private key, PEM."
)
@click.option(
    "--tls-ca", type=click.Path(path_type=Path), metavar="FILE", help="Who signs clients, PEM."
)
@click.option("--tls-verify-client", is_flag=True, help="Demand client certificates.")
@click.option(
    "--on-full",
    type=click.Choice(["wait", "error"]),
    default="wait",
    show_default=True,
    help="What a write meets when the pool is full: hold it until there is space, or fail.",
)
@click.option(
    "--full-timeout",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a write is held at most.",
)
@click.option(
    "--trash-keep",
    type=parameters.duration_s,
    default="24h",
    show_default=True,
    metavar="TIME",
    help="How long deleted volumes can be restored, unless the pool needs their space.",
)
@click.option(
    "--map-memory",
    type=parameters.size,
    default="512M",
    show_default=True,
    metavar="SIZE",
    help="Memory for the maps of volumes.",
)
@click.option(
    "--scrub-every",
    type=parameters.duration_s,
    metavar="TIME",
    help="Scrub each volume when its last scrub is as old as this, as in 7d or 12h.",
)
@click.option(
    "--scrub-rate",
    type=parameters.size,
    metavar="SIZE",
    default="100M",
    show_default=True,
    help="Bytes per second that these scrubs read at most.",
)
@click.option(
    "--control",
    type=parameters.host_port,
    metavar="HOST:PORT",
    help="Answer the control API over TCP, too; wants --control-token-file.",
)
@click.option(
    "--control-token-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Holds the tokens of callers over TCP, one per line: 'admin TOKEN [NAME]', or "
    "'read TOKEN [NAME]' for GET only. It is read again when it has changed.",
)
@click.option(
    "--control-tls-cert",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Certificate of the control API over TCP, PEM; without it, tokens travel in the clear.",
)
@click.option(
    "--control-tls-key", type=click.Path(path_type=Path), metavar="FILE", help="Its private key."
)
@click.option("--stdin", is_flag=True, help="Serve the one client on standard input, then end.")
@click.option(
    "--create", is_flag=True, help="Make the pool if there is none, as 'nbdstore pool create' does."
)
@click.option("--demo", is_flag=True, help="Make the pool, and a volume, if there is none.")
@logs.level_option
@pass_session
def serve(session: Session, **options: Any) -> None:
    """Serve the pool's volumes over NBD until SIGTERM or Ctrl-C.

    Every volume is an export under its name. A stop lets requests in flight finish, writes all to
    disk and ends with status 0; a second signal does not wait for clients. Killing the server
    loses nothing that was acknowledged.

    Works as a systemd service: Type=notify, socket activation (a socket with
    FileDescriptorName=control is for the control API), logs for journald.

    \b
    Examples:
      nbdstore serve
      nbdstore serve --listen 0.0.0.0:10809 --listen unix:/run/nbd.sock
      nbdstore serve --tls required --tls-cert server.pem --tls-key server.key \\
          --tls-ca ca.pem --tls-verify-client
    """
    asked = Asked(**options)
    _check_usage(asked)
    _check_tls_usage(asked)
    client = _take_stdin() if asked.stdin else None
    logs.set_up(asked.log_level, session.environ)
    _run(session, asked, client)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options as they were given, see there."""

    listen: Sequence[str]
    read_only: bool
    default_export: str | None
    max_connections: int
    client_memory: int
    stall_timeout: float
    tls: str
    tls_cert: Path | None
    tls_key: Path | None
    tls_ca: Path | None
    tls_verify_client: bool
    on_full: Literal["wait", "error"]
    full_timeout: float
    trash_keep: float
    map_memory: int
    scrub_every: float | None
    scrub_rate: int
    control: tuple[str, int] | None
    control_token_file: Path | None
    control_tls_cert: Path | None
    control_tls_key: Path | None
    stdin: bool
    create: bool
    demo: bool
    log_level: str


def _check_usage(asked: Asked) -> None:
    """Raise a UsageError for options that make no sense together."""
    if asked.stdin and asked.listen:
        raise click.UsageError("--stdin serves one client, --listen many: give one of them")
    if asked.client_memory < MIN_CLIENT_MEMORY:
        raise click.UsageError("--client-memory: give at least 64M, one request may take 32M")
    if asked.control and not asked.control_token_file:
        raise click.UsageError("--control wants --control-token-file: TCP has no other guard")
    if bool(asked.control_tls_cert) != bool(asked.control_tls_key):
        raise click.UsageError("--control-tls-cert and --control-tls-key belong together")


def _check_tls_usage(asked: Asked) -> None:
    given = {
        "--tls-cert": asked.tls_cert,
        "--tls-key": asked.tls_key,
        "--tls-ca": asked.tls_ca,
        "--tls-verify-client": asked.tls_verify_client,
    }
    if asked.tls == "off":
        for option in filter(given.get, given):
            raise click.UsageError(f"{option} wants --tls optional or --tls required")
        return
    for option in ("--tls-cert", "--tls-key"):
        if not given[option]:
            raise click.UsageError(f"{option} is missing: TLS cannot do without it")
    if asked.tls_verify_client and not asked.tls_ca:
        raise click.UsageError("--tls-ca is missing: it says who signs the clients' certificates")
    if asked.tls_ca and not asked.tls_verify_client:
        raise click.UsageError("--tls-ca says who signs clients: give --tls-verify-client, too")


def _take_stdin() -> socket.socket:
    """Take the client from descriptor 0, and keep 0, 1 and 2 from reaching it.

    inetd connects all three to the client, and a log line in the middle of NBD would end it.
    """
    original = systemd.adopt(0, "standard input (--stdin)")
    client = original.dup()
    identity = os.fstat(original.detach())
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        with contextlib.suppress(OSError):  # closed: nothing to keep
            if os.path.samestat(os.fstat(fd), identity):
                os.dup2(null, fd)
    os.close(null)
    return client


def _run(session: Session, asked: Asked, client: socket.socket | None) -> None:
    # Imported late: other commands need neither numpy, aiohttp nor uvloop.
    import uvloop

    from nbdstore import daemon
    from nbdstore.commands import announcement

    def announce(pool: Pool, server: Server) -> None:
        if client is None:
            announcement.show(
                str(session.pool),
                pool.volumes.values(),
                server.addresses,
                tls=asked.tls == "required",
            )

    options = _daemon_options(session, asked, client)
    try:
        uvloop.run(daemon.run(options, announce))
    except InvalidArgument as error:
        # The options were read and make sense; this machine, at this time, does not go with them.
        raise NbdstoreError(str(error)) from error


def _daemon_options(session: Session, asked: Asked, client: socket.socket | None) -> DaemonOptions:
    """Join what was asked with the sockets that systemd or inetd passed."""
    from nbdstore.daemon import DaemonOptions
    from nbdstore.store import PoolOptions

    passed = systemd.passed_sockets(session.environ, os.getpid())
    for_control = [item.socket for item in passed if item.name == CONTROL_SOCKET_NAME]
    for_nbd = [item for item in passed if item.name != CONTROL_SOCKET_NAME]
    listening = [item.socket for item in for_nbd if item.listening]
    clients = [item.socket for item in for_nbd if not item.listening] + ([client] if client else [])
    if asked.control_token_file and not (asked.control or for_control):
        raise click.UsageError("--control-token-file is for --control, which is not given")
    if asked.control_tls_cert and not (asked.control or for_control):
        raise click.UsageError("--control-tls-cert is for --control, which is not given")
    listen = asked.listen or (() if listening or clients else (DEFAULT_LISTEN,))
    return DaemonOptions(
        pool=session.require_local("serve"),
        pool_options=PoolOptions(
            on_full=asked.on_full,
            full_timeout_s=asked.full_timeout,
            trash_keep_s=asked.trash_keep,
            map_memory=asked.map_memory,
        ),
        server_options=_server_options(asked, listen, listening),
        create=asked.create,
        scrub_every_s=asked.scrub_every,
        scrub_rate=asked.scrub_rate,
        demo=asked.demo,
        clients=clients,
        control_tcp=asked.control,
        control_tokens=_control_tokens(asked),
        control_tls=_control_tls(asked),
        control_sockets=for_control,
        environ=session.environ,
    )


def _control_tokens(asked: Asked) -> TokenFile | None:
    if asked.control_token_file is None:
        return None
    from nbdstore.control.tokens import TokenFile

    return TokenFile(asked.control_token_file)


def _control_tls(asked: Asked) -> TlsOptions | None:
    from nbdstore.server import TlsMode, TlsOptions

    if not (asked.control_tls_cert and asked.control_tls_key):
        return None
    return TlsOptions(
        mode=TlsMode.REQUIRED, certificate=asked.control_tls_cert, key=asked.control_tls_key
    )


def _server_options(
    asked: Asked, listen: Sequence[str], sockets: Sequence[socket.socket]
) -> ServerOptions:
    from nbdstore.server import Limits, ServerOptions, TlsMode, TlsOptions

    tls = None
    if asked.tls_cert and asked.tls_key:
        tls = TlsOptions(
            mode=TlsMode(asked.tls),
            certificate=asked.tls_cert,
            key=asked.tls_key,
            client_ca=asked.tls_ca,
        )
    return ServerOptions(
        listen=listen,
        sockets=sockets,
        read_only=asked.read_only,
        default_export=asked.default_export,
        tls=tls,
        limits=Limits(
            max_connections=asked.max_connections,
            max_client_bytes=asked.client_memory,
            stall_timeout_s=asked.stall_timeout,
        ),
    )
