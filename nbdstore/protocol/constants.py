"""Every number and fixed layout of NBD: the specification as a file.

Names are those of the specification (proto.md of github.com/NetworkBlockDevice/nbd) without
their ``NBD_`` prefixes; extended headers are of its branch ``extension-ext-header``. All numbers
on the wire are big-endian. Nothing here knows what a number is used for.

Cookies are opaque (proto.md, "Request message"): layouts carry them as eight raw bytes, which
spares two conversions per request.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

# --- Magics --------------------------------------------------------------------------------------

INIT_PASSWD: Final = 0x4E42444D41474943
"""``NBDMAGIC``: the first eight bytes a server sends."""

OPTION_MAGIC: Final = 0x49484156454F5054
"""``IHAVEOPT``: the server's second eight bytes, and the start of every option."""

OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

# --- Layouts -------------------------------------------------------------------------------------

HELLO: Final = Struct(">QQH")
"""NBDMAGIC, IHAVEOPT, handshake flags."""

CLIENT_FLAGS: Final = Struct(">I")

OPTION: Final = Struct(">QII")
"""IHAVEOPT, option, length of its data."""

OPTION_REPLY: Final = Struct(">QIII")
"""Magic, option, reply type, length of its data."""

EXPORT_NAME_REPLY: Final = Struct(">QH")
"""Size, transmission flags; then 124 zero bytes unless the client refused them."""

EXPORT_NAME_PADDING: Final = bytes(124)

INFO_EXPORT: Final = Struct(">HQH")
"""Info type, size, transmission flags."""

INFO_BLOCK_SIZE: Final = Struct(">HIII")
"""Info type, minimum, preferred, maximum payload."""

REQUEST: Final = Struct(">IHH8sQI")
"""Magic, command flags, command, cookie, offset, length."""

EXTENDED_REQUEST: Final = Struct(">IHH8sQQ")
"""Magic, command flags, command, cookie, offset, length of payload or effect."""

SIMPLE_REPLY: Final = Struct(">II8s")
"""Magic, error, cookie."""

STRUCTURED_REPLY: Final = Struct(">IHH8sI")
"""Magic, reply flags, chunk type, cookie, length of payload."""

OFFSET_DATA_REPLY: Final = Struct(">IHH8sIQ")
"""STRUCTURED_REPLY, and the offset of the data with which the payload of OFFSET_DATA begins."""

EXTENDED_REPLY: Final = Struct(">IHH8sQQ")
"""Magic, reply flags, chunk type, cookie, offset of the request, length of payload."""

EXTENDED_OFFSET_DATA_REPLY: Final = Struct(">IHH8sQQQ")
"""The same with EXTENDED_REPLY."""

OFFSET_HOLE: Final = Struct(">QI")
"""Payload of OFFSET_HOLE: offset, size of the hole."""

ERROR: Final = Struct(">IH")
"""Start of the payload of ERROR: error, length of the message that follows."""

EXTENT: Final = Struct(">II")
"""In BLOCK_STATUS: length, status flags."""

EXTENDED_EXTENT: Final = Struct(">QQ")
"""In BLOCK_STATUS_EXT: length, status flags."""

BLOCK_STATUS_EXT: Final = Struct(">II")
"""Start of the payload of BLOCK_STATUS_EXT: context id, number of extents."""

U16: Final = Struct(">H")
U32: Final = Struct(">I")
U64: Final = Struct(">Q")

# --- Limits --------------------------------------------------------------------------------------

MAX_STRING: Final = 4096
"""Bytes of UTF-8 in any string (proto.md, "Conventions")."""

MAX_EXPORT_SIZE: Final = (1 << 63) - 1
"""Larger exports are negative to Linux (loff_t) and to libnbd."""

MAX_EXTENTS: Final = 1 << 20
"""Extents in one block status chunk (proto.md, "NBD_REPLY_TYPE_BLOCK_STATUS")."""

MAX_PAYLOAD: Final = 32 << 20
"""Bytes in one request that every server should take (proto.md, "Block size constraints")."""


# --- Handshake -----------------------------------------------------------------------------------


class HandshakeFlag(IntFlag):
    """What the server offers in its hello."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(IntFlag):
    """What the client takes of it."""

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


class OptionReply(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 1 << 31 | 1
    ERR_POLICY = 1 << 31 | 2
    ERR_INVALID = 1 << 31 | 3
    ERR_PLATFORM = 1 << 31 | 4
    ERR_TLS_REQD = 1 << 31 | 5
    ERR_UNKNOWN = 1 << 31 | 6
    ERR_SHUTDOWN = 1 << 31 | 7
    ERR_BLOCK_SIZE_REQD = 1 << 31 | 8
    ERR_TOO_BIG = 1 << 31 | 9
    ERR_EXT_HEADER_REQD = 1 << 31 | 10


class Info(IntEnum):
    """What INFO and GO tell about an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    """What an export can do."""

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


# --- Transmission --------------------------------------------------------------------------------


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlag(IntFlag):
    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ReplyFlag(IntFlag):
    DONE = 1 << 0


class Chunk(IntEnum):
    """Types of structured and extended reply chunks."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 1 << 15 | 1
    ERROR_OFFSET = 1 << 15 | 2


class Errno(IntEnum):
    """The errors that may stand in a reply; the same numbers on every system."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class Allocation(IntFlag):
    """Status bits of the metadata context ``base:allocation``."""

    HOLE = 1 << 0
    ZERO = 1 << 1
