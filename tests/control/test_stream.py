"""The data stream: whole, byte by byte, damaged, cut off, and told to fail."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstore.control.stream import (
    FRAME_HEADER_SIZE,
    MAX_PAYLOAD,
    Piece,
    StreamReader,
    StreamWriter,
)
from nbdstore.errors import ControlError, NbdstoreError, NoSpace

SIZE = 1 << 20
PIECES = [
    Piece(0, b"first"),
    Piece(5, b"next to it"),
    Piece(8192, bytes(100)),
    Piece(SIZE - 1, b"z"),
]


def written(pieces: list[Piece], size: int = SIZE) -> bytes:
    writer = StreamWriter()
    buffers = writer.header(size)
    for piece in pieces:
        buffers += writer.data(piece)
    return b"".join(buffers + writer.end())


def read(chunks: list[bytes]) -> list[Piece]:
    reader = StreamReader()
    pieces = [piece for chunk in chunks for piece in reader.feed(chunk)]
    reader.end()
    return pieces


class TestWholeStreams:
    def test_pieces_come_back(self) -> None:
        assert read([written(PIECES)]) == PIECES

    def test_pieces_come_back_byte_by_byte(self) -> None:
        stream = written(PIECES)
        assert read([stream[i : i + 1] for i in range(len(stream))]) == PIECES

    def test_size_is_known_after_the_header(self) -> None:
        reader = StreamReader()
        assert list(reader.feed(written(PIECES)[:FRAME_HEADER_SIZE])) == []
        assert reader.size == SIZE

    def test_an_empty_content_is_whole(self) -> None:
        assert read([written([], size=0)]) == []

    def test_the_payload_is_not_copied_by_the_writer(self) -> None:
        payload = memoryview(b"payload")
        assert StreamWriter().data(Piece(0, payload))[1] is payload

    @given(
        st.lists(st.tuples(st.integers(0, 50), st.binary(min_size=1, max_size=50)), max_size=10),
        st.integers(1, 64),
    )
    def test_any_content_in_any_chunks(self, gaps: list[tuple[int, bytes]], step: int) -> None:
        pieces, position = [], 0
        for gap, data in gaps:
            pieces.append(Piece(position + gap, data))
            position += gap + len(data)
        stream = written(pieces, size=position)
        assert read([stream[i : i + step] for i in range(0, len(stream), step)]) == pieces


class TestBrokenStreams:
    def test_every_damaged_byte_is_noticed(self) -> None:
        stream = written(PIECES)
        for position in range(len(stream)):
            damaged = bytearray(stream)
            damaged[position] ^= 0x40
            with pytest.raises(ControlError):
                read([bytes(damaged)])

    def test_every_cut_is_noticed(self) -> None:
        stream = written(PIECES)
        for stop in range(len(stream)):
            with pytest.raises(ControlError):
                read([stream[:stop]])

    def test_bytes_after_the_end_are_refused(self) -> None:
        with pytest.raises(ControlError, match="does not belong"):
            read([written(PIECES), written(PIECES)])

    def test_a_frame_that_is_left_out_is_noticed(self) -> None:
        writer = StreamWriter()
        buffers = writer.header(SIZE)
        writer.data(PIECES[0])
        with pytest.raises(ControlError, match="lost bytes"):
            read([b"".join(buffers + writer.end())])

    @pytest.mark.parametrize(
        "pieces",
        [
            pytest.param([Piece(10, b"abc"), Piece(12, b"x")], id="overlap"),
            pytest.param([Piece(10, b"abc"), Piece(0, b"x")], id="backwards"),
            pytest.param([Piece(SIZE - 1, b"xy")], id="beyond the size"),
            pytest.param([Piece(2**64 - 1, b"xy")], id="beyond all sizes"),
        ],
    )
    def test_misplaced_pieces_are_refused(self, pieces: list[Piece]) -> None:
        with pytest.raises(ControlError, match="out of order or beyond"):
            read([written(pieces)])

    def test_a_frame_larger_than_allowed_is_refused_before_it_is_buffered(self) -> None:
        header = struct.pack("!BBHIQQ", 2, 1, 0, MAX_PAYLOAD + 1, 0, 0)
        with pytest.raises(ControlError, match="not a data stream"):
            list(StreamReader().feed(header))

    def test_another_format_is_refused(self) -> None:
        with pytest.raises(ControlError, match="not a data stream"):
            list(StreamReader().feed(b"<!DOCTYPE html><html><body>"))

    def test_what_made_the_sender_fail_is_raised(self) -> None:
        writer = StreamWriter()
        buffers = writer.header(SIZE) + writer.data(PIECES[0]) + writer.failed(NoSpace("full"))
        with pytest.raises(NoSpace, match="full"):
            read([b"".join(buffers)])

    @given(st.binary(max_size=200))
    def test_garbage_raises_nothing_else(self, garbage: bytes) -> None:
        with pytest.raises(NbdstoreError):
            read([garbage])
