"""``nbdstore send``, ``receive`` and ``stream show``: snapshots as streams, out and in."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from io import BufferedReader
from typing import IO, BinaryIO, cast

import click

from nbdstore.commands.groups import OrderedGroup
from nbdstore.commands.output import json_option, note, print_facts, print_json
from nbdstore.commands.progress import Progress
from nbdstore.commands.session import Session, complete_image, complete_volume, pass_session
from nbdstore.control.backup_stream import BackupReader
from nbdstore.control.receiving_model import ReceivedInfo
from nbdstore.control.service import VolumeService
from nbdstore.control.stream import Buffer
from nbdstore.errors import (
    BadStream,
    Cancelled,
    ControlError,
    NbdstoreError,
    NotFound,
    StoreError,
)
from nbdstore.sizes import exact_size, format_size

CHUNK_BYTES = 1 << 20


@click.command(short_help="Write a snapshot, or what has changed, to a file or pipe.")
@click.argument("snapshot", metavar="[VOL@B]", required=False, shell_complete=complete_image)
@click.option("--since", metavar="VOL@A", help="Only what has changed since this snapshot.")
@click.option("--resume", metavar="TOKEN", help="Go on: see 'nbdstore receive --resume-token'.")
@click.option("--json", "as_json", is_flag=True, help="Tell what was sent as JSON, on stderr.")
@pass_session
def send(
    session: Session, snapshot: str | None, since: str | None, resume: str | None, as_json: bool
) -> None:
    """Write snapshot VOL@B to standard output, as a stream for 'nbdstore receive'.

    Every frame of the stream has a checksum that vouches for all before it, and the end has one
    for the whole. With --since it has only what has changed; the receiver needs VOL@A, and nothing
    else. Volumes may have been resized in between. Holes take no space; nor do zeros for which the
    volume has space set aside, which is not set aside where they are received.

    \b
    Examples:
      nbdstore send db@monday > db-monday.nbdstore
      nbdstore send db@tuesday --since db@monday | ssh backup nbdstore receive db
      nbdstore send --resume TOKEN | ssh backup nbdstore receive db
    """
    if (snapshot is None) == (resume is None) or (resume and since):
        raise click.UsageError("give a snapshot VOL@B, with or without --since, or --resume")
    if sys.stdout.isatty():
        raise click.UsageError("a stream is not for a terminal: write it to a file or a pipe")
    with session.service() as service, Progress(f"send {snapshot or ''}".strip(), None) as progress:
        if snapshot is not None:
            chunks = service.backups.send(snapshot, since)
        else:
            chunks = service.backups.resume(resume or "")
        watch = _Watch(progress)
        output = sys.stdout.buffer
        for chunk in chunks:
            _write(output, chunk)
            watch.feed(chunk)
        output.flush()
    _tell_sent(watch.reader, as_json)


def _write(output: BinaryIO, chunk: Buffer) -> None:
    try:
        output.write(chunk)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise NbdstoreError(f"cannot write standard output: {error.strerror}") from error


class _Watch:
    """Follows a stream that passes by: how far it is, and whether it was whole."""

    def __init__(self, progress: Progress) -> None:
        self.reader = BackupReader()
        self._progress = progress

    def feed(self, chunk: Buffer) -> None:
        """Take in a chunk that was passed on; raise what the sender says, or what is wrong."""
        for _ in self.reader.feed(chunk):
            pass
        if self.reader.begin is not None:
            self._progress.update(self.reader.position, self.reader.begin.size)


def _tell_sent(reader: BackupReader, as_json: bool) -> None:
    begin = reader.end()
    if as_json:
        click.echo(json.dumps(_summary(reader)), err=True)
        return
    since = f" since {begin.base_name}" if begin.base else ""
    zeros = f" and {format_size(reader.n_zero_bytes)} of zeros" if reader.n_zero_bytes else ""
    note(f"sent {begin.name}{since}: {format_size(reader.n_data_bytes)} of data{zeros}")


def _summary(reader: BackupReader) -> dict[str, object]:
    begin = reader.end()
    return begin.to_json() | {
        "data": reader.n_data_bytes,
        "zeros": reader.n_zero_bytes,
        "frames": reader.n_frames,
    }


@click.command(short_help="Read such a stream from a file or pipe into a volume.")
@click.argument("name", shell_complete=complete_volume)
@click.option("--resume-token", is_flag=True, help="Print what 'nbdstore send --resume' wants.")
@click.option("--abort", is_flag=True, help="Give up what a broken transfer has brought.")
@json_option
@pass_session
def receive(session: Session, name: str, resume_token: bool, abort: bool, as_json: bool) -> None:
    """Read a stream of 'nbdstore send' from standard input into volume NAME.

    A full stream makes NAME. One with changes only wants NAME to have the snapshot that it builds
    on, and not to have changed since then ('nbdstore snapshot rollback' sees to that). Once all
    has come and been verified the snapshot is made, with the name and the uuid that it was sent
    with; until then nobody can attach NAME.

    If the transfer breaks off, what has come is kept, and NAME cannot be attached. Go on with
    the token that --resume-token prints, or by giving the same stream again from its beginning;
    or give up with --abort: NAME is as before, or gone.

    \b
    Examples:
      nbdstore receive db < db-monday.nbdstore
      nbdstore send db@tuesday --since db@monday | nbdstore --pool /b receive db
      nbdstore receive --resume-token db
    """
    if resume_token and abort:
        raise click.UsageError("give --resume-token or --abort, not both")
    stream = iter(()) if resume_token or abort else _begun(_stdin())
    with session.service() as service:
        if abort:
            service.backups.abort_receive(name)
            click.echo(f"gave up what was received into volume {name}")
        elif resume_token:
            info = service.backups.receiving(name)
            if as_json:
                print_json(info.to_json())
            else:
                click.echo(info.token)
        else:
            _tell_received(_receive(service, name, stream), as_json)


def _begun(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Wait until a stream begins, or ends, and return all of it.

    Until then the sender may ask the pool that receives for its token, as in `send --resume $(...
    receive --resume-token NAME) | ... receive NAME`, whose three commands start at once.  So a pool
    that nobody serves is not opened before.
    """
    return itertools.chain(list(itertools.islice(chunks, 1)), chunks)


