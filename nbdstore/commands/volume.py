"""``nbdstore volume``: create, list, show, resize, rename, set, delete, allow."""

from __future__ import annotations

from collections.abc import Sequence

import click

from nbdstore.commands import parameters
from nbdstore.commands.groups import OrderedGroup
from nbdstore.commands.output import counted, json_option, print_facts, print_json, print_table
from nbdstore.commands.session import Session, complete_volume, pass_session
from nbdstore.control.model import AttachmentInfo, VolumeInfo
from nbdstore.sizes import exact_size, format_size

name_argument = click.argument("name", shell_complete=complete_volume)


@click.group(cls=OrderedGroup)
def volume() -> None:
    """Create, list, change and delete volumes.

    A volume is a thin disk: it takes space from the pool only for what is written to it. While a
    server runs, new volumes and new sizes are there for the next client at once.
    """


@volume.command()
@click.argument("name")
@click.option(
    "--size", type=parameters.size, required=True, metavar="SIZE", help="As in 10G, 512M, 1.5T."
)
@click.option("--allow", multiple=True, metavar="CERT", help="See 'nbdstore volume allow'.")
@parameters.uuid_option
@json_option
@pass_session
def create(
    session: Session,
    name: str,
    size: int,
    allow: Sequence[str],
    uuid: str | None,
    as_json: bool,
) -> None:
    """Create an empty volume NAME.

    \b
    Examples:
      nbdstore volume create db --size 10G
      nbdstore volume create db --size 10G --uuid "$UUID"   # may be repeated
    """
    with session.service() as service:
        info = service.create_volume(name, size, allow, uuid=uuid)
    _print_done(info, as_json, f"created volume {info.name}, {format_size(info.size)}")


@volume.command("list")
@json_option
@pass_session
def list_(session: Session, as_json: bool) -> None:
    """List the volumes: their size, what they hold, who leased or attached them."""
    with session.service() as service:
        infos = service.volumes()
        attachments = [] if as_json else service.attachments()
    if as_json:
        print_json([info.to_json() for info in infos])
    elif not infos:
        click.echo("no volumes yet: make one with 'nbdstore volume create NAME --size SIZE'")
    else:
        print_table(
            ("NAME", "SIZE", "MAPPED", "ATTACHED", "BY", "CREATED", "NOTES"),
            [_row(info, attachments) for info in infos],
            right="SIZE MAPPED ATTACHED",
        )


def _row(info: VolumeInfo, attachments: Sequence[AttachmentInfo]) -> tuple[str, ...]:
    notes = ["import not finished"] if info.importing and not info.receiving else []
    if info.receiving:
        notes.append(f"half received, with {info.receiving}")
    if limits := _limits(info):
        notes.append(limits)
    if info.allow:
        notes.append(f"for {', '.join(info.allow)}")
    return (
        info.name,
        format_size(info.size),
        format_size(info.mapped),
        str(info.attached or "-"),
        info.lease_holder or _clients(info.name, attachments) or "-",
        info.created[:10],
        "; ".join(notes),
    )


def _clients(name: str, attachments: Sequence[AttachmentInfo]) -> str:
    """Name who has a volume attached that nobody leased: one of them, and how many others."""
    peers = sorted({item.peer for item in attachments if item.export == name})
    return f"{peers[0]} and {len(peers) - 1} more" if len(peers) > 1 else "".join(peers)


@volume.command()
@name_argument
@json_option
@pass_session
def show(session: Session, name: str, as_json: bool) -> None:
    """Show volume NAME and who is attached to it."""
    with session.service() as service:
        info = service.volume(name)
        attachments = [item for item in service.attachments() if item.export == name]
    if as_json:
        print_json(info.to_json() | {"attachments": [item.to_json() for item in attachments]})
        return
    print_facts(_facts(info))
    if attachments:
        click.echo()
        print_table(
            ("CLIENT", "SINCE", "MODE", "CERTIFICATE", "READ", "WRITTEN"),
            [_attachment_row(item) for item in attachments],
            right="READ WRITTEN",
        )


def _facts(info: VolumeInfo) -> list[tuple[str, str]]:
    mapped = f"{format_size(info.mapped)} ({info.mapped / info.size:.1%})" if info.size else "0 B"
    facts = [
        ("volume", info.name),
        ("uuid", info.uuid),
        ("size", exact_size(info.size)),
        ("mapped", mapped),
        ("own", format_size(info.own)),
        ("shared", format_size(info.shared)),
        ("reserved", format_size(info.reserved)),
        ("written", "yes" if info.written else "never"),
        ("created", info.created),
        ("allowed", ", ".join(info.allow) or "anyone the server lets in"),
        ("limits", _limits(info) or "none"),
        (
            "leased",
            f"to {info.lease_holder} since {info.lease_since}" if info.lease_holder else "no",
        ),
        ("attached", counted(info.attached, "connection") if info.attached else "no"),
    ]
    facts.append(("scrubbed", _scrub_text(info)))
    if info.snapshots:
        facts.append(("snapshots", str(info.snapshots)))
    if info.origin:
        facts.append(("clone of", info.origin))
    if info.receiving:
        kept = f"'nbdstore receive --resume-token {info.name}' or '--abort {info.name}'"
        facts.append(("receiving", f"{info.receiving}, not whole yet: {kept}"))
    elif info.importing:
        facts.append(("import", "not finished: wait for it, import again, or delete the volume"))
    return facts


def _scrub_text(info: VolumeInfo) -> str:
    damaged = counted(info.scrub_damaged, "damaged block") + ": see 'nbdstore scrub'"
    return (info.scrubbed or "never") + (f", {damaged}" if info.scrub_damaged else "")


