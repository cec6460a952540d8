"""The seam between commands and a pool: what can be asked, whoever holds the pool.

A command calls a `VolumeService` and cannot tell its two implementations apart: the client of a
server's control API (`nbdstore.control.client`), and a pool that the command line opens for the
moment (`nbdstore.commands.local`). Both end in `nbdstore.control.operations`, so they have the same
rules and the same error messages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, Unpack

from nbdstore.control.backup_service import BackupService
from nbdstore.control.capacity import CapacityReport
from nbdstore.control.changes import Deletion, VolumeChanges
from nbdstore.control.model import (
    AttachmentInfo,
    LeaseInfo,
    OperationInfo,
    PoolInfo,
    SnapshotInfo,
    TrashInfo,
    VolumeInfo,
)
from nbdstore.control.space import SpaceReport
from nbdstore.control.stream import Piece


@dataclasses.dataclass(frozen=True)
class Content:
    """A volume's content on its way out.

    size: bytes of the volume when reading began. pieces: its data in ascending order, without
    overlap; what no piece covers reads as zeros.
    """

    size: int
    pieces: Iterator[Piece]


class VolumeService(Protocol):
    """Ask about, and change, one pool. Every call may raise any `NbdstoreError`."""

    def pool(self) -> PoolInfo:
        """Describe the pool and its space."""

    def grow_pool(self, capacity: int) -> PoolInfo:
        """Raise the pool's capacity to `capacity` bytes, durably."""

    def checkpoint(self) -> PoolInfo:
        """Write a checkpoint now, so that the next start has no journal to replay."""

    def capacity(self) -> CapacityReport:
        """Report the capacity model of the pool."""

    def space(self) -> SpaceReport:
        """Tell where the space of the pool is, image by image, so that it adds up."""

    @property
    def backups(self) -> BackupService:
        """Changed blocks, send and receive."""

    def attachments(self) -> list[AttachmentInfo]:
        """List the live NBD connections; none without a server."""

    def disconnect(self, connection_id: int) -> None:
        """End a connection, if there is one of that id.

        On return none of its requests is executed any more; its client may connect again.
        """

    def leases(self) -> list[LeaseInfo]:
        """List the leases that are held, by volume, without their tokens."""

    def acquire_lease(self, name: str, holder: str, *, force: bool = False) -> LeaseInfo:
        """Lease a volume to `holder`, who alone can attach it from then on; durable on return.

        Idempotent: who holds it gets the same lease again. With `force` whoever else holds it, or
        has it attached, is fenced: on return none of their requests is executed any more.

        Raises:
            Busy: it is leased to another, attached without a lease, or imported into.
        """

    def release_lease(self, name: str, holder: str, epoch: int | None = None) -> None:
        """End the lease of `holder` and its connections; another's lease, or epoch, stays."""

    def break_lease(self, name: str) -> None:
        """End whatever lease a volume has, and its connections."""

    def volumes(self) -> list[VolumeInfo]:
        """List all volumes, by name."""

    def volume(self, name: str) -> VolumeInfo:
        """Describe one volume; NotFound if there is none of that name."""

    def create_volume(
        self, name: str, size: int, allow: Sequence[str] = (), *, uuid: str | None = None
    ) -> VolumeInfo:
        """Create an empty thin volume of `size` bytes; durable on return.

        With a `uuid` that the caller chose, the same call again returns the volume that is there.
        """

    def update_volume(self, name: str, **changes: Unpack[VolumeChanges]) -> VolumeInfo:
        """Resize, rename, change who may attach or how fast; durable on return, in that order."""

    def delete_volume(self, name: str, **how: Unpack[Deletion]) -> None:
        """Put a volume into the trash, or delete it for good; Busy while leased or attached."""

    def snapshots(self, volume: str | None = None, *, unique: bool = False) -> list[SnapshotInfo]:
        """List snapshots, of one volume or of all; with `unique`, tell what each holds alone."""

    def create_snapshots(
        self, names: Sequence[str], *, uuids: Sequence[str] | None = None
    ) -> list[SnapshotInfo]:
        """Make snapshots ``VOLUME@NAME``, all of one moment; durable on return.

        With `uuids` that the caller chose, the same call again returns those that are there.
        """

    def delete_snapshot(self, name: str, *, uuid: str | None = None) -> None:
        """Delete a snapshot, and free what only it holds; Busy with clones, or attached.

        With its `uuid` another one of that name stays, and nothing is done if it is gone already.
        """

    def rollback(self, name: str, *, fence: bool = False) -> VolumeInfo:
        """Make a volume what its snapshot is; Busy while leased or attached, unless `fence`."""

    def clone(
        self, name: str, new_name: str, allow: Sequence[str] = (), *, uuid: str | None = None
    ) -> VolumeInfo:
        """Make a volume that begins as a snapshot and shares its blocks; durable on return.

        With a `uuid` that the caller chose, the same call again returns the clone that is there.
        """

    def start_flatten(self, name: str, *, operation_id: str | None = None) -> OperationInfo:
        """Begin to copy what a clone shares with its origin; ids as in `start_scrub`."""

    def trash(self) -> list[TrashInfo]:
        """List the volumes in the trash, those that came first first."""

    def restore(self, which: str, name: str | None = None) -> VolumeInfo:
        """Take a volume, by id or the newest of a name, out of the trash, as `name`."""

    def purge(self, which: str) -> None:
        """Delete a volume in the trash, by id or the newest of a name, for good."""

    def read_content(self, name: str) -> Content:
        """Read a volume from start to end, holes left out."""

    def write_content(
        self, name: str, size: int, pieces: Iterable[Piece], *, overwrite: bool = False
    ) -> VolumeInfo:
        """Make `pieces` the content of a volume; durable on return.

        A volume that is absent is created with `size` bytes, and removed again if the import
        fails. One that is there must be at least `size` long, unattached, and empty unless
        `overwrite`; what no piece covers reads as zeros afterwards.
        """

    def start_scrub(
        self,
        volume: str | None = None,
        *,
        rate: int | None = None,
        restart: bool = False,
        operation_id: str | None = None,
    ) -> OperationInfo:
        """Begin to scrub a volume, or all of them, at `rate` bytes/s; Busy while another runs.

        One that was stopped goes on, unless `restart`. With the `operation_id` of an operation that
        was started by the same call, that one is returned.
        """

    def operations(self) -> list[OperationInfo]:
        """List the long operations that run, and those that ended within the hour."""

    def operation(self, operation_id: str, *, wait_s: int = 0) -> OperationInfo:
        """Describe a long operation, at its end or after `wait_s` seconds; NotFound if unknown."""

    def cancel_operation(self, operation_id: str) -> OperationInfo:
        """End a long operation; NotFound if unknown."""

    def close(self) -> None:
        """Let go of the connection or the pool."""