def _receive(service: VolumeService, name: str, stream: Iterable[bytes]) -> ReceivedInfo:
    try:
        with Progress(f"receive {name}", None) as progress:
            return service.backups.receive(name, _watched(stream, progress))
    except (BadStream, Cancelled, StoreError, ControlError) as error:
        kept = f"'nbdstore receive --resume-token {name}'"
        try:
            position = service.backups.receiving(name).position
        except NotFound:
            raise error from None
        except NbdstoreError:  # most likely the server is gone
            raise NbdstoreError(f"{error}; {kept} tells how to go on with what came") from error
        raise NbdstoreError(
            f"{error}; what came is kept, up to {format_size(position)}: {kept} tells how to go on"
        ) from error


def _stdin() -> Iterator[bytes]:
    """Yield what comes, as soon as it comes."""
    if sys.stdin is None:  # closed from the start (<&-)
        raise click.UsageError("standard input is closed: give a file or a pipe")
    stdin = cast("BufferedReader", sys.stdin.buffer)
    if stdin.isatty():
        raise click.UsageError("a stream does not come from a terminal: give a file or a pipe")
    while True:
        try:
            chunk = stdin.read1(CHUNK_BYTES)
        except OSError as error:
            raise NbdstoreError(f"cannot read standard input: {error.strerror}") from error
        if not chunk:
            return
        yield chunk


def _watched(chunks: Iterable[bytes], progress: Progress) -> Iterator[bytes]:
    """Pass the stream on, and show how far it is; the receiver says whether it is right."""
    watch: _Watch | None = _Watch(progress)
    for chunk in chunks:
        yield chunk
        if watch is not None:
            try:
                watch.feed(chunk)
            except NbdstoreError:
                watch = None


def _tell_received(info: ReceivedInfo, as_json: bool) -> None:
    if as_json:
        print_json(info.to_json())
        return
    zeros = f" and {format_size(info.zeros)} of zeros" if info.zeros else ""
    since = f", from {format_size(info.resumed_at)} on" if info.resumed_at else ""
    click.echo(f"received {info.snapshot}: {format_size(info.data)} of data{zeros}{since}")


@click.group(cls=OrderedGroup)
def stream() -> None:
    """Look into stored streams of 'nbdstore send'."""


@stream.command()
@click.argument("file", type=click.Path(allow_dash=True))
@json_option
def show(file: str, as_json: bool) -> None:
    """Read the stream in FILE, verify all of it, and tell what it holds.

    Needs no pool. Fails if a byte of it is damaged or missing.

    \b
    Examples:
      nbdstore stream show db-monday.nbdstore
    """
    reader = BackupReader()
    with _opened(file) as (source, size), Progress(f"verify {file}", size) as progress:
        n_read = 0
        while chunk := source.read(CHUNK_BYTES):
            for _ in reader.feed(chunk):
                pass
            n_read += len(chunk)
            progress.update(n_read)
        begin = reader.end()
    if as_json:
        print_json(_summary(reader))
        return
    base = f"{begin.base_name} ({begin.base})" if begin.base else "nothing: it is a full one"
    print_facts(
        [
            ("snapshot", begin.name),
            ("uuid", begin.uuid),
            ("created", begin.created),
            ("size", exact_size(begin.size)),
            ("builds on", base),
            ("begins at", exact_size(begin.start)),
            ("data", f"{format_size(reader.n_data_bytes)} in {reader.n_frames} frames"),
            ("zeros", format_size(reader.n_zero_bytes)),
            ("verified", "all of it is whole"),
        ]
    )


@contextlib.contextmanager
def _opened(file: str) -> Iterator[tuple[IO[bytes], int | None]]:
    try:
        with click.open_file(file, "rb") as source:
            size = None if file == "-" else os.fstat(source.fileno()).st_size
            yield source, size or None
    except OSError as error:
        raise NbdstoreError(f"cannot read '{file}': {error.strerror}") from error
