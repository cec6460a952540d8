"""``nbdstore snapshot``: create, list, delete, rollback; ``nbdstore clone`` and ``flatten``."""

from __future__ import annotations

from collections.abc import Sequence

import click

from nbdstore.commands import parameters
from nbdstore.commands.groups import OrderedGroup
from nbdstore.commands.output import json_option, print_json, print_table
from nbdstore.commands.progress import follow
from nbdstore.commands.session import (
    Session,
    complete_snapshot,
    complete_volume,
    pass_session,
)
from nbdstore.errors import NbdstoreError
from nbdstore.sizes import format_size

snapshot_argument = click.argument(
    "snapshot", metavar="VOLUME@NAME", shell_complete=complete_snapshot
)


@click.group(cls=OrderedGroup)
def snapshot() -> None:
    """Keep volumes as they were at a moment.

    A snapshot costs nothing when it is made, and then as much space as the volume overwrites or
    trims. It is an export of its own, read-only: nbd://HOST/VOLUME@NAME. Clients are not held up,
    whatever is done with it.
    """


@snapshot.command()
@click.argument("snapshots", metavar="VOLUME@NAME...", nargs=-1, required=True)
@click.option(
    "--uuid",
    "uuids",
    multiple=True,
    metavar="UUID",
    help="Of your choice, one for each: the same command again makes nothing new.",
)
@json_option
@pass_session
def create(session: Session, snapshots: Sequence[str], uuids: Sequence[str], as_json: bool) -> None:
    """Make snapshots, of one volume or of several at the same moment.

    They hold what was acknowledged before, whether it was flushed or not. What an application has
    not written yet is not in it: freeze the filesystem (fsfreeze) to have that, too.

    \b
    Examples:
      nbdstore snapshot create db@monday
      nbdstore snapshot create db@release logs@release
    """
    with session.service() as service:
        made = service.create_snapshots(snapshots, uuids=uuids or None)
    if as_json:
        print_json([info.to_json() for info in made])
    else:
        click.echo("\n".join(f"created snapshot {info.snapshot}" for info in made))


@snapshot.command("list")
@click.argument("volume", required=False, shell_complete=complete_volume)
@json_option
@pass_session
def list_(session: Session, volume: str | None, as_json: bool) -> None:
    """List snapshots, of VOLUME or of all, with what deleting each would free.

    MAPPED is the data a snapshot holds, OWN what of it was written since the one before it, FREES
    what only it holds: what deleting it gives back. 'nbdstore du' shows volumes, too.
    """
    with session.service() as service:
        infos = service.snapshots(volume, unique=True)
    if as_json:
        print_json([info.to_json() for info in infos])
    elif not infos:
        click.echo(f"volume {volume} has no snapshots" if volume else "there are no snapshots")
    else:
        print_table(
            ("SNAPSHOT", "SIZE", "MAPPED", "OWN", "FREES", "CREATED", "CLONES"),
            [
                (
                    info.snapshot,
                    format_size(info.size),
                    format_size(info.mapped),
                    format_size(info.own),
                    "?" if info.unique is None else format_size(info.unique),
                    info.created,
                    ", ".join(info.clones) or "-",
                )
                for info in infos
            ],
            right="SIZE MAPPED OWN FREES",
        )


@snapshot.command()
@click.argument(
    "snapshots",
    metavar="VOLUME@NAME...",
    nargs=-1,
    required=True,
    shell_complete=complete_snapshot,
)
@pass_session
def delete(session: Session, snapshots: Sequence[str]) -> None:
    """Delete snapshots, in any order; what only they hold is free then.

    Refused while one is attached or has clones.
    """
    with session.service() as service:
        for name in snapshots:
            service.delete_snapshot(name)
            click.echo(f"deleted snapshot {name}")


@snapshot.command()
@snapshot_argument
@click.option("--fence", is_flag=True, help="End the volume's lease and connections first.")
@json_option
@pass_session
def rollback(session: Session, snapshot: str, fence: bool, as_json: bool) -> None:
    """Make the volume what it was at a snapshot.

    What it holds now is lost, unless a snapshot of it was made; all snapshots stay. Refused while
    the volume is leased or attached, unless with --fence.

    \b
    Examples:
      nbdstore snapshot create db@before-rollback
      nbdstore snapshot rollback db@monday
    """
    with session.service() as service:
        info = service.rollback(snapshot, fence=fence)
    if as_json:
        print_json(info.to_json())
    else:
        click.echo(f"volume {info.name} is as it was at {snapshot}")


@click.command()
@snapshot_argument
@click.argument("name")
@parameters.uuid_option
@json_option
@pass_session
def clone(session: Session, snapshot: str, name: str, uuid: str | None, as_json: bool) -> None:
    """Make volume NAME that begins as a snapshot.

    Done at once, whatever its size: it shares all blocks with the snapshot, and takes space for
    what is written to it. The snapshot cannot be deleted while it has clones; 'nbdstore flatten'
    makes a clone independent.

    \b
    Examples:
      nbdstore clone db@monday db-test
    """
    with session.service() as service:
        info = service.clone(snapshot, name, uuid=uuid)
    if as_json:
        print_json(info.to_json())
    else:
        click.echo(f"cloned volume {info.name} from {snapshot}, {format_size(info.size)}")


@click.command()
@click.argument("name", metavar="VOLUME", shell_complete=complete_volume)
@json_option
@pass_session
def flatten(session: Session, name: str, as_json: bool) -> None:
    """Make VOLUME, a clone, independent of the snapshot that it began as.

    Copies what the two share, so it takes as much space. The volume may be used meanwhile; when
    this is interrupted, calling it again goes on.
    """
    with session.service() as service:
        operation = service.start_flatten(name)
        operation = follow(service, operation, "stopped: calling it again goes on from here")
        if operation.error is not None:
            raise NbdstoreError(operation.error["detail"])
        if operation.state != "done":
            raise NbdstoreError(f"flattening volume {name} was {operation.state}: call it again")
        info = service.volume(name)
    if as_json:
        print_json(info.to_json())
    else:
        click.echo(f"volume {info.name} shares data with nothing now")
