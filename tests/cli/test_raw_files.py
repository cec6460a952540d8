"""Raw images: holes, zeros, pipes, and files that end early or late."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdstore.commands import raw_files
from nbdstore.commands.raw_files import RawSource, write_raw
from nbdstore.control.stream import PIECE_BYTES, Piece
from nbdstore.errors import InvalidArgument, NbdstoreError

BLOCK = 4096


def ignore(_position: int) -> None:
    """Report nothing."""


def read(file: str, limit: int = 1 << 40) -> list[tuple[int, bytes]]:
    source = RawSource(file)
    try:
        return [(piece.offset, bytes(piece.data)) for piece in source.pieces(limit, ignore)]
    finally:
        source.close()


def write(file: Path | str, size: int, *pieces: tuple[int, bytes]) -> None:
    write_raw(str(file), size, (Piece(offset, data) for offset, data in pieces), ignore)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "image"


class TestReading:
    def test_zeros_are_left_out(self, image: Path) -> None:
        image.write_bytes(b"a" * BLOCK + bytes(2 * BLOCK) + b"b" * BLOCK)
        assert read(str(image)) == [(0, b"a" * BLOCK), (3 * BLOCK, b"b" * BLOCK)]

    def test_a_short_last_block(self, image: Path) -> None:
        image.write_bytes(bytes(BLOCK) + b"end")
        assert read(str(image)) == [(BLOCK, b"end")]
        image.write_bytes(bytes(BLOCK + 3))
        assert read(str(image)) == []

    def test_a_file_of_holes_is_not_read_through(self, image: Path) -> None:
        image.touch()
        os.truncate(image, 1 << 40)
        with image.open("r+b") as file:
            file.seek(1 << 39)
            file.write(b"x" * BLOCK)
        assert read(str(image)) == [(1 << 39, b"x" * BLOCK)]

    def test_data_longer_than_a_piece(self, image: Path) -> None:
        data = os.urandom(PIECE_BYTES * 2 + 5)
        image.write_bytes(data)
        assert b"".join(part for _, part in read(str(image))) == data

    def test_a_pipe(self) -> None:
        """A pipe hands out what it has; offsets stay on block boundaries all the same."""
        code = (
            "import sys\nfrom tests.cli.test_raw_files import read\n"
            "for offset, data in read('-'): print(offset, len(data))"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdin is not None
        for part in (b"a" * 100, b"a" * (BLOCK - 100), bytes(BLOCK), b"end"):
            child.stdin.write(part)
            child.stdin.flush()
        assert child.communicate()[0] == f"0 {BLOCK}\n{2 * BLOCK} 3\n".encode()

    def test_a_file_longer_than_the_volume(self, image: Path) -> None:
        image.write_bytes(b"x" * (BLOCK + 1))
        with pytest.raises(InvalidArgument, match="longer than the volume, which has 4 KiB"):
            read(str(image), limit=BLOCK)

    @pytest.mark.parametrize(("name", "message"), [("", "directory"), ("none", "No such file")])
    def test_what_cannot_be_read(self, tmp_path: Path, name: str, message: str) -> None:
        with pytest.raises(NbdstoreError, match=message):
            RawSource(str(tmp_path / name))


class TestWriting:
    def test_holes_stay_holes(self, image: Path) -> None:
        write(image, 1 << 30, (1 << 29, b"x" * BLOCK))
        assert image.stat().st_size == 1 << 30
        assert image.stat().st_blocks * 512 <= 4 * BLOCK
        assert read(str(image)) == [(1 << 29, b"x" * BLOCK)]

    def test_a_file_that_was_there_is_replaced(self, image: Path) -> None:
        image.write_bytes(b"old" * 10_000)
        write(image, BLOCK, (0, b"new"))
        assert image.read_bytes() == b"new" + bytes(BLOCK - 3)

    def test_a_file_that_was_there_keeps_its_mode(self, image: Path) -> None:
        image.write_bytes(b"before")
        image.chmod(0o600)
        write(image, BLOCK)
        assert stat.S_IMODE(image.stat().st_mode) == 0o600

    def test_nobody_s_link_is_written_through(self, image: Path) -> None:
        other = image.with_name("other")
        other.write_bytes(b"precious")
        link = image.with_name(f".{image.name}.{os.getpid()}.partial")
        link.symlink_to(other)
        write(image, BLOCK)
        assert (other.read_bytes(), image.stat().st_size) == (b"precious", BLOCK)

    def test_links_that_go_round_in_circles(self, image: Path) -> None:
        image.symlink_to(image)
        with pytest.raises(NbdstoreError, match="Too many levels of symbolic links"):
            write(image, BLOCK)
        assert list(image.parent.iterdir()) == [image]

    def test_a_failure_leaves_what_was_there(self, image: Path) -> None:
        def failing() -> Iterator[Piece]:
            yield Piece(0, b"new")
            raise NbdstoreError("the server is gone")

        image.write_bytes(b"old")
        with pytest.raises(NbdstoreError, match="server is gone"):
            write_raw(str(image), BLOCK, failing(), ignore)
        assert image.read_bytes() == b"old"
        assert list(image.parent.iterdir()) == [image]

    def test_a_link_keeps_pointing(self, image: Path) -> None:
        link = image.with_name("link")
        link.symlink_to(image)
        write(link, BLOCK, (0, b"new"))
        assert link.is_symlink()
        assert image.read_bytes()[:3] == b"new"

    def test_a_directory_that_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(NbdstoreError, match=r"cannot write '.*missing/x': No such file"):
            write(tmp_path / "missing" / "x", BLOCK)

    def test_a_full_disk(self) -> None:
        with pytest.raises(NbdstoreError, match="cannot write '/dev/full': No space left"):
            write("/dev/full", BLOCK, (0, b"x"))


class TestStandardOutput:
    CODE = (
        "from tests.cli.test_raw_files import write\n"
        f"write('-', {64 * BLOCK}, ({BLOCK}, b'a' * {BLOCK}), ({9 * BLOCK}, b'end'))"
    )
    CONTENT = bytes(BLOCK) + b"a" * BLOCK + bytes(7 * BLOCK) + b"end" + bytes(55 * BLOCK - 3)

    def run(self, stdout: int) -> bytes:
        done = subprocess.run([sys.executable, "-c", self.CODE], stdout=stdout, check=True)
        return done.stdout or b""

    def test_a_pipe_gets_every_byte(self) -> None:
        assert self.run(subprocess.PIPE) == self.CONTENT

    def test_a_file_gets_holes(self, image: Path) -> None:
        with image.open("wb") as file:
            self.run(file.fileno())
        assert image.read_bytes() == self.CONTENT
        assert image.stat().st_blocks * 512 < len(self.CONTENT)

    def test_a_file_that_is_appended_to(self, image: Path) -> None:
        image.write_bytes(b"before")
        with image.open("ab") as file:
            self.run(file.fileno())
        assert image.read_bytes() == b"before" + self.CONTENT

    def test_a_file_with_something_ahead(self, image: Path) -> None:
        image.write_bytes(b"x" * (80 * BLOCK))
        with image.open("r+b") as file:
            self.run(file.fileno())
        assert image.read_bytes() == self.CONTENT + b"x" * (16 * BLOCK)


def test_pieces_are_found_at_memory_speed_without_copies() -> None:
    chunk = b"x" * PIECE_BYTES
    (piece,) = raw_files._without_zeros(0, chunk)
    assert isinstance(piece.data, memoryview)
    assert piece.data.obj is chunk
