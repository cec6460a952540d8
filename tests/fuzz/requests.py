"""Target: the server's request parser, in each family of requests.

What must hold: ProtocolError and nothing else; what `Reading` says, which reads a stream that is
whole, byte by byte and without haste; the same however the stream is cut; payloads that are what
was sent, as long as they are promised to be; memory within the limits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nbdstore.errors import ProtocolError
from nbdstore.protocol.agreement import CONTEXTS, Agreement, Offer, ReplyMode
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
    TransmissionFlag,
)
from nbdstore.protocol.rules import WRITING, Rules
from nbdstore.protocol.transmission import Request, RequestParser
from tests.fuzz.cutting import WAYS, cut
from tests.fuzz.program import Program
from tests.protocol.conversation import FLAGS

SIZE = 1 << 20
RECEIVE_BYTES, DIRECT_BYTES, MAX_DISCARD, MAX_PAYLOAD = 1000, 400, 3000, 2000
FUA, PAYLOAD_LEN = int(CommandFlag.FUA), int(CommandFlag.PAYLOAD_LEN)

Seen = tuple[int, int, bytes, int, int, bytes | None, int]


def agreements(program: Program) -> Agreement:
    """One of the agreements that a handshake can end in."""
    mode = program.choose(tuple(ReplyMode))
    bits = program.byte()
    contexts = CONTEXTS if bits & 1 and mode is not ReplyMode.SIMPLE else ()
    flags = FLAGS
    if bits & 2:
        flags |= TransmissionFlag.READ_ONLY
    if bits & 4:
        flags &= ~(TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_FUA)
    if mode is not ReplyMode.SIMPLE:
        flags |= TransmissionFlag.SEND_DF
    if mode is ReplyMode.EXTENDED and contexts:
        flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
    block = 512 if bits & 8 else 1
    offer = Offer("disk", SIZE, flags, minimum_block=block, maximum_payload=MAX_PAYLOAD)
    return Agreement(offer, flags, mode, contexts)


def header(
    program: Program, extended: bool, length: int | None = None, command: int | None = None
) -> bytes:
    """A request's header, with any numbers in it; some ranges end near the end of the export."""
    if command is None or program.byte() % 8 == 7:
        command = program.byte() % 10 if program.byte() % 16 else program.number(16)
    flags = (0, 0, 0, PAYLOAD_LEN, FUA, program.byte())[program.byte() % 6]
    if extended and length is not None and program.byte() % 8 != 7:
        flags |= PAYLOAD_LEN
    cookie = program.number(64).to_bytes(8, "big")
    if length is None:
        length = program.number(64 if extended else 32)
    near_the_end = program.byte()
    if near_the_end % 2:
        offset = max(0, SIZE - length + near_the_end % 5 - 2) & ((1 << 64) - 1)
    else:
        offset = program.number(64)
    layout = EXTENDED_REQUEST if extended else REQUEST
    magic = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
    return layout.pack(magic, flags, command, cookie, offset, length)


def stream_of(program: Program, extended: bool) -> bytes:
    """What a client sends."""
    sent = bytearray()
    while program:
        kind = program.byte() % 8
        if kind == 0:
            sent += program.text()
        elif kind < 4:
            # A payload of any length, up to more than is read past, out of few bytes.
            text = program.text()
            payload = (text * (1 + program.byte() % 16))[: MAX_DISCARD + 100]
            sent += header(program, extended, len(payload), Command.WRITE) + payload
        elif kind == 4:
            ids = [program.byte() % 4 for _ in range(program.byte() % 4)]
            payload = U64.pack(program.number(64)) + b"".join(U32.pack(i) for i in ids)
            sent += header(program, extended, len(payload), Command.BLOCK_STATUS) + payload
        else:
            sent += header(program, extended)
    return bytes(sent)


# --- The parser ----------------------------------------------------------------------------------


@dataclass
class Trace:
    """What a parser made of a stream."""

    requests: list[Seen] = field(default_factory=list)
    fault: bool = False
    finished: bool = False
    between: bool = True


def parse(agreement: Agreement, stream: bytes, way: str) -> Trace:
    """Parse a stream, cut one way."""
    trace = Trace()
    parser = RequestParser(
        Rules(agreement),
        receive_bytes=RECEIVE_BYTES,
        direct_bytes=DIRECT_BYTES,
        max_discard=MAX_DISCARD,
    )
    try:
        for piece in cut(stream, way):
            rest = memoryview(piece)
            while rest:
                buffer = parser.get_buffer()
                n_bytes = min(len(buffer), len(rest))
                assert 0 < n_bytes <= max(RECEIVE_BYTES, MAX_PAYLOAD)
                buffer[:n_bytes] = rest[:n_bytes]
                trace.requests += [seen(parser, request) for request in parser.received(n_bytes)]
                rest = rest[n_bytes:]
    except ProtocolError as fault:
        assert str(fault)
        trace.fault = True
    trace.finished = parser.finished
    trace.between = parser.is_between_requests
    return trace


