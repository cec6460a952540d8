"""``nbdstore ps`` and ``nbdstore disconnect``: the NBD connections of a server."""

from __future__ import annotations

import click

from nbdstore.commands.capacity import format_duration
from nbdstore.commands.output import counted, json_option, print_json, print_table
from nbdstore.commands.session import Session, complete_image, pass_session
from nbdstore.control.model import AttachmentInfo
from nbdstore.control.service import VolumeService
from nbdstore.errors import NotFound
from nbdstore.sizes import format_size


@click.command()
@json_option
@pass_session
def ps(session: Session, as_json: bool) -> None:
    """List who is connected: what they do, and since when.

    Rates are those of the last seconds. IN FLIGHT counts requests that are not answered yet.
    """
    with session.service() as service:
        attachments = service.attachments()
    if as_json:
        print_json([item.to_json() for item in attachments])
    elif not attachments:
        click.echo("nobody is connected")
    else:
        print_table(
            ("ID", "CLIENT", "EXPORT", "HOLDER", "AGE", "REQUESTS", "READ", "WRITTEN", "IN FLIGHT"),
            [_row(item) for item in attachments],
            right="ID REQUESTS READ WRITTEN",
        )


def _row(item: AttachmentInfo) -> tuple[str, ...]:
    return (
        str(item.id),
        item.peer,
        item.export,
        item.holder or "-",
        format_duration(item.age_s),
        f"{item.requests_per_s:.0f}/s",
        f"{format_size(item.read_per_s)}/s",
        f"{format_size(item.written_per_s)}/s",
        str(item.in_flight),
    )


@click.command()
@click.argument("which", metavar="ID|VOLUME|VOLUME@SNAPSHOT", shell_complete=complete_image)
@pass_session
def disconnect(session: Session, which: str) -> None:
    """End one connection, or all of a volume or snapshot.

    A number is the ID of a connection, as 'nbdstore ps' shows it. What its client had not been told
    was done may be done or not; nothing that it sent is done after this command. Most clients
    connect again at once: to keep out a holder that is gone, see 'nbdstore lease break'. No harm if
    there is no such connection any more.

    \b
    Examples:
      nbdstore disconnect 17
      nbdstore disconnect db
    """
    with session.service() as service:
        if which.isdecimal():
            click.echo(_disconnect_one(service, int(which)))
            return
        ids = _ids(service, which)
        for connection_id in ids:
            service.disconnect(connection_id)
    kind = "snapshot" if "@" in which else "volume"
    click.echo(f"closed {counted(len(ids), 'connection')} of {kind} {which}")


def _disconnect_one(service: VolumeService, connection_id: int) -> str:
    """End a connection, and return what to say of it."""
    is_listed = any(item.id == connection_id for item in service.attachments())
    service.disconnect(connection_id)  # if it is not: one that is still in its handshake
    if is_listed:
        return f"connection {connection_id} is closed"
    return f"nobody is connected as {connection_id}: 'nbdstore ps' lists who is"


def _ids(service: VolumeService, name: str) -> list[int]:
    """Return the ids of the connections of a volume or snapshot; NotFound if there is none such."""
    volume, at, _ = name.partition("@")
    if not at:
        service.volume(volume)
    elif name not in (info.snapshot for info in service.snapshots(volume)):
        raise NotFound(
            f"there is no snapshot '{name}': 'nbdstore snapshot list {volume}' shows what is"
        )
    return [item.id for item in service.attachments() if item.export == name]
