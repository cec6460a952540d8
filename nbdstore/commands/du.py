"""``nbdstore du``: where the space of the pool is."""

from __future__ import annotations

import click

from nbdstore.commands.output import json_option, print_facts, print_json, print_table
from nbdstore.commands.session import Session, pass_session
from nbdstore.control.space import ImageSpace, SpaceReport
from nbdstore.sizes import format_size


@click.command(short_help="Show where the space is: volumes, snapshots, maps, what is free.")
@json_option
@pass_session
def du(session: Session, as_json: bool) -> None:
    """Show where the space of the pool is, volume by volume and snapshot by snapshot.

    MAPPED is the data an image holds, OWN what no older image holds, SHARED the rest, which is
    some snapshot's own. FREES is what only a snapshot holds: what deleting it gives back.

    It adds up: data is the sum of OWN (and of what deleted volumes have left), used is data and
    maps, capacity is used, reclaimable and free.
    """
    with session.service() as service:
        report = service.space()
    if as_json:
        print_json(report.to_json())
        return
    if report.images:
        print_table(
            ("NAME", "PROVISIONED", "MAPPED", "OWN", "SHARED", "FREES", "NOTES"),
            [_row(image) for image in report.images],
            right="PROVISIONED MAPPED OWN SHARED FREES",
        )
        click.echo()
    print_facts(_facts(report))


def _row(image: ImageSpace) -> tuple[str, ...]:
    notes = [image.state] if image.state else []
    if image.reserved:
        notes.append(f"{format_size(image.reserved)} set aside")
    return (
        image.name,
        format_size(image.provisioned),
        format_size(image.mapped),
        format_size(image.own),
        format_size(image.shared),
        "-" if image.unique is None else format_size(image.unique),
        "; ".join(notes),
    )


def _facts(report: SpaceReport) -> list[tuple[str, str]]:
    emptying = f", {format_size(report.emptying)} of it being freed" if report.emptying else ""
    return [
        ("capacity", format_size(report.capacity)),
        ("used", f"{format_size(report.used):<10}  data + maps"),
        ("  data", f"{format_size(report.data):<10}  the sum of OWN{emptying}"),
        ("  maps", f"{format_size(report.maps):<10}  of the images, and the pool's own"),
        ("reclaimable", f"{format_size(report.reclaimable):<10}  after the next sync"),
        ("free", f"{format_size(report.free):<10}  {format_size(report.reserved)} reserved"),
    ]
