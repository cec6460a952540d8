"""Attaching with the kernel's nbd driver, by netlink.

Why not with nbd-client: it hands a socket to the same kernel driver by the same netlink command,
but (3.24, the one of Debian 12) cannot set DEAD_CONN_TIMEOUT, without which every request fails
when the server goes away; nor the identifier, without which nobody can tell after a crash whose
device that is, and which cannot be given later (RECONFIGURE with one succeeds, and leaves the
device's empty: seen with Linux 6.1). 3.27 has options for both. But every version wants the
export's name, which holds the lease's secret, on its command line, where every user of the machine
can read it; none says which socket it gave away, by which a dead connection is known; and none
reconnects over netlink, its ``-persist`` does nothing there. So the agent shakes hands itself
(`store_server.dial`) and speaks the driver's netlink family, which it must for reconnecting anyway:
with nbd-client there would be a second way for the first of many connections. What it does where
there is no netlink fails requests at every restart of the server: the fuse driver is used there.

The device's identifier is ``nbdstore:AGENT:VOLUME:ID`` and says which record it belongs to.

One connection for each device: with several, the kernel sends a request again on another one while
the server may still have it from the one that died.

    connection dies    the kernel marks it dead, new requests wait, up to dead_timeout_s
    reconnect          a new socket takes its place; what waited is sent
    requests that were under way when it died are sent again when their own time is over, so a
    pause of up to request_timeout_s is normal
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final, NoReturn

from nbdstore.agent import devices, programs, store_server, tls
from nbdstore.agent.devices import BlockDevice
from nbdstore.agent.driver import Health
from nbdstore.agent.nbd_family import Connect, NbdFamily
from nbdstore.agent.records import AttachRecord
from nbdstore.errors import DeviceError
from nbdstore.protocol.constants import TransmissionFlag
from nbdstore.sizes import exact_size

PREFIX: Final = "nbdstore:"
BLOCK_SIZES: Final = (4096, 2048, 1024, 512)
"""Of the device; the largest that the volume's size is a multiple of."""
SETTLE_TIMEOUT_S: Final = 30.0
SETTLE_EVERY_S: Final = 0.01
TAKEN_TIMEOUT_S: Final = 20.0
TAKEN_EVERY_S: Final = 0.1
LIST_AGE_S: Final = 0.5
"""Reading the list costs as much as there are connections, and each of a thousand wants to know."""
TCP_ESTABLISHED: Final = "01"


class NotTaken(DeviceError):
    """The kernel did not want a new connection: it does not know yet that the old one is dead."""


def why_unavailable(family: NbdFamily | None = None) -> str | None:
    """Say why this driver cannot be used here; None if it can. Loads the module if need be."""
    family = family or NbdFamily()
    try:
        if not Path("/sys/module/nbd").exists():
            # Without partitions: nothing of the host is to look into the volumes of others.
            programs.run("modprobe", "nbd", "max_part=0")
        family.devices()
    except FileNotFoundError:
        return (
            "its nbd driver cannot be reached from this network namespace (before Linux 6.4 only "
            "from the host's)"
        )
    except PermissionError:
        return "this process lacks CAP_SYS_ADMIN on the host, which the nbd driver asks for"
    except (DeviceError, OSError) as error:
        return f"its kernel has no nbd driver ({error})"
    return None


