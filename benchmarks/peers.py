"""The servers that are measured, and how each is told to serve: nbdstore and four C servers.

All of them promise the same: a write is with the kernel when it is acknowledged, and on disk when
a FLUSH after it is. All use the host's page cache. Everything else is each server's default, but
for what a fair comparison wants, which ``about`` names.
"""

from __future__ import annotations

import contextlib
import random
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks import history
from benchmarks.model import (
    SCATTERED_BLOCK_BYTES,
    BenchmarkFailed,
    Filling,
    Need,
    Stage,
    Transport,
)
from benchmarks.scale import GIB
from benchmarks.server import START_TIMEOUT_S, Server
from nbdstore.control.client import ControlClient
from tests.children import Children

ROOT: Final = Path(__file__).parents[1]
MAX_CLIENTS: Final = 64


class Nbdstore(Server):
    """nbdstore of a checkout: this one, or another one to compare with."""

    def __init__(
        self, children: Children, directory: Path, credentials: Path, *, checkout: Path = ROOT
    ) -> None:
        super().__init__(children, directory, credentials)
        self.pool = directory / "pool"
        self.env = {
            "PYTHONPATH": str(checkout),
            "NBDSTORE_POOL": str(self.pool),
            "PYTHONDONTWRITEBYTECODE": "",  # an nbdstore that is installed has it, from pip
        }

    def create(self, stage: Stage) -> None:
        capacity = stage.n_volumes * stage.stored_bytes + 2 * GIB
        self.children.run(*self._nbdstore("pool", "create", "--capacity", capacity), env=self.env)
        # The first start serves no volume yet: what counts is that it answers on its control API.
        self.children.run(
            *self._nbdstore("volume", "create", self.export(), "--size", stage.size), env=self.env
        )
        if stage.n_volumes > 1:
            self.start(Transport.UNIX)
            for volume in range(1, stage.n_volumes):
                self.control().create_volume(self.export(volume), stage.size)
            self.stop()

    def map_whole(self) -> None:
        with self.paused():
            history.map_whole(self.pool, self.export())

    def keep_snapshots(self, n_snapshots: int) -> None:
        with self.paused():
            history.keep_snapshots(self.pool, self.export(), n_snapshots)

    def control(self) -> ControlClient:
        return ControlClient(f"unix:{self.pool}/control.sock")

    def command(self, transport: Transport) -> Sequence[str]:
        if transport is Transport.UNIX:
            return self._nbdstore("serve", "--listen", f"unix:{self.socket_path}")
        listen = ("serve", "--listen", f"127.0.0.1:{self.port}")
        if transport is Transport.TCP:
            return self._nbdstore(*listen)
        certificate = self.credentials / "server-cert.pem"
        key = self.credentials / "server-key.pem"
        return self._nbdstore(
            *(*listen, "--tls", "required", "--tls-cert", certificate, "--tls-key", key)
        )

    def files(self) -> list[Path]:
        return [self.pool / name for name in ("data", "journal", "super")]

    def _nbdstore(self, *arguments: str | int | Path) -> list[str]:
        # -P: of the checkout in PYTHONPATH, even if this is run in the root of another one.
        return [sys.executable, "-P", "-m", "nbdstore", *map(str, arguments)]


class FileServer(Server):
    """A server that serves each volume from one file."""

    def create(self, stage: Stage) -> None:
        (self.directory / "disks").mkdir()
        self.disks = [
            self.directory / "disks" / self.export(number) for number in range(stage.n_volumes)
        ]
        for disk in self.disks:
            with disk.open("wb") as file:
                file.truncate(stage.size)

    def files(self) -> list[Path]:
        return self.disks


class Nbdkit(FileServer):
    """``nbdkit file``."""

    def command(self, transport: Transport) -> Sequence[str]:
        if transport is Transport.UNIX:
            listen = ["--unix", str(self.socket_path)]
        else:
            listen = ["--ipaddr", "127.0.0.1", "--port", str(self.port)]
        if transport is Transport.TLS:
            listen += ["--tls=require", f"--tls-certificates={self.credentials}"]
        served = f"file={self.disks[0]}" if len(self.disks) == 1 else f"dir={self.disks[0].parent}"
        return ["nbdkit", "--foreground", *listen, "file", served]


class QemuNbd(FileServer):
    """``qemu-nbd`` of a raw file."""

    image_format = "raw"

    def command(self, transport: Transport) -> Sequence[str]:
        if transport is Transport.UNIX:
            listen = ["--socket", str(self.socket_path)]
        else:
            listen = ["--bind", "127.0.0.1", "--port", str(self.port)]
        if transport is Transport.TLS:
            tls = f"tls-creds-x509,id=tls,endpoint=server,dir={self.credentials},verify-peer=off"
            listen += ["--object", tls, "--tls-creds", "tls"]
        return [
            *("qemu-nbd", "--persistent", f"--shared={MAX_CLIENTS}", *listen),
            *("--cache=writeback", "--discard=unmap", f"--format={self.image_format}"),
            *("--export-name", self.export(), str(self.disks[0])),
        ]


