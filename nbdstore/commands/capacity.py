"""``nbdstore capacity``: the capacity model in numbers."""

from __future__ import annotations

import contextlib

import click

from nbdstore.commands import parameters
from nbdstore.commands.output import json_option, print_facts, print_json
from nbdstore.commands.session import Session, pass_session
from nbdstore.control.capacity import CapacityReport
from nbdstore.orchestration.platform import PLATFORMS, open_platform
from nbdstore.sizes import format_size

DAY_S = 24 * 60 * 60


@click.command(short_help="Show what fits, what was promised, what is stored, what is left.")
@click.option(
    "--platform",
    type=click.Choice(PLATFORMS),
    envvar="NBDSTORE_PLATFORM",
    show_envvar=True,
    help="Count its running containers, and the storage that each was given.",
)
@click.option(
    "--containers", type=click.IntRange(min=0), default=0, help="Containers of no such platform."
)
@click.option(
    "--container-size",
    type=parameters.size,
    metavar="SIZE",
    default="0",
    help="Storage the platform gives to each, beside the pool.",
)
@json_option
@pass_session
def capacity(
    session: Session, platform: str | None, containers: int, container_size: int, as_json: bool
) -> None:
    """Show what the pool can hold, what was promised, what is stored, what is left.

    C_b is the capacity of the block storage, C_c that of the container platform, C_bc both
    together, D the data stored. --platform asks Docker or Kubernetes what its containers were
    given: the limit of each, or, with Docker, what it uses if it has none. Of another platform say
    it with --containers and --container-size. Attached volumes live in C_b and are not counted
    twice.

    \b
    Examples:
      nbdstore capacity --platform docker
      nbdstore capacity --containers 20 --container-size 10G --json
    """
    if platform and containers:
        raise click.UsageError("--platform counts the containers: leave out --containers")
    given = _given(platform) if platform else [container_size] * containers
    with session.service() as service:
        report = service.capacity().with_containers(given)
    if as_json:
        print_json(report.to_json())
    else:
        print_facts(_facts(report))


def _given(platform: str) -> list[int]:
    """Ask a platform how many bytes each of its containers was given."""
    with contextlib.closing(open_platform(platform)) as found:
        return [container.bytes for container in found.containers()]


def _facts(report: CapacityReport) -> list[tuple[str, str]]:
    def product(n: int, each: int, total: int) -> str:
        return f"{format_size(total):<10}  {n} x {format_size(each)}"

    return [
        (
            "block storage C_b",
            product(report.n_blocks, report.block_size, report.block_capacity),
        ),
        (
            "containers C_c",
            product(report.n_containers, report.container_size, report.container_capacity),
        ),
        ("integrated C_bc", f"{format_size(report.integrated_capacity):<10}  C_b + C_c"),
        ("data stored D", product(report.n_mapped, report.block_size, report.data)),
        ("provisioned", f"{format_size(report.provisioned):<10}  volumes: {report.n_volumes}"),
        ("overcommit", f"{report.overcommit:<10.2f}  provisioned / C_b"),
        ("fill", f"{report.fill:<10.1%}  {format_size(report.used)} used with the pool's maps"),
        ("left", format_size(report.free)),
        ("runs out", _forecast(report)),
    ]


def _forecast(report: CapacityReport) -> str:
    rate, window_s = report.growth_bytes_per_s, report.growth_window_s
    if rate is None or window_s is None:
        return "unknown: a running server knows once it has watched for a minute"
    seen = f"over the last {format_duration(window_s)}"
    if report.exhausted_in_s is None:
        return f"not in sight: no growth {seen}"
    per_day = format_size(rate * DAY_S)
    return f"in {format_duration(report.exhausted_in_s)}, at {per_day} a day as {seen}"


def format_duration(seconds: float) -> str:
    """Write a duration for a person, in one unit: ``12 days``, ``3 hours``, ``1 minute``."""
    for unit, length_s in (("day", DAY_S), ("hour", 3600), ("minute", 60)):
        if seconds >= length_s:
            n = round(seconds / length_s)
            return f"{n} {unit}{'s' if n != 1 else ''}"
    return f"{seconds:.0f} seconds"
