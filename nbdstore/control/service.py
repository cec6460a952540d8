"""The seam between commands and a pool: what can be asked, whoever holds the pool.

A command calls a `VolumeService` and cannot tell its two implementations apart: the client of a
server's control API (`nbdstore.control.client`), and a pool that the command line opens for the
moment (`nbdstore.commands.local`). Both end in `nbdstore.control.operations`, so they have the same
rules and the same error messages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from nbdstore.control.capacity import CapacityReport
from nbdstore.control.model import AttachmentInfo, PoolInfo, VolumeInfo
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

    def attachments(self) -> list[AttachmentInfo]:
        """List the live NBD connections; none without a server."""

    def volumes(self) -> list[VolumeInfo]:
        """List all volumes, by name."""

    def volume(self, name: str) -> VolumeInfo:
        """Describe one volume; NotFound if there is none of that name."""

    def create_volume(self, name: str, size: int, allow: Sequence[str] = ()) -> VolumeInfo:
        """Create an empty thin volume of `size` bytes; durable on return."""

    def update_volume(
        self,
        name: str,
        *,
        size: int | None = None,
        new_name: str | None = None,
        allow: Sequence[str] | None = None,
        force: bool = False,
    ) -> VolumeInfo:
        """Resize, rename or change who may attach; None leaves a property as it is.

        Shrinking is Busy while attached; `force` shrinks below mapped data and so loses it.
        """

    def delete_volume(self, name: str) -> None:
        """Delete a volume and its data; Busy while attached."""

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

    def close(self) -> None:
        """Let go of the connection or the pool."""
