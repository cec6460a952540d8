"""Unix sockets at paths of any length.

The kernel takes at most 107 bytes of path in a socket address, and pools lie where people put
them. So the address used is ``/proc/self/fd/N/NAME`` with N a descriptor of the directory: short,
and without a change of the working directory, which would be seen by the whole process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

MODE = 0o600
MAX_ADDRESS = 107
"""Bytes of path in a `sockaddr_un`, without its final zero (unix(7))."""


def connect(path: Path, timeout_s: float | None = None) -> socket.socket:
    """Connect to the socket at `path`; OSError as from connect(2)."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        with address(path) as short:
            sock.connect(short)
    except BaseException:
        sock.close()
        raise
    return sock


def listen(path: Path, *, backlog: int = 128) -> socket.socket:
    """Listen at `path`, for the owner alone (mode 0600), replacing a socket that is there.

    The socket appears under its name in one step, complete: never with wider permissions, and
    never unconnectable. The caller must know that nobody else serves at `path` (it holds the
    pool's lock), so whatever lies there was left behind by a process that was killed.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            fresh.unlink()
        with address(fresh) as short:
            sock.bind(short)
        fresh.chmod(MODE)
        sock.listen(backlog)
        fresh.rename(path)
    except BaseException:
        sock.close()
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
    return sock


@contextlib.contextmanager
def address(path: Path) -> Iterator[str]:
    """Yield an address of `path` that fits, for bind(2) or connect(2) at once.

    Raises:
        OSError: the directory cannot be opened, or the name alone is too long.
    """
    if len(os.fsencode(path)) <= MAX_ADDRESS:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        short = f"/proc/self/fd/{directory}/{path.name}"
        if (excess := len(os.fsencode(short)) - MAX_ADDRESS) > 0:
            reason = f"the socket's name is {excess} bytes too long"
            raise OSError(errno.ENAMETOOLONG, reason, str(path))
        yield short
    finally:
        os.close(directory)
