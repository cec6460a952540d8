"""The client's side of the option phase: hello, options, their replies.

Every reply is checked for what holds of all replies; what it means is the business of the cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.conformance.connection import Connection
from tests.conformance.outcome import Broken, Violation
from tests.conformance.wire import (
    ERROR_BIT,
    EXPORT_NAME_PADDING,
    EXPORT_NAME_REPLY,
    HELLO,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    INIT_PASSWD,
    MAX_STRING,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    U16,
    U32,
    Flag,
    HandshakeFlag,
    Info,
    Mode,
    Option,
    Rep,
    context_data,
    info_data,
    name_of,
    option,
)

DEFAULT_FLAGS = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES

MAX_REPLY_BYTES = 1 << 20
"""An option reply that announces more is taken for nonsense."""

MAX_REPLIES = 100_000
"""So are more replies than this to one option."""


@dataclass(frozen=True)
class OptionReply:
    """One reply to an option."""

    option: int
    kind: int
    data: bytes

    @property
    def is_error(self) -> bool:
        return bool(self.kind & ERROR_BIT)

    @property
    def name(self) -> str:
        return name_of(Rep, self.kind)


@dataclass(frozen=True)
class Export:
    """What a server tells of an export when it is chosen."""

    size: int
    flags: Flag


@dataclass(frozen=True)
class BlockSizes:
    """What INFO_BLOCK_SIZE tells, in bytes."""

    minimum: int
    preferred: int
    maximum: int


class Client:
    """One connection in its option phase.

    Arguments:
        connection: connected, and nothing received yet.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.handshake_flags = HandshakeFlag(0)
        self.client_flags = HandshakeFlag(0)

    # --- Hello -------------------------------------------------------------------------------

    def receive_hello(self) -> int:
        """Receive the server's hello; return its handshake flags."""
        password, magic, flags = HELLO.unpack(self.connection.take(HELLO.size))
        if (password, magic) != (INIT_PASSWD, IHAVEOPT):
            raise Broken(f"the hello is {password + magic!r}, not that of newstyle NBD")
        self.handshake_flags = HandshakeFlag(flags & DEFAULT_FLAGS)
        return int(flags)

    def send_flags(self, flags: int) -> None:
        self.client_flags = HandshakeFlag(flags & DEFAULT_FLAGS)
        self.connection.send(U32.pack(flags))

    # --- Options -----------------------------------------------------------------------------

    def send(self, number: int, data: bytes = b"", length: int | None = None) -> None:
        """Send one option; ``length`` replaces the true one."""
        self.connection.send(option(number, data, length))

    def reply(self) -> OptionReply:
        """Receive one option reply."""
        header = OPTION_REPLY.unpack(self.connection.take(OPTION_REPLY.size))
        magic, number, kind, length = header
        if magic != OPTION_REPLY_MAGIC:
            raise Broken(f"an option reply starts with {magic:#018x}")
        if length > MAX_REPLY_BYTES:
            raise Broken(f"an option reply of {length} bytes")
        reply = OptionReply(number, kind, self.connection.take(length))
        if reply.kind == Rep.ACK and reply.data:
            raise Broken("an ACK with data")
        return reply

    def replies(self, number: int) -> list[OptionReply]:
        """Receive all replies to one option that was sent."""
        replies: list[OptionReply] = []
        while not replies or not (replies[-1].is_error or replies[-1].kind == Rep.ACK):
            reply = self.reply()
            if reply.option != number:
                raise Broken(f"a reply to option {reply.option} instead of {number}")
            replies.append(reply)
            if len(replies) > MAX_REPLIES:
                raise Broken(f"more than {MAX_REPLIES} replies to one option")
        return replies

    def ask(self, number: int, data: bytes = b"") -> list[OptionReply]:
        """Send one option; receive all replies to it."""
        self.send(number, data)
        return self.replies(number)

    def final(self, number: int, data: bytes = b"") -> OptionReply:
        """Send one option; receive all replies to it, and return the last."""
        return self.ask(number, data)[-1]

    def export_name(self, name: str) -> Export:
        """Choose an export by EXPORT_NAME."""
        self.send(Option.EXPORT_NAME, name.encode())
        size, flags = EXPORT_NAME_REPLY.unpack(self.connection.take(EXPORT_NAME_REPLY.size))
        if not self.client_flags & HandshakeFlag.NO_ZEROES:
            padding = self.connection.take(EXPORT_NAME_PADDING)
            if padding.strip(b"\0"):
                raise Violation("the padding behind EXPORT_NAME's answer is not zero")
        return Export(size, Flag(flags))

    def negotiate(self, mode: Mode) -> bool:
        """Ask for a family of replies; whether the server has it."""
        if mode is Mode.SIMPLE:
            return True
        structured = mode is Mode.STRUCTURED
        number = Option.STRUCTURED_REPLY if structured else Option.EXTENDED_HEADERS
        return self.final(number).kind == Rep.ACK

    def set_contexts(self, name: str, queries: Sequence[str]) -> dict[str, int]:
        """Ask for metadata contexts; return the ids of those that were selected, by name."""
        replies = self.ask(Option.SET_META_CONTEXT, context_data(name, queries))
        if replies[-1].is_error:
            return {}
        return dict(parse_context(reply) for reply in replies[:-1])

    def go(self, name: str) -> Export:
        """Choose an export by GO; Violation if that is refused."""
        replies = self.ask(Option.GO, info_data(name, [Info.EXPORT]))
        if replies[-1].kind == Rep.ERR_UNSUP:
            return self.export_name(name)
        if replies[-1].is_error:
            raise Violation(f"GO {name!r} is answered {replies[-1].name}")
        return parse_export(replies)


