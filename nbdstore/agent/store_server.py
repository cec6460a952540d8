"""The server, as the agent needs it: volumes by the control API, connections that are ready to use.

Owns where NBD is spoken, and the dialogue from connecting to the first request; the socket that
comes out of it is the kernel's, or the relay's. Knows nothing of devices.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from nbdstore import unix_socket
from nbdstore.agent import tls
from nbdstore.control.client import ControlClient
from nbdstore.control.model import LeaseInfo, PoolInfo, VolumeInfo
from nbdstore.errors import ControlError, DeviceError, InvalidArgument, NotFound, ProtocolError
from nbdstore.protocol.agreement import ReplyMode
from nbdstore.protocol.client import (
    ClientHandshake,
    ExportSize,
    OptionAnswer,
    build_option,
    option_exchange,
    parse_info_export,
)
from nbdstore.protocol.constants import U16, Info, Option, OptionReply, TransmissionFlag

DIAL_TIMEOUT_S: Final = 10.0
CONTROL_TIMEOUT_S: Final = 30.0
RECEIVE_BYTES: Final = 64 << 10
MAX_PORT: Final = 0xFFFF
LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
# A peer that is gone without a word is noticed after about half a minute, though nothing is sent.
KEEPALIVE_IDLE_S: Final = 15
KEEPALIVE_EVERY_S: Final = 5
KEEPALIVE_PROBES: Final = 3


class ServerAway(DeviceError):
    """The server does not answer: it is worth trying again."""


class Link(NamedTuple):
    """A connection behind its handshake; flags: the transmission flags."""

    socket: socket.socket
    size: int
    flags: int


class StoreServer:
    """One server.

    Arguments:
        control: its control API.
        address: HOST:PORT or unix:PATH of its NBD, or with TLS, see `tls`; None asks the server
            for it.

    Raises:
        InvalidArgument: the address makes no sense.
    """

    def __init__(self, control: ControlClient, address: str | None = None) -> None:
        if address is not None:
            require_address(address)
        self.control = control
        self._address = address

    def volume(self, name: str) -> VolumeInfo:
        """Describe a volume; NotFound if there is none."""
        return self.control.volume(name)

    def volumes(self) -> list[VolumeInfo]:
        """Describe all volumes."""
        return self.control.volumes()

    def lease(self, volume: str, holder: str, *, force: bool = False) -> LeaseInfo:
        """Take the lease of a volume; Busy if another holds it. The same one if we hold it."""
        return self.control.acquire_lease(volume, holder, force=force)

    def release(self, volume: str, holder: str, epoch: int) -> None:
        """Give the lease back; nothing if it is not held any more, or the volume is gone."""
        with contextlib.suppress(NotFound):
            self.control.release_lease(volume, holder, epoch)

    def leases(self) -> list[LeaseInfo]:
        """List who holds what."""
        return self.control.leases()

    def end_connections(self, volume: str, epoch: int) -> None:
        """End the connections of a lease: on return none of their requests is executed any more.

        The kernel, or the relay, gives a connection up that the server may still know; it sends
        again by the next one what was under way. Were it executed by the old one later than what
        follows it by the new one, it would undo that.
        """
        for item in self.control.attachments():
            if item.export == volume and item.lease_epoch == epoch:
                self.control.disconnect(item.id)

    def address(self) -> str:
        """Return where NBD is spoken."""
        return self._address or choose_address(self.control.url, self._pool())

    def _pool(self) -> PoolInfo:
        pool = self.control.pool()
        if pool.server is None:
            raise ControlError(f"{self.control.url} does not serve its volumes over NBD")
        return pool


def require_address(text: str) -> None:
    """Raise InvalidArgument of what is none of the addresses that `dial` understands."""
    if text.startswith("unix:") or tls.parse_address(text) is not None:
        return
    found = re.fullmatch(r".+:([0-9]{1,5})", text)
    if found is None or int(found[1]) > MAX_PORT:
        raise InvalidArgument(
            f"'{text}' is no address: give HOST:PORT, unix:PATH or, with TLS, {tls.FORM}"
        )


def choose_address(control_url: str, pool: PoolInfo) -> str:
    """Choose from the addresses that a server listens on the one to attach by.

    TCP before unix sockets: the kernel tells whether a TCP connection is alive.

    Raises:
        InvalidArgument: none can be reached from here, so a person must say.
    """
    assert pool.server
    url = urlsplit(control_url)
    remote = None if control_url.startswith("unix:") else url.hostname
    for address in sorted(pool.server.addresses, key=lambda text: text.startswith("unix:")):
        if (chosen := _reachable(address, remote)) is not None:
            return chosen
    raise InvalidArgument(
        f"the server at {control_url} listens for NBD on "
        f"{', '.join(pool.server.addresses) or 'passed sockets'}: "
        "say with --nbd HOST:PORT how this machine reaches it"
    )


def _reachable(address: str, remote: str | None) -> str | None:
    if address.startswith("unix:"):
        return None if remote else address
    host, _, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if bare in ("0.0.0.0", "::", ""):
        name = remote or "127.0.0.1"
        return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
    if remote and bare in LOOPBACK and remote not in LOOPBACK:
        return None
    return address


def still_fits(before: int, now: int) -> bool:
    """Tell whether a client that was told flags `before` can go on with a server that offers `now`.

    A server that can more than before, as after an upgrade, still fits: nobody asks it for that.
    """
    read_only = int(TransmissionFlag.READ_ONLY)
    return not before & ~now & ~read_only and before & read_only == now & read_only


def dial(address: str, export: str, *, timeout_s: float = DIAL_TIMEOUT_S) -> Link:
    """Connect to an export and shake hands; the socket blocks, and is at its first request.

    Of an address with TLS it is an `ssl.SSLSocket`, or there is none.

    Raises:
        ServerAway: nobody answers.
        DeviceError: the server refuses the export, with its reason, or TLS fails.
        ProtocolError: it does not speak NBD as it must.
        InvalidArgument: the files for TLS cannot be used.
    """
    secured = tls.parse_address(address)
    try:
        sock = _connect(f"[{secured.host}]:{secured.port}" if secured else address, timeout_s)
    except (OSError, UnicodeError) as error:  # the latter of what cannot be a host's name
        reason = getattr(error, "strerror", None) or error
        raise ServerAway(f"no NBD server answers at {address} ({reason})") from error
    try:
        handshake = _begin_handshake(sock)
        if secured:
            _start_tls(sock, handshake, address)
            sock = tls.secure(sock, secured)
        found = _choose_export(sock, handshake, address, export)
        sock.settimeout(None)
    except BaseException as error:
        sock.close()
        if secured and isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
            raise tls.failure(secured, error) from error
        if isinstance(error, OSError):
            raise ServerAway(f"{address} went away in the handshake: {error}") from error
        raise
    return Link(sock, found.size, found.flags)


def _connect(address: str, timeout_s: float) -> socket.socket:
    if address.startswith("unix:"):
        return unix_socket.connect(Path(address.removeprefix("unix:")), timeout_s)
    host, _, port = address.rpartition(":")
    sock = socket.create_connection(
        (host.removeprefix("[").removesuffix("]"), int(port)), timeout_s
    )
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_EVERY_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    return sock


def _begin_handshake(sock: socket.socket) -> ClientHandshake:
    handshake = ClientHandshake()
    while (hello := handshake.hello()) is None:
        handshake.receive(_receive(sock))
    sock.sendall(hello)
    return handshake


def _start_tls(sock: socket.socket, handshake: ClientHandshake, address: str) -> None:
    """Have the server agree to TLS; never go on without it."""
    sock.sendall(build_option(Option.STARTTLS))
    answer = next(iter(_answers(sock, handshake)))
    if answer.is_error:
        raise DeviceError(
            f"the server at {address} speaks no TLS ({OptionReply(answer.reply).name}): serve it "
            "with --tls, or give its address without nbds://"
        )
    if not answer.is_last or handshake.unread():
        # What somebody in between slipped in would be taken for the server's word under TLS.
        raise ProtocolError(f"the server at {address} sent more before TLS than its consent")


def _choose_export(
    sock: socket.socket, handshake: ClientHandshake, address: str, export: str
) -> ExportSize:
    found: ExportSize | None = None
    for option in option_exchange(export, ReplyMode.SIMPLE):
        sock.sendall(option)
        for answer in _answers(sock, handshake):
            if answer.reply == OptionReply.ERR_TLS_REQD:
                raise DeviceError(
                    f"the server at {address} asks for TLS: say so with --nbd {tls.FORM} "
                    f"({tls.KERNEL_CANNOT})"
                )
            if answer.is_error:
                reason = answer.data.decode(errors="replace") or OptionReply(answer.reply).name
                raise DeviceError(f"the server at {address} refuses: {reason}")
            if answer.reply == OptionReply.INFO and answer.data[:2] == U16.pack(Info.EXPORT):
                found = parse_info_export(answer.data)
    if found is None or handshake.unread():
        raise ProtocolError(f"the server at {address} did not tell the export's size")
    return found


def _answers(sock: socket.socket, handshake: ClientHandshake) -> Iterable[OptionAnswer]:
    while True:
        answer = handshake.answer()
        if answer is None:
            handshake.receive(_receive(sock))
            continue
        yield answer
        if answer.is_last:
            return


def _receive(sock: socket.socket) -> bytes:
    data = sock.recv(RECEIVE_BYTES)
    if not data:
        raise ConnectionResetError("the server closed the connection")
    return data