class KernelDriver:
    """The driver; `agent_id` is a part of its devices' identifiers."""

    name = "kernel"
    reconnects_itself = False

    def __init__(self, agent_id: str, family: NbdFamily | None = None) -> None:
        self._agent_id = agent_id
        self._live: tuple[float, frozenset[int]] = (float("-inf"), frozenset())
        self._family = family or NbdFamily()

    def identifier(self, record: AttachRecord) -> str:
        """Name the device of a record."""
        return f"{PREFIX}{self._agent_id}:{record.volume}:{record.id}"

    def attach(self, record: AttachRecord) -> tuple[BlockDevice, AttachRecord]:
        link = _dial(record)
        with link.socket:
            inode = os.fstat(link.socket.fileno()).st_ino
            flags = link.flags | (TransmissionFlag.READ_ONLY if record.read_only else 0)
            request = Connect(
                identifier=self.identifier(record),
                size=link.size,
                block_size=block_size(link.size),
                flags=flags,
                request_timeout_s=record.request_timeout_s,
                dead_timeout_s=record.dead_timeout_s,
                sockets=[link.socket.fileno()],
            )
            with _explained("attach the volume"):
                index = self._family.connect(request)
        device = BlockDevice(f"nbd{index}")
        self._require_identifier(record, device)
        device.make_node()
        return device, dataclasses.replace(
            record, size=link.size, flags=link.flags, sockets=(inode,)
        )

    def _require_identifier(self, record: AttachRecord, device: BlockDevice) -> None:
        """Without identifiers, which came with Linux 5.14, devices could not be told apart."""
        if device.identifier != self.identifier(record):
            self._family.disconnect(device.index)
            raise DeviceError("this kernel is too old for the kernel driver: it takes Linux 5.14")

    def find(self, record: AttachRecord) -> BlockDevice | None:
        # Most often it is the one that it was last, and there may be a thousand.
        last = BlockDevice(record.device)
        if record.device and self._is_of(record, last):
            return last
        found = (device for device in devices.nbd_devices() if self._is_of(record, device))
        return next(found, None)

    def _is_of(self, record: AttachRecord, device: BlockDevice) -> bool:
        return device.identifier == self.identifier(record) and device.configured

    def health(self, record: AttachRecord, device: BlockDevice, *, glance: bool = False) -> Health:
        if not device.configured:
            return Health.DEAD
        if record.sockets and self._are_alive(record.sockets, LIST_AGE_S if glance else 0.0):
            return Health.CONNECTED
        return Health.WAITING

    def _are_alive(self, sockets: Collection[int], max_age_s: float) -> bool:
        """Tell from a list that may be so old; what is not in it is looked for again."""
        seen_s, live = self._live
        if time.monotonic() - seen_s < max_age_s and live.issuperset(sockets):
            return True
        self._live = (time.monotonic(), live := frozenset(live_sockets()))
        return live.issuperset(sockets)

    def reconnect(self, record: AttachRecord, device: BlockDevice) -> AttachRecord:
        deadline_s = time.monotonic() + TAKEN_TIMEOUT_S
        while True:
            try:
                return self._offer(record, device)
            except NotTaken:
                if time.monotonic() > deadline_s:
                    raise
            time.sleep(TAKEN_EVERY_S)

    def _offer(self, record: AttachRecord, device: BlockDevice) -> AttachRecord:
        """Offer one new connection.

        The kernel says success even if it drops the socket. Once our own descriptor is closed, the
        connection lives on exactly if the kernel holds it.
        """
        link = _dial(record)
        with link.socket:
            if not store_server.still_fits(record.flags, link.flags):
                raise DeviceError(
                    f"the server offers {record.volume} with the flags {link.flags:#x} now, and "
                    f"{device.name} was attached with {record.flags:#x}, which cannot be changed "
                    "while it is in use: serve it as before, or detach it and attach it again"
                )
            if link.size < device.size:
                raise DeviceError(
                    f"volume {record.volume} has {exact_size(link.size)} now, less than the "
                    f"{exact_size(device.size)} of {device.name}: give it its size again"
                )
            inode = os.fstat(link.socket.fileno()).st_ino
            with _explained("reconnect the volume"):
                self._family.reconfigure(
                    device.index, self.identifier(record), [link.socket.fileno()]
                )
        if inode not in live_sockets():
            raise NotTaken(f"the kernel has not noticed yet that {device.name} lost its connection")
        return dataclasses.replace(record, sockets=(inode,))

    def grow(self, record: AttachRecord, device: BlockDevice, size: int) -> bool:
        with _explained("change the size of the device"):
            self._family.reconfigure(device.index, self.identifier(record), size=size)
        return True

    def detach(self, record: AttachRecord, device: BlockDevice) -> None:
        # While it is claimed nobody can mount it; what was written by other ways is synced first.
        with device.claimed():
            device.sync()
            self.abandon(record, device)
        self._wait_until_gone(record, device)

    def abandon(self, record: AttachRecord, device: BlockDevice) -> None:
        if device.identifier != self.identifier(record):
            return  # it is gone, and may be somebody else's by now
        with _explained("detach the device"):
            self._family.disconnect(device.index)

    def remove_remains(self, record: AttachRecord) -> None:
        """Nothing: a device of the kernel is there or not."""

    def _wait_until_gone(self, record: AttachRecord, device: BlockDevice) -> None:
        """Taking a device down goes on behind the command; until it is done, it is not free."""
        deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
        while self._is_of(record, device):
            if time.monotonic() > deadline_s:
                raise DeviceError(
                    f"{device.name} was told to go, but somebody still has it open: "
                    f"'fuser -v {device.path}' names them"
                )
            time.sleep(SETTLE_EVERY_S)

    def orphans(self, known: set[str]) -> tuple[list[BlockDevice], list[BlockDevice]]:
        """List devices with nbdstore identifiers of no record: this agent's, and other agents'."""
        ours, others = [], []
        for device in devices.nbd_devices():
            identifier = device.identifier or ""
            if not identifier.startswith(PREFIX) or not device.configured:
                continue
            agent_id, _, rest = identifier.removeprefix(PREFIX).partition(":")
            if agent_id != self._agent_id:
                others.append(device)
            elif rest.rpartition(":")[2] not in known:
                ours.append(device)
        return ours, others

    def remove_orphan(self, device: BlockDevice) -> None:
        """Detach a device of this agent that no record knows; Busy if it is in use."""
        if not (device.identifier or "").startswith(f"{PREFIX}{self._agent_id}:"):
            raise DeviceError(f"{device.path} is not a device of this agent")
        with device.claimed(), _explained("detach the device"):
            device.sync()
            self._family.disconnect(device.index)


def _dial(record: AttachRecord) -> store_server.Link:
    """Connect, for the kernel to go on; DeviceError with TLS, whose keys would stay here."""
    if tls.parse_address(record.address) is not None:
        raise DeviceError(tls.KERNEL_CANNOT)
    return store_server.dial(record.address, record.export)


def block_size(size: int) -> int:
    """Choose a device's block size: the kernel cuts off what is not a multiple of it."""
    return next(n_bytes for n_bytes in BLOCK_SIZES if size % n_bytes == 0)


def live_sockets() -> set[int]:
    """List, by inode numbers, the connections of this network namespace that are alive.

    A unix socket is in the list as long as the kernel's driver holds it, its peer gone or not.
    """
    live: set[int] = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path("/proc/self/net", name).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == TCP_ESTABLISHED:
                    live.add(int(fields[9]))
    for line in Path("/proc/self/net/unix").read_text().splitlines()[1:]:
        live.add(int(line.split()[6]))
    return live


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _raise(error, what)


def _raise(error: OSError, what: str) -> NoReturn:
    reasons = {
        errno.EPERM: "it takes CAP_SYS_ADMIN on the host",
        errno.EACCES: "it takes CAP_SYS_ADMIN on the host",
        errno.EINVAL: "the kernel's log says more ('dmesg')",
        errno.EBUSY: "the device is in use by somebody else",
    }
    advice = reasons.get(error.errno or 0, "see the kernel's log ('dmesg')")
    raise DeviceError(f"the kernel does not {what}: {error.strerror}; {advice}") from error
