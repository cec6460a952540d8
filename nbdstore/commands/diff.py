"""``nbdstore diff``: what has changed between two images."""

from __future__ import annotations

from collections.abc import Iterator

import click

from nbdstore.commands.output import counted, json_option, note
from nbdstore.commands.session import Session, complete_image, pass_session
from nbdstore.control.diff import Diff, Extent
from nbdstore.sizes import exact_size, format_size

OFFSET_WIDTH = len(str(1 << 48))
"""Of the largest volume."""


@click.command(short_help="List what has changed since a snapshot, or between two.")
@click.argument("older", metavar="VOL@A", shell_complete=complete_image)
@click.argument("newer", metavar="[VOL@B|VOL]", required=False, shell_complete=complete_image)
@json_option
@pass_session
def diff(session: Session, older: str, newer: str | None, as_json: bool) -> None:
    """List the extents of VOL@B, or of VOL as it is now, that are not as in VOL@A.

    With VOL@A alone, all that it holds. Offsets and lengths are bytes of the newer one; extents
    ascend and are never adjacent; data and zeros are not told apart. The cost goes with what has
    changed, not with what there is.

    If the two have different sizes: beyond the end of a smaller VOL@A only what the newer one holds
    is listed, the rest is zeros. What lay beyond the end of a smaller newer one is not listed: it
    is gone.

    \b
    Examples:
      nbdstore diff db@monday db@tuesday
      nbdstore diff db@tuesday db --json
    """
    with session.service() as service:
        found = service.backups.diff(newer or older, older if newer else None)
        if as_json:
            _print_json(found)
        else:
            _print_list(found, older, newer)


def _print_json(found: Diff) -> None:
    """Print a list of objects, one a line, as they come."""
    before = "["
    for offset, length in found.extents:
        click.echo(f'{before}\n  {{"offset": {offset}, "length": {length}}}', nl=False)
        before = ","
    click.echo("[]" if before == "[" else "\n]")


def _print_list(found: Diff, older: str, newer: str | None) -> None:
    n_extents = n_bytes = 0
    for offset, length in _titled(found.extents):
        click.echo(f"{offset:>{OFFSET_WIDTH}}  {length:>{OFFSET_WIDTH}}")
        n_extents, n_bytes = n_extents + 1, n_bytes + length
    what = "changed" if newer else "held"
    amount = f"{format_size(n_bytes)} of {format_size(found.size)}"
    note(f"{counted(n_extents, 'extent')}, {amount} {what}")
    if found.older_size is not None and found.older_size != found.size:
        kind = "larger" if found.size > found.older_size else "smaller"
        by = format_size(abs(found.size - found.older_size))
        note(
            f"{newer} is {by} {kind} than {older}: {exact_size(found.size)}, not "
            f"{exact_size(found.older_size)}"
        )


def _titled(extents: Iterator[Extent]) -> Iterator[Extent]:
    """Print the title before the first extent."""
    for n, extent in enumerate(extents):
        if not n:
            click.echo(f"{'OFFSET':>{OFFSET_WIDTH}}  {'LENGTH':>{OFFSET_WIDTH}}")
        yield extent
