"""The data stream: a volume's content over HTTP, holes left out, every byte checksummed.

Owns the format and its reader; knows neither HTTP nor pools. All numbers are big-endian::

    stream  = frame(HEADER) frame(DATA)* frame(END)          a whole content
            | frame(HEADER) frame(DATA)* frame(FAILED)       the sender could not go on
    frame   = kind u8, version u8, zero u16, length u32, offset u64, checksum u64, payload[length]

    HEADER    offset = size of the content in bytes; no payload
    DATA      payload stands at offset; frames ascend, do not overlap, and stay within the size
    END       offset = bytes of payload in all DATA frames; no payload
    FAILED    payload = the problem as JSON (`problems`)

What no DATA frame covers reads as zeros. The checksum is xxh3_64 of the frame's first 16 bytes
and its payload, so a damaged length or offset is noticed too. A stream without END was cut off and
must not be taken for a whole one.

Why a format at all: HTTP has no holes, and a thin volume of a TiB may hold a MiB; and an HTTP body
that ends early is easily taken for a short one.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from enum import IntEnum

import xxhash

from nbdstore.control import problems
from nbdstore.errors import ControlError

CONTENT_TYPE = "application/vnd.nbdstore.content"
VERSION = 1
MAX_PAYLOAD = 4 << 20
"""Bytes in one frame at most: bounds what a reader buffers."""
PIECE_BYTES = 1 << 20
"""Bytes that senders put into one frame: large enough that per-frame costs vanish."""

_PLACE = struct.Struct("!BBHIQ")
_CHECKSUM = struct.Struct("!Q")
FRAME_HEADER_SIZE = _PLACE.size + _CHECKSUM.size
assert FRAME_HEADER_SIZE == 24

Buffer = bytes | bytearray | memoryview


class FrameKind(IntEnum):
    HEADER = 1
    DATA = 2
    END = 3
    FAILED = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Data that stands at `offset` of a volume."""

    offset: int
    data: Buffer


class StreamWriter:
    """Turn pieces into frames: lists of buffers, the payload itself not copied."""

    def __init__(self) -> None:
        self._n_payload_bytes = 0

    def header(self, size: int) -> list[Buffer]:
        """Begin a stream for a content of `size` bytes."""
        return [_frame_header(FrameKind.HEADER, size, b"")]

    def data(self, piece: Piece) -> list[Buffer]:
        """Frame one piece of at most MAX_PAYLOAD bytes."""
        assert 0 < len(piece.data) <= MAX_PAYLOAD, len(piece.data)
        self._n_payload_bytes += len(piece.data)
        return [_frame_header(FrameKind.DATA, piece.offset, piece.data), piece.data]

    def end(self) -> list[Buffer]:
        """End a stream that is whole."""
        return [_frame_header(FrameKind.END, self._n_payload_bytes, b"")]

    def failed(self, error: Exception) -> list[Buffer]:
        """End a stream that cannot go on, saying why."""
        payload = problems.dump(error)
        return [_frame_header(FrameKind.FAILED, 0, payload), payload]


def _frame_header(kind: FrameKind, offset: int, payload: Buffer) -> bytes:
    place = _PLACE.pack(kind, VERSION, 0, len(payload), offset)
    return place + _CHECKSUM.pack(_checksum(place, payload))


def _checksum(place: Buffer, payload: Buffer) -> int:
    digest = xxhash.xxh3_64(place)
    digest.update(payload)
    return digest.intdigest()


class StreamReader:
    """Read a stream from chunks of any length, checking everything it can.

    size: bytes of the content, None until the header was read. finished: END was read.
    """

    def __init__(self) -> None:
        self.size: int | None = None
        self.finished = False
        self._buffer = bytearray()
        self._position = 0
        self._n_payload_bytes = 0

    def feed(self, chunk: Buffer) -> Iterator[Piece]:
        """Take in a chunk and yield the pieces it completes; exhaust it before the next call.

        Raises:
            ControlError: the stream is damaged or breaks the format's rules.
            NbdstoreError: the sender reported this failure.
        """
        self._buffer += chunk
        while (frame := self._next_frame()) is not None:
            kind, offset, payload = frame
            piece = self._take(kind, offset, payload)
            if piece is not None:
                yield piece

    def end(self) -> None:
        """Note that no more chunks will come.

        Raises:
            ControlError: the stream was cut off before its END.
        """
        if not self.finished:
            raise ControlError(f"the data stream was cut off at offset {self._position}")

    def _next_frame(self) -> tuple[int, int, bytes] | None:
        if len(self._buffer) < FRAME_HEADER_SIZE:
            return None
        kind, version, _, length, offset = _PLACE.unpack_from(self._buffer)
        if version != VERSION or length > MAX_PAYLOAD:
            raise ControlError("this is not a data stream of nbdstore, or of a newer version")
        stop = FRAME_HEADER_SIZE + length
        if len(self._buffer) < stop:
            return None
        with memoryview(self._buffer) as view:
            place, payload = bytes(view[: _PLACE.size]), bytes(view[FRAME_HEADER_SIZE:stop])
        (expected,) = _CHECKSUM.unpack_from(self._buffer, _PLACE.size)
        del self._buffer[:stop]
        if _checksum(place, payload) != expected:
            raise ControlError(f"the data stream is damaged after offset {self._position}")
        return kind, offset, payload

    def _take(self, kind: int, offset: int, payload: bytes) -> Piece | None:
        if self.finished or (self.size is None) != (kind == FrameKind.HEADER):
            raise ControlError(f"a frame of kind {kind} does not belong here in a data stream")
        if kind == FrameKind.FAILED:
            raise problems.load(payload)
        if kind == FrameKind.HEADER:
            self.size = offset
        elif kind == FrameKind.END:
            self._check_end(offset)
        elif kind == FrameKind.DATA:
            return self._place(Piece(offset, payload))
        else:
            raise ControlError(f"a data stream has no frames of kind {kind}")
        return None

    def _place(self, piece: Piece) -> Piece:
        stop = piece.offset + len(piece.data)
        assert self.size is not None
        if piece.offset < self._position or stop > self.size:
            raise ControlError(
                f"the data stream has bytes [{piece.offset}, {stop}) out of order or beyond its "
                f"size {self.size}"
            )
        self._position = stop
        self._n_payload_bytes += len(piece.data)
        return piece

    def _check_end(self, n_payload_bytes: int) -> None:
        if n_payload_bytes != self._n_payload_bytes:
            raise ControlError(
                f"the data stream lost bytes: {self._n_payload_bytes} came, "
                f"{n_payload_bytes} were sent"
            )
        self.finished = True