def _attachment_row(item: AttachmentInfo) -> tuple[str, ...]:
    mode = "read-only" if item.read_only else "read-write"
    return (
        item.peer,
        item.since,
        mode,
        item.tls_name or "-",
        format_size(item.bytes_read),
        format_size(item.bytes_written),
    )


@volume.command()
@name_argument
@click.argument("size", type=parameters.size, metavar="SIZE")
@click.option("--shrink", is_flag=True, help="Cut off the end: SIZE is less than it has.")
@click.option("--force", is_flag=True, help="With --shrink: even below data, which is lost.")
@json_option
@pass_session
def resize(
    session: Session, name: str, size: int, shrink: bool, force: bool, as_json: bool
) -> None:
    """Change the size of volume NAME to SIZE.

    Growing works any time, also while clients use the volume: new ones see the new size, those that
    are attached may use it once they know of it. The attach agent tells the kernel; with other
    clients, detach and attach again, then enlarge the filesystem.

    Shrinking wants --shrink and the volume detached, and --force if data lies beyond the new end.

    \b
    Examples:
      nbdstore volume resize db 20G
      nbdstore volume resize db 5G --shrink
    """
    if force and not shrink:
        raise click.UsageError("--force goes with --shrink")
    with session.service() as service:
        info = service.update_volume(name, size=size, shrink=shrink, force=force)
    _print_done(info, as_json, f"volume {info.name} has {format_size(info.size)} now")


@volume.command()
@name_argument
@click.argument("new_name")
@json_option
@pass_session
def rename(session: Session, name: str, new_name: str, as_json: bool) -> None:
    """Rename volume NAME to NEW_NAME.

    Clients that are attached stay so. Refused while it is leased: its holder could not come back.
    """
    with session.service() as service:
        info = service.update_volume(name, new_name=new_name)
    _print_done(info, as_json, f"volume {name} is called {info.name} now")


@volume.command("set")
@name_argument
@click.option(
    "--iops", type=parameters.limit, metavar="N", help="Requests per second; 0 or none: any number."
)
@click.option(
    "--bandwidth",
    type=parameters.size_limit,
    metavar="SIZE",
    help="Bytes per second, as in 100M; 0 or none: any number.",
)
@click.option(
    "--burst",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="How many seconds' worth may be saved up while it is idle; 1 at first.",
)
@json_option
@pass_session
def set_(
    session: Session,
    name: str,
    iops: int | None,
    bandwidth: int | None,
    burst: float | None,
    as_json: bool,
) -> None:
    """Limit how fast volume NAME is, for all its clients together.

    It holds at once, and is shared evenly by the clients. Reads and writes count as one request and
    their bytes, flushes as nothing, other requests as one without bytes. What is beyond a limit
    waits, it does not fail; mind that a client may give up on what waits for long.

    \b
    Examples:
      nbdstore volume set db --iops 2000 --bandwidth 100M
      nbdstore volume set db --iops none
    """
    if iops is bandwidth is burst is None:
        raise click.UsageError("say what to set: --iops, --bandwidth or --burst")
    with session.service() as service:
        info = service.update_volume(name, iops=iops, bandwidth=bandwidth, burst_s=burst)
    _print_done(info, as_json, f"limits of volume {name}: {_limits(info) or 'none'}")


def _limits(info: VolumeInfo) -> str:
    """Write the limits of a volume; empty if there are none."""
    limits = [f"{info.iops} requests/s"] if info.iops else []
    if info.bandwidth:
        limits.append(f"{format_size(info.bandwidth)}/s")
    return f"{', '.join(limits)}, bursts of {info.burst_s:g} s" if limits else ""


@volume.command()
@name_argument
@click.option("--fence", is_flag=True, help="End its lease and close its connections first.")
@click.option("--snapshots", is_flag=True, help="Delete its snapshots with it.")
@click.option("--now", is_flag=True, help="Delete it for good, not into the trash.")
@pass_session
def delete(session: Session, name: str, fence: bool, snapshots: bool, now: bool) -> None:
    """Delete volume NAME: it goes into the trash.

    From there 'nbdstore trash restore' brings it back, with all its data, for a day. Refused while
    it is leased or attached, unless with --fence, and if it has snapshots, unless with --snapshots.
    """
    with session.service() as service:
        service.delete_volume(name, fence=fence, snapshots=snapshots, now=now)
    click.echo(f"deleted volume {name}" + (" for good" if now else ""))


@volume.command()
@name_argument
@click.argument("certificate", nargs=-1, metavar="[CERT]...")
@click.option("--anyone", is_flag=True, help="Clear the list: anyone the server lets in.")
@json_option
@pass_session
def allow(
    session: Session, name: str, certificate: Sequence[str], anyone: bool, as_json: bool
) -> None:
    """Let only clients with certificates named CERT attach volume NAME.

    The names replace those of before and hold for the next client; the server must demand client
    certificates ('nbdstore serve --tls required --tls-verify-client'). Without CERT and --anyone,
    shows who is allowed.

    \b
    Examples:
      nbdstore volume allow db db1.example.org db2.example.org
      nbdstore volume allow db --anyone
    """
    if anyone and certificate:
        raise click.UsageError("give certificate names or --anyone, not both")
    with session.service() as service:
        if anyone or certificate:
            info = service.update_volume(name, allow=certificate)
        else:
            info = service.volume(name)
    who = ", ".join(info.allow) or "anyone the server lets in"
    _print_done(info, as_json, f"volume {name} may be attached by: {who}")


def _print_done(info: VolumeInfo, as_json: bool, text: str) -> None:
    if as_json:
        print_json(info.to_json())
    else:
        click.echo(text)
