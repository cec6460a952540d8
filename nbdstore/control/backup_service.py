"""The seam between commands and backups: what can be asked, whoever holds the pool.

A part of `VolumeService`, by its attribute `backups`; see there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from nbdstore.control.diff import Diff
from nbdstore.control.receiving_model import ReceivedInfo, ReceivingInfo
from nbdstore.control.stream import Buffer


class BackupService(Protocol):
    """Ask about changed blocks, send and receive. Every call may raise any `NbdstoreError`."""

    def diff(self, newer: str, older: str | None = None) -> Diff:
        """Tell what is in one image and not the same in another, or all that it holds.

        Images are ``VOLUME`` or ``VOLUME@NAME``.
        """

    def send(self, snapshot: str, since: str | None = None) -> Iterator[Buffer]:
        """Send a snapshot as a backup stream, or what it has beyond the snapshot `since`.

        A stream that cannot go on says so in its last frame; one without an end was cut off.
        """

    def resume(self, token: str) -> Iterator[Buffer]:
        """Send the rest of a stream, from a token that the receiver has given."""

    def receive(self, name: str, chunks: Iterable[Buffer]) -> ReceivedInfo:
        """Receive a backup stream into a volume; durable on return.

        What has come before a failure, and is whole, is kept to go on from.
        """

    def receiving(self, name: str) -> ReceivingInfo:
        """Tell what a half-received volume has; NotFound if it is none."""

    def abort_receive(self, name: str) -> None:
        """Give up what a half-received volume has: it is as before, or is gone."""
