"""``nbdstore scrub``: compare what volumes hold with its checksums, while they are served."""

from __future__ import annotations

from typing import Any

import click

from nbdstore.commands import parameters
from nbdstore.commands.output import counted, json_option, note, print_json
from nbdstore.commands.progress import follow
from nbdstore.commands.session import Session, complete_volume
from nbdstore.control.client import ControlClient
from nbdstore.control.model import OperationInfo
from nbdstore.errors import NbdstoreError
from nbdstore.sizes import format_size


@click.command(short_help="Compare what volumes hold with its checksums, while they are served.")
@click.argument("name", metavar="[VOLUME]", required=False, shell_complete=complete_volume)
@click.option(
    "--rate",
    type=parameters.size,
    metavar="SIZE",
    default="100M",
    show_default=True,
    help="Bytes per second that are read at most.",
)
@click.option("--restart", is_flag=True, help="Begin anew, even if a scrub was stopped before.")
@click.option("--detach", is_flag=True, help="Leave the scrub to the server and do not wait.")
@json_option
@click.pass_context
def scrub(
    ctx: click.Context, name: str | None, rate: int, restart: bool, detach: bool, as_json: bool
) -> None:
    """Read all that VOLUME, or every volume, and its snapshots map, and compare the checksums.

    Reads from the disk itself, past the page cache, while clients use the volumes. Exit status 0
    if all is well, 1 if a block is damaged. Ctrl-C stops it; a scrub that was stopped, by Ctrl-C or
    with its server, goes on where it was. 'nbdstore serve --scrub-every 7d' does this by itself;
    'nbdstore check' looks at the maps, too, while nobody serves the pool.

    \b
    Examples:
      nbdstore scrub
      nbdstore scrub db --rate 500M
      nbdstore scrub --detach
    """
    session: Session = ctx.obj
    with session.service() as service:
        if detach and not isinstance(service, ControlClient):
            raise click.UsageError("--detach leaves the scrub to a server, and none is running")
        info = service.start_scrub(name, rate=rate, restart=restart)
        if not detach:
            info = follow(service, info, "stopped: the next scrub goes on from here")
    if as_json:
        print_json(info.to_json())
    else:
        _show(info)
    ctx.exit(1 if info.result.get("damaged") else 0)


def _show(info: OperationInfo) -> None:
    if info.is_running:
        click.echo(f"scrub {info.id} is running: 'nbdstore operation show {info.id}'")
        return
    if info.error is not None:
        raise NbdstoreError(f"the scrub failed: {info.error['detail']}")
    result: dict[str, Any] = info.result
    for damage in result["damage"]:
        click.echo(f"damage: {damage['detail']}")
    n_left_out = result["damaged"] - len(result["damage"])
    if n_left_out > 0:
        click.echo(f"... and {n_left_out} more: the server's log has all")
    verdict = (
        f"{counted(result['damaged'], 'damaged block')}" if result["damaged"] else "all is well"
    )
    stopped = "" if info.state == "done" else f" before it was {info.state}"
    click.echo(
        f"scrubbed {counted(result['volumes'], 'volume')}, {format_size(result['bytes'])} read"
        f"{stopped}: {verdict}"
    )
    if result["damaged"]:
        note(
            "what is damaged reads as an I/O error until it is written again: restore it from a "
            "backup; 'nbdstore check' tells what else is damaged"
        )
