"""The command line: ``list``, ``run``, ``guest`` and ``report``."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import click

from benchmarks import credentials, in_a_guest, machine, report, results
from benchmarks.model import BenchmarkFailed, Row, Transport
from benchmarks.peers import NBDSTORE, PEERS, Peer, other_checkout
from benchmarks.progress import Progress
from benchmarks.results import Results
from benchmarks.rounds import Plan, Runner
from benchmarks.rows import chosen, rows
from benchmarks.scale import NORMAL, SCALES, Scale
from benchmarks.tools import Tools
from tests.children import Children, CommandError
from tests.guest.guest import GuestError

# Not /tmp, which often is memory.
DEFAULT_DISK = Path("/var/tmp")
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


@click.group()
def main() -> None:
    """Measure nbdstore and its peers side by side; see benchmarks/README.md."""


@main.command("list")
@click.argument("patterns", nargs=-1, metavar="[ROW]...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(patterns: Sequence[str], as_json: bool) -> None:
    """List the rows, or those whose name or group fits ROW: what each asks, and its goal."""
    found = _chosen(rows(NORMAL), patterns)
    if as_json:
        facts = [
            {
                "name": row.name,
                "group": row.group,
                "question": row.question,
                "unit": row.unit.label,
                "goal": dataclasses.asdict(row.goal) if row.goal else None,
                "quick": row.is_quick,
            }
            for row in found
        ]
        click.echo(json.dumps(facts, indent=1))
        return
    width = max(len(row.name) for row in found)
    group = ""
    for row in found:
        if row.group != group:
            group = row.group
            click.echo(f"\n{group}")
        click.echo(f"  {row.name:{width}}  {row.question}  [{report.format_goal(row.goal)}]")


@main.command()
@click.argument("patterns", nargs=-1, metavar="[ROW]...")
@click.option("--quick", is_flag=True, help="The daily rows, small: under three minutes.")
@click.option("--full", is_flag=True, help="Larger disks and longer samples: hours.")
@click.option("--smoke", is_flag=True, help="Only to see that everything works.")
@click.option("--rounds", type=click.IntRange(min=1), help="How often everything is measured.")
@click.option("--runtime", type=click.FloatRange(min=0.02), help="Seconds of one sample.")
@click.option(
    "--peers", metavar="NAMES", help=f"Which, with commas: {','.join(PEERS)}. nbdstore always is."
)
@click.option(
    "--against",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    multiple=True,
    metavar="CHECKOUT",
    help="Measure nbdstore of another checkout, too; may be repeated.",
)
@click.option(
    "--disk",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=DEFAULT_DISK,
    show_default=True,
    help="A directory on the disk to measure on.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where results go. Default: benchmarks/results/TIME.",
)
@click.option("--plots/--no-plots", "with_plots", default=True, help="Whether to draw plots.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON, not as a table.")
def run(
    patterns: Sequence[str],
    quick: bool,
    full: bool,
    smoke: bool,
    rounds: int | None,
    runtime: float | None,
    peers: str | None,
    against: Sequence[Path],
    disk: Path,
    output: Path | None,
    with_plots: bool,
    as_json: bool,
) -> None:
    """Measure all rows, or those whose name or group fits ROW (which may have * and ?).

    Results and their table are saved after each row; Ctrl-C stops all servers and keeps what there
    is. The exit status is 1 if something could not be measured that should have been.

    \b
    Examples:
      python -m benchmarks run --quick
      python -m benchmarks run 'random-*' fsync --rounds 9
      python -m benchmarks run 'random-write-*' --peers nbdkit --against ../main
    """
    scale = _scale(quick=quick, full=full, smoke=smoke, rounds=rounds, runtime=runtime)
    found = _chosen(rows(scale), patterns)
    if quick and not patterns:
        found = [row for row in found if row.is_quick]
    machine.find_admin_programs()
    for program in ("fio", "setpriv"):
        if reason := machine.why_missing(program):
            raise click.ClickException(f"{reason}, and nothing can be measured without it")
    output = output or Path(__file__).parent / "results" / _now().replace(":", "")
    output.mkdir(parents=True, exist_ok=True)
    with _interrupted_once():
        measured = _measure(scale, found, _peers(peers, against), disk, output)
    if with_plots:
        _draw(measured, output)
    click.echo(
        json.dumps(results.to_json(measured), indent=1) if as_json else report.markdown(measured)
    )
    click.echo(f"results are in {output}", err=True)
    sys.exit(1 if measured.n_failed() or not measured.finished else 0)


@main.command()
@click.argument("patterns", nargs=-1, metavar="[ROW]...")
@click.option("--peers", metavar="NAMES", help="As for run.")
def guest(patterns: Sequence[str], peers: str | None) -> None:
    """Run the rows of the group kernel, or ROW, in an emulated machine.

    Its kernel has an nbd driver, which this machine's may lack. This tells whether everything
    works there; figures of an emulated machine mean nothing.
    """
    _chosen(rows(NORMAL), patterns)
    machine.find_admin_programs()
    names = [peer.name for peer in _peers(peers, ())]
    try:
        click.echo(in_a_guest.run(patterns or ["kernel"], names))
        click.echo("all of it works; figures of an emulated machine mean nothing", err=True)
    except (CommandError, GuestError) as error:
        raise click.ClickException(str(error)) from error


@main.command("report")
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON, not as a table.")
def report_(directory: Path, as_json: bool) -> None:
    """Render the table and the plots of the results in DIRECTORY once more."""
    try:
        loaded = results.load(directory)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"no results in {directory}: {error}") from error
    report.save(loaded, directory)
    _draw(loaded, directory)
    click.echo(
        json.dumps(results.to_json(loaded), indent=1) if as_json else report.markdown(loaded)
    )


# --- What was asked for --------------------------------------------------------------------------


def _chosen(all_rows: Sequence[Row], patterns: Sequence[str]) -> list[Row]:
    try:
        return chosen(all_rows, patterns)
    except LookupError as error:
        raise click.UsageError(str(error.args[0])) from error


def _scale(
    *, quick: bool, full: bool, smoke: bool, rounds: int | None, runtime: float | None
) -> Scale:
    if quick + full + smoke > 1:
        raise click.UsageError("give one of --quick, --full and --smoke")
    name = "quick" if quick else "full" if full else "smoke" if smoke else "normal"
    scale = SCALES[name]
    if runtime is not None:
        warm_up_s = min(scale.warm_up_s, runtime / 4)
        scale = dataclasses.replace(scale, runtime_s=runtime, warm_up_s=warm_up_s)
    return dataclasses.replace(scale, rounds=rounds or scale.rounds)


def _peers(names: str | None, against: Sequence[Path]) -> list[Peer]:
    wanted = list(PEERS) if names is None else [name for name in names.split(",") if name]
    for name in wanted:
        if name not in PEERS:
            raise click.UsageError(f"'{name}' is no peer: choose from {', '.join(PEERS)}")
    try:
        others = [other_checkout(directory) for directory in against]
    except BenchmarkFailed as error:
        raise click.UsageError(str(error)) from error
    return [NBDSTORE, *others, *(PEERS[name] for name in wanted if name != NBDSTORE.name)]


@contextlib.contextmanager
def _interrupted_once() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM break off what is done here, which keeps what there is."""
    before = {number: signal.signal(number, _interrupt) for number in _INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> NoReturn:
    """End a run; once, since stopping servers and saving must go on."""
    for each in _INTERRUPTS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


# --- Measuring -----------------------------------------------------------------------------------


def _measure(
    scale: Scale, found: Sequence[Row], peers: Sequence[Peer], disk: Path, output: Path
) -> Results:
    """Measure and save; an interrupted run too."""
    progress = Progress()
    if machine.is_busy():
        progress.say(f"the load average is {machine.load()}: figures of a busy machine mean little")
    measured = Results(
        started=_now(),
        scale=scale.name,
        rounds=scale.rounds,
        runtime_s=scale.runtime_s,
        commit=machine.this_commit(),
        machine=machine.describe(disk),
        versions=machine.versions(peers),
        peers={peer.name: peer.about for peer in peers},
    )
    try:
        with _work_directory(disk) as directory, Children(directory) as children:
            authority = directory / "authority"
            uses_tls = any(row.stage.transport is Transport.TLS for row in found)
            if uses_tls and credentials.why_missing() is None:
                credentials.issue(authority)
            with credentials.pki_home(authority) as home:
                tools = Tools(children, directory, scale, scale.runtime_s, home)
                plan = Plan(found, peers, scale.rounds, directory, scale.warm_up_s)
                runner = Runner(
                    plan, measured, tools, authority, progress, lambda: _save(measured, output)
                )
                runner.run()
                measured.finished = _now()
    except KeyboardInterrupt:
        progress.say("interrupted: all servers were stopped")
    finally:
        measured.machine["load after"] = machine.load()
        _save(measured, output)
    return measured


@contextlib.contextmanager
def _work_directory(disk: Path) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="nbdstore-bench-", dir=disk))
    try:
        yield directory
    finally:
        try:
            shutil.rmtree(directory)
        except OSError as error:
            click.echo(f"{directory} could not be removed: {error}", err=True)


def _save(measured: Results, output: Path) -> None:
    results.save(measured, output)
    report.save(measured, output)


def _draw(measured: Results, output: Path) -> None:
    """Write the plots, if there is what draws them."""
    try:
        from benchmarks import plots
    except ImportError:
        click.echo("no plots: install matplotlib (pip install -e '.[bench]')", err=True)
        return
    plots.draw(measured, output)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
