"""``nbdstore trash``: list, restore, empty."""

from __future__ import annotations

from collections.abc import Sequence

import click

from nbdstore.commands.groups import OrderedGroup
from nbdstore.commands.output import counted, json_option, print_json, print_table
from nbdstore.commands.session import Session, pass_session
from nbdstore.sizes import format_size


@click.group(cls=OrderedGroup)
def trash() -> None:
    """Bring back deleted volumes, or delete them for good.

    A deleted volume rests in the trash, with its snapshots, for a day ('nbdstore serve
    --trash-keep'), or until the pool needs its space. Its name is free for others at once.
    """


@trash.command("list")
@json_option
@pass_session
def list_(session: Session, as_json: bool) -> None:
    """List the volumes in the trash, those that came first first."""
    with session.service() as service:
        infos = service.trash()
    if as_json:
        print_json([info.to_json() for info in infos])
    elif not infos:
        click.echo("the trash is empty")
    else:
        print_table(
            ("ID", "NAME", "SIZE", "MAPPED", "SNAPSHOTS", "DELETED"),
            [
                (
                    str(info.id),
                    info.name,
                    format_size(info.size),
                    format_size(info.mapped),
                    str(info.snapshots),
                    info.trashed,
                )
                for info in infos
            ],
            right="ID SIZE MAPPED SNAPSHOTS",
        )


@trash.command()
@click.argument("volume", metavar="NAME|ID")
@click.option("--as", "name", metavar="NEW_NAME", help="The name it gets, if its own is taken.")
@json_option
@pass_session
def restore(session: Session, volume: str, name: str | None, as_json: bool) -> None:
    """Take a volume out of the trash, with its snapshots.

    NAME is what it was called, the newest if there are several; 'nbdstore trash list' shows IDs.

    \b
    Examples:
      nbdstore trash restore db
      nbdstore trash restore 7 --as db-old
    """
    with session.service() as service:
        info = service.restore(volume, name)
    if as_json:
        print_json(info.to_json())
    else:
        click.echo(f"restored volume {info.name}, {format_size(info.size)}")


@trash.command()
@click.argument("volumes", metavar="[NAME|ID]...", nargs=-1)
@pass_session
def empty(session: Session, volumes: Sequence[str]) -> None:
    """Delete what is in the trash for good, all of it or those that are named."""
    with session.service() as service:
        chosen = volumes or [str(info.id) for info in service.trash()]
        for volume in chosen:
            service.purge(volume)
    click.echo(f"deleted {counted(len(chosen), 'volume')} for good")
