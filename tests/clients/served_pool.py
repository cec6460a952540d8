"""One pool and the `nbdstore serve` that serves it, as a subprocess: started, stopped, killed.

Owns the life of the server; what clients do to it is the business of the tests.
"""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from tests.children import Children
from tests.readiness import ReadinessSocket, ServerFailed

NBDSTORE = Path(sysconfig.get_path("scripts")) / "nbdstore"
STOP_TIMEOUT_S = 60.0
# Below the range from which the kernel takes ports for outgoing connections, which could take
# the port of a server that is being restarted.
PORTS = range(20000, 30000)


class ServedPool:
    """A pool in ``directory``/pool, served on one TCP port and one unix socket."""

    def __init__(self, children: Children, directory: Path) -> None:
        self.children = children
        self.directory = directory / "pool"
        self.socket_path = directory / "nbd.sock"
        self.notify_path = directory / "notify.sock"
        self.log = children.log_file("server.log")
        self.port = free_port()
        self.options: tuple[str, ...] = ()
        self.process: subprocess.Popen[bytes] | None = None

    # --- The command line ---

    def nbdstore(self, *arguments: str, status: int = 0) -> str:
        """Run an nbdstore command on this pool and return what it wrote."""
        __tracebackhide__ = True
        return self.children.run(
            NBDSTORE, "--pool", self.directory, *arguments, status=status, timeout_s=300
        )

    def create(self, *options: str) -> None:
        self.nbdstore("pool", "create", *options)

    def create_volume(self, name: str, size: str) -> None:
        self.nbdstore("volume", "create", name, "--size", size)

    def show(self) -> Any:
        """Return what `nbdstore pool show --json` says."""
        return json.loads(self.nbdstore("pool", "show", "--json"))

    def check(self) -> None:
        """Fail unless `nbdstore check` finds nothing wrong with the pool, which is not served."""
        __tracebackhide__ = True
        assert self.process is None, "only a pool that is not being served can be checked"
        self.nbdstore("check")

    # --- The server ---

    def start(self, *options: str) -> None:
        """Start to serve and return when clients can connect."""
        self.options = options
        with ReadinessSocket(self.notify_path) as readiness:
            process = self._launch(readiness)
            readiness.wait(process)
        self.process = process

    def _launch(self, readiness: ReadinessSocket) -> subprocess.Popen[bytes]:
        return self.children.start(
            *(str(NBDSTORE), "--pool", str(self.directory), "serve", *self.options),
            *("--listen", f"127.0.0.1:{self.port}", "--listen", f"unix:{self.socket_path}"),
            log=self.log.name,
            env=readiness.env,
        )

    def stop(self) -> None:
        """Ask the server to stop, as systemd does; it must end with status 0."""
        assert self.process
        self.process.send_signal(signal.SIGTERM)
        self.wait()

    def wait(self) -> None:
        """Wait for the end of the server, which was asked to stop; it must be with status 0."""
        assert self.process
        process, self.process = self.process, None
        status = process.wait(STOP_TIMEOUT_S)
        if status != 0:
            raise ServerFailed(f"the server ended with status {status} after SIGTERM")

    def kill(self) -> None:
        """End the server as a crash does: `kill -9`."""
        assert self.process
        process, self.process = self.process, None
        process.kill()
        process.wait(STOP_TIMEOUT_S)

    def kill_while_starting(self, after_s: float) -> None:
        """Start the server, as it was last, and end it by `kill -9` when `after_s` have passed."""
        assert self.process is None
        with ReadinessSocket(self.notify_path) as readiness:
            process = self._launch(readiness)
            try:
                status = process.wait(after_s)
                raise ServerFailed(f"the server ended with status {status}")
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_TIMEOUT_S)

    def restart(self) -> None:
        """Start the server again, on the addresses and with the options that it had."""
        assert self.process is None
        self.start(*self.options)

    def close(self) -> None:
        """Stop the server; fail if it complained, or if the pool is not in perfect order."""
        if self.process:
            self.stop()
        if "Traceback" in self.log.read_text(errors="replace"):
            raise ServerFailed("the server logged a traceback: see server.log")
        self.check()

    # --- Addresses ---

    def uri(self, export: str = "disk", *, tls: bool = False) -> str:
        """Return the NBD URI of an export over TCP."""
        return f"{'nbds' if tls else 'nbd'}://127.0.0.1:{self.port}/{export}"

    def unix_uri(self, export: str = "disk") -> str:
        """Return the NBD URI of an export over the unix socket."""
        return f"nbd+unix:///{export}?socket={self.socket_path}"


def free_port() -> int:
    """Find a TCP port that nothing listens on."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
