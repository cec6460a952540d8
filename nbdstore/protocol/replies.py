"""Replies, as lists of buffers: headers are made here, payloads are passed through untouched.

One class per family of replies, all with the same methods, so that nothing outside asks which
family is in use:

    SimpleReplies       16-byte headers; no holes, no messages (proto.md, "Simple reply message")
    StructuredReplies   chunks for READ, BLOCK_STATUS and errors; simple replies, which are
                        shorter, for commands without payload ("Structured reply chunk message")
    ExtendedReplies     chunks of 32 bytes for everything, each with the request's offset

Every method takes ``out``, the list of buffers to extend, and returns how many bytes it added. A
READ's content arrives as segments: bytes-like objects are data, an int is that many zeroes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from struct import Struct
from typing import ClassVar, TypeAlias

from nbdstore.protocol.agreement import MetaContext, ReplyMode
from nbdstore.protocol.constants import (
    BLOCK_STATUS_EXT,
    ERROR,
    EXTENDED_EXTENT,
    EXTENDED_OFFSET_DATA_REPLY,
    EXTENDED_REPLY,
    EXTENDED_REPLY_MAGIC,
    EXTENT,
    OFFSET_DATA_REPLY,
    OFFSET_HOLE,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY,
    STRUCTURED_REPLY_MAGIC,
    U32,
    Chunk,
    ReplyFlag,
)
from nbdstore.protocol.options import clip_message
from nbdstore.protocol.transmission import Request

Buffer: TypeAlias = bytes | bytearray | memoryview
Segments: TypeAlias = Sequence[Buffer | int]
Extents: TypeAlias = Sequence[tuple[int, int]]
"""``(length, status)`` pairs of one metadata context."""

ZEROES = memoryview(bytes(1 << 20))
"""What holes are sent as when the client cannot take hole chunks."""

_DONE = int(ReplyFlag.DONE)
_OFFSET_DATA = int(Chunk.OFFSET_DATA)
_SUCCESS = SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, bytes(8))[:8]


def make_replies(mode: ReplyMode) -> SimpleReplies:
    """Choose the family of replies that was agreed on."""
    return _FAMILIES[mode]()


def append_zeroes(out: list[Buffer], length: int) -> None:
    """Append ``length`` zero bytes without allocating them."""
    while length > len(ZEROES):
        out.append(ZEROES)
        length -= len(ZEROES)
    out.append(ZEROES[:length])


class SimpleReplies:
    """Simple replies, and what the other families share with them."""

    def done(self, out: list[Buffer], cookie: bytes, offset: int) -> int:
        """Acknowledge a command without payload."""
        out.append(_SUCCESS + cookie)
        return SIMPLE_REPLY.size

    def all_done(self, out: list[Buffer], requests: Sequence[Request]) -> int:
        """Acknowledge many commands without payload at once, as one buffer."""
        out.append(b"".join([_SUCCESS + request[2] for request in requests]))
        return SIMPLE_REPLY.size * len(requests)

    def error(self, out: list[Buffer], cookie: bytes, offset: int, error: int, text: str) -> int:
        """Answer with an error; ``text`` is for a person, if the family can carry it."""
        assert error > 0
        out.append(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie))
        return SIMPLE_REPLY.size

    def read(
        self,
        out: list[Buffer],
        cookie: bytes,
        offset: int,
        length: int,
        segments: Segments,
        whole: bool = False,
    ) -> int:
        """Answer a READ of [offset, offset + length); ``whole`` asks for one chunk (DF)."""
        out.append(_SUCCESS + cookie)
        append_data(out, segments)
        return SIMPLE_REPLY.size + length

    def read_batch(
        self, out: list[Buffer], requests: Sequence[Request], contents: Sequence[Buffer]
    ) -> int:
        """Answer many READs at once, not empty, each by one run of data of the same length."""
        headers = self._data_headers(requests)
        out += chain.from_iterable(zip(headers, contents, strict=True))
        return len(requests) * (len(headers[0]) + len(contents[0]))

    def _data_headers(self, requests: Sequence[Request]) -> list[bytes]:
        """What comes before the data of each READ that is answered by one run of data."""
        return [_SUCCESS + request[2] for request in requests]

    def block_status(
        self,
        out: list[Buffer],
        cookie: bytes,
        offset: int,
        contexts: Sequence[tuple[MetaContext, Extents]],
    ) -> int:
        """Answer a BLOCK_STATUS: one chunk per context, DONE on the last."""
        raise AssertionError("contexts cannot be agreed on with simple replies")


def append_data(out: list[Buffer], segments: Segments) -> None:
    """Append a READ's content, holes as zeroes."""
    for segment in segments:
        if isinstance(segment, int):
            append_zeroes(out, segment)
        else:
            out.append(segment)


