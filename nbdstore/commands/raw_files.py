"""Raw images outside the pool: read as pieces without their zeros, written with their holes.

Owns what is particular about files: regular files have holes (lseek(2), SEEK_DATA), block devices
have a size but old content, pipes have neither. Knows nothing of pools. Every OSError becomes a
`NbdstoreError` that names the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from nbdstore.control.stream import PIECE_BYTES, Buffer, Piece
from nbdstore.errors import InvalidArgument, NbdstoreError
from nbdstore.sizes import exact_size

ZERO_BLOCK_BYTES = 4096
"""Zeros are left out in runs of such blocks: the default block size of a pool."""
_ZERO_BLOCK = bytes(ZERO_BLOCK_BYTES)
_ZEROS = bytes(PIECE_BYTES)

Report = Callable[[int], None]
"""Called with the position reached, in bytes."""


class RawSource:
    """A raw image to read: a regular file, a block device, or a stream.

    Arguments:
        file: a path, or ``-`` for standard input.

    size: bytes left to read, None for a stream.
    """

    def __init__(self, file: str) -> None:
        self.name = "standard input" if file == "-" else f"'{file}'"
        with self._errors():
            self._fd = os.dup(0) if file == "-" else os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with self._errors():
                self._mode = os.fstat(self._fd).st_mode
                self._start, self.size = self._measure()
        except BaseException:
            os.close(self._fd)
            raise

    def _measure(self) -> tuple[int, int | None]:
        if stat.S_ISDIR(self._mode):
            raise InvalidArgument(f"{self.name} is a directory: give a raw image")
        if not (stat.S_ISREG(self._mode) or stat.S_ISBLK(self._mode)):
            return 0, None
        start = os.lseek(self._fd, 0, os.SEEK_CUR)
        stop = os.lseek(self._fd, 0, os.SEEK_END)
        return start, max(stop - start, 0)

    def close(self) -> None:
        os.close(self._fd)

    def pieces(self, limit: int, report: Report) -> Iterator[Piece]:
        """Yield what is not zero, in ascending order.

        Raises:
            InvalidArgument: there are more than `limit` bytes.
            NbdstoreError: the file cannot be read.
        """
        chunks = self._stream() if self.size is None else self._extents(self.size)
        for offset, chunk in chunks:
            if offset + len(chunk) > limit:
                raise InvalidArgument(
                    f"{self.name} is longer than the volume, which has {exact_size(limit)}: "
                    "import into a larger one"
                )
            yield from _without_zeros(offset, chunk)
            report(offset + len(chunk))

    def _stream(self) -> Iterator[tuple[int, bytes]]:
        offset = 0
        while True:
            chunk = self._read_full()
            if not chunk:
                return
            yield offset, chunk
            offset += len(chunk)

    def _read_full(self) -> bytes:
        """Read PIECE_BYTES from a stream, less only at its end: keeps offsets block-aligned."""
        parts: list[bytes] = []
        missing = PIECE_BYTES
        while missing:
            with self._errors():
                part = os.read(self._fd, missing)
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _extents(self, size: int) -> Iterator[tuple[int, bytes]]:
        for start, stop in self._data_ranges(self._start, self._start + size):
            offset = start
            while offset < stop:
                with self._errors():
                    chunk = os.pread(self._fd, min(PIECE_BYTES, stop - offset), offset)
                if not chunk:
                    return  # the file was cut meanwhile; what is gone reads as zeros
                yield offset - self._start, chunk
                offset += len(chunk)

    def _data_ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the [start, stop) that hold data; all of it where holes are not known."""
        while start < stop:
            try:
                start = os.lseek(self._fd, start, os.SEEK_DATA)
                end = os.lseek(self._fd, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return  # no data after start
                if error.errno != errno.EINVAL:
                    raise NbdstoreError(f"cannot read {self.name}: {error.strerror}") from error
                end = stop
            yield start, min(end, stop)
            start = end

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise NbdstoreError(f"cannot read {self.name}: {error.strerror}") from error


def _without_zeros(offset: int, chunk: bytes) -> Iterator[Piece]:
    """Split a chunk into runs of blocks that are not all zeros.

    Comparing `bytes` is a memcmp, so this reads at memory speed: 50 us for a MiB of data.
    """
    if len(chunk) == PIECE_BYTES and chunk == _ZEROS:
        return
    view = memoryview(chunk)
    run_start: int | None = None
    for start in range(0, len(chunk), ZERO_BLOCK_BYTES):
        block = chunk[start : start + ZERO_BLOCK_BYTES]
        is_zero = block == _ZERO_BLOCK[: len(block)]
        if is_zero and run_start is not None:
            yield Piece(offset + run_start, view[run_start:start])
            run_start = None
        elif not is_zero and run_start is None:
            run_start = start
    if run_start is not None:
        yield Piece(offset + run_start, view[run_start:])


def write_raw(file: str, size: int, pieces: Iterator[Piece], report: Report) -> None:
    """Write `size` bytes with `pieces` and zeros elsewhere to a path, or ``-`` for stdout.

    A regular file is written beside its place and renamed when it is whole and on disk, so a
    failure leaves what was there before; its zeros are holes. Devices and pipes are written in
    order, zeros included. A standard output that is a regular file gets holes, too.

    Raises:
        BrokenPipeError: nobody reads the pipe any more.
        NbdstoreError: any other failure of the output.
    """
    if file == "-":
        with _output_errors("standard output"):
            write = _write_holes if _takes_holes(1) else _write_everything
            write(1, size, pieces, report)
        return
    path = Path(file)
    with _output_errors(f"'{file}'"):
        if path.exists() and not path.is_file():
            _write_in_place(path, size, pieces, report)
        else:
            # Not Path.resolve, which raises a RuntimeError for links that go round in circles.
            _write_and_rename(Path(os.path.realpath(path)), size, pieces, report)


def _write_in_place(path: Path, size: int, pieces: Iterator[Piece], report: Report) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        _write_everything(fd, size, pieces, report)
        if stat.S_ISBLK(os.fstat(fd).st_mode):
            os.fsync(fd)
    finally:
        os.close(fd)


def _write_and_rename(path: Path, size: int, pieces: Iterator[Piece], report: Report) -> None:
    partial = path.with_name(f".{path.name[:200]}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    # O_EXCL: in a directory for all, somebody could have put a link there to write through.
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.fchmod(fd, stat.S_IMODE(path.stat().st_mode))
        _write_holes(fd, size, pieces, report)
        os.fsync(fd)
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _takes_holes(fd: int) -> bool:
    """Whether skipping bytes leaves zeros: a regular file, not appended to, and nothing ahead."""
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND:
        return False
    return os.lseek(fd, 0, os.SEEK_CUR) >= info.st_size


def _write_holes(fd: int, size: int, pieces: Iterator[Piece], report: Report) -> None:
    start = os.lseek(fd, 0, os.SEEK_CUR)
    os.ftruncate(fd, start + size)
    for piece in pieces:
        os.lseek(fd, start + piece.offset, os.SEEK_SET)
        _write_all(fd, piece.data)
        report(piece.offset + len(piece.data))
    os.lseek(fd, start + size, os.SEEK_SET)


def _write_everything(fd: int, size: int, pieces: Iterator[Piece], report: Report) -> None:
    position = 0
    for piece in pieces:
        _write_zeros(fd, piece.offset - position)
        _write_all(fd, piece.data)
        position = piece.offset + len(piece.data)
        report(position)
    _write_zeros(fd, size - position)


def _write_zeros(fd: int, length: int) -> None:
    view = memoryview(_ZEROS)
    while length:
        part = min(length, len(view))
        _write_all(fd, view[:part])
        length -= part


def _write_all(fd: int, data: Buffer) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@contextlib.contextmanager
def _output_errors(name: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise NbdstoreError(f"cannot write {name}: {error.strerror}") from error
