"""What systemd passes to a service and wants to hear from it: sockets and readiness.

The two protocols in full, so that no library is needed: sd_listen_fds(3) and sd_notify(3). The
environment is an argument; nothing here reads it by itself.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import stat
from collections.abc import Mapping

from nbdstore.errors import InvalidArgument

FIRST_FD = 3
"""SD_LISTEN_FDS_START."""


@dataclasses.dataclass(frozen=True)
class PassedSocket:
    """A socket that was open when the process began. name: from FileDescriptorName=."""

    name: str
    socket: socket.socket

    @property
    def listening(self) -> bool:
        """Whether it accepts connections; else it is one (Accept=yes)."""
        return bool(self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def passed_sockets(environ: Mapping[str, str], pid: int) -> list[PassedSocket]:
    """Take over the sockets that are meant for process `pid`; none without socket activation.

    Raises:
        InvalidArgument: the variables make no sense, or a descriptor is no stream socket.
    """
    if environ.get("LISTEN_PID") != str(pid):
        return []
    count = environ.get("LISTEN_FDS", "")
    if not (count.isascii() and count.isdigit()):
        raise InvalidArgument(f"LISTEN_FDS is '{count}', not a number of sockets")
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    names += [""] * (int(count) - len(names))
    return [
        PassedSocket(name, adopt(FIRST_FD + index, f"descriptor {FIRST_FD + index} (LISTEN_FDS)"))
        for index, name in enumerate(names[: int(count)])
    ]


def adopt(fd: int, what: str) -> socket.socket:
    """Take over descriptor `fd`, which must be a stream socket, closed to child processes.

    Raises:
        InvalidArgument: it is none; `what` says in the message which one was meant.
    """
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        is_socket = False
    if not is_socket:
        raise InvalidArgument(f"{what} is not a socket")
    sock = socket.socket(fileno=fd)
    if sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise InvalidArgument(f"{what} is not a stream socket")
    sock.set_inheritable(False)
    return sock


def notify(environ: Mapping[str, str], state: str) -> None:
    """Tell the service manager `state`, such as ``READY=1``; nothing without one.

    A manager that does not listen is its own trouble, not the service's: failures are ignored, as
    sd_notify(3) advises.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    # "@" stands for the zero byte of an abstract address (unix(7)).
    target = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), target)
        except OSError:
            pass
