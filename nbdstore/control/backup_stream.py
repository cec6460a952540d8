"""The backup stream: a snapshot, or what it has beyond an older one, as bytes for a file or a pipe.

Owns the format, its writer and its reader, and the token by which a broken transfer goes on; knows
neither pools nor HTTP. All numbers are big-endian::

    stream    = preamble frame(BEGIN) frame(DATA | ZERO)* frame(END)      all of it
              | preamble frame(BEGIN) frame(DATA | ZERO)* frame(FAILED)   the sender cannot go on
    preamble  = 89 'NBDSTORE' 0d 0a 1a, version u8 (1), zero u8[3]         16 bytes
    frame     = kind u8, zero u8[3], length u32, offset u64, checksum u64, payload[length]

    BEGIN   payload = JSON, the object of `Begin`; offset = where it begins: 0, or where it was
            broken off
    DATA    payload stands at offset
    ZERO    what stands at offset is zeros and needs no space; payload = how many, u64
    END     offset = bytes of payload in all DATA frames; payload = xxh3_128 of all bytes before
            this frame
    FAILED  payload = the problem as JSON (`problems`)

DATA and ZERO ascend, do not overlap, and lie within the size. What no frame covers is as in the
base, or zeros without one; beyond the end of a base that is smaller it is zeros. Members of BEGIN
that a reader does not know are ignored; whatever else it does not know is of another version.

A stream holds what is read, not what it costs: zeros for which space is set aside (NBD's
WRITE_ZEROES with NO_HOLE) come as the other zeros, and have none set aside where they are received.
That is a promise of one pool, which another one, with other space left, cannot be made to keep.

A frame's checksum is xxh3_64 of the checksum before it (of the preamble: of its 16 bytes), its own
first 16 bytes, and its payload. So a frame vouches for all before it: one that is lost, repeated or
in another stream's place is noticed as a damaged one is, and a stream that breaks off is good up to
its last whole frame. Checksums find damage; they do not keep out somebody who forges a stream.

Why not the data stream of volumes (`stream`): that lives as long as one HTTP request between
programs of one version; this one is kept for years, on media that rot.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Any, Final
from uuid import UUID

import xxhash

from nbdstore.control import problems
from nbdstore.control.model import Record
from nbdstore.control.stream import Buffer
from nbdstore.errors import BadStream, ControlError, InvalidArgument

CONTENT_TYPE: Final = "application/vnd.nbdstore.backup"
VERSION: Final = 1
MAX_PAYLOAD: Final = 4 << 20
"""Bytes in one frame at most: bounds what a reader buffers."""

_MAGIC: Final = b"\x89NBDSTORE\r\n\x1a"  # a transfer as text changes it
_PREAMBLE: Final = struct.Struct("!12sB3x")
_PLACE: Final = struct.Struct("!B3xIQ")
_CHECKSUM: Final = struct.Struct("!Q")
_LENGTH: Final = struct.Struct("!Q")
FRAME_HEADER_SIZE: Final = _PLACE.size + _CHECKSUM.size
assert (_PREAMBLE.size, FRAME_HEADER_SIZE) == (16, 24)


class FrameKind(IntEnum):
    BEGIN = 1
    DATA = 2
    ZERO = 3
    END = 4
    FAILED = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Begin(Record):
    """What a stream holds.

    volume, snapshot: names where it was sent. uuid, size, created: of the snapshot; a uuid is
    written as 01234567-89ab-cdef-0123-456789abcdef, in lower case.
    base, base_name, base_size: uuid, name and size of the snapshot that must be there; None in a
    stream that needs none. start: bytes of the volume that a stream before this one has brought.
    """

    volume: str
    snapshot: str
    uuid: str
    size: int
    created: str
    base: str | None = None
    base_name: str | None = None
    base_size: int | None = None
    start: int = 0

    @property
    def name(self) -> str:
        """``VOLUME@SNAPSHOT``, where it was sent."""
        return f"{self.volume}@{self.snapshot}"


@dataclasses.dataclass(frozen=True, slots=True)
class Data:
    """Bytes that stand at `offset`, in one buffer or several."""

    offset: int
    buffers: Sequence[Buffer]

    @property
    def stop(self) -> int:
        """Where they end."""
        return self.offset + sum(map(len, self.buffers))


@dataclasses.dataclass(frozen=True, slots=True)
class Zeros:
    """`length` zeros at `offset`, which need no space."""

    offset: int
    length: int

    @property
    def stop(self) -> int:
        """Where they end."""
        return self.offset + self.length


Part = Data | Zeros


class BackupWriter:
    """Make a stream: lists of buffers, the payload itself not copied.

    begun: what it holds, None before its beginning. position: where the last part ends.
    """

    def __init__(self) -> None:
        self.begun: Begin | None = None
        self.position = 0
        self._whole = xxhash.xxh3_128()
        self._checksum = 0
        self._n_payload_bytes = 0

    def begin(self, begin: Begin) -> list[Buffer]:
        """Begin the stream."""
        self.begun, self.position = begin, begin.start
        preamble = _PREAMBLE.pack(_MAGIC, VERSION)
        self._whole.update(preamble)
        self._checksum = xxhash.xxh3_64_intdigest(preamble)
        payload = json.dumps(begin.to_json()).encode()
        return [preamble, *self._frame(FrameKind.BEGIN, begin.start, [payload])]

    def part(self, part: Part) -> list[Buffer]:
        """Frame a part; data of at most MAX_PAYLOAD bytes."""
        self.position = part.stop
        if isinstance(part, Zeros):
            return self._frame(FrameKind.ZERO, part.offset, [_LENGTH.pack(part.length)])
        self._n_payload_bytes += part.stop - part.offset
        return self._frame(FrameKind.DATA, part.offset, part.buffers)

    def end(self) -> list[Buffer]:
        """End a stream that is whole."""
        return self._frame(FrameKind.END, self._n_payload_bytes, [self._whole.digest()])

    def failed(self, error: Exception) -> list[Buffer]:
        """End a stream that cannot go on, saying why."""
        return self._frame(FrameKind.FAILED, 0, [problems.dump(error)])

    def _frame(self, kind: FrameKind, offset: int, payload: Sequence[Buffer]) -> list[Buffer]:
        length = sum(map(len, payload))
        assert length <= MAX_PAYLOAD, length
        place = _PLACE.pack(kind, length, offset)
        self._checksum = _chained(self._checksum, place, payload)
        frame: list[Buffer] = [place + _CHECKSUM.pack(self._checksum), *payload]
        for buffer in frame:
            self._whole.update(buffer)
        return frame


def _chained(before: int, place: Buffer, payload: Sequence[Buffer]) -> int:
    digest = xxhash.xxh3_64(_CHECKSUM.pack(before))
    digest.update(place)
    for buffer in payload:
        digest.update(buffer)
    return digest.intdigest()


class BackupReader:
    """Read a stream from chunks of any length, checking everything.

    begin: what it holds, None until that was read. finished: END was read, and all is right.
    position: where the last part ends. n_data_bytes, n_zero_bytes, n_frames: read so far.
    """

    def __init__(self) -> None:
        self.begin: Begin | None = None
        self.finished = False
        self.position = 0
        self.n_data_bytes = 0
        self.n_zero_bytes = 0
        self.n_frames = 0
        self._whole = xxhash.xxh3_128()
        self._checksum: int | None = None
        self._buffer = bytearray()

    def feed(self, chunk: Buffer) -> Iterator[Part]:
        """Take in a chunk and yield the parts it completes; exhaust it before the next call.

        Raises:
            BadStream: it is damaged, of another version, or none at all.
            NbdstoreError: the sender reported this failure.
        """
        self._buffer += chunk
        if self._checksum is None and not self._take_preamble():
            return
        while (frame := self._next_frame()) is not None:
            part = self._take(*frame)
            if part is not None:
                yield part

    def end(self) -> Begin:
        """Note that no more chunks will come; return what the stream holds.

        Raises:
            BadStream: it was cut off before its END.
        """
        if self.begin is None:
            raise BadStream(
                "the backup stream is cut off before it says what it holds: see why the sender "
                "has ended"
            )
        if not self.finished:
            raise BadStream(f"the backup stream{self._where()} is cut off: its end is missing")
        if self._buffer:
            raise BadStream(f"the backup stream has {len(self._buffer)} bytes after its end")
        return self.begin

    def _where(self) -> str:
        return f" of {self.begin.name} after offset {self.position}" if self.begin else ""

    def _take_preamble(self) -> bool:
        preamble = bytes(self._buffer[: _PREAMBLE.size])
        if preamble[: len(_MAGIC)] != _MAGIC[: len(preamble)]:
            raise BadStream("this is not a backup stream: give what 'nbdstore send' wrote")
        if len(preamble) < _PREAMBLE.size:
            return False
        if preamble != _PREAMBLE.pack(_MAGIC, VERSION):
            raise BadStream(
                f"this is a backup stream of version {preamble[len(_MAGIC)]}, or damaged: "
                f"version {VERSION} is known here"
            )
        self._whole.update(preamble)
        self._checksum = xxhash.xxh3_64_intdigest(preamble)
        del self._buffer[: _PREAMBLE.size]
        return True

    def _next_frame(self) -> tuple[int, int, bytes] | None:
        if self.finished or len(self._buffer) < FRAME_HEADER_SIZE:
            return None
        kind, length, offset = _PLACE.unpack_from(self._buffer)
        if length > MAX_PAYLOAD:
            raise self._damaged()
        stop = FRAME_HEADER_SIZE + length
        if len(self._buffer) < stop:
            return None
        with memoryview(self._buffer) as view:
            place, payload = bytes(view[: _PLACE.size]), bytes(view[FRAME_HEADER_SIZE:stop])
        (expected,) = _CHECKSUM.unpack_from(self._buffer, _PLACE.size)
        del self._buffer[:stop]
        assert self._checksum is not None
        if (checksum := _chained(self._checksum, place, [payload])) != expected:
            raise self._damaged()
        self._checksum = checksum
        if kind != FrameKind.END:
            for buffer in (place, _CHECKSUM.pack(checksum), payload):
                self._whole.update(buffer)
        return kind, offset, payload

    def _damaged(self) -> BadStream:
        return BadStream(f"the backup stream{self._where()} is damaged: send it again")

    def _take(self, kind: int, offset: int, payload: bytes) -> Part | None:
        self.n_frames += 1
        if (self.begin is None) != (kind == FrameKind.BEGIN):
            raise BadStream(f"a frame of kind {kind} does not belong here in a backup stream")
        if kind == FrameKind.BEGIN:
            self._begin(payload)
        elif kind == FrameKind.DATA:
            self.n_data_bytes += len(payload)
            return self._place(Data(offset, [payload]))
        elif kind == FrameKind.ZERO:
            if len(payload) != _LENGTH.size:
                raise BadStream("a backup stream has zeros of an unknown number")
            (length,) = _LENGTH.unpack(payload)
            self.n_zero_bytes += length
            return self._place(Zeros(offset, length))
        elif kind == FrameKind.END:
            if (offset, payload) != (self.n_data_bytes, self._whole.digest()):
                raise self._damaged()
            self.finished = True
        elif kind == FrameKind.FAILED:
            raise problems.load(payload)
        else:
            raise BadStream(f"a backup stream has no frames of kind {kind}: is it a newer version?")
        return None

    def _begin(self, payload: bytes) -> None:
        try:
            begin = Begin.from_json(json.loads(payload))
        except (ValueError, ControlError) as error:
            raise BadStream(f"the beginning of the backup stream makes no sense: {error}") from None
        if not _has_sense(begin):
            raise BadStream("the beginning of the backup stream makes no sense: send it again")
        self.begin = begin
        self.position = begin.start

    def _place(self, part: Part) -> Part:
        assert self.begin is not None
        if part.offset < self.position or not part.offset < part.stop <= self.begin.size:
            raise BadStream(
                f"the backup stream has bytes [{part.offset}, {part.stop}) out of order or beyond "
                f"its size {self.begin.size}"
            )
        self.position = part.stop
        return part


def _has_sense(begin: Begin) -> bool:
    """Tell whether the members have the right types and ranges."""
    texts = (begin.volume, begin.snapshot, begin.created)
    base = (begin.base, begin.base_name, begin.base_size)
    is_based = _is_uuid(begin.base) and isinstance(begin.base_name, str)
    return (
        all(isinstance(text, str) and text for text in texts)
        and _is_uuid(begin.uuid)
        and isinstance(begin.size, int)
        and isinstance(begin.start, int)
        and 0 <= begin.start <= begin.size
        and (base == (None, None, None) or (is_based and isinstance(begin.base_size, int)))
    )


def _is_uuid(text: object) -> bool:
    """Tell whether it is a uuid, written as all write it: what is the same must look the same."""
    try:
        return isinstance(text, str) and text == str(UUID(text))
    except ValueError:
        return False


# -- tokens -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumeToken(Record):
    """Where a transfer broke off: what the receiver has, for the sender.

    uuid, base: as in `Begin`. start: the receiver has all bytes before this one.
    """

    uuid: str
    base: str | None
    start: int

    def encode(self) -> str:
        """Return it as one word."""
        raw = json.dumps(self.to_json(), separators=(",", ":")).encode()
        checksum = xxhash.xxh3_64_digest(raw)
        return "1." + base64.urlsafe_b64encode(checksum + raw).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> ResumeToken:
        """Read what `encode` returned; InvalidArgument if it is not that."""
        wrong = InvalidArgument(
            f"'{text:.40}' is no resume token: give what 'nbdstore receive --resume-token' printed"
        )
        version, _, word = text.partition(".")
        try:
            raw = base64.urlsafe_b64decode(word + "=" * (-len(word) % 4))
            if version != "1" or xxhash.xxh3_64_digest(raw[8:]) != raw[:8]:
                raise wrong
            value: Any = json.loads(raw[8:])
        except (binascii.Error, ValueError):
            raise wrong from None
        return cls.from_json(value)
