"""Attaching without an nbd driver: nbdfuse makes a file of the export, a loop device of the file.

For kernels without nbd, and where its netlink cannot be reached. Slower than the kernel's driver,
and data passes through two processes, which the agent starts and does not need to be there::

    STATE/fuse/ID/nbd        the file, in the mounted FUSE filesystem
    STATE/fuse/ID.relay      locked by the relay as long as it lives; see `relay`
    STATE/fuse/ID.log        what the two had to say

A stop of the machine's init system or of the container ends them with everything else in there.
The file is as large as any volume can be (`relay.ROOM`), and the loop device over it is limited to
the volume's size. To grow, the relay must know the new size, for which it connects anew; then the
limit is raised (LOOP_SET_STATUS64 of loop(4)). While the device is mounted, Linux allows that from
5.19 (before: EAGAIN while anything of the device is cached) to 6.18 (since: EBUSY); elsewhere it
grows when it is attached again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from nbdstore.agent import devices, mounts, programs, relay
from nbdstore.agent.devices import BlockDevice
from nbdstore.agent.driver import Health
from nbdstore.agent.records import AttachRecord
from nbdstore.errors import DeviceError
from nbdstore.sizes import exact_size

LOOP_CTL_GET_FREE: Final = 0x4C82
LOOP_SET_STATUS64: Final = 0x4C04
LOOP_GET_STATUS64: Final = 0x4C05
LOOP_INFO_BYTES: Final = 232
"""Of struct loop_info64 (linux/loop.h)."""
LIMIT: Final = struct.Struct("=Q")
LIMIT_AT: Final = 32
"""Where its lo_sizelimit stands."""
LOOP_ATTEMPTS: Final = 20
"""Others take loop devices, too: what was free may be taken when we come."""
START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 30.0
POLL_S: Final = 0.02
FILE_NAME: Final = "nbd"


def why_unavailable() -> str | None:
    """Say why this driver cannot be used here; None if it can."""
    for path in ("/dev/fuse", "/dev/loop-control"):
        if not os.access(path, os.R_OK | os.W_OK):
            return f"{path} is not there, or not allowed"
    search = programs.SBIN.split(":")
    for program in ("nbdfuse", "fusermount3", "losetup"):
        if not any(os.access(f"{directory}/{program}", os.X_OK) for directory in search):
            return f"the program {program} is not installed"
    return None


class FuseDriver:
    """The driver.

    Arguments:
        directory: the agent's state directory.
        relay_command: starts a relay when a record's path is added to it.
        end_connections: ends the connections of a volume's lease; see `StoreServer`.
    """

    name = "fuse"
    reconnects_itself = True  # the relay does

    def __init__(
        self,
        directory: Path,
        relay_command: Sequence[str],
        end_connections: Callable[[str, int], None],
    ) -> None:
        self._directory = directory / "fuse"
        self._records = directory / "attachments"
        self._relay_command = relay_command
        self._end_connections = end_connections

    def attach(self, record: AttachRecord) -> tuple[BlockDevice, AttachRecord]:
        directory = self._mountpoint(record)
        if mounts.mounted_at(str(directory)) is None:
            self._start_relay(record, directory)
        device = self.find(record) or self._make_loop(record)
        device.make_node()
        return device, replace(record, size=device.size)

    def _start_relay(self, record: AttachRecord, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        log_path = self._directory / f"{record.id}.log"
        with log_path.open("wb") as log:
            # In a session of its own, and nobody's child: it outlives the agent.
            programs.start_detached(
                *self._relay_command, str(self._records / f"{record.id}.json"), output=log
            )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        seen = False
        while mounts.mounted_at(str(directory)) is None:
            alive = relay.read_state(self._state_path(record)) is not None
            said = log_path.read_text(errors="replace").strip()
            if (seen or said) and not alive:
                raise DeviceError(f"the volume cannot be attached by nbdfuse: {_last(said)}")
            if time.monotonic() > deadline_s:
                raise DeviceError(f"nbdfuse does not start: see {log_path}")
            seen = alive
            time.sleep(POLL_S)

    def _make_loop(self, record: AttachRecord) -> BlockDevice:
        size = self._await_size(record, 1, f"the relay of {record.volume} does not connect")
        options = ["--sizelimit", str(size)]
        options += ["--read-only"] if record.read_only else []
        file = self._mountpoint(record) / FILE_NAME
        for _ in range(LOOP_ATTEMPTS):
            device = BlockDevice(f"loop{_free_loop()}")
            path = device.make_node()
            done = programs.run("losetup", *options, path, str(file), accept=range(256))
            if done.status == 0:
                return device
            if os.strerror(errno.EBUSY) not in done.output:
                break
        raise DeviceError(f"no loop device for {record.volume}: {done.output}")

    def find(self, record: AttachRecord) -> BlockDevice | None:
        wanted = str(self._mountpoint(record) / FILE_NAME)
        for device in devices.loop_devices():
            if device.backing_file == wanted:
                return device
        return None

    def health(self, record: AttachRecord, device: BlockDevice, *, glance: bool = False) -> Health:
        state = relay.read_state(self._state_path(record))
        if state is None:
            return Health.DEAD
        return Health.CONNECTED if state.connected else Health.WAITING

    def reconnect(self, record: AttachRecord, device: BlockDevice) -> AttachRecord:
        """Return the record as it is; see `reconnects_itself`."""
        return record

    def grow(self, record: AttachRecord, device: BlockDevice, size: int) -> bool:
        if device.attribute("loop/sizelimit") in (None, "0"):
            return False  # it is as an agent made it that could not do this
        if self._size(record) < size:
            self._end_connections(record.volume, record.epoch)
            self._await_size(
                record,
                size,
                f"the relay of {record.volume} does not see that it has {exact_size(size)} now",
            )
        _raise_limit(device, size)
        return True

    def _size(self, record: AttachRecord) -> int:
        """Return how many bytes the relay has a connection for, 0 without one."""
        state = relay.read_state(self._state_path(record))
        return state.size if state is not None and state.connected else 0

    def _await_size(self, record: AttachRecord, least: int, complaint: str) -> int:
        """Wait until the relay has a connection for so many bytes; return how many it then had.

        Asked once more it may have none: a limit of 0 would be none, on a file that is all ROOM.
        """
        size = 0

        def is_enough() -> bool:
            nonlocal size
            size = self._size(record)
            return size >= least

        self._wait(is_enough, complaint)
        return size

    def detach(self, record: AttachRecord, device: BlockDevice) -> None:
        with device.claimed():
            device.sync()
            # Open as it is here, the device goes when it is closed, and not before.
            programs.run("losetup", "--detach", device.path)
        self._wait(lambda: self.find(record) is None, f"{device.name} is still in use")
        self.remove_remains(record)

    def abandon(self, record: AttachRecord, device: BlockDevice) -> None:
        if self.find(record) == device:
            programs.run("losetup", "--detach", device.path)
        if (state := relay.read_state(self._state_path(record))) is not None:
            os.kill(state.pid, signal.SIGKILL)
        # What still uses the device keeps it, and the file behind it, until it lets go.
        self.remove_remains(record, lazily=True)

    def remove_remains(self, record: AttachRecord, *, lazily: bool = False) -> None:
        """Unmount nbdfuse, and remove what is left when no device is."""
        directory = self._mountpoint(record)
        while mounts.mounted_at(str(directory)) is not None:
            mounts.unmount(str(directory), lazily=lazily)
        self._wait(
            lambda: relay.read_state(self._state_path(record)) is None,
            f"the relay of {record.volume} does not end",
        )
        with contextlib.suppress(FileNotFoundError):
            directory.rmdir()
        for suffix in ("relay", "log"):
            (self._directory / f"{record.id}.{suffix}").unlink(missing_ok=True)

    def _mountpoint(self, record: AttachRecord) -> Path:
        return self._directory / record.id

    def _state_path(self, record: AttachRecord) -> Path:
        return self._directory / f"{record.id}.relay"

    def _wait(self, done: Callable[[], bool], complaint: str) -> None:
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        while not done():
            if time.monotonic() > deadline_s:
                raise DeviceError(complaint)
            time.sleep(POLL_S)


def _free_loop() -> int:
    """Ask the kernel for a loop device that is free; it makes one if there is none."""
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise DeviceError(f"/dev/loop-control: {error.strerror}") from error
    try:
        return fcntl.ioctl(control, LOOP_CTL_GET_FREE)
    finally:
        os.close(control)


def _raise_limit(device: BlockDevice, size: int) -> None:
    """Let a loop device have `size` bytes, and otherwise be as it is."""
    try:
        descriptor = os.open(device.make_node(), os.O_RDONLY | os.O_CLOEXEC)
        try:
            info = bytearray(LOOP_INFO_BYTES)
            fcntl.ioctl(descriptor, LOOP_GET_STATUS64, info)
            LIMIT.pack_into(info, LIMIT_AT, size)
            fcntl.ioctl(descriptor, LOOP_SET_STATUS64, info)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DeviceError(
            f"{device.path} cannot be given {exact_size(size)} while it is in use "
            f"({error.strerror}): unmount and mount it, or detach and attach it"
        ) from error


def _last(text: str) -> str:
    lines = text.splitlines()
    return lines[-1] if lines else "it ended without a word"
