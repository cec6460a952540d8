"""``nbdstore export`` and ``nbdstore import``: raw images out of and into volumes, without NBD."""

from __future__ import annotations

import contextlib

import click

from nbdstore.commands import parameters, raw_files
from nbdstore.commands.output import note
from nbdstore.commands.progress import Progress
from nbdstore.commands.session import Session, complete_volume, pass_session
from nbdstore.control.model import VolumeInfo
from nbdstore.control.service import VolumeService
from nbdstore.errors import InvalidArgument, NotFound
from nbdstore.sizes import exact_size, format_size

SECTOR_BYTES = 512
"""Volumes have whole sectors: the kernel knows no other disks."""


@click.command("export", short_help="Write a volume as a raw image to a file or pipe.")
@click.argument("name", shell_complete=complete_volume)
@click.argument("file", type=click.Path(allow_dash=True))
@pass_session
def export_(session: Session, name: str, file: str) -> None:
    """Write volume NAME as a raw image to FILE, or to standard output if FILE is '-'.

    Holes of the volume become holes of the file. FILE takes its place when it is whole. A volume
    that is written meanwhile does not give one consistent moment.

    \b
    Examples:
      nbdstore export db db.img
      nbdstore export db - | zstd > db.img.zst
    """
    with session.service() as service, Progress(f"export {name}", None) as progress:
        if service.volume(name).attached:
            note(f"volume '{name}' is attached: what its clients write meanwhile may be torn")
        content = service.read_content(name)
        raw_files.write_raw(
            file,
            content.size,
            content.pieces,
            lambda position: progress.update(position, content.size),
        )


@click.command("import", short_help="Read a raw image from a file or pipe into a volume.")
@click.argument("file", type=click.Path(allow_dash=True))
@click.argument("name", shell_complete=complete_volume)
@click.option(
    "--size",
    type=parameters.size,
    metavar="SIZE",
    help="Size of a new volume, if not that of FILE; needed for a pipe.",
)
@click.option("--overwrite", is_flag=True, help="Replace what an existing volume holds.")
@pass_session
def import_(session: Session, file: str, name: str, size: int | None, overwrite: bool) -> None:
    """Read the raw image FILE, or standard input if FILE is '-', into volume NAME.

    NAME is created with the size of FILE if there is none. Blocks of zeros take
    no space. An import into a new volume that fails leaves no volume behind; one that is killed
    leaves it marked, and importing again replaces it.

    \b
    Examples:
      nbdstore import debian-12.raw debian
      zstdcat db.img.zst | nbdstore import - db --size 10G
    """
    with contextlib.closing(raw_files.RawSource(file)) as source, session.service() as service:
        length = _length(service, source, name, size)
        with Progress(f"import {name}", source.size) as progress:
            pieces = source.pieces(length, progress.update)
            info = service.write_content(name, length, pieces, overwrite=overwrite)
    click.echo(
        f"imported volume {info.name}: {format_size(info.size)}, {format_size(info.mapped)} mapped"
    )


def _length(
    service: VolumeService, source: raw_files.RawSource, name: str, size: int | None
) -> int:
    """Decide how many bytes the content has: of a new volume, its size."""
    try:
        volume: VolumeInfo | None = service.volume(name)
    except NotFound:
        volume = None
    if size is not None:
        if volume is not None and volume.size != size:
            raise InvalidArgument(
                f"volume '{name}' is there with {format_size(volume.size)}: "
                "leave --size away, or resize it first"
            )
        if source.size is not None and source.size > size:
            raise InvalidArgument(
                f"{source.name} has {exact_size(source.size)}, more than --size {exact_size(size)}"
            )
        return size
    if source.size is not None:
        return source.size if volume else -(-source.size // SECTOR_BYTES) * SECTOR_BYTES
    if volume is not None:
        return volume.size
    raise InvalidArgument(
        f"there is no volume '{name}', and a pipe does not tell how long it is: give --size"
    )
