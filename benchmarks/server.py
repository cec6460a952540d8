"""The life of one server under measurement: its disks are made, it is started, stopped, killed.

Owns what all peers have in common. How each of them is told what to serve is peers.py's.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final

from benchmarks import handshake, process
from benchmarks.handshake import Address
from benchmarks.model import BenchmarkFailed, Stage, Transport
from nbdstore.errors import ProtocolError
from tests.children import Children
from tests.clients.served_pool import free_port

START_TIMEOUT_S: Final = 120.0
STOP_TIMEOUT_S: Final = 120.0
# Short beside the 10 ms that the fastest peer takes to start, since this is what open times are
# measured with.
_POLL_S: Final = 0.001


class Server(ABC):
    """One peer's server, which serves the disks of one stage.

    Arguments:
        children: what it is started by.
        directory: for its disks and logs; made here.
        credentials: a directory with ca-cert.pem, server-cert.pem and server-key.pem.
    """

    log_name: ClassVar = "server.log"

    def __init__(self, children: Children, directory: Path, credentials: Path) -> None:
        directory.mkdir(parents=True)
        self.children = children
        self.directory = directory
        self.credentials = credentials
        # Of its own, since a unix socket's path must be short (unix(7): 107 bytes).
        self._socket_directory = Path(tempfile.mkdtemp(prefix="nbdstore-bench-"))
        self.socket_path = self._socket_directory / "nbd.sock"
        self.port = free_port()
        self.transport = Transport.UNIX
        self.pid: int | None = None
        self.process: subprocess.Popen[bytes] | None = None

    # --- What a peer says of itself ---

    @abstractmethod
    def create(self, stage: Stage) -> None:
        """Make the disks of `stage`; called once, before the first start."""

    def map_whole(self) -> None:  # noqa: B027 - what most peers do, not all must
        """Map all of the first volume without writing it; nothing to do where there is no map."""

    def keep_snapshots(self, n_snapshots: int) -> None:
        """Take snapshots of the first volume, with writes between them.

        Raises:
            BenchmarkFailed: this server has none; who runs rows leaves it out.
        """
        raise BenchmarkFailed("has no snapshots")

    @abstractmethod
    def command(self, transport: Transport) -> Sequence[str]:
        """The command line that serves over `transport`, in the foreground if it can."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The files that hold the data."""

    env: Mapping[str, str] = {}

    def started_pid(self) -> int:
        """The server's process, once it answers."""
        assert self.process
        return self.process.pid

    def has_failed(self) -> bool:
        """Whether what was started has ended, and so will never answer."""
        assert self.process
        return self.process.poll() is not None

    # --- Its life ---

    def start(self, transport: Transport) -> float:
        """Start to serve; return the seconds until the first client had its export.

        (With TLS: until the server greeted a client.)

        Raises:
            BenchmarkFailed: it ended, or did not answer in time.
        """
        self.transport = transport
        self.socket_path.unlink(missing_ok=True)
        began = time.monotonic()
        self.process = self.children.start(
            *self.command(transport),
            log=f"{self.directory.name}-{self.log_name}",
            env=self.env,
        )
        while True:
            try:
                self.attach()
                break
            except (OSError, ProtocolError) as error:
                if self.has_failed() or time.monotonic() - began > START_TIMEOUT_S:
                    raise BenchmarkFailed(f"did not start ({error}): {self.last_words()}") from None
                time.sleep(_POLL_S)
        took_s = time.monotonic() - began
        self.pid = self.started_pid()
        return took_s

    def attach(self, volume: int = 0) -> None:
        """Be a client that comes and goes."""
        if self.transport is Transport.TLS:
            handshake.greet(self.address())
        else:
            handshake.attach(self.address(), self.export(volume))

    def stop(self) -> None:
        """Ask the server to stop, and wait until it has."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server as a crash does."""
        self._end(signal.SIGKILL)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop, and start again as it was."""
        transport = self.transport
        self.stop()
        yield
        self.start(transport)

    def _end(self, number: signal.Signals) -> None:
        pid, self.pid = self.pid, None
        if pid is None:
            return
        ended = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(ended, number)
            if not select.select([ended], [], [], STOP_TIMEOUT_S)[0]:
                raise BenchmarkFailed(f"still there {STOP_TIMEOUT_S:.0f} s after {number.name}")
        finally:
            os.close(ended)
            if self.process and self.process.pid == pid:
                self.process.poll()

    def close(self) -> None:
        """Stop at all costs."""
        if self.pid is not None and Path(f"/proc/{self.pid}").exists():
            self.kill()
        shutil.rmtree(self._socket_directory)

    def last_words(self) -> str:
        """The end of what the server logged."""
        log = self.children.log_file(f"{self.directory.name}-{self.log_name}")
        return " / ".join(log.read_text(errors="replace").strip().splitlines()[-3:])

    # --- What it costs ---

    def cpu_s(self) -> float:
        assert self.pid is not None
        return process.cpu_s(self.pid)

    def memory_bytes(self) -> int:
        assert self.pid is not None
        return process.memory_bytes(self.pid)

    # --- Addresses ---

    def export(self, volume: int = 0) -> str:
        return f"volume-{volume}"

    def address(self) -> Address:
        if self.transport is Transport.UNIX:
            return str(self.socket_path)
        return ("127.0.0.1", self.port)

    def uri(self, volume: int = 0) -> str:
        """The NBD URI of a volume, over the transport that the server was started with."""
        match self.transport:
            case Transport.UNIX:
                return f"nbd+unix:///{self.export(volume)}?socket={self.socket_path}"
            case Transport.TCP:
                return f"nbd://127.0.0.1:{self.port}/{self.export(volume)}"
            case Transport.TLS:
                return f"nbds://localhost:{self.port}/{self.export(volume)}"