# --- Replies -------------------------------------------------------------------------------------


def check_string(raw: bytes, what: str) -> str:
    """Decode a string (proto.md, "Conventions"); Violation if it is none."""
    if len(raw) > MAX_STRING:
        raise Violation(f"{what} has {len(raw)} bytes, more than {MAX_STRING}")
    if 0 in raw:
        raise Violation(f"{what} contains a NUL byte")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise Violation(f"{what} is not UTF-8") from None


def parse_context(reply: OptionReply) -> tuple[str, int]:
    """Parse a REP_META_CONTEXT: name and id."""
    if reply.kind != Rep.META_CONTEXT or len(reply.data) < U32.size:
        raise Broken(f"a reply {reply.name} of {len(reply.data)} bytes among metadata contexts")
    (number,) = U32.unpack_from(reply.data)
    return check_string(reply.data[U32.size :], "a context's name"), number


def parse_server(reply: OptionReply) -> str:
    """Parse a REP_SERVER: the export's name."""
    if reply.kind != Rep.SERVER or len(reply.data) < U32.size:
        raise Broken(f"a reply {reply.name} of {len(reply.data)} bytes in a list of exports")
    (length,) = U32.unpack_from(reply.data)
    if length > len(reply.data) - U32.size:
        raise Violation(f"a name of {length} bytes in {len(reply.data)} bytes of REP_SERVER")
    check_string(reply.data[U32.size + length :], "an export's description")
    return check_string(reply.data[U32.size : U32.size + length], "an export's name")


def infos_of(replies: Sequence[OptionReply]) -> dict[int, bytes]:
    """Sort the REP_INFOs among replies by the type of their information."""
    found = [reply.data for reply in replies if reply.kind == Rep.INFO]
    if any(len(data) < U16.size for data in found):
        raise Broken("a REP_INFO without a type")
    return {U16.unpack_from(data)[0]: data for data in found}


def parse_export(replies: Sequence[OptionReply]) -> Export:
    """Find INFO_EXPORT among the replies to INFO or GO."""
    data = infos_of(replies).get(Info.EXPORT)
    if data is None:
        raise Violation("no INFO_EXPORT")
    if len(data) != INFO_EXPORT.size:
        raise Violation(f"an INFO_EXPORT of {len(data)} bytes, not {INFO_EXPORT.size}")
    _, size, flags = INFO_EXPORT.unpack(data)
    return Export(size, Flag(flags))


def parse_block_sizes(replies: Sequence[OptionReply]) -> BlockSizes | None:
    """Find INFO_BLOCK_SIZE among the replies to INFO or GO; None if it is not there."""
    data = infos_of(replies).get(Info.BLOCK_SIZE)
    if data is None:
        return None
    if len(data) != INFO_BLOCK_SIZE.size:
        raise Violation(f"an INFO_BLOCK_SIZE of {len(data)} bytes, not {INFO_BLOCK_SIZE.size}")
    return BlockSizes(*INFO_BLOCK_SIZE.unpack(data)[1:])
