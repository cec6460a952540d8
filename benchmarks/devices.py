"""A volume as a block device of this host, for as long as it is needed.

kernel    the nbd driver and nbd-client, on hosts that have /dev/nbd0
loop      nbdfuse and a loop device, on all others: one more hop, the same one for every peer
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from benchmarks.model import BenchmarkFailed, LeftOut
from benchmarks.server import Server
from benchmarks.tools import Tools

Attach = Callable[[Server, Tools], contextlib.AbstractContextManager[Path]]

_MOUNT_TIMEOUT_S: Final = 30.0
_MAX_DEVICES: Final = 16


@contextlib.contextmanager
def kernel(server: Server, tools: Tools) -> Iterator[Path]:
    """Attach the first volume with nbd-client, over the unix socket."""
    if os.geteuid() != 0:
        raise LeftOut("needs root")
    device = _free_nbd_device()
    tools.children.run(
        *("nbd-client", "-unix", server.socket_path, device, "-name", server.export()),
    )
    try:
        yield device
    finally:
        tools.children.run("nbd-client", "-d", device)


def _free_nbd_device() -> Path:
    for number in range(_MAX_DEVICES):
        device = Path(f"/dev/nbd{number}")
        if device.exists() and not Path(f"/sys/block/{device.name}/pid").exists():
            return device
    raise LeftOut("this host has no free /dev/nbd device (modprobe nbd)")


@contextlib.contextmanager
def loop(server: Server, tools: Tools) -> Iterator[Path]:
    """Mount the first volume with nbdfuse and put a loop device on it."""
    if os.geteuid() != 0:
        raise LeftOut("needs root")
    for path in ("/dev/fuse", "/dev/loop-control"):
        if not Path(path).exists():
            raise LeftOut(f"needs {path}")
    directory = server.directory / "fuse"
    directory.mkdir(exist_ok=True)
    with _fuse(server, tools, directory):
        device = tools.children.run(
            *("losetup", "--find", "--show", "--direct-io=off", directory / "nbd")
        ).strip()
        try:
            yield Path(device)
        finally:
            tools.children.run("losetup", "--detach", device)


@contextlib.contextmanager
def _fuse(server: Server, tools: Tools, directory: Path) -> Iterator[None]:
    pidfile = server.directory / "nbdfuse.pid"
    pidfile.unlink(missing_ok=True)
    os.mkfifo(pidfile)
    reader = os.open(pidfile, os.O_RDONLY | os.O_NONBLOCK)
    try:
        process = tools.children.start(
            *("nbdfuse", "--pidfile", str(pidfile), str(directory), server.uri()),
            log=f"{server.directory.name}-nbdfuse.log",
        )
        # nbdfuse writes its process id when the file system is mounted.
        if not select.select([reader], [], [], _MOUNT_TIMEOUT_S)[0]:
            process.kill()
            raise BenchmarkFailed("nbdfuse has not mounted the volume")
        try:
            yield
        finally:
            tools.children.run("fusermount3", "-u", "-z", directory)
            process.wait(_MOUNT_TIMEOUT_S)
    finally:
        os.close(reader)
