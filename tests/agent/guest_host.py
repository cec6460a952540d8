"""A guest as a machine that attaches volumes with the kernel's nbd driver.

The agent runs in a container there: mount and process namespaces of its own, and a /dev in which
there are no devices. The network is the guest's, as the nbd driver wants it. What it mounts below
SHARED is seen by the guest, and by other containers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

from tests.agent.served import Served
from tests.guest.guest import HOST, Guest

ROOT: Final = Path(__file__).parents[2]
SHARED: Final = "/run/volumes"
SOCKET: Final = "/run/nbdstore/agent.sock"
REQUEST_TIMEOUT_S: Final = 5
PATIENCE_S: Final = 120
WAIT: Final = "/run/guest/busybox usleep 100000"

CONTAINER: Final = """
mount -t tmpfs -o mode=755 tmpfs /dev
mknod /dev/null c 1 3; mknod /dev/urandom c 1 9
exec $AS {nbdstore} agent --request-timeout {request_timeout_s} "$@"
"""
# One question to the agent, by a python that loads nothing else.
ASK: Final = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
sock.sendall(sys.argv[2].encode() + b"\\n")
print(sock.makefile().readline())
"""


class GuestHost:
    """The agent of a guest."""

    def __init__(self, guest: Guest, served: Served) -> None:
        self.guest = guest
        self.environment = (
            f"export PYTHONPATH={ROOT} NBDSTORE_SERVER=http://{HOST}:{served.control_port} "
            f"NBDSTORE_TOKEN_FILE={served.token_file} NBDSTORE_NBD={HOST}:{served.pool.port}\n"
        )
        container = CONTAINER.format(
            nbdstore=f"{sys.executable} -m nbdstore", request_timeout_s=REQUEST_TIMEOUT_S
        )
        guest.run(
            f"mkdir -p {SHARED}; mount -t tmpfs tmpfs {SHARED}; mount --make-shared {SHARED}\n"
            f"cat >/run/container.sh <<'END'\n{container}END\ncat >/run/ask.py <<'END'\n{ASK}END\n"
        )

    def start(self, *options: str, without: str = "") -> None:
        """Start the agent in a new container, and return when it answers.

        Arguments:
            without: a capability that the container does not have, such as "sys_resource".
        """
        arguments = " ".join(options)
        prefix = f"setpriv --bounding-set -{without}" if without else ""
        self.guest.run(
            f"{self.environment}export AS='{prefix}'\n"
            f"unshare --mount --pid --mount-proc --fork --kill-child "
            f"--propagation unchanged sh /run/container.sh {arguments} >/dev/console 2>&1 & "
            f"echo $! >/run/agent.pid\nuntil [ -S {SOCKET} ] && kill -0 $(cat /run/agent.pid); do "
            f"{WAIT}; done"
        )

    def kill(self) -> None:
        """Remove the container, and all its processes, at once."""
        self.guest.run(
            f"pid=$(cat /run/agent.pid); kill -9 $pid; while kill -0 $pid; do {WAIT}; done; "
            f"rm -f {SOCKET}",
        )

    def stop(self) -> None:
        """Ask the agent to stop, as `docker stop` does, and wait for its end."""
        self.guest.run(
            "pid=$(cat /run/agent.pid); kill -TERM $(cat /proc/$pid/task/$pid/children); "
            f"while kill -0 $pid 2>/dev/null; do {WAIT}; done"
        )

    def ask(self, **question: Any) -> Any:
        """Ask the agent; return the result, or the problem's text."""
        words = json.dumps(question)
        output = self.guest.run(f"{sys.executable} -ISE /run/ask.py {SOCKET} '{words}'")
        answer = json.loads(output)
        return answer["ok"] if "ok" in answer else answer["problem"]["detail"]

    def mount(self, volume: str, **options: Any) -> str:
        """Mount a volume below SHARED; return where."""
        where = f"{SHARED}/{volume}"
        answer = self.ask(
            do="mount", request={"volume": volume, "path": where, "by": "test", **options}
        )
        assert isinstance(answer, dict), answer
        return where

    def state(self, volume: str) -> str:
        (status,) = [item for item in self.ask(do="status") if item["volume"] == volume]
        return str(status["state"])
