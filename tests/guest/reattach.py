"""Run in the guest: give an NBD device new connections while it stays in use.

``python -m tests.guest.reattach COMMAND HOST PORT EXPORT N_CONNECTIONS``, with "connect" or
"reconfigure" for COMMAND, shakes hands with a server and hands the sockets to /dev/nbd0 by netlink,
as an agent would and nbd-client cannot: with a time for which requests wait for a connection when
theirs has died, instead of failing.

Speaks just enough generic netlink (linux/genetlink.h, linux/nbd-netlink.h): messages are a
netlink header, a generic one and attributes, all in the machine's byte order.
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import Final

from nbdstore.protocol.agreement import ReplyMode
from nbdstore.protocol.client import (
    ClientHandshake,
    ExportSize,
    OptionAnswer,
    option_exchange,
    parse_info_export,
)
from nbdstore.protocol.constants import OptionReply

DEVICE_INDEX: Final = 0
BLOCK_SIZE: Final = 4096
REQUEST_TIMEOUT_S: Final = 5
"""A request that was on its way when its connection died is sent again after this."""
DEAD_TIMEOUT_S: Final = 120
"""How long requests wait for a connection."""

NLMSG: Final = struct.Struct("=IHHII")  # length, type, flags, sequence, port
GENLMSG: Final = struct.Struct("=BBxx")  # command, version
ATTRIBUTE: Final = struct.Struct("=HH")  # length, type
NETLINK_GENERIC: Final = 16
NLM_F_REQUEST_ACK: Final = 0x5
NLMSG_ERROR: Final = 2
GENL_ID_CTRL: Final = 0x10
CTRL_CMD_GETFAMILY: Final = 3
CTRL_ATTR_FAMILY_ID: Final = 1
CTRL_ATTR_FAMILY_NAME: Final = 2

COMMANDS: Final = {"connect": 1, "reconfigure": 3}
NBD_ATTR_INDEX: Final = 1
NBD_ATTR_SIZE_BYTES: Final = 2
NBD_ATTR_BLOCK_SIZE_BYTES: Final = 3
NBD_ATTR_TIMEOUT: Final = 4
NBD_ATTR_SERVER_FLAGS: Final = 5
NBD_ATTR_SOCKETS: Final = 7
NBD_ATTR_DEAD_CONN_TIMEOUT: Final = 8
NBD_SOCK_ITEM: Final = 1
NBD_SOCK_FD: Final = 1


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded to a multiple of four bytes."""
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def u64(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=Q", value))


def attributes(data: bytes) -> dict[int, bytes]:
    """Split attributes by their types."""
    found = {}
    while data:
        length, kind = ATTRIBUTE.unpack_from(data)
        found[kind] = data[ATTRIBUTE.size : length]
        data = data[length + -length % 4 :]
    return found


class GenericNetlink:
    """A generic netlink socket."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC)
        self._socket.bind((0, 0))

    def call(self, family: int, command: int, data: bytes) -> dict[int, bytes]:
        """Send a command; return the attributes of what it answers before it is acknowledged."""
        body = GENLMSG.pack(command, 1) + data
        header = NLMSG.pack(NLMSG.size + len(body), family, NLM_F_REQUEST_ACK, 1, 0)
        self._socket.send(header + body)
        found: dict[int, bytes] = {}
        while True:
            received = self._socket.recv(1 << 16)
            while received:
                length, kind, *_ = NLMSG.unpack_from(received)
                payload, received = received[NLMSG.size : length], received[length + -length % 4 :]
                if kind == NLMSG_ERROR:
                    (number,) = struct.unpack_from("=i", payload)
                    if number:
                        raise OSError(-number, f"netlink command {command}")
                    return found
                found |= attributes(payload[GENLMSG.size :])

    def family(self, name: str) -> int:
        """Return the number of a family."""
        wanted = attribute(CTRL_ATTR_FAMILY_NAME, name.encode() + b"\0")
        answer = self.call(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, wanted)
        (number,) = struct.unpack("=H", answer[CTRL_ATTR_FAMILY_ID])
        return int(number)


def shake_hands(host: str, port: int, export: str) -> tuple[socket.socket, ExportSize]:
    """Connect to an export; return the socket, in its transmission phase."""
    sock = socket.create_connection((host, port))
    handshake = ClientHandshake()
    while (hello := handshake.hello()) is None:
        handshake.receive(receive(sock))
    sock.sendall(hello)
    found: ExportSize | None = None
    for option in option_exchange(export, ReplyMode.SIMPLE):
        sock.sendall(option)
        answer: OptionAnswer | None = None
        while answer is None or not answer.is_last:
            answer = handshake.answer()
            if answer is None:
                handshake.receive(receive(sock))
            elif answer.reply == OptionReply.INFO and answer.data[:2] == b"\0\0":
                found = parse_info_export(answer.data)
        assert answer.reply == OptionReply.ACK, answer
    assert found is not None
    return sock, found


def receive(sock: socket.socket) -> bytes:
    data = sock.recv(1 << 16)
    if not data:
        raise ConnectionResetError("the server has closed the connection")
    return data


def main() -> None:
    """Do what the arguments say."""
    command, host, port, export, n_connections = sys.argv[1:]
    made = [shake_hands(host, int(port), export) for _ in range(int(n_connections))]
    items = [attribute(NBD_SOCK_ITEM, u32(NBD_SOCK_FD, sock.fileno())) for sock, _ in made]
    data = u32(NBD_ATTR_INDEX, DEVICE_INDEX) + attribute(NBD_ATTR_SOCKETS, b"".join(items))
    if command == "connect":
        _, export_size = made[0]
        data += u64(NBD_ATTR_SIZE_BYTES, export_size.size)
        data += u64(NBD_ATTR_BLOCK_SIZE_BYTES, BLOCK_SIZE)
        data += u64(NBD_ATTR_SERVER_FLAGS, export_size.flags)
        data += u64(NBD_ATTR_TIMEOUT, REQUEST_TIMEOUT_S)
        data += u64(NBD_ATTR_DEAD_CONN_TIMEOUT, DEAD_TIMEOUT_S)
    netlink = GenericNetlink()
    netlink.call(netlink.family("nbd"), COMMANDS[command], data)


if __name__ == "__main__":
    main()
