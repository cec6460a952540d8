"""``nbdstore pool``: make a pool, look at it, make it larger."""

from __future__ import annotations

import click

from nbdstore.commands import parameters
from nbdstore.commands.groups import OrderedGroup
from nbdstore.commands.output import counted, json_option, print_facts, print_json
from nbdstore.commands.session import Session, pass_session
from nbdstore.control.model import PoolInfo
from nbdstore.sizes import format_size


@click.group(cls=OrderedGroup)
def pool() -> None:
    """Make a pool, look at it, make it larger.

    A pool is a directory that holds the blocks of all its volumes. --pool names it.
    """


@pool.command()
@click.option(
    "--block-size",
    type=parameters.size,
    metavar="SIZE",
    default="4K",
    show_default=True,
    help="A power of two from 4K to 64K; the smallest unit of space, for good.",
)
@click.option(
    "--capacity",
    type=parameters.size,
    metavar="SIZE",
    help="Data the pool may hold. Default: the size of the filesystem it lies on.",
)
@click.option(
    "--journal-size",
    type=parameters.size,
    metavar="SIZE",
    default="128M",
    show_default=True,
    help="Room for writes between two checkpoints.",
)
@pass_session
def create(session: Session, block_size: int, capacity: int | None, journal_size: int) -> None:
    """Make an empty pool.

    It takes little more than its journal at first and grows as volumes are written.

    \b
    Examples:
      nbdstore pool create
      nbdstore --pool /srv/blocks pool create --capacity 500G
    """
    from nbdstore.store import Pool

    directory = session.require_local("pool create")
    Pool.create(directory, block_size=block_size, capacity=capacity, journal_size=journal_size)
    with session.service() as service:
        info = service.pool()
    click.echo(
        f"created pool {directory}: {format_size(info.capacity)} in blocks of "
        f"{format_size(info.block_size)}"
    )


@pool.command()
@json_option
@pass_session
def show(session: Session, as_json: bool) -> None:
    """Show the pool: its space, its state, who serves it."""
    with session.service() as service:
        info = service.pool()
    if as_json:
        print_json(info.to_json())
    else:
        print_facts(_facts(info))


_SHORTAGES = {
    "pool": "trim or delete volumes, or enlarge it with 'nbdstore pool grow'",
    "host": "free space on the filesystem below, or trim or delete volumes",
}
"""What to do about a full pool."""


def _facts(info: PoolInfo) -> list[tuple[str, str]]:
    state = info.state + (f": {info.failure}" if info.failure else "")
    if info.shortage and not info.failure:
        state += f": {_SHORTAGES.get(info.shortage, info.shortage)}"
    if info.held_writes:
        state += f"; {counted(info.held_writes, 'write')} waiting for space"
    if info.corruptions:
        state += f", damage met {counted(info.corruptions, 'time')}: run 'nbdstore check'"
    return [
        ("pool", info.directory),
        ("uuid", info.uuid),
        ("state", state),
        ("capacity", format_size(info.capacity)),
        ("used", f"{format_size(info.used)} ({info.fill:.1%})"),
        ("reserved", format_size(info.reserved)),
        ("free", format_size(info.free)),
        (
            "volumes",
            f"{info.volumes}, {format_size(info.provisioned)} provisioned, "
            f"{format_size(info.mapped)} mapped",
        ),
        (
            "on disk",
            f"{format_size(info.allocated_on_host)}, {format_size(info.free_on_host)} free there",
        ),
        ("block size", format_size(info.block_size)),
        ("journal", f"{format_size(info.journal['used'])} of {format_size(info.journal['size'])}"),
        ("format", f"version {info.format_version}"),
        ("served by", _server_text(info)),
    ]


def _server_text(info: PoolInfo) -> str:
    if info.server is None:
        return "nobody now"
    mode = ", read-only" if info.server.read_only else ""
    return f"process {info.server.pid} at {', '.join(info.server.addresses)}{mode}"


@pool.command()
@click.argument("capacity", type=parameters.size, metavar="CAPACITY")
@json_option
@pass_session
def grow(session: Session, capacity: int, as_json: bool) -> None:
    """Raise the pool's capacity to CAPACITY.

    Takes effect at once, with clients attached; writes that were held for space go on.

    \b
    Examples:
      nbdstore pool grow 2T
    """
    with session.service() as service:
        info = service.grow_pool(capacity)
    if as_json:
        print_json(info.to_json())
    else:
        click.echo(
            f"pool {info.directory}: {format_size(info.capacity)}, {format_size(info.free)} free"
        )