class StructuredReplies(SimpleReplies):
    """Structured replies."""

    _extent: ClassVar[Struct] = EXTENT

    def _header(
        self, cookie: bytes, offset: int, flags: int, chunk: int, payload_length: int
    ) -> bytes:
        return STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, flags, chunk, cookie, payload_length)

    def _data_header(
        self, cookie: bytes, offset: int, flags: int, start: int, length: int
    ) -> bytes:
        """What comes before `length` bytes of data from `start` on; packed by one call."""
        return OFFSET_DATA_REPLY.pack(
            STRUCTURED_REPLY_MAGIC, flags, _OFFSET_DATA, cookie, 8 + length, start
        )

    def _data_headers(self, requests: Sequence[Request]) -> list[bytes]:
        pack, magic, kind = OFFSET_DATA_REPLY.pack, STRUCTURED_REPLY_MAGIC, _OFFSET_DATA
        return [
            pack(magic, _DONE, kind, cookie, 8 + length, offset)
            for _, _, cookie, offset, length, _, _ in requests
        ]

    def error(self, out: list[Buffer], cookie: bytes, offset: int, error: int, text: str) -> int:
        assert error > 0
        message = clip_message(text)
        payload = ERROR.pack(error, len(message)) + message
        reply = self._header(cookie, offset, _DONE, Chunk.ERROR, len(payload)) + payload
        out.append(reply)
        return len(reply)

    def read(
        self,
        out: list[Buffer],
        cookie: bytes,
        offset: int,
        length: int,
        segments: Segments,
        whole: bool = False,
    ) -> int:
        """Answer a READ with chunks that cover every byte exactly once.

        All content is at hand and verified before the first header goes out, so that DONE may
        stand on the last chunk ("Structured reply flags").
        """
        if not length:
            return self._none(out, cookie, offset)
        if len(segments) == 1 and not isinstance(segments[0], int):
            # One run of data: the most frequent reply, and the cheapest to make.
            header = self._data_header(cookie, offset, _DONE, offset, length)
            out += (header, segments[0])
            return len(header) + length
        if whole and not all(isinstance(segment, int) for segment in segments):
            return self._data(out, cookie, offset, (offset, length, segments), _DONE)
        return self._runs(out, cookie, offset, segments)

    def _none(self, out: list[Buffer], cookie: bytes, offset: int) -> int:
        header = self._header(cookie, offset, _DONE, Chunk.NONE, 0)
        out.append(header)
        return len(header)

    def _runs(self, out: list[Buffer], cookie: bytes, offset: int, segments: Segments) -> int:
        """Send runs of data and holes alternately; DONE on the last."""
        runs = join_runs(offset, segments)
        n_bytes = 0
        for start, length, parts in runs:
            flags = _DONE if start == runs[-1][0] else 0
            if parts:
                n_bytes += self._data(out, cookie, offset, (start, length, parts), flags)
            else:
                header = self._header(cookie, offset, flags, Chunk.OFFSET_HOLE, OFFSET_HOLE.size)
                out.append(header + OFFSET_HOLE.pack(start, length))
                n_bytes += len(out[-1])
        return n_bytes

    def _data(self, out: list[Buffer], cookie: bytes, offset: int, run: Run, flags: int) -> int:
        start, length, parts = run
        out.append(self._data_header(cookie, offset, flags, start, length))
        n_bytes = len(out[-1]) + length
        append_data(out, parts)
        return n_bytes

    def block_status(
        self,
        out: list[Buffer],
        cookie: bytes,
        offset: int,
        contexts: Sequence[tuple[MetaContext, Extents]],
    ) -> int:
        n_bytes = 0
        for context, extents in contexts:
            flags = _DONE if context is contexts[-1][0] else 0
            payload = self._status_head(context.id, len(extents)) + b"".join(
                [self._extent.pack(length, status) for length, status in extents]
            )
            header = self._header(cookie, offset, flags, self._status_chunk, len(payload))
            out += (header, payload)
            n_bytes += len(header) + len(payload)
        return n_bytes

    _status_chunk: ClassVar[Chunk] = Chunk.BLOCK_STATUS

    def _status_head(self, context_id: int, n_extents: int) -> bytes:
        return U32.pack(context_id)


