"""Target: the server's option phase, from the client flags on.

What must hold, whatever comes: ProtocolError and nothing else; the same replies and the same end
however the stream is cut; each option answered by one final reply at most, and each reply one that
the project's client understands; phases that only go forward; memory within the limits; nothing
agreed before TLS if that is required.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nbdstore.errors import ProtocolError
from nbdstore.protocol.agreement import Agreement, ReplyMode, TlsMode
from nbdstore.protocol.client import ClientHandshake
from nbdstore.protocol.constants import (
    CLIENT_FLAGS,
    EXPORT_NAME_PADDING,
    EXPORT_NAME_REPLY,
    HELLO,
    OPTION,
    OPTION_MAGIC,
    U16,
    U32,
    ClientFlag,
    Option,
    OptionReply,
    TransmissionFlag,
)
from nbdstore.protocol.handshake import Handshake, HandshakeLimits, Phase
from tests.fuzz.cutting import WAYS, cut
from tests.fuzz.program import Program
from tests.protocol.conversation import Shelf

LIMITS = HandshakeLimits(max_options=12, max_option_length=96, max_option_bytes=512)
NAMES = (b"disk", b"", b"secret", b"barred", b"nothing", b"di\0sk", b"\xc3\x28", b"d" * 90)
QUERIES = (b"base:allocation", b"base:", b"qemu:", b"qemu:allocation-depth", b"x-y:z", b"\xff", b"")
FLAGS = (3, 1, 2, 0, 4, 1 << 31)

MAX_REPLY_BYTES = 20 + 4095
"""nbd-client leaves larger ones unread."""

NEXT = {
    Phase.CLIENT_FLAGS: {Phase.CLIENT_FLAGS, Phase.OPTIONS},
    Phase.OPTIONS: set(Phase) - {Phase.CLIENT_FLAGS},
    Phase.STARTTLS: {Phase.STARTTLS, Phase.OPTIONS},
    Phase.TRANSMISSION: {Phase.TRANSMISSION},
    Phase.CLOSED: {Phase.CLOSED},
}


# --- Programs ------------------------------------------------------------------------------------


def counted(text: bytes) -> bytes:
    return U32.pack(len(text)) + text


def info_data(program: Program) -> bytes:
    name, n_infos = program.choose(NAMES), program.byte() % 5
    return counted(name) + U16.pack(n_infos) + bytes(n_infos * [0, program.byte() % 5])


def context_data(program: Program) -> bytes:
    name, n_queries = program.choose(NAMES), program.byte() % 4
    queries = [counted(program.choose(QUERIES)) for _ in range(n_queries)]
    return counted(name) + U32.pack(n_queries) + b"".join(queries)


def option_data(program: Program, number: int) -> bytes:
    """Data that fits an option, most of the time."""
    if program.byte() % 8 == 0:
        return program.text()
    if number in (Option.INFO, Option.GO):
        return info_data(program)
    if number in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
        return context_data(program)
    return program.choose(NAMES) if number == Option.EXPORT_NAME else b""


def flights(program: Program) -> list[bytes]:
    """What a client sends; it waits for the replies to one flight before it sends the next."""
    sent = [CLIENT_FLAGS.pack(program.choose(FLAGS))]
    while program:
        kind = program.byte() % 8
        if kind == 0:
            sent.append(b"")
        elif kind == 1:
            sent[-1] += program.text()
        elif kind == 2:
            number, length = program.number(32), program.number(32)
            sent[-1] += OPTION.pack(OPTION_MAGIC, number, length) + program.text()
        else:
            number = program.byte() % 13
            data = option_data(program, number)
            sent[-1] += OPTION.pack(OPTION_MAGIC, number, len(data)) + data
    return sent


# --- One conversation ----------------------------------------------------------------------------


@dataclass
class Trace:
    """What came of a conversation."""

    sent: list[bytes] = field(default_factory=list)
    fault: str = ""
    phase: Phase = Phase.CLIENT_FLAGS
    agreement: Agreement | None = None
    unread: bytes = b""
    tls: bool = False


def converse(mode: TlsMode, sent: list[bytes], way: str) -> Trace:
    """Have the conversation, the client's side cut one way."""
    trace = Trace()
    handshake = Handshake(Shelf(), tls=mode, limits=LIMITS)
    assert [len(reply) for reply in handshake.data_to_send()] == [HELLO.size]
    try:
        for flight in sent:
            pieces = list(cut(flight, way))
            for index, piece in enumerate(pieces):
                handshake.receive(piece)
                step(handshake, trace)
                if handshake.phase is Phase.STARTTLS and index + 1 < len(pieces):
                    # In one piece with STARTTLS, the rest would be the fault that it is.
                    trace.sent.pop()
                    raise ProtocolError("plaintext")
            if handshake.phase is Phase.STARTTLS:
                handshake.tls_established()
                trace.tls = True
    except ProtocolError as fault:
        assert str(fault)
        trace.fault = "plaintext" if "plaintext" in str(fault) else str(fault)
        return trace
    trace.phase, trace.agreement = handshake.phase, handshake.agreement
    trace.unread = handshake.unread()
    return trace


