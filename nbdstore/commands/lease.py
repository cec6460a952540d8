"""``nbdstore lease``: list, break."""

from __future__ import annotations

import click

from nbdstore.commands.groups import OrderedGroup
from nbdstore.commands.output import json_option, print_json, print_table
from nbdstore.commands.session import Session, complete_volume, pass_session


@click.group(cls=OrderedGroup)
def lease() -> None:
    """See who may attach which volume now, and end that.

    An attach agent leases the volume before it attaches it: from then on only that agent can.
    Whoever takes the lease over is safe at once, since the server has closed the connections of
    the holder before, and refuses it for ever.
    """


@lease.command("list")
@json_option
@pass_session
def list_(session: Session, as_json: bool) -> None:
    """List the leases that are held."""
    with session.service() as service:
        infos = service.leases()
    if as_json:
        print_json([info.to_json() for info in infos])
    elif not infos:
        click.echo("no volume is leased")
    else:
        print_table(
            ("VOLUME", "HOLDER", "EPOCH", "SINCE", "CONNECTIONS"),
            [
                (info.volume, info.holder, str(info.epoch), info.since, str(info.connections))
                for info in infos
            ],
            right="EPOCH CONNECTIONS",
        )


@lease.command("break")
@click.argument("name", shell_complete=complete_volume)
@pass_session
def break_(session: Session, name: str) -> None:
    """End the lease of volume NAME, whoever holds it, and close its connections.

    What the holder had not written by then will not be written: its filesystem sees an error. It
    is for a holder that is gone for good. No harm if nobody holds a lease.

    \b
    Examples:
      nbdstore lease break db
    """
    with session.service() as service:
        service.break_lease(name)
    click.echo(f"nobody holds a lease of volume {name} now")
