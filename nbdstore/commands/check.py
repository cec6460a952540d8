"""``nbdstore check``: verify a pool that is not being served."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from nbdstore.commands.output import counted, json_option, note, print_json
from nbdstore.commands.progress import Progress
from nbdstore.commands.session import Session
from nbdstore.control.client import ControlClient
from nbdstore.errors import PoolLocked

if TYPE_CHECKING:
    from nbdstore.store.check import CheckReport, Finding


@click.command(short_help="Verify a pool that is not being served, and repair it.")
@click.option(
    "--repair",
    is_flag=True,
    help="Rebuild what is derived, and give up what damage has cut off, so that the rest works.",
)
@json_option
@click.pass_context
def check(ctx: click.Context, repair: bool, as_json: bool) -> None:
    """Verify every pointer, every checksum and the free map of the pool.

    Nothing may serve the pool meanwhile. Exit status 0 if all is well or was repaired, 1 if
    something is left: blocks that are damaged stay so, and reading them stays an error until they
    are written again.

    A pool whose maps or journal are damaged opens again after --repair. What lay below a damaged
    part of a map then reads as errors, too, and is gone for good: 'nbdstore salvage' first, if the
    damage may be the disk's or the cable's.

    \b
    Examples:
      nbdstore check
      nbdstore check --repair --json
    """
    session: Session = ctx.obj
    report = _checked(session, repair)
    if as_json:
        print_json(report.to_json())
    else:
        _show(report, repair)
    ctx.exit(0 if report.clean else 1)


def _checked(session: Session, repair: bool) -> CheckReport:
    from nbdstore.store.check import check_pool

    directory = session.require_local("check")
    with Progress("check", None, lambda n: f"{n:,.0f} blocks") as progress:
        try:
            return check_pool(directory, repair=repair, progress=progress.update)
        except PoolLocked as error:
            if ControlClient(session.control_url).reachable():
                raise PoolLocked(f"{directory} is being served: stop its server first") from error
            raise


def _show(report: CheckReport, repair: bool) -> None:
    for finding in report.findings:
        click.echo(f"{finding}{_outcome(finding)}")
    if report.n_findings_left_out:
        click.echo(f"... and {report.n_findings_left_out} more of the kind")
    looked_at = ", ".join(
        (
            counted(report.n_volumes, "volume"),
            counted(report.n_blocks, "block"),
            counted(report.n_nodes, "map node"),
            counted(report.n_journal_records, "journal record"),
        )
    )
    click.echo(f"checked {looked_at}: {_verdict(report)}")
    if not report.clean:
        note(
            "what is damaged reads as an I/O error until it is written again; 'nbdstore salvage' "
            "copies what is intact"
            if repair
            else "'nbdstore salvage' copies what is intact, 'nbdstore check --repair' makes that "
            "usable in place"
        )


def _outcome(finding: Finding) -> str:
    if not finding.repaired:
        return ""
    return ", given up" if finding.severity == "damage" else ", repaired"


def _verdict(report: CheckReport) -> str:
    n_left = sum(not f.repaired and f.severity != "notice" for f in report.findings)
    n_given_up = sum(f.repaired and f.severity == "damage" for f in report.findings)
    n_repaired = sum(f.repaired for f in report.findings) - n_given_up
    parts = []
    if not report.clean:
        parts.append(f"{counted(n_left + report.n_findings_left_out, 'fault')} left")
    if n_repaired:
        parts.append(f"{counted(n_repaired, 'fault')} repaired")
    if n_given_up:
        parts.append(f"{counted(n_given_up, 'fault')} given up")
    return ", ".join(parts) or "all is well"
