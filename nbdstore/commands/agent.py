"""``nbdstore agent`` and what is asked of it: attach, detach, mount, umount, doctor."""

from __future__ import annotations

import contextlib
import csv
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nbdstore.commands import logs, parameters
from nbdstore.commands.groups import OrderedGroup
from nbdstore.commands.output import json_option, note, print_json, print_table
from nbdstore.commands.session import Session, complete_volume, pass_session, read_token
from nbdstore.errors import Busy, NbdstoreError
from nbdstore.sizes import format_size

if TYPE_CHECKING:
    from nbdstore.agent.doctor import Finding
    from nbdstore.agent.local import AgentService, Setting
    from nbdstore.agent.requests import AttachmentStatus, MountRequest

DEFAULT_STATE = "/var/lib/nbdstore-agent"
DEFAULT_SOCKET = "/run/nbdstore/agent.sock"
DRIVERS = ("auto", "kernel", "fuse")
FSCK_MODES = ("auto", "never", "repair")
PROPAGATIONS = ("private", "rprivate", "slave", "rslave", "shared", "rshared")

LOCK_PATIENCE_S = 10.0
LOCK_RETRY_S = 0.1

Command = Callable[..., Any]

state_option = click.option(
    "--state",
    type=click.Path(path_type=Path),
    metavar="DIR",
    envvar="NBDSTORE_AGENT_STATE",
    show_envvar=True,
    default=DEFAULT_STATE,
    show_default=True,
    help="Where the agent remembers what it has attached.",
)
socket_option = click.option(
    "--socket",
    "socket_path",
    type=click.Path(path_type=Path),
    metavar="PATH",
    envvar="NBDSTORE_AGENT_SOCKET",
    show_envvar=True,
    default=DEFAULT_SOCKET,
    show_default=True,
    help="Where the agent answers.",
)
nbd_option = click.option(
    "--nbd",
    metavar="ADDRESS",
    envvar="NBDSTORE_NBD",
    show_envvar=True,
    help="HOST:PORT or unix:PATH of the server's NBD; with TLS, which takes the fuse driver, "
    "nbds://HOST:PORT?tls-certificates=DIR. Default: the server is asked.",
)
driver_option = click.option(
    "--driver",
    type=click.Choice(DRIVERS),
    default="auto",
    show_default=True,
    help="The kernel's nbd driver, or nbdfuse and a loop device; auto is fuse where the kernel "
    "has no nbd.",
)
force_lease_option = click.option(
    "--force", is_flag=True, help="Take the volume from whoever else has it attached."
)


def places(command: Command) -> Command:
    """Give a command the options that say where an agent, and a server's NBD, are."""
    return state_option(socket_option(nbd_option(command)))


def _setting(session: Session, state: Path, nbd: str | None, **others: Any) -> Setting:
    # Imported late, as all of the agent: other commands do without.
    from nbdstore.agent.local import Setting

    token_file = session.token_file.absolute() if session.token_file else None
    return Setting(
        state=state.absolute(),
        control_url=session.server or session.control_url,
        token=read_token(token_file) if token_file and session.server else None,
        token_file=token_file if session.server else None,
        tls_ca=session.tls_ca.absolute() if session.tls_ca and session.server else None,
        nbd=nbd or "",
        **others,
    )


@contextlib.contextmanager
def reach(
    session: Session, state: Path, socket_path: Path, nbd: str | None
) -> Iterator[tuple[AgentService, bool]]:
    """Reach the agent that runs, or act in its place; also tells whether one runs."""
    from nbdstore.agent.api import AgentClient
    from nbdstore.agent.local import open_agent

    client = AgentClient(socket_path)
    deadline_s = time.monotonic() + LOCK_PATIENCE_S
    with contextlib.ExitStack() as stack:
        while not client.reachable():
            try:
                agent = stack.enter_context(open_agent(_setting(session, state, nbd)))
            except Busy as error:  # another command, or an agent that is about to answer
                if time.monotonic() >= deadline_s:
                    raise Busy(f"{error} (no agent answers at {socket_path})") from error
                time.sleep(LOCK_RETRY_S)
            else:
                yield agent, False
                return
        yield client, True


