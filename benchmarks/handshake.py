"""Asking a server for an export, as the first thing that a client does.

Owns the few blocking socket calls that join nbdstore's sans-I/O client to a socket. It leaves
again with DISC.
"""

from __future__ import annotations

import socket

from nbdstore.errors import ProtocolError
from nbdstore.protocol.agreement import ReplyMode
from nbdstore.protocol.client import (
    ClientHandshake,
    ClientTransmission,
    OptionAnswer,
    build_info,
    build_option,
    parse_info_export,
)
from nbdstore.protocol.constants import Command, Info, Option, OptionReply

Address = str | tuple[str, int]
"""The path of a unix socket, or a host and a port."""

_RECEIVE_BYTES = 4096


def attach(address: Address, export: str, *, timeout_s: float = 30) -> int:
    """Ask for `export` and return its size in bytes.

    Raises:
        OSError: nobody listens, or the server did not answer.
        ProtocolError: the server refused, or broke a rule.
    """
    with _connect(address, timeout_s) as connection:
        handshake = ClientHandshake()
        while (flags := handshake.hello()) is None:
            handshake.receive(_received(connection))
        connection.sendall(flags + build_option(Option.GO, build_info(export)))
        size = _wait_for_size(connection, handshake)
        _, leave = ClientTransmission(ReplyMode.SIMPLE).request(Command.DISC)
        connection.sendall(leave)
        return size


def greet(address: Address, *, timeout_s: float = 30) -> None:
    """Wait for the server's hello, which comes before TLS.

    Raises:
        OSError: nobody listens, or the server did not answer.
        ProtocolError: it is no NBD server.
    """
    with _connect(address, timeout_s) as connection:
        handshake = ClientHandshake()
        while handshake.hello() is None:
            handshake.receive(_received(connection))


def _connect(address: Address, timeout_s: float) -> socket.socket:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(address)
    except BaseException:
        connection.close()
        raise
    return connection


def _received(connection: socket.socket) -> bytes:
    data = connection.recv(_RECEIVE_BYTES)
    if not data:
        raise ConnectionError("the server closed the connection")
    return data


def _wait_for_size(connection: socket.socket, handshake: ClientHandshake) -> int:
    size: int | None = None
    while True:
        answer: OptionAnswer | None = handshake.answer()
        if answer is None:
            handshake.receive(_received(connection))
        elif answer.is_error:
            raise ProtocolError(f"the server refused: {answer.data.decode(errors='replace')}")
        elif answer.reply == OptionReply.INFO and answer.data[:2] == Info.EXPORT.to_bytes(2):
            size = parse_info_export(answer.data).size
        elif answer.reply == OptionReply.ACK:
            if size is None:
                raise ProtocolError("the server did not tell the size")
            return size
