"""What a driver does: it makes a block device of an export, and takes it away again.

The seam between the agent and the two ways of attaching; `choose` says which one a machine has.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from nbdstore.agent.devices import BlockDevice
from nbdstore.agent.records import AttachRecord


class Health(Enum):
    """What a device's connections are like."""

    CONNECTED = "connected"
    WAITING = "waiting"
    """No connection: requests wait for one."""
    DEAD = "dead"
    """What kept requests waiting has ended: they fail."""


class Driver(Protocol):
    """One way of attaching. Every call may raise DeviceError."""

    @property
    def name(self) -> str: ...

    @property
    def reconnects_itself(self) -> bool:
        """Whether `reconnect` is not needed, since the device gets connections without it."""

    def attach(self, record: AttachRecord) -> tuple[BlockDevice, AttachRecord]:
        """Make a device of the record's export; return it, and what is to be remembered.

        If this process dies in the middle, `find` finds what there is by the record alone.
        """

    def find(self, record: AttachRecord) -> BlockDevice | None:
        """Find the device of a record on this machine."""

    def health(self, record: AttachRecord, device: BlockDevice, *, glance: bool = False) -> Health:
        """Tell whether the device is connected, without waiting for it.

        At a `glance` it may be told as it was a moment ago, which is for those who look at all
        devices, and look again.
        """

    def reconnect(self, record: AttachRecord, device: BlockDevice) -> AttachRecord:
        """Give the device new connections for its dead ones; return what is to be remembered.

        All connections of before must have been ended in the server: a request of theirs that was
        executed later than one which came by the new ones would undo it.
        """

    def grow(self, record: AttachRecord, device: BlockDevice, size: int) -> bool:
        """Let the device have more bytes while it is in use; False if that device cannot."""

    def detach(self, record: AttachRecord, device: BlockDevice) -> None:
        """Take the device away; it must not be in use."""

    def abandon(self, record: AttachRecord, device: BlockDevice) -> None:
        """Take the device away whatever its state: requests under way fail."""

    def remove_remains(self, record: AttachRecord) -> None:
        """Remove what is left of a device that is gone."""
