"""The kernel's nbd driver, as its netlink family lets it be commanded (linux/nbd-netlink.h).

Owns the family's numbers and commands. Knows sockets only by their descriptors, and nothing of
volumes or servers.

    CONNECT       index (or none: the kernel takes a free device, or makes one), size, block size,
                  timeouts, flags, identifier, sockets -> index
    RECONFIGURE   index, identifier (must be the one of CONNECT); sockets take the places of dead
                  ones, and are dropped without a word if none is dead; a size changes the device
    DISCONNECT    index; does not ask whether the device is in use
    STATUS        -> for each device, whether it is configured
    LINK_DEAD     an event: index of a device that lost a connection

All need CAP_SYS_ADMIN in the first user namespace. Before Linux 6.4 the family exists in the first
network namespace alone; events go there alone on later ones, too.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from nbdstore.agent import netlink
from nbdstore.agent.netlink import Family, GenericNetlink, attribute, text, u32, u64

FAMILY: Final = "nbd"
GROUP: Final = "nbd_mc_group"

CONNECT: Final = 1
DISCONNECT: Final = 2
RECONFIGURE: Final = 3
LINK_DEAD: Final = 4
STATUS: Final = 5

INDEX: Final = 1
SIZE_BYTES: Final = 2
BLOCK_SIZE_BYTES: Final = 3
TIMEOUT: Final = 4
SERVER_FLAGS: Final = 5
SOCKETS: Final = 7
DEAD_CONN_TIMEOUT: Final = 8
DEVICE_LIST: Final = 9
BACKEND_IDENTIFIER: Final = 10
SOCKET_ITEM: Final = 1
SOCKET_FD: Final = 1
DEVICE_INDEX: Final = 1
DEVICE_CONNECTED: Final = 2


@dataclass(frozen=True, kw_only=True)
class Connect:
    """What CONNECT is told.

    identifier: shown in sysfs, and asked for by every RECONFIGURE.
    request_timeout_s: whole seconds after which an unanswered request takes its connection down
    and waits for another one. dead_timeout_s: how long requests wait when no connection is left.
    """

    identifier: str
    size: int
    block_size: int
    flags: int
    request_timeout_s: int
    dead_timeout_s: int
    sockets: Sequence[int]

    def encode(self) -> bytes:
        """Build the attributes."""
        return b"".join(
            [
                u64(SIZE_BYTES, self.size),
                u64(BLOCK_SIZE_BYTES, self.block_size),
                u64(SERVER_FLAGS, self.flags),
                u64(TIMEOUT, self.request_timeout_s),
                u64(DEAD_CONN_TIMEOUT, self.dead_timeout_s),
                text(BACKEND_IDENTIFIER, self.identifier),
                encode_sockets(self.sockets),
            ]
        )


def encode_sockets(descriptors: Sequence[int]) -> bytes:
    """Build the list of sockets."""
    items = [attribute(SOCKET_ITEM, u32(SOCKET_FD, descriptor)) for descriptor in descriptors]
    return attribute(SOCKETS, b"".join(items))


def parse_devices(data: bytes) -> dict[int, bool]:
    """Read the answer to STATUS: whether a device is configured, by its index."""
    devices = {}
    for kind, value in netlink.attributes(data):
        if kind != DEVICE_LIST:
            continue
        for _, item in netlink.attributes(value):
            found = dict(netlink.attributes(item))
            index = netlink.number(found[DEVICE_INDEX])
            devices[index] = bool(netlink.number(found[DEVICE_CONNECTED]))
    return devices


class NbdFamily:
    """Commands to the kernel's nbd driver; a socket of its own for each call, so for any thread.

    Raises (by every call):
        FileNotFoundError: there is no such family here.
        OSError: the kernel refused; PermissionError without CAP_SYS_ADMIN.
    """

    def connect(self, device: Connect, index: int | None = None) -> int:
        """Configure a device and return its index. The sockets belong to the kernel from then on.

        Without an index the kernel takes a free device, or makes one.
        """
        place = b"" if index is None else u32(INDEX, index)
        answer = dict(netlink.attributes(self._call(CONNECT, place + device.encode())))
        return netlink.number(answer[INDEX])

    def reconfigure(
        self, index: int, identifier: str, sockets: Sequence[int] = (), size: int | None = None
    ) -> None:
        """Offer sockets in the place of dead ones, and change the size.

        Whether sockets were taken it does not tell.
        """
        data = u32(INDEX, index) + text(BACKEND_IDENTIFIER, identifier)
        if size is not None:
            data += u64(SIZE_BYTES, size)
        if sockets:
            data += encode_sockets(sockets)
        self._call(RECONFIGURE, data)

    def disconnect(self, index: int) -> None:
        """Take a device down; requests under way fail. Nothing if it is down."""
        try:
            self._call(DISCONNECT, u32(INDEX, index))
        except OSError as error:
            if error.errno != errno.EINVAL:  # of a device that is not configured
                raise

    def devices(self) -> dict[int, bool]:
        """Tell for each device whether it is configured."""
        return parse_devices(self._call(STATUS, b""))

    def _call(self, command: int, data: bytes) -> bytes:
        netlink_socket = GenericNetlink()
        try:
            family = netlink_socket.family(FAMILY)
            return netlink_socket.call(family.number, command, data)
        finally:
            netlink_socket.close()


class DeadLinks:
    """The stream of LINK_DEAD events, from now on; has a descriptor, for select."""

    def __init__(self) -> None:
        self._netlink = GenericNetlink()
        try:
            family: Family = self._netlink.family(FAMILY)
            self._netlink.join(family.groups[GROUP])
        except BaseException:
            self._netlink.close()
            raise

    def fileno(self) -> int:
        return self._netlink.fileno()

    def close(self) -> None:
        self._netlink.close()

    def take(self) -> set[int] | None:
        """Return the devices that lost a connection; None if nobody can tell, it may be any."""
        try:
            messages = self._netlink.events()
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            return None
        return {
            netlink.number(dict(netlink.attributes(message.attributes))[INDEX])
            for message in messages
            if message.command == LINK_DEAD
        }