class QemuNbdQcow2(QemuNbd):
    """``qemu-nbd`` of a qcow2 image."""

    image_format = "qcow2"

    def create(self, stage: Stage) -> None:
        super().create(stage)
        command = ["qemu-img", "create", "-q", "-f", "qcow2"]
        if stage.filling is Filling.MAPPED:
            command += ["-o", "preallocation=metadata"]
        for disk in self.disks:
            self.children.run(*command, disk, str(stage.size))
        self.n_blocks = stage.size // SCATTERED_BLOCK_BYTES

    def keep_snapshots(self, n_snapshots: int) -> None:
        chance = random.Random(n_snapshots)
        with self.paused():
            for number in range(n_snapshots):
                self.children.run("qemu-img", "snapshot", "-c", f"s{number}", self.disks[0])
                writes = [
                    f"write -q {chance.randrange(self.n_blocks) * SCATTERED_BLOCK_BYTES} 4k"
                    for _ in range(history.WRITES_BETWEEN)
                ]
                commands = [word for write in writes for word in ("-c", write)]
                self.children.run("qemu-io", "-f", "qcow2", *commands, self.disks[0])


class NbdServer(FileServer):
    """``nbd-server``. In the foreground it serves only one client, so it is let go as a daemon."""

    def create(self, stage: Stage) -> None:
        super().create(stage)
        self.pid_path = self.directory / "nbd-server.pid"

    def command(self, transport: Transport) -> Sequence[str]:
        generic = ["allowlist=true"]
        if transport is Transport.UNIX:
            generic += [f"unixsock={self.socket_path}"]
        else:
            generic += ["listenaddr=127.0.0.1", f"port={self.port}"]
        if transport is Transport.TLS:
            generic += [
                f"certfile={self.credentials}/server-cert.pem",
                f"keyfile={self.credentials}/server-key.pem",
                "force_tls=true",
            ]
        lines = ["[generic]", *generic]
        for number, disk in enumerate(self.disks):
            lines += [f"[{self.export(number)}]", f"exportname={disk}"]
            lines += ["flush=true", "fua=true", "trim=true"]
        config = self.directory / "nbd-server.conf"
        config.write_text("\n".join(lines) + "\n")
        self.pid_path.unlink(missing_ok=True)
        return ["nbd-server", "-C", str(config), "-p", str(self.pid_path)]

    def started_pid(self) -> int:
        return int(self.pid_path.read_text())

    def has_failed(self) -> bool:
        assert self.process
        return self.process.poll() not in (None, 0)

    def _end(self, number: signal.Signals) -> None:
        super()._end(number)
        self.pid_path.unlink(missing_ok=True)

    def close(self) -> None:
        if self.pid is None and self.process and self.process.wait(START_TIMEOUT_S) == 0:
            # Perhaps it was interrupted while it started: then the file is still there.
            with contextlib.suppress(FileNotFoundError):
                self.pid = self.started_pid()
        super().close()


@dataclass(frozen=True)
class Peer:
    """A server that can be measured.

    Attributes:
        programs: what must be installed.
        about: how it is run.
        version: the command that tells its version.
        lacks: what it cannot do, and why.
    """

    name: str
    build: Callable[[Children, Path, Path], Server]
    programs: tuple[str, ...]
    about: str
    version: tuple[str, ...]
    lacks: Mapping[Need, str] = field(default_factory=dict)
    checkout: Path | None = None


NO_JOURNAL: Final = {Need.JOURNAL: "keeps no journal"}
NO_SNAPSHOTS: Final = {Need.SNAPSHOTS: "has no snapshots"}
ONE_EXPORT: Final = {Need.MANY_VOLUMES: "serves one export per process"}
# Seen with nbd-server 3.24 of Debian 12 and libnbd 1.14: the connection ends after STARTTLS.
BROKEN_TLS: Final = {Need.TLS: "drops clients that use libnbd when they ask for TLS"}

NBDSTORE: Final = Peer(
    "nbdstore",
    Nbdstore,
    (),
    "checksums verified on every read, copy-on-write on every write",
    (sys.executable, "-m", "nbdstore", "--version"),
    checkout=ROOT,
)
PEERS: Final = {
    peer.name: peer
    for peer in (
        NBDSTORE,
        Peer(
            "nbdkit",
            Nbdkit,
            ("nbdkit",),
            "file plugin, a sparse file, overwritten in place",
            ("nbdkit", "--version"),
            lacks=NO_JOURNAL | NO_SNAPSHOTS,
        ),
        Peer(
            "qemu-raw",
            QemuNbd,
            ("qemu-nbd",),
            "qemu-nbd --cache=writeback --discard=unmap, a sparse raw file",
            ("qemu-nbd", "--version"),
            lacks=NO_JOURNAL | NO_SNAPSHOTS | ONE_EXPORT,
        ),
        Peer(
            "qemu-qcow2",
            QemuNbdQcow2,
            ("qemu-nbd", "qemu-img", "qemu-io"),
            "qemu-nbd --cache=writeback --discard=unmap, a qcow2 image with clusters of 64 KiB",
            ("qemu-nbd", "--version"),
            lacks=NO_JOURNAL | ONE_EXPORT,
        ),
        Peer(
            "nbd-server",
            NbdServer,
            ("nbd-server",),
            "a sparse file; flush, fua and trim switched on",
            ("nbd-server", "-V"),
            lacks=NO_JOURNAL | NO_SNAPSHOTS | BROKEN_TLS,
        ),
    )
}


def other_checkout(directory: Path) -> Peer:
    """nbdstore of another checkout, to be measured beside this one.

    Raises:
        BenchmarkFailed: there is none.
    """
    checkout = directory.resolve()
    if not (checkout / "nbdstore" / "__main__.py").exists():
        raise BenchmarkFailed(f"{directory} is no checkout of nbdstore")

    def build(children: Children, place: Path, credentials: Path) -> Server:
        return Nbdstore(children, place, credentials, checkout=checkout)

    return Peer(
        f"nbdstore@{checkout.name}",
        build,
        NBDSTORE.programs,
        f"nbdstore of {checkout.name}",
        NBDSTORE.version,
        checkout=checkout,
    )
