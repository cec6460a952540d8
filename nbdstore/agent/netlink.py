"""Generic netlink: messages and attributes as bytes, and a socket for them.

Owns the encoding (linux/netlink.h, linux/genetlink.h) and the dialogue with the kernel's "ctrl"
family, which tells a family's number and its multicast groups. Knows nothing of what families mean.

    message    u32 length, u16 type, u16 flags, u32 sequence, u32 port, then
               u8 command, u8 version, u16 0, and attributes
    attribute  u16 length (with these four bytes), u16 type | value | zeros up to a multiple of 4

All in the machine's byte order. An error is a message of type 2 that begins with a negative errno;
0 is the acknowledgement.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

MESSAGE: Final = struct.Struct("=IHHII")
COMMAND: Final = struct.Struct("=BBxx")
ATTRIBUTE: Final = struct.Struct("=HH")
ERRNO: Final = struct.Struct("=i")

NETLINK_GENERIC: Final = 16
SOL_NETLINK: Final = 270
NETLINK_ADD_MEMBERSHIP: Final = 1
NLM_F_REQUEST_ACK: Final = 0x5
NLMSG_ERROR: Final = 2
TYPE_MASK: Final = 0x3FFF
"""The two highest bits of an attribute's type are flags: nested, network byte order."""

CTRL_FAMILY: Final = 0x10
CTRL_GETFAMILY: Final = 3
CTRL_FAMILY_ID: Final = 1
CTRL_FAMILY_NAME: Final = 2
CTRL_MCAST_GROUPS: Final = 7
CTRL_GROUP_NAME: Final = 1
CTRL_GROUP_ID: Final = 2

RECEIVE_BYTES: Final = 64 << 10
ANSWER_TIMEOUT_S: Final = 120.0
"""The kernel answers at once, but for commands that wait for I/O to stop (a new size)."""


class Message(NamedTuple):
    """One message from the kernel. error: errno of an error message, 0 of an acknowledgement."""

    family: int
    sequence: int
    command: int
    attributes: bytes
    error: int | None = None


class Family(NamedTuple):
    """A generic netlink family: its number, and its multicast groups by name."""

    number: int
    groups: Mapping[str, int]


# --- Bytes ---------------------------------------------------------------------------------------


def attribute(kind: int, value: bytes) -> bytes:
    """Build one attribute, padded to a multiple of four bytes."""
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def u64(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=Q", value))


def text(kind: int, value: str) -> bytes:
    """Build a string attribute, which ends with a zero byte."""
    return attribute(kind, value.encode() + b"\0")


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Split attributes into (type, value).

    Raises:
        ValueError: the bytes are no attributes.
    """
    while data:
        if len(data) < ATTRIBUTE.size:
            raise ValueError(f"{len(data)} bytes where a netlink attribute belongs")
        length, kind = ATTRIBUTE.unpack_from(data)
        if not ATTRIBUTE.size <= length <= len(data):
            raise ValueError(f"a netlink attribute of {length} bytes in {len(data)}")
        yield kind & TYPE_MASK, data[ATTRIBUTE.size : length]
        data = data[length + -length % 4 :]


def number(value: bytes) -> int:
    """Read an unsigned attribute of one to eight bytes."""
    return int.from_bytes(value, "little" if struct.pack("=H", 1)[0] else "big")


def build(family: int, command: int, data: bytes, sequence: int) -> bytes:
    """Build a request that is to be acknowledged."""
    body = COMMAND.pack(command, 1) + data
    return MESSAGE.pack(MESSAGE.size + len(body), family, NLM_F_REQUEST_ACK, sequence, 0) + body


def parse(data: bytes) -> Iterator[Message]:
    """Split what was received at once into messages.

    Raises:
        ValueError: the bytes are no messages.
    """
    while data:
        if len(data) < MESSAGE.size:
            raise ValueError(f"{len(data)} bytes where a netlink message belongs")
        length, kind, _, sequence, _ = MESSAGE.unpack_from(data)
        if not MESSAGE.size + ERRNO.size <= length <= len(data):
            raise ValueError(f"a netlink message of {length} bytes in {len(data)}")
        body = data[MESSAGE.size : length]
        if kind == NLMSG_ERROR:
            yield Message(kind, sequence, 0, b"", -ERRNO.unpack_from(body)[0])
        else:
            command, _ = COMMAND.unpack_from(body)
            yield Message(kind, sequence, command, body[COMMAND.size :])
        data = data[length + -length % 4 :]


def parse_family(data: bytes) -> Family:
    """Read the answer to CTRL_GETFAMILY."""
    fields = dict(attributes(data))
    groups = {}
    for _, group in attributes(fields.get(CTRL_MCAST_GROUPS, b"")):
        found = dict(attributes(group))
        name = found[CTRL_GROUP_NAME].rstrip(b"\0").decode()
        groups[name] = number(found[CTRL_GROUP_ID])
    return Family(number(fields[CTRL_FAMILY_ID]), groups)


# --- The socket ----------------------------------------------------------------------------------


class GenericNetlink:
    """A generic netlink socket. Not for several threads at a time."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_GENERIC
        )
        self._socket.bind((0, 0))
        self._sequence = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def call(self, family: int, command: int, data: bytes) -> bytes:
        """Send a command; return the attributes of its answers, one after the other.

        Raises:
            OSError: with the errno that the kernel gave.
        """
        self._sequence += 1
        self._socket.settimeout(ANSWER_TIMEOUT_S)
        self._socket.send(build(family, command, data, self._sequence))
        answer = b""
        while True:
            for message in parse(self._socket.recv(RECEIVE_BYTES)):
                if message.sequence != self._sequence:
                    continue  # the answer to a call that was given up
                if message.error is None:
                    answer += message.attributes
                elif message.error:
                    raise OSError(message.error, os.strerror(message.error))
                else:
                    return answer

    def family(self, name: str) -> Family:
        """Ask for a family; FileNotFoundError if this network namespace has none of that name."""
        return parse_family(self.call(CTRL_FAMILY, CTRL_GETFAMILY, text(CTRL_FAMILY_NAME, name)))

    def join(self, group: int) -> None:
        """Receive what is sent to a multicast group from now on."""
        self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)

    def events(self) -> list[Message]:
        """Return what has come by now, without waiting.

        Raises:
            OSError: ENOBUFS if more came than the socket could hold: some are lost.
        """
        self._socket.setblocking(False)
        found: list[Message] = []
        while True:
            try:
                found += parse(self._socket.recv(RECEIVE_BYTES))
            except BlockingIOError:
                return found