class ExtendedReplies(StructuredReplies):
    """Extended replies: structured ones with wider fields, for every command."""

    _extent = EXTENDED_EXTENT
    _status_chunk = Chunk.BLOCK_STATUS_EXT

    def _header(
        self, cookie: bytes, offset: int, flags: int, chunk: int, payload_length: int
    ) -> bytes:
        return EXTENDED_REPLY.pack(
            EXTENDED_REPLY_MAGIC, flags, chunk, cookie, offset, payload_length
        )

    def _data_header(
        self, cookie: bytes, offset: int, flags: int, start: int, length: int
    ) -> bytes:
        return EXTENDED_OFFSET_DATA_REPLY.pack(
            EXTENDED_REPLY_MAGIC, flags, _OFFSET_DATA, cookie, offset, 8 + length, start
        )

    def _data_headers(self, requests: Sequence[Request]) -> list[bytes]:
        return [
            self._data_header(cookie, offset, _DONE, offset, length)
            for _, _, cookie, offset, length, _, _ in requests
        ]

    def done(self, out: list[Buffer], cookie: bytes, offset: int) -> int:
        return self._none(out, cookie, offset)

    def all_done(self, out: list[Buffer], requests: Sequence[Request]) -> int:
        pack, magic, none = EXTENDED_REPLY.pack, EXTENDED_REPLY_MAGIC, int(Chunk.NONE)
        headers = [pack(magic, _DONE, none, request[2], request[3], 0) for request in requests]
        out.append(b"".join(headers))
        return EXTENDED_REPLY.size * len(requests)

    def _status_head(self, context_id: int, n_extents: int) -> bytes:
        return BLOCK_STATUS_EXT.pack(context_id, n_extents)


Run: TypeAlias = tuple[int, int, Segments]
"""``(start, length, parts)``; a hole has no parts."""


def join_runs(offset: int, segments: Segments) -> list[Run]:
    """Join neighbouring segments of one kind: each run becomes one chunk."""
    runs: list[tuple[int, int, list[Buffer]]] = []
    for segment in segments:
        is_hole = isinstance(segment, int)
        length = segment if isinstance(segment, int) else len(segment)
        if not length:
            continue
        if not runs or is_hole == bool(runs[-1][2]):
            start = runs[-1][0] + runs[-1][1] if runs else offset
            runs.append((start, 0, []))
        start, so_far, parts = runs[-1]
        if not isinstance(segment, int):
            parts.append(segment)
        runs[-1] = (start, so_far + length, parts)
    return list(runs)


_FAMILIES = {
    ReplyMode.SIMPLE: SimpleReplies,
    ReplyMode.STRUCTURED: StructuredReplies,
    ReplyMode.EXTENDED: ExtendedReplies,
}
