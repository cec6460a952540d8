"""A machine of namespaces: own processes, mounts, network and host name over this one's files.

What a Docker engine does to a machine - bridges, packet filters, mounts, processes that outlive
it - it does to this one, and all of it is gone when the first process dies, which it does with the
test at the latest. The way out, for package registries while images are built, is slirp4netns: a
network stack in user space that needs nothing of the real machine's network configuration.

Owns namespaces; knows nothing of Docker.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from tests.children import Argument, Children

INIT = Path(__file__).with_name("init.sh")
START_TIMEOUT_S = 30.0
# A Docker engine stops its containers first.
END_TIMEOUT_S = 60.0
# The largest packets that slirp4netns takes: fewer of them for the same data.
MTU = 65520


class Machine:
    """Run programs in namespaces of their own, which end with `children`.

    Arguments:
        children: what the machine is started, logged and killed with.
    """

    def __init__(self, children: Children) -> None:
        self.children = children
        self.unshare = children.start(
            *("unshare", "--mount", "--pid", "--net", "--uts", "--ipc"),
            # Mounts of the real machine that come later are seen here; none of here are seen there.
            *("--propagation", "slave", "--mount-proc", "--fork", "--kill-child"),
            *("sh", str(INIT)),
            log="machine.log",
        )
        self._wait_until("machine.log", "ready")
        (self.pid,) = _children_of(self.unshare.pid)
        children.start(
            *("slirp4netns", "--configure", f"--mtu={MTU}", "--disable-host-loopback"),
            *(str(self.pid), "tap0"),
            log="slirp4netns.log",
        )
        self._wait_until("slirp4netns.log", "received tapfd")

    def run(
        self,
        *argv: Argument,
        timeout_s: float = 60,
        status: int | None = 0,
        env: Mapping[str, str] | None = None,
        stdin: str = "",
    ) -> str:
        """Run a program in the machine to its end; see `Children.run`."""
        __tracebackhide__ = True
        words = [*self._enter(), *argv]
        return self.children.run(*words, timeout_s=timeout_s, status=status, env=env, stdin=stdin)

    def start(
        self, *argv: Argument, log: str, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a program in the machine; see `Children.start`. To signal it, use `kill`.

        The process is nsenter, which stays and ends as the program does.
        """
        return self.children.start(*self._enter(), *argv, log=log, env=env)

    def kill(self, process: subprocess.Popen[bytes], number: signal.Signals) -> int:
        """Send a signal to a program that `start` started, and return with which status it ends."""
        if process.poll() is None:
            for pid in _children_of(process.pid):
                os.kill(pid, number)
        return process.wait(END_TIMEOUT_S)

    def _enter(self) -> list[str]:
        spaces = ("--mount", "--pid", "--net", "--uts", "--ipc")
        return ["nsenter", "--target", str(self.pid), *spaces, "--"]

    def _wait_until(self, log: str, word: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        path = self.children.log_file(log)
        while word not in path.read_text():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{log} does not say '{word}': {path.read_text()}")
            time.sleep(0.02)


def _children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]