# --- The agent itself ----------------------------------------------------------------------------


@click.group(cls=OrderedGroup, invoke_without_command=True, short_help="Attach volumes here.")
@places
@click.option(
    "--mount",
    "mounts",
    multiple=True,
    metavar="SPEC",
    help="Mount a volume as long as the agent runs: volume=NAME,path=DIR and, if need be, "
    "fs=, size= (creates the volume), owner=UID:GID, mode=, options=, fsck=, propagation=, ro. "
    "May be repeated.",
)
@driver_option
@click.option("--holder", metavar="NAME", help="In whose name leases are taken; one per agent.")
@click.option(
    "--request-timeout",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    metavar="SECONDS",
    help="When a request without an answer is sent again, by a new connection.",
)
@click.option(
    "--dead-timeout",
    type=click.IntRange(min=1),
    default=3600,
    show_default=True,
    metavar="SECONDS",
    help="How long I/O waits for a server that is away before it fails.",
)
@click.option(
    "--keep", is_flag=True, help="At a stop leave all attached and mounted, for the next agent."
)
@logs.level_option
@click.pass_context
def agent(ctx: click.Context, /, **options: Any) -> None:
    """Attach and mount volumes on this machine, and keep them so until SIGTERM or Ctrl-C.

    Takes each volume's lease, attaches it, formats it if nothing was ever written to it, mounts
    it. When the server goes away and comes back, I/O waits and goes on. A kill of the agent
    interrupts nothing; the next one takes over. A stop unmounts and detaches what is not in use.

    Runs as root, on the host or in a container with CAP_SYS_ADMIN.

    \b
    Examples:
      nbdstore agent
      nbdstore --server http://store:10810 --token-file token agent \\
          --mount volume=db,path=/srv/db,fs=ext4,size=10G,owner=999:999
    """
    if ctx.invoked_subcommand is None:
        _run_agent(ctx.obj, **options)


def _run_agent(
    session: Session,
    *,
    state: Path,
    socket_path: Path,
    nbd: str | None,
    mounts: Sequence[str],
    driver: str,
    holder: str | None,
    request_timeout: int,
    dead_timeout: int,
    keep: bool,
    log_level: str,
) -> None:
    from nbdstore.agent import first_process, life

    first_process.split_if_first()
    wanted = [parse_mount(spec).checked() for spec in mounts]
    logs.set_up(log_level, session.environ)
    setting = _setting(
        session,
        state,
        nbd,
        holder=holder or "",
        driver=driver,
        request_timeout_s=request_timeout,
        dead_timeout_s=dead_timeout,
    )

    def announce(_agent: object) -> None:
        click.echo(f"agent for {setting.control_url} answers at {socket_path}")
        sys.stdout.flush()

    life.run(
        setting, socket_path, wanted=wanted, keep=keep, environ=session.environ, announce=announce
    )


def parse_mount(spec: str) -> MountRequest:
    """Read ``volume=NAME,path=DIR,...``; a value with commas is written in double quotes."""
    from nbdstore.agent.requests import MountRequest

    names = {"fs": "filesystem", "ro": "read_only"}
    known = ("volume", "path", "options", "owner", "mode", "fsck", "propagation", "size", *names)
    values: dict[str, Any] = {}
    for field in next(csv.reader([spec]), []):
        key, _, value = field.strip().partition("=")
        if key not in known:
            raise click.UsageError(f"--mount: '{key}' is none of {', '.join(known)}")
        values[names.get(key, key)] = value
    if not (values.get("volume") and values.get("path")):
        raise click.UsageError(f"--mount: '{spec}' lacks volume= or path=")
    if "size" in values:
        values["size"] = parameters.size(values["size"])
    if "read_only" in values:
        values["read_only"] = values["read_only"] in ("", "true", "1")
    return MountRequest(**values, by="agent --mount")


