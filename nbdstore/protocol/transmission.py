"""The server's side of the transmission phase: bytes in, checked requests out.

Sans-I/O, and made for batches: the driver receives as many bytes as the socket has into
`get_buffer`, and `received` returns all requests that are complete, each judged by the `Rules`.

Where a payload lies decides who may keep it:

    payload                        lies in                     valid
    ----------------------------   -------------------------   -----------------------------------
    complete in the same batch     the receive buffer          until the next `get_buffer`; `keep`
    or not longer than DIRECT                                  copies it
    longer than DIRECT_BYTES       a buffer of its own, into   until `release` or the next
                                   which the rest is received  `get_buffer`, which take it back;
                                                               `keep` hands it over
    refused                        nowhere: read past          -

So small payloads are never copied before the store, large ones only for the part that came with
their header, and a steady stream of large writes allocates nothing.

Why plain tuples: a request costs 30 ns to make as a tuple, 100 to 180 ns as an object of a class,
and a server that answers 200,000 requests per second has 5 us for everything.
"""

from __future__ import annotations

from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import TypeAlias

from nbdstore.errors import ProtocolError
from nbdstore.protocol.agreement import ReplyMode
from nbdstore.protocol.constants import (
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    U32,
    U64,
    Command,
    CommandFlag,
    Errno,
)
from nbdstore.protocol.rules import WRITING, Rules

Request: TypeAlias = tuple[int, int, bytes, int, int, memoryview | None, int]
"""``(command, flags, cookie, offset, length, payload, verdict)``.

``flags`` holds only those that change what the server does: FUA of commands that write, NO_HOLE,
FAST_ZERO, DF, REQ_ONE. ``length`` is the effect's. ``payload`` is a WRITE's data, or the context
ids of a filtered BLOCK_STATUS. ``verdict`` is that of `Rules.judge`."""

RECEIVE_BYTES = (512 << 10) + 4096
"""The receive buffer: four requests of 128 KiB, the largest a Linux client sends by default, and
their headers. Without room for those it would take three, and move the fourth, nearly whole."""

DIRECT_BYTES = 128 << 10
"""Incomplete payloads above this are received into a buffer of their own."""

SPARE_BYTES = 4 << 20
"""A larger buffer of a payload's own is not kept for the next one."""

MAX_SPARES_BYTES = 16 << 20
"""Buffers that are kept, together."""

MAX_DISCARD = 64 << 20
"""Payloads that are refused are read past up to this length, and drop the client beyond. Up to
32 MiB nobody may be dropped (proto.md, "Block size constraints"); libnbd sends up to 64 MiB."""

# Members of IntEnum and IntFlag cost a lookup through their class; the parser compares these.
_READ = int(Command.READ)
_WRITE = int(Command.WRITE)
_DISC = int(Command.DISC)
_BLOCK_STATUS = int(Command.BLOCK_STATUS)
_FUA = int(CommandFlag.FUA)
_PAYLOAD_LEN = int(CommandFlag.PAYLOAD_LEN)
_EINVAL = int(Errno.EINVAL)
_WRITING = frozenset(int(command) for command in WRITING)


class Spares:
    """Buffers of large payloads that wait to be used again, by any connection.

    Arguments:
        max_bytes: what all of them may have together.
    """

    def __init__(self, max_bytes: int = MAX_SPARES_BYTES) -> None:
        self.buffers: list[mmap] = []
        self._max_bytes = max_bytes
        self._n_bytes = 0

    def take(self, length: int) -> mmap:
        """Return a buffer for `length` bytes, of less than twice that."""
        for position, buffer in enumerate(self.buffers):
            if length <= len(buffer) < 2 * length:
                self._n_bytes -= len(buffer)
                return self.buffers.pop(position)
        return reserve(length)

    def give(self, buffer: mmap) -> None:
        """Take a buffer that nobody uses any more; the oldest make way for it."""
        if len(buffer) > SPARE_BYTES:
            return
        self.buffers.append(buffer)
        self._n_bytes += len(buffer)
        while self._n_bytes > self._max_bytes:
            self._n_bytes -= len(self.buffers.pop(0))