def seen(parser: RequestParser, request: Request) -> Seen:
    """Copy a request before its payload is gone."""
    command, flags, cookie, offset, length, payload, verdict = request
    copied = None if payload is None else bytes(payload)
    if payload is not None:
        assert bytes(parser.keep(payload)) == copied
    return (command, flags, cookie, offset, length, copied, int(verdict))


# --- The same, slowly ----------------------------------------------------------------------------


class Reading:
    """A whole stream, read as the specification has it; every decision in one place."""

    def __init__(self, agreement: Agreement, stream: bytes) -> None:
        self.trace = Trace()
        self.rules = Rules(agreement)
        self.extended = agreement.mode is ReplyMode.EXTENDED
        self.left = stream

    def read(self) -> Trace:
        layout = EXTENDED_REQUEST if self.extended else REQUEST
        magic = EXTENDED_REQUEST_MAGIC if self.extended else REQUEST_MAGIC
        while len(self.left) >= layout.size:
            found, flags, command, cookie, offset, length = layout.unpack_from(self.left)
            if found != magic:
                self.trace.fault = True
                return self.trace
            body = self.left[layout.size :]
            announced = self.extended and flags & PAYLOAD_LEN and command != Command.DISC
            if command != Command.WRITE and not announced:
                self.left = body
                verdict = self.rules.judge(command, flags, offset, length)
                self._note(command, flags, cookie, offset, length, None, verdict)
                if command == Command.DISC:
                    self.trace.finished = True
                    return self.trace
            elif not self._take(command, flags, cookie, offset, length, body):
                return self.trace
        self.trace.between = not self.left
        return self.trace

    def _take(
        self, command: int, flags: int, cookie: bytes, offset: int, length: int, body: bytes
    ) -> bool:
        """Read a payload; False if the stream ends here."""
        verdict = self._verdict(command, flags, offset, length)
        if verdict > 0 and length > MAX_DISCARD:
            self.trace.fault = True
            return False
        if len(body) < length:
            self.trace.between = False
            return False
        payload, self.left = body[:length], body[length:]
        if verdict > 0:
            self.trace.requests.append((command, flags, cookie, offset, length, None, verdict))
        elif command == Command.WRITE:
            kept = flags & ~PAYLOAD_LEN
            self.trace.requests.append((command, kept, cookie, offset, length, payload, verdict))
        else:
            self._filter(flags & ~PAYLOAD_LEN, cookie, offset, payload)
        return True

    def _verdict(self, command: int, flags: int, offset: int, length: int) -> int:
        if command == Command.WRITE:
            verdict = self.rules.judge(command, flags, offset, length)
            missing = self.extended and not flags & PAYLOAD_LEN
            return Errno.EINVAL if missing and verdict <= 0 else verdict
        n_ids = len(self.rules.context_ids)
        if command == Command.BLOCK_STATUS and length in [8 + 4 * n for n in range(1, n_ids + 1)]:
            return self.rules.judge(command, flags, offset, 1)
        return Errno.EINVAL

    def _filter(self, flags: int, cookie: bytes, offset: int, payload: bytes) -> None:
        (length,) = U64.unpack_from(payload)
        ids = [number for (number,) in U32.iter_unpack(payload[8:])]
        verdict = self.rules.judge(Command.BLOCK_STATUS, flags, offset, length)
        if len(set(ids)) < len(ids) or set(ids) - self.rules.context_ids:
            verdict = Errno.EINVAL
        self._note(Command.BLOCK_STATUS, flags, cookie, offset, length, payload[8:], verdict)

    def _note(
        self,
        command: int,
        flags: int,
        cookie: bytes,
        offset: int,
        length: int,
        payload: bytes | None,
        verdict: int,
    ) -> None:
        if command not in WRITING:
            flags &= ~FUA
        self.trace.requests.append((command, flags, cookie, offset, length, payload, int(verdict)))


# --- What must hold ------------------------------------------------------------------------------


def run(data: bytes) -> None:
    """Run one input."""
    program = Program(data)
    agreement = agreements(program)
    stream = stream_of(program, agreement.mode is ReplyMode.EXTENDED)
    expected = Reading(agreement, stream).read()
    for way in WAYS:
        trace = parse(agreement, stream, way)
        if expected.fault:
            # What came in one piece with the fault goes with it.
            n_requests = len(trace.requests)
            assert trace.fault, f"{way}: no fault"
            assert trace.requests == expected.requests[:n_requests], way
            assert way != "byte by byte" or n_requests == len(expected.requests)
        else:
            assert trace.fault is False, way
            assert trace.requests == expected.requests, way
            assert trace.finished is expected.finished, way
            assert trace.finished or trace.between is expected.between, way
    for request in expected.requests:
        check(request, agreement)


def check(request: Seen, agreement: Agreement) -> None:
    """What the server relies on."""
    command, _, cookie, offset, length, payload, verdict = request
    assert len(cookie) == 8
    assert verdict <= 0 or verdict in list(Errno)
    if verdict == 0 and command not in (Command.DISC, Command.FLUSH):
        assert 0 <= offset < offset + length <= SIZE
        assert command in list(Command)
        if command == Command.WRITE:
            assert payload is not None and len(payload) == length <= MAX_PAYLOAD
        if command in WRITING:
            assert not agreement.flags & TransmissionFlag.READ_ONLY