@agent.command()
@places
@click.option("--check", is_flag=True, help="Exit with 1 unless all is attached and mounted.")
@json_option
@pass_session
def status(
    session: Session, state: Path, socket_path: Path, nbd: str | None, check: bool, as_json: bool
) -> None:
    """Show what is attached on this machine, and how it fares.

    \b
    Examples:
      nbdstore agent status
    """
    with reach(session, state, socket_path, nbd) as (service, running):
        found = service.status()
    if as_json:
        print_json([item.to_json() for item in found])
    elif found:
        header = ("VOLUME", "DEVICE", "DRIVER", "STATE", "SIZE", "MOUNTED AT", "SINCE", "NOTES")
        print_table(header, [_row(item) for item in found], right="SIZE")
    else:
        click.echo("nothing is attached here: 'nbdstore mount NAME DIR' mounts a volume")
    if not running:
        note("no agent runs: nothing is reconnected when the server has been away")
    if check and not (running and all(item.state == "attached" for item in found)):
        raise NbdstoreError("not all is attached and mounted as it should be, see above")


def _row(item: AttachmentStatus) -> tuple[str, ...]:
    return (
        item.volume,
        item.path or "-",
        item.driver or "-",
        item.state,
        format_size(item.size),
        ", ".join(mount["path"] for mount in item.mounts) or "-",
        item.since,
        item.message,
    )


@agent.command(hidden=True)
@click.argument("record", type=click.Path(path_type=Path))
@pass_session
def relay(session: Session, record: Path) -> None:
    """Carry the requests of one attachment of the fuse driver, as RECORD says; see the agent."""
    from nbdstore.agent import relay as relays
    from nbdstore.agent.records import read_record
    from nbdstore.agent.store_server import StoreServer
    from nbdstore.control.client import ControlClient

    logs.set_up("info", session.environ)
    found = read_record(record)
    token = read_token(session.token_file) if session.token_file else None
    url = session.server or session.control_url
    server = StoreServer(ControlClient(url, token=token, tls_ca=session.tls_ca))
    directory = record.parents[1] / "fuse" / found.id
    relays.run_with_nbdfuse(
        directory,
        relays.StateFile(directory.with_suffix(".relay")),
        relays.connector(server, found),
        read_only=found.read_only,
        request_timeout_s=found.request_timeout_s,
        dead_timeout_s=found.dead_timeout_s,
    )


# --- What is asked of it -------------------------------------------------------------------------


