"""``nbdstore docker-plugin``: volumes for Docker's containers."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import click

from nbdstore import systemd
from nbdstore.commands import logs, parameters
from nbdstore.commands.agent import DEFAULT_SOCKET as AGENT_SOCKET
from nbdstore.commands.session import Session, pass_session, read_token
from nbdstore.control.client import ControlClient

DEFAULT_SOCKET = "/run/docker/plugins/nbdstore.sock"
DEFAULT_STATE = "/var/lib/nbdstore-docker"
CONTROL_TIMEOUT_S = 30.0
"""Docker waits for a minute."""
SWEEP_EVERY_S = 30.0
"""How long a volume stays mounted for nobody, if it could not be unmounted at once."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@click.command("docker-plugin", short_help="Make volumes for Docker's containers.")
@click.option(
    "--socket",
    "socket_path",
    type=click.Path(path_type=Path),
    metavar="PATH",
    default=DEFAULT_SOCKET,
    show_default=True,
    help="Where Docker, or Podman, finds the plugin; its name is the driver's.",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    metavar="DIR",
    default=DEFAULT_STATE,
    show_default=True,
    help="Where the plugin remembers its volumes, and they are mounted.",
)
@click.option(
    "--agent-socket",
    type=click.Path(path_type=Path),
    metavar="PATH",
    envvar="NBDSTORE_AGENT_SOCKET",
    show_envvar=True,
    default=AGENT_SOCKET,
    show_default=True,
    help="Where this machine's agent answers.",
)
@click.option(
    "--default-size",
    type=parameters.size,
    metavar="SIZE",
    default="0",
    help="Of volumes that are created without a size. Default: they are refused.",
)
@logs.level_option
@pass_session
def docker_plugin(
    session: Session,
    socket_path: Path,
    state: Path,
    agent_socket: Path,
    default_size: int,
    log_level: str,
) -> None:
    """Serve Docker's volume plugin protocol, until SIGTERM or Ctrl-C.

    Volumes are made on the server and mounted by this machine's agent, which must run. Containers
    are disturbed neither when the plugin ends nor when it is killed.

    Options of a volume: size, fs (ext4, xfs), clone (VOLUME@SNAPSHOT), options (of mount),
    owner (UID:GID), mode, iops, bandwidth. They count when it is made, as Docker hands them on
    only then; 'nbdstore volume' changes it afterwards.

    Then 'docker volume create -d nbdstore -o size=10G -o fs=xfs db' makes one, and
    'docker run -v db:/var/lib/postgresql/data postgres' uses it.

    \b
    Examples:
      nbdstore docker-plugin
    """
    from nbdstore.agent.api import AgentClient
    from nbdstore.docker_plugin.driver import VolumeDriver
    from nbdstore.docker_plugin.records import Records
    from nbdstore.docker_plugin.server import PluginServer

    token = read_token(session.token_file) if session.token_file and session.server else None
    logs.set_up(log_level, session.environ)
    # Before there are threads, which inherit it: the signals are waited for here, nowhere else.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    os.umask(0o077)
    url = session.server or session.control_url
    with contextlib.closing(Records(state.absolute())) as records:
        driver = VolumeDriver(
            records,
            ControlClient(url, token=token, tls_ca=session.tls_ca, timeout_s=CONTROL_TIMEOUT_S),
            AgentClient(agent_socket),
            default_size=default_size,
        )
        server = PluginServer(driver, socket_path)
        server.start()
        systemd.notify(session.environ, "READY=1")
        click.echo(f"volumes of {url} for Docker at {socket_path}")
        sys.stdout.flush()
        while signal.sigtimedwait(STOP_SIGNALS, SWEEP_EVERY_S) is None:
            driver.sweep()
        systemd.notify(session.environ, "STOPPING=1")
        server.stop()
