"""``nbdstore salvage``: what is intact of a damaged pool, as files or over NBD."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nbdstore.commands import raw_files
from nbdstore.commands.output import counted, json_option, print_json
from nbdstore.commands.progress import Progress
from nbdstore.commands.session import Session
from nbdstore.control.stream import Piece
from nbdstore.errors import NbdstoreError
from nbdstore.sizes import format_size

if TYPE_CHECKING:
    from nbdstore.server import Server
    from nbdstore.store import Image
    from nbdstore.store.salvage import Lost, SalvagedPool

N_SHOWN = 20
"""Lost ranges that are shown of each volume; --json has all."""


@click.command(short_help="Copy or export what is intact of a damaged pool.")
@click.argument("volumes", nargs=-1, metavar="[VOLUME]...")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write each volume to DIR/VOLUME.raw, each snapshot to DIR/VOLUME@SNAPSHOT.raw; what is "
    "lost is a hole there.",
)
@click.option(
    "--socket",
    "socket_path",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Export the volumes over NBD on a unix socket, read-only; what is lost is an I/O error.",
)
@json_option
@click.pass_context
def salvage(
    ctx: click.Context,
    volumes: tuple[str, ...],
    output: Path | None,
    socket_path: Path | None,
    as_json: bool,
) -> None:
    """Bring back what is intact of a damaged pool, of all volumes or of each VOLUME.

    Snapshots are brought back as well, each under its name, VOLUME@SNAPSHOT, and so are volumes in
    the trash, as VOLUME~ID.

    Works where the pool does not open any more, as long as one copy of the superblock and of the
    list of volumes is whole. Nothing is ever written to the pool; it may lie on a filesystem that
    is mounted read-only, and must not be served. Every block is verified.

    With --output, exit status 1 says that something is lost, or that a file could not be written;
    which bytes and which files, is told, and the others are written all the same. With --socket,
    nbdcopy, ddrescue or a read-only mount can get at the volumes until Ctrl-C.

    \b
    Examples:
      nbdstore salvage --output /mnt/rescue
      nbdstore salvage --output . --json db > report.json
      nbdstore salvage --socket /tmp/rescue.sock
    """
    if (output is None) == (socket_path is None):
        raise click.UsageError("give either --output or --socket")
    if socket_path is not None and as_json:
        raise click.UsageError("--json is for --output")
    from nbdstore.store.salvage import SalvagedPool

    session: Session = ctx.obj
    pool = SalvagedPool(session.require_local("salvage"))
    try:
        if volumes:
            pool.choose(volumes)
        if output is None:
            assert socket_path is not None
            return _export(pool, session, socket_path)
        report = _copy_all(pool, output)
    finally:
        pool.close()
    if as_json:
        print_json(report.to_json())
    else:
        _show(report)
    ctx.exit(0 if report.complete else 1)


# -- files -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Copied:
    """One volume or snapshot, copied as far as it goes; sizes in bytes.

    error: why there is no such file, or the one of before; None = it is written.
    """

    name: str
    size: int
    file: Path
    intact: int = 0
    lost: list[Lost] = dataclasses.field(default_factory=list)
    error: str | None = None

    @property
    def n_lost(self) -> int:
        """Bytes that are lost."""
        return sum(part.stop - part.start for part in self.lost)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "size": self.size,
            "file": str(self.file),
            "intact": self.intact,
            "lost": self.n_lost,
            "ranges": [dataclasses.asdict(part) for part in self.lost],
            "error": self.error,
        }


@dataclasses.dataclass
class Report:
    """What was salvaged, and what was found wrong."""

    volumes: list[Copied]
    faults: list[str]
    journal_damaged: bool
    dropped: list[str]

    @property
    def complete(self) -> bool:
        """Nothing that was durable is lost, and all of it is written."""
        wrong = any(volume.lost or volume.error for volume in self.volumes)
        return not self.journal_damaged and not wrong

    def to_json(self) -> dict[str, Any]:
        return {
            "complete": self.complete,
            "journal_damaged": self.journal_damaged,
            "without_unsynced_writes": self.dropped,
            "faults": self.faults,
            "volumes": [volume.to_json() for volume in self.volumes],
        }


def _copy_all(pool: SalvagedPool, output: Path) -> Report:
    # Every damaged block is in the report; the log would tell it once more, in between.
    logging.getLogger("nbdstore.store").setLevel(logging.CRITICAL)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NbdstoreError(f"cannot make '{output}': {error.strerror}") from error
    # What is in the trash comes last: it may be what there is no space for.
    in_order = sorted(pool.images.items(), key=lambda item: ("~" in item[0], item[0]))
    copied = [_copy(pool, image, output) for _, image in in_order]
    return Report(copied, [*pool.faults], pool.journal_damaged, pool.dropped)


def _copy(pool: SalvagedPool, image: Image, output: Path) -> Copied:
    copied = Copied(image.name, image.size, output / f"{image.name}.raw")
    try:
        with Progress(f"salvage {image.name}", image.size) as progress:
            raw_files.write_raw(
                str(copied.file), image.size, _pieces(pool, image, copied), progress.update
            )
    except NbdstoreError as error:  # for the report: the next one may be small enough
        copied.error = str(error)
    return copied


def _pieces(pool: SalvagedPool, image: Image, copied: Copied) -> Iterator[Piece]:
    """Yield what is intact, and note in `copied` what is and what is not."""
    from nbdstore.store.salvage import Lost

    for part in pool.contents(image):
        if isinstance(part, Lost):
            copied.lost.append(part)
        else:
            copied.intact += len(part.data)
            yield Piece(part.offset, part.data)


def _show(report: Report) -> None:
    for fault in report.faults:
        click.echo(f"damage: {fault}")
    if report.journal_damaged:
        click.echo("all volumes are as they were before the damage to the journal")
    for name in report.dropped:
        click.echo(f"volume {name} is without unsynced writes that a crash took")
    for volume in report.volumes:
        if volume.error:
            click.echo(f"not salvaged {volume.name}: {volume.error}")
            continue
        lost = f"{format_size(volume.n_lost)} lost" if volume.lost else "nothing lost"
        click.echo(
            f"salvaged {volume.name}: {format_size(volume.size)}, {format_size(volume.intact)} "
            f"of data intact, {lost}: {volume.file}"
        )
        for part in volume.lost[:N_SHOWN]:
            click.echo(f"  lost: bytes {part.start} to {part.stop}: {part.reason}")
        if len(volume.lost) > N_SHOWN:
            click.echo(f"  and {counted(len(volume.lost) - N_SHOWN, 'more range')}: see --json")


# -- NBD ---------------------------------------------------------------------------------------


def _export(pool: SalvagedPool, session: Session, path: Path) -> None:
    # Imported late: other uses need neither uvloop nor a server.
    import uvloop

    from nbdstore import daemon
    from nbdstore.commands import announcement, logs
    from nbdstore.server import ServerOptions

    logs.set_up("info", session.environ)
    os.umask(0o077)  # the socket is for the owner of this process alone
    for fault in pool.faults:
        click.echo(f"damage: {fault}")
    if pool.journal_damaged:
        click.echo("all volumes are as they were before the damage to the journal")

    def announce(server: Server) -> None:
        announcement.show(
            str(session.pool), pool.volumes.values(), server.addresses, tls=False, read_only=True
        )

    options = ServerOptions(listen=[f"unix:{path.absolute()}"], read_only=True, owner_only=True)
    uvloop.run(daemon.serve_salvaged(pool, options, session.environ, announce))