class RequestParser:
    """Turn what a client sends into requests.

    Arguments:
        rules: what the agreement allows.
        spares: shared with other parsers; None = spares of its own.
        receive_bytes, direct_bytes, max_discard: see the module's constants.
    """

    def __init__(
        self,
        rules: Rules,
        *,
        spares: Spares | None = None,
        receive_bytes: int = RECEIVE_BYTES,
        direct_bytes: int = DIRECT_BYTES,
        max_discard: int = MAX_DISCARD,
    ) -> None:
        self.finished = False
        """True after DISC: what follows is ignored (proto.md, "NBD_CMD_DISC")."""
        self.direct_bytes = 0
        """Size of the buffer into which a large payload is being received; 0 = there is none."""

        extended = rules.mode is ReplyMode.EXTENDED
        self._rules = rules
        self._header = EXTENDED_REQUEST if extended else REQUEST
        self._magic = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
        self._payload_flag = _PAYLOAD_LEN if extended else 0
        self._set_shortcuts()
        self._direct_bytes = direct_bytes
        self._max_discard = max_discard

        assert receive_bytes >= 2 * (self._header.size + direct_bytes)
        self._view = memoryview(reserve(receive_bytes))
        self._start = 0
        self._end = 0
        self._missing = 0
        """Bytes that the request at ``_start`` still lacks."""

        self._direct: memoryview | None = None
        self._direct_buffer: mmap | None = None
        self.direct_request: Request | None = None
        """The request whose large payload is being received, still without it."""
        self._filled = 0
        self._lent: mmap | None = None
        self._spares = spares if spares is not None else Spares()

        self._refused: Request | None = None
        self._left_to_skip = 0

    # --- Receiving ---------------------------------------------------------------------------

    def get_buffer(self) -> memoryview:
        """Say where the next bytes go; never empty. Ends the life of payloads not kept."""
        if self._lent is not None:
            self.release()
        if self._direct is not None:
            return self._direct[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
        elif len(self._view) - self._end < max(self._missing, self._direct_bytes):
            # At most one incomplete request is left, so this moves at most DIRECT_BYTES.
            left = self._end - self._start
            self._view[:left] = self._view[self._start : self._end]
            self._start, self._end = 0, left
        return self._view[self._end :]

    def received(self, n_bytes: int) -> list[Request]:
        """Take note of bytes received into the last `get_buffer`; return complete requests.

        Errors:
            ProtocolError: the stream has no meaning any more, or a payload is beyond all limits.
        """
        if self.finished:
            return []
        if self._direct is not None:
            return self._received_directly(n_bytes)
        self._end += n_bytes
        requests: list[Request] = []
        if not self._left_to_skip or self._skip(requests):
            self._parse(requests)
        return requests

    def keep(self, payload: memoryview) -> memoryview:
        """Make a payload outlive the next `get_buffer`."""
        if self._lent is not None and payload.obj is self._lent:
            self._lent = None
            return payload
        return memoryview(bytes(payload))

    def release(self) -> None:
        """End the life of a large payload that was not kept: its buffer is for the next one."""
        if self._lent is not None:
            self._spares.give(self._lent)
            self._lent = None

    def close(self) -> None:
        """Give the buffers back now; payloads not kept are lost, and nothing more is received.

        Whoever holds a parser may be part of a cycle, and live until garbage is collected: there
        is too little of it for that to be soon, but each may have a payload of 32 MiB.
        """
        self.finished = True
        self._view = memoryview(b"")
        self._direct = self._direct_buffer = self.direct_request = self._lent = None
        self.direct_bytes = 0

    def grow(self, size: int) -> None:
        """Allow requests up to `size` from now on: the export has become larger."""
        self._rules.size = max(size, self._rules.size)
        self._set_shortcuts()

    def _set_shortcuts(self) -> None:
        """The hot loop takes a shortcut past the rules, below these sizes and for single bytes."""
        rules = self._rules
        self._readable_size = -1 if rules.misaligned else rules.size
        self._writable_size = -1 if rules.read_only else self._readable_size

    @property
    def is_between_requests(self) -> bool:
        """Whether the stream may end here without cutting a request."""
        return self._start == self._end and self._direct is None and not self._left_to_skip

    # --- Parsing -----------------------------------------------------------------------------

    def _parse(self, requests: list[Request]) -> None:
        """Append all complete requests. The hot loop: reads and plain writes come first."""
        view, end, position = self._view, self._end, self._start
        unpack, header_size, magic = self._header.unpack_from, self._header.size, self._magic
        size, writable_size = self._readable_size, self._writable_size
        max_payload, payload_flag = self._rules.max_payload, self._payload_flag
        append = requests.append
        self._missing = header_size
        while position + header_size <= end:
            found, flags, command, cookie, offset, length = unpack(view, position)
            if found != magic:
                raise ProtocolError(f"a request starts with {found:#010x}, not {magic:#010x}")
            body = position + header_size
            if 0 < length <= max_payload:
                if command == _READ and not flags and offset + length <= size:
                    append((_READ, 0, cookie, offset, length, None, 0))
                    position = body
                    continue
                stop = body + length
                if (
                    command == _WRITE
                    and flags == payload_flag
                    and stop <= end
                    and offset + length <= writable_size
                ):
                    append((_WRITE, 0, cookie, offset, length, view[body:stop], 0))
                    position = stop
                    continue
            if command == _WRITE or (flags & payload_flag and command != _DISC):
                # Extended headers: only the flag announces a payload, but a WRITE without it is
                # taken to have one too, as qemu does: its data could else be read as requests.
                self._start = body
                if not self._take_payload(requests, flags, command, cookie, offset, length):
                    if self._missing:
                        self._start = position
                    return
                position = self._start
                continue
            verdict = self._rules.judge(command, flags, offset, length)
            kept_flags = flags if command in _WRITING else flags & ~_FUA
            append((command, kept_flags, cookie, offset, length, None, verdict))
            position = body
            if command == _DISC:
                self.finished = True
                break
        self._start = position

    def _take_payload(
        self,
        requests: list[Request],
        flags: int,
        command: int,
        cookie: bytes,
        offset: int,
        length: int,
    ) -> bool:
        """Deal with the payload at ``_start``; False if more bytes must come first.

        On False, ``_missing`` says how many of them must come into the receive buffer; 0 if the
        rest is received, or read past, by itself.
        """
        verdict = self._judge_payload(flags, command, offset, length)
        available = self._end - self._start
        if verdict > 0:
            if length > self._max_discard:
                raise ProtocolError(f"a payload of {length} bytes")
            self._refused = (command, flags, cookie, offset, length, None, verdict)
            self._left_to_skip = length
            self._missing = 0
            return self._skip(requests)
        request = (command, flags & ~_PAYLOAD_LEN, cookie, offset, length, None, verdict)
        if available >= length:
            payload = self._view[self._start : self._start + length]
            requests.append(self._complete(request, payload))
            self._start += length
            return True
        self._missing = length - available
        if length > self._direct_bytes:
            self._receive_directly(request, available)
        return False

    def _judge_payload(self, flags: int, command: int, offset: int, length: int) -> int:
        if command == _WRITE:
            verdict = self._rules.judge(command, flags, offset, length)
            return verdict if verdict > 0 or flags & _PAYLOAD_LEN == self._payload_flag else _EINVAL
        if command == _BLOCK_STATUS and length in self._filter_lengths():
            # The effect's length is in the payload: judged again when that is complete.
            return self._rules.judge(command, flags, offset, 1)
        return _EINVAL

    def _filter_lengths(self) -> range:
        """The lengths that a filter payload may have: the effect's length and 1..n context ids."""
        return range(12, 8 + 4 * len(self._rules.context_ids) + 1, 4)

    def _complete(self, request: Request, payload: memoryview) -> Request:
        """Put a request and its payload together."""
        command, flags, cookie, offset, length, _, verdict = request
        if command != _BLOCK_STATUS:
            return (command, flags, cookie, offset, length, payload, verdict)
        (length,) = U64.unpack_from(payload)
        ids = [context_id for (context_id,) in U32.iter_unpack(payload[8:])]
        verdict = self._rules.judge(command, flags, offset, length)
        if not self._rules.context_ids.issuperset(ids) or len(set(ids)) < len(ids):
            verdict = _EINVAL
        return (command, flags & ~_FUA, cookie, offset, length, payload[8:], verdict)

    # --- Large payloads ----------------------------------------------------------------------

    def _receive_directly(self, request: Request, available: int) -> None:
        """Give a payload its own buffer, with the ``available`` bytes that have arrived."""
        length = request[4]
        buffer = self._spares.take(length)
        self._direct_buffer = buffer
        self.direct_bytes = len(buffer)
        self._direct = memoryview(buffer)[:length]
        self._direct[:available] = self._view[self._start : self._end]
        self.direct_request = request
        self._filled = available
        self._start = self._end = 0
        self._missing = 0

    def _received_directly(self, n_bytes: int) -> list[Request]:
        assert self._direct is not None and self.direct_request is not None
        self._filled += n_bytes
        if self._filled < len(self._direct):
            return []
        request = self._complete(self.direct_request, self._direct)
        self._lent = self._direct_buffer
        self._direct = self.direct_request = self._direct_buffer = None
        self.direct_bytes = 0
        return [request]

    # --- Refused payloads --------------------------------------------------------------------

    def _skip(self, requests: list[Request]) -> bool:
        """Read past a refused payload; its error is due only after all of it has come."""
        assert self._refused is not None
        skipped = min(self._left_to_skip, self._end - self._start)
        self._start += skipped
        self._left_to_skip -= skipped
        if self._left_to_skip:
            return False
        requests.append(self._refused)
        self._refused = None
        return True


def reserve(n_bytes: int) -> mmap:
    """Reserve memory that costs nothing before something is received into it.

    A bytearray would be filled with zeroes: then every idle connection would hold a whole receive
    buffer, and a header that announces 32 MiB would cost 32 MiB though none of them ever comes.
    """
    return mmap(-1, n_bytes, flags=MAP_PRIVATE | MAP_ANONYMOUS)
