"""Block devices as the kernel shows them in sysfs, and their nodes, made where there are none.

Owns reading ``/sys/block`` and making ``/dev`` nodes from it, as containers need it, which have no
udev and a ``/dev`` of their own. Changes no device.

    /sys/block/NAME/dev               MAJOR:MINOR
    /sys/block/NAME/size              in sectors of 512 bytes, whatever the device's own are
    /sys/block/NAME/holders           devices on top of it
    /sys/block/NAME/inflight          requests under way: reads, writes
    /sys/block/nbdN/pid, backend      there while it is configured; the identifier of CONNECT
    /sys/block/loopN/loop/backing_file
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbdstore.agent import programs
from nbdstore.errors import Busy, DeviceError

SECTOR_BYTES = 512
NODE_MODE = 0o600
CLAIM_PATIENCE_S = 3.0
"""udev looks into a device for a moment, and so does a process that starts a container."""
CLAIM_RETRY_S = 0.05
SYNC_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class BlockDevice:
    """A block device of this machine, by the name that the kernel gave it, such as ``nbd3``."""

    name: str
    sysfs: Path = Path("/sys/block")
    dev: Path = Path("/dev")

    @property
    def index(self) -> int:
        """The number in its name."""
        return int("".join(filter(str.isdigit, self.name)))

    @property
    def path(self) -> str:
        return str(self.dev / self.name)

    @property
    def number(self) -> tuple[int, int]:
        """(major, minor); DeviceError if there is no such device."""
        text = self.attribute("dev")
        if text is None:
            raise DeviceError(f"there is no device {self.name} on this machine")
        major, _, minor = text.partition(":")
        return int(major), int(minor)

    @property
    def size(self) -> int:
        """Bytes; 0 of one that is not there, or not configured."""
        return int(self.attribute("size") or 0) * SECTOR_BYTES

    @property
    def configured(self) -> bool:
        """Whether an nbd device has a configuration."""
        return self.attribute("pid") is not None

    @property
    def identifier(self) -> str | None:
        """What an nbd device was called by whoever configured it."""
        return self.attribute("backend")

    @property
    def backing_file(self) -> str | None:
        """The file behind a loop device."""
        return self.attribute("loop/backing_file")

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        return all(int(word) == 0 for word in (self.attribute("inflight") or "").split())

    @property
    def holders(self) -> list[str]:
        """Devices that are made of this one."""
        try:
            return sorted(path.name for path in (self.sysfs / self.name / "holders").iterdir())
        except FileNotFoundError:
            return []

    def users(self, proc: Path = Path("/proc")) -> list[str]:
        """List the processes that have the device open, as "NAME (PID)", those that can be seen.

        By the names of what they have open alone: a look at a file could wait for its device.
        """
        found = []
        # By os.scandir: each nbd device has threads of the kernel, so that there may be thousands.
        with os.scandir(proc) as processes:
            for process in processes:
                if not process.name.isdigit() or int(process.name) == os.getpid():
                    continue
                if self._is_open_in(f"{process.path}/fd"):
                    try:
                        name = Path(process.path, "comm").read_text().strip()
                    except OSError:
                        continue  # it has ended
                    found.append(f"{name} ({process.name})")
        return sorted(found)

    def _is_open_in(self, directory: str) -> bool:
        try:
            with os.scandir(directory) as entries:
                return any(_name_behind(entry) == self.name for entry in entries)
        except OSError:  # the process is gone, or it is none of ours
            return False

    def attribute(self, name: str) -> str | None:
        """Read a file of the device's directory in sysfs; None if it is not there."""
        try:
            return (self.sysfs / self.name / name).read_text().rstrip("\n")
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO):
                return None
            raise

    def make_node(self) -> str:
        """Return the path of the device's node; make it if there is none.

        Raises:
            DeviceError: there is no such device, something else has its name, or the node cannot
                be made.
        """
        wanted = os.makedev(*self.number)
        try:
            found = Path(self.path).stat()
        except FileNotFoundError:
            self._mknod(wanted)
            return self.path
        if not stat.S_ISBLK(found.st_mode) or found.st_rdev != wanted:
            raise DeviceError(
                f"{self.path} is not the device {self.name}: remove it, and try again"
            )
        return self.path

    def _mknod(self, number: int) -> None:
        try:
            os.mknod(self.path, NODE_MODE | stat.S_IFBLK, number)
        except FileExistsError:
            pass  # devtmpfs was as fast
        except OSError as error:
            raise DeviceError(
                f"the node {self.path} cannot be made ({error.strerror}): a container needs "
                "CAP_MKNOD, or the host's /dev"
            ) from error

    def sync(self) -> None:
        """Have all that was written to the device, by whomever, durable at its other end.

        By another process, which can be left behind if the device waits for its server.

        Raises:
            ProgramTimeout: that took too long.
            DeviceError: it cannot be done.
        """
        programs.run("sync", self.make_node(), timeout_s=SYNC_TIMEOUT_S)

    @contextlib.contextmanager
    def claimed(self, patience_s: float = CLAIM_PATIENCE_S) -> Iterator[int]:
        """Hold the device so that nobody can mount it; yields a descriptor.

        Raises:
            Busy: it is mounted, in whatever mount namespace, or a part of another device, and
                still is after `patience_s`.
        """
        deadline_s = time.monotonic() + patience_s
        read_only = self.attribute("ro") == "1"
        flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_EXCL | os.O_CLOEXEC
        while True:
            try:
                descriptor = os.open(self.make_node(), flags)
                break
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() >= deadline_s:
                    raise self._refusal(error) from error
            time.sleep(CLAIM_RETRY_S)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _refusal(self, error: OSError) -> Exception:
        if error.errno != errno.EBUSY:
            hint = ": does the container allow the device?" if error.errno == errno.EPERM else ""
            return DeviceError(f"{self.path} cannot be opened: {error.strerror}{hint}")
        holders = self.holders
        by = f"{', '.join(holders)} is made of it" if holders else "it is mounted"
        return Busy(f"{self.path} is in use: {by}, here or in a container")


def _name_behind(link: os.DirEntry[str]) -> str:
    try:
        return Path(link).readlink().name
    except OSError:  # closed meanwhile, which tells nothing of the others
        return ""


def nbd_devices(sysfs: Path = Path("/sys/block")) -> list[BlockDevice]:
    """List the nbd devices of this machine, by their numbers."""
    return _devices("nbd", sysfs)


def loop_devices(sysfs: Path = Path("/sys/block")) -> list[BlockDevice]:
    """List the loop devices of this machine, by their numbers."""
    return _devices("loop", sysfs)


def _devices(prefix: str, sysfs: Path) -> list[BlockDevice]:
    names = [path.name for path in sysfs.glob(f"{prefix}*") if path.name[len(prefix) :].isdigit()]
    return sorted((BlockDevice(name, sysfs) for name in names), key=lambda device: device.index)
