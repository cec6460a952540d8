"""Waiting until a server says that it is ready: the other end of sd_notify(3)."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import time
from pathlib import Path

from tests.closing import Closing

READY_TIMEOUT_S = 60.0


class ServerFailed(AssertionError):
    """A server did not start, stop or serve as it should."""


class ReadinessSocket(Closing):
    """A socket that a program which is given ``env`` reports to.

    Arguments:
        path: where to put it; replaced if it exists.
    """

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self.env = {"NOTIFY_SOCKET": str(path)}

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for READY=1. Raises ServerFailed if ``process`` ends before, or takes too long."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        ended = os.pidfd_open(process.pid)
        try:
            while left_s := max(0.0, deadline - time.monotonic()):
                readable, _, _ = select.select([self._socket.fileno(), ended], [], [], left_s)
                if ended in readable:
                    raise ServerFailed(f"the server ended with status {process.wait()}")
                if readable and b"READY=1" in self._socket.recv(4096).split(b"\n"):
                    return
        finally:
            os.close(ended)
        raise ServerFailed(f"the server was not ready within {READY_TIMEOUT_S} s")

    def close(self) -> None:
        self._socket.close()
