"""``nbdstore serve``: from the options to a running daemon, and what it says when it is ready."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nbdstore import systemd
from nbdstore.commands import logs, parameters
from nbdstore.commands.session import Session, complete_volume, pass_session, read_token
from nbdstore.errors import InvalidArgument, NbdstoreError

if TYPE_CHECKING:
    from nbdstore.server import Server, ServerOptions
    from nbdstore.store import Pool, PoolOptions

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
    "--tls",
    type=click.Choice(["off", "optional", "required"]),
    default="off",
    show_default=True,
    help="Whether clients may or must use TLS.",
)
@click.option(
    "--tls-cert", type=click.Path(path_type=Path), metavar="FILE", help="Server certificate, PEM."
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
    "--map-memory",
    type=parameters.size,
    default="512M",
    show_default=True,
    metavar="SIZE",
    help="Memory for the maps of volumes.",
)
@click.option(
    "--control",
    type=parameters.host_port,
    metavar="HOST:PORT",
    help="Answer the control API over TCP, too; wants --control-token-file. It is plain HTTP: "
    "for a network that is not trusted, put a TLS proxy before it.",
)
@click.option(
    "--control-token-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Holds the token that callers over TCP must know.",
)
@click.option("--stdin", is_flag=True, help="Serve the one client on standard input, then end.")
@click.option("--demo", is_flag=True, help="Make the pool, and a volume, if there is none.")
@click.option("--log-level", type=click.Choice(logs.LEVELS), default="info", show_default=True)
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
    _check_usage(options)
    client = _take_stdin() if options["stdin"] else None
    logs.set_up(options["log_level"], session.environ)
    _run(session, options, client)


def _check_usage(options: Mapping[str, Any]) -> None:
    """Raise a UsageError for options that make no sense together."""
    if options["stdin"] and options["listen"]:
        raise click.UsageError("--stdin serves one client, --listen many: give one of them")
    _check_tls_usage(options)
    if options["control"] and not options["control_token_file"]:
        raise click.UsageError("--control wants --control-token-file: TCP has no other guard")
    if options["control_token_file"] and not options["control"]:
        raise click.UsageError("--control-token-file is for --control, which is not given")


def _check_tls_usage(options: Mapping[str, Any]) -> None:
    wanted = ("tls_cert", "tls_key") if options["tls"] != "off" else ()
    if options["tls_verify_client"]:
        wanted = (*wanted, "tls_ca")
    for name in ("tls_cert", "tls_key", "tls_ca", "tls_verify_client"):
        option = "--" + name.replace("_", "-")
        if options[name] and options["tls"] == "off":
            raise click.UsageError(f"{option} wants --tls optional or --tls required")
        if name in wanted and not options[name]:
            raise click.UsageError(f"{option} is missing: TLS cannot do without it")
    if options["tls_ca"] and not options["tls_verify_client"]:
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


def _run(session: Session, options: Mapping[str, Any], client: socket.socket | None) -> None:
    # Imported late: other commands need neither numpy, aiohttp nor uvloop.
    import uvloop

    from nbdstore import daemon
    from nbdstore.commands import announcement

    passed = systemd.passed_sockets(session.environ, os.getpid())
    for_control = [item.socket for item in passed if item.name == CONTROL_SOCKET_NAME]
    for_nbd = [item for item in passed if item.name != CONTROL_SOCKET_NAME]
    listening = [item.socket for item in for_nbd if item.listening]
    clients = [item.socket for item in for_nbd if not item.listening] + ([client] if client else [])
    listen = options["listen"] or (() if listening or clients else (DEFAULT_LISTEN,))
    prepared = daemon.DaemonOptions(
        pool=session.require_local("serve"),
        pool_options=_pool_options(options),
        server_options=_server_options(options, listen, listening),
        demo=options["demo"],
        clients=clients,
        control_tcp=options["control"],
        control_token=options["control_token_file"] and read_token(options["control_token_file"]),
        control_sockets=for_control,
        environ=session.environ,
    )

    def announce(pool: Pool, server: Server) -> None:
        if client is None:
            announcement.show(
                str(session.pool),
                pool.volumes.values(),
                server.addresses,
                tls=options["tls"] == "required",
            )

    try:
        uvloop.run(daemon.run(prepared, announce))
    except InvalidArgument as error:
        # The options were read and make sense; this machine, at this time, does not go with them.
        raise NbdstoreError(str(error)) from error


def _pool_options(options: Mapping[str, Any]) -> PoolOptions:
    from nbdstore.store import PoolOptions

    return PoolOptions(
        on_full=options["on_full"],
        full_timeout_s=options["full_timeout"],
        map_memory=options["map_memory"],
    )


def _server_options(
    options: Mapping[str, Any], listen: Sequence[str], sockets: Sequence[socket.socket]
) -> ServerOptions:
    from nbdstore.protocol.agreement import TlsMode
    from nbdstore.server import Limits, ServerOptions, TlsOptions

    tls = None
    if options["tls"] != "off":
        tls = TlsOptions(
            mode=TlsMode[options["tls"].upper()],
            certificate=options["tls_cert"],
            key=options["tls_key"],
            client_ca=options["tls_ca"],
        )
    return ServerOptions(
        listen=listen,
        sockets=sockets,
        read_only=options["read_only"],
        default_export=options["default_export"],
        tls=tls,
        limits=Limits(max_connections=options["max_connections"]),
    )