def step(handshake: Handshake, trace: Trace) -> None:
    """Let the handshake do all it can, and watch it."""
    while True:
        before = handshake.phase
        advanced = handshake.advance()
        replies = handshake.data_to_send()
        trace.sent += replies
        assert handshake.phase in NEXT[before], f"{before} -> {handshake.phase}"
        assert advanced or not replies
        assert all(len(reply) <= MAX_REPLY_BYTES for reply in replies)
        if not advanced:
            break
    if handshake.phase in (Phase.CLIENT_FLAGS, Phase.OPTIONS):
        held = len(handshake.unread())
        assert held < OPTION.size + LIMITS.max_option_length, f"{held} bytes are held"


# --- What must hold ------------------------------------------------------------------------------


def run(data: bytes) -> None:
    """Run one input."""
    program = Program(data)
    mode = program.choose(tuple(TlsMode))
    sent = flights(program)
    traces = [converse(mode, sent, way) for way in WAYS]
    for way, trace in zip(WAYS[1:], traces[1:], strict=True):
        assert trace == traces[0], f"{way}: {trace}\nwhole: {traces[0]}"
    (flags,) = CLIENT_FLAGS.unpack(sent[0][:4])
    check_replies(traces[0], flags)
    check_end(traces[0], mode)


def check_replies(trace: Trace, flags: int) -> None:
    """Read the replies as the project's client does."""
    client = ClientHandshake(flags)
    client.receive(b"".join(trace.sent))
    n_final = 0
    chosen_by_name = False
    for reply in trace.sent:
        if len(reply) == EXPORT_NAME_REPLY.size + len(EXPORT_NAME_PADDING) * (not flags & 2):
            chosen_by_name = reply is trace.sent[-1] and trace.phase is Phase.TRANSMISSION
        if chosen_by_name:
            assert client.export_name_answer() is not None
            break
        answer = client.answer()
        assert answer is not None and answer.data == reply[20:]
        assert answer.is_last or answer.reply in (
            OptionReply.SERVER,
            OptionReply.INFO,
            OptionReply.META_CONTEXT,
        )
        if answer.is_error:
            assert answer.data.decode().endswith("."), "nbd-client overwrites the last byte"
        n_final += answer.is_last
    assert client.unread() == b""
    assert n_final <= LIMITS.max_options
    assert flags & ClientFlag.FIXED_NEWSTYLE or not n_final, "no option replies for old clients"


def check_end(trace: Trace, mode: TlsMode) -> None:
    agreement = trace.agreement
    assert (agreement is not None) is (trace.phase is Phase.TRANSMISSION)
    assert not trace.tls or mode is not TlsMode.OFF
    if agreement is None:
        return
    assert mode is not TlsMode.REQUIRED or trace.tls, "agreed without TLS"
    structured = agreement.mode is not ReplyMode.SIMPLE
    assert bool(agreement.flags & TransmissionFlag.SEND_DF) is structured
    assert structured or not agreement.contexts
    assert agreement.flags & TransmissionFlag.HAS_FLAGS
