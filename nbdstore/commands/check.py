"""``nbdstore check``: verify a pool that is not being served."""

from __future__ import annotations

import dataclasses

import click

from nbdstore.commands.output import json_option, print_json
from nbdstore.commands.progress import Progress
from nbdstore.commands.session import Session


@click.command(short_help="Verify a pool that is not being served, and repair it.")
@click.option("--repair", is_flag=True, help="Repair what can be repaired without losing data.")
@json_option
@click.pass_context
def check(ctx: click.Context, repair: bool, as_json: bool) -> None:
    """Verify every pointer, every checksum and the free map of the pool.

    Nothing may serve the pool meanwhile. Exit status 0 if all is well or was repaired, 1 if
    something is wrong.

    \b
    Examples:
      nbdstore check
      nbdstore check --repair --json
    """
    from nbdstore.store.check import check_pool

    session: Session = ctx.obj
    directory = session.require_local("check")
    with Progress("check", None) as progress:
        report = check_pool(directory, repair=repair, progress=progress.update)
    left = [finding for finding in report.findings if not finding.repaired]
    if as_json:
        print_json(dataclasses.asdict(report))
    ctx.exit(1 if left else 0)