@click.command()
@click.argument("name", shell_complete=complete_volume)
@places
@driver_option
@click.option("--read-only", is_flag=True, help="The device cannot be written.")
@force_lease_option
@json_option
@pass_session
def attach(
    session: Session,
    name: str,
    state: Path,
    socket_path: Path,
    nbd: str | None,
    driver: str,
    read_only: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Make volume NAME a block device of this machine, and print its path.

    Works as root, through the agent that runs, and without one alike; but only an agent reconnects
    the device when the server has been away.

    \b
    Examples:
      nbdstore attach db
    """
    from nbdstore.agent.requests import AttachRequest

    request = AttachRequest(volume=name, driver=driver, read_only=read_only, force=force)
    with reach(session, state, socket_path, nbd) as (service, running):
        _print_attached(service.attach(request), running, as_json)


@click.command()
@click.argument("name", shell_complete=complete_volume)
@places
@click.option(
    "--force",
    is_flag=True,
    help="Even if it is mounted or waits for its server: what is not written is lost.",
)
@pass_session
def detach(
    session: Session, name: str, state: Path, socket_path: Path, nbd: str | None, force: bool
) -> None:
    """Take the device of volume NAME away, and let others have the volume.

    Refused while it is mounted or in use, here or in a container.

    \b
    Examples:
      nbdstore detach db
    """
    with reach(session, state, socket_path, nbd) as (service, _):
        service.detach(name, force=force)
    click.echo(f"detached volume {name}")


@click.command()
@click.argument("name", shell_complete=complete_volume)
@click.argument("path", metavar="DIR", type=click.Path(path_type=Path))
@places
@driver_option
@click.option(
    "--fs",
    "filesystem",
    type=click.Choice(["ext4", "xfs"]),
    help="What a new volume is formatted with (ext4), and what another one must hold.",
)
@click.option("--options", default="", metavar="LIST", help="Of mount(8), as in noatime,nodev.")
@click.option("--read-only", is_flag=True, help="Mount it read-only.")
@click.option("--owner", default="", metavar="UID:GID", help="Of the root of a new filesystem.")
@click.option("--mode", default="", metavar="OCTAL", help="Of the root of a new filesystem.")
@click.option(
    "--fsck",
    type=click.Choice(FSCK_MODES),
    default="auto",
    show_default=True,
    help="Check a filesystem that is unclean, never, or repair it even if that may lose data.",
)
@click.option("--propagation", type=click.Choice(PROPAGATIONS), help="Of the mount, see mount(8).")
@click.option("--size", type=parameters.size, metavar="SIZE", help="Create it if there is none.")
@force_lease_option
@json_option
@pass_session
def mount(
    session: Session,
    name: str,
    path: Path,
    state: Path,
    socket_path: Path,
    nbd: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Attach volume NAME and mount it at DIR; a volume never written to is formatted first.

    Whether it was ever written is what the store says: one that holds data is never formatted,
    whatever stands at its beginning.

    \b
    Examples:
      nbdstore mount db /srv/db
      nbdstore mount db /srv/db --size 10G --fs xfs --owner 999:999
    """
    from nbdstore.agent.requests import MountRequest

    given = {key: value for key, value in options.items() if value is not None}
    request = MountRequest(volume=name, path=str(path.absolute()), by="nbdstore mount", **given)
    with reach(session, state, socket_path, nbd) as (service, running):
        _print_attached(service.mount(request), running, as_json)


@click.command()
@click.argument("target", metavar="NAME|DIR", shell_complete=complete_volume)
@places
@click.option("--force", is_flag=True, help="Even while files on it are open.")
@pass_session
def umount(
    session: Session, target: str, state: Path, socket_path: Path, nbd: str | None, force: bool
) -> None:
    """Unmount a volume, given by its name or by where it is mounted, and detach it.

    One that was attached by 'nbdstore attach' stays attached. Refused while files on it are open.

    \b
    Examples:
      nbdstore umount db
      nbdstore umount /srv/db
    """
    with reach(session, state, socket_path, nbd) as (service, _):
        path = target if "/" in target else ""
        volume = service.find_by_path(path) if path else target
        service.umount(volume, path, force=force)
    click.echo(f"unmounted volume {volume}")


@click.command()
@places
@click.option("--fix", is_flag=True, help="Put right what can be, without touching what is in use.")
@json_option
@pass_session
def doctor(
    session: Session, state: Path, socket_path: Path, nbd: str | None, fix: bool, as_json: bool
) -> None:
    """Find what is wrong with the volumes attached on this machine, and say what helps.

    Exit status 1 if something is wrong that was not put right.

    \b
    Examples:
      nbdstore doctor
      nbdstore doctor --fix
    """
    with reach(session, state, socket_path, nbd) as (service, running):
        findings = service.examine(fix=fix)
    if as_json:
        print_json([finding.to_json() for finding in findings])
    else:
        _print_findings(findings)
    if not running:
        note("no agent runs: nothing is reconnected when the server has been away")
    if left := [finding for finding in findings if not finding.fixed]:
        raise NbdstoreError(f"{len(left)} of {len(findings)} findings are still to be put right")


def _print_findings(findings: Sequence[Finding]) -> None:
    if not findings:
        click.echo("all is well")
    for finding in findings:
        helps = finding.advice or "'nbdstore doctor --fix' puts it right"
        click.echo(f"{finding.kind}: {finding.text}")
        click.echo(f"  {finding.outcome or helps}")


def _print_attached(item: AttachmentStatus, running: bool, as_json: bool) -> None:
    if as_json:
        print_json(item.to_json())
    else:
        click.echo(item.path)
    if item.message:
        note(item.message)
    if item.driver == "fuse":
        note("attached by nbdfuse and a loop device: the kernel's nbd cannot be used here")
    if not running:
        note("no agent runs: start 'nbdstore agent' to have it reconnected after a server restart")
