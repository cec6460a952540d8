"""Every number and layout of NBD that the cases need.

Names are those of the specification (doc/proto.md of github.com/NetworkBlockDevice/nbd, and its
branch extension-ext-header) without their ``NBD_`` prefixes. All numbers are big-endian.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, IntEnum, IntFlag
from struct import Struct

INIT_PASSWD = b"NBDMAGIC"
IHAVEOPT = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REQUEST_MAGIC = 0x21E41C71
EXTENDED_REPLY_MAGIC = 0x6E8A278C

U16, U32, U64 = Struct(">H"), Struct(">I"), Struct(">Q")
HELLO = Struct(">8s8sH")  # NBDMAGIC, IHAVEOPT, handshake flags
OPTION = Struct(">8sII")  # IHAVEOPT, option, length
OPTION_REPLY = Struct(">QIII")  # magic, option, type, length
EXPORT_NAME_REPLY = Struct(">QH")  # size, transmission flags
INFO_EXPORT = Struct(">HQH")  # type, size, transmission flags
INFO_BLOCK_SIZE = Struct(">HIII")  # type, minimum, preferred, maximum payload
REQUEST = Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
EXTENDED_REQUEST = Struct(">IHHQQQ")
SIMPLE_REPLY = Struct(">IIQ")  # magic, error, cookie
STRUCTURED_REPLY = Struct(">IHHQI")  # magic, flags, type, cookie, length
EXTENDED_REPLY = Struct(">IHHQQQ")  # magic, flags, type, cookie, offset, length
OFFSET_HOLE = Struct(">QI")  # offset, length of the hole
ERROR = Struct(">IH")  # error, length of the message
EXTENT = Struct(">II")  # length, status
EXTENDED_EXTENT = Struct(">QQ")
STATUS_EXT = Struct(">II")  # context id, number of extents

MAX_STRING = 4096
EXPORT_NAME_PADDING = 124
MAX_PAYLOAD = 32 << 20  # what a server should take that advertises nothing
ERROR_BIT = 1 << 31


class HandshakeFlag(IntFlag):
    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Rep(IntEnum):
    """Types of option replies."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = ERROR_BIT | 1
    ERR_POLICY = ERROR_BIT | 2
    ERR_INVALID = ERROR_BIT | 3
    ERR_PLATFORM = ERROR_BIT | 4
    ERR_TLS_REQD = ERROR_BIT | 5
    ERR_UNKNOWN = ERROR_BIT | 6
    ERR_SHUTDOWN = ERROR_BIT | 7
    ERR_BLOCK_SIZE_REQD = ERROR_BIT | 8
    ERR_TOO_BIG = ERROR_BIT | 9
    ERR_EXT_HEADER_REQD = ERROR_BIT | 10


class Info(IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Flag(IntFlag):
    """Transmission flags."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Cmd(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CmdFlag(IntFlag):
    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ChunkType(IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 1 << 15 | 1
    ERROR_OFFSET = 1 << 15 | 2


DONE = 1
"""The only flag of reply chunks."""


class Errno(IntEnum):
    """All errors that a reply may carry."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class State(IntFlag):
    """Status of ``base:allocation``."""

    HOLE = 1 << 0
    ZERO = 1 << 1


class Mode(Enum):
    """The family of requests and replies that a session uses."""

    SIMPLE = "simple"
    STRUCTURED = "structured"
    EXTENDED = "extended"


BASE_ALLOCATION = "base:allocation"


def option(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    """Build an option; ``length`` replaces the true one."""
    return OPTION.pack(IHAVEOPT, number, len(data) if length is None else length) + data


def counted(text: bytes) -> bytes:
    """Build a string behind its 32-bit length."""
    return U32.pack(len(text)) + text


def info_data(name: str, infos: Sequence[int] = ()) -> bytes:
    """Build the data of INFO and GO."""
    asked = b"".join(U16.pack(info) for info in infos)
    return counted(name.encode()) + U16.pack(len(infos)) + asked


def context_data(name: str, queries: Sequence[str] = ()) -> bytes:
    """Build the data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    counts = U32.pack(len(queries))
    return counted(name.encode()) + counts + b"".join(counted(q.encode()) for q in queries)


def name_of(kind: type[IntEnum], value: int) -> str:
    """Name a number for a person, whether it is a known one or not."""
    return kind(value).name if value in list(kind) else f"{value:#x}"
