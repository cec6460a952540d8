"""The attachments that an agent knows, and whose turn it is with each of them.

Owns the records in memory and on disk, and one lock for each volume; does nothing to devices.

A volume is worked on by one thread at a time. Who finds somebody at work waits a little, and then
is told who it is and since when, instead of waiting behind it without an end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Final

from nbdstore.agent.devices import BlockDevice
from nbdstore.agent.records import AttachRecord, Records
from nbdstore.errors import Busy, NotFound

PATIENCE_S: Final = 10.0
"""Most work on a volume takes less; mkfs, fsck and waiting for a server take longer."""


class AtWork(Busy):
    """Somebody else is at work on the volume."""


@dataclasses.dataclass
class Attachment:
    """One attachment as this process knows it.

    device: where it was seen last. problem: why it is not as it should be, for people; fenced: the
    problem is that the lease is lost, which does not pass. settled: what its record wishes has been
    fulfilled once since this process began. waiting_since_s: monotonic; None while connected.
    expired: it waited longer than its requests do, so some have failed.
    """

    record: AttachRecord
    device: BlockDevice | None = None
    problem: str = ""
    fenced: bool = False
    settled: bool = False
    waiting_since_s: float | None = None
    expired: bool = False


@dataclasses.dataclass
class _Turn:
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    what: str = ""
    since_s: float = 0.0


class Attachments:
    """All attachments of a state directory, by volume; for any thread."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._by_volume = {record.volume: Attachment(record) for record in records.load()}
        self._turns: dict[str, _Turn] = {}
        self._guard = threading.Lock()

    @property
    def agent_id(self) -> str:
        return self._records.agent_id

    def all(self) -> list[Attachment]:
        """List the attachments, by volume."""
        with self._guard:
            return [self._by_volume[volume] for volume in sorted(self._by_volume)]

    def get(self, volume: str) -> Attachment | None:
        return self._by_volume.get(volume)

    def find(self, volume: str) -> Attachment:
        """Return the attachment of a volume; NotFound if there is none."""
        found = self.get(volume)
        if found is None:
            raise NotFound(f"volume {volume} is not attached here: 'nbdstore agent status' lists")
        return found

    def save(self, record: AttachRecord) -> Attachment:
        """Remember a record, durably; return its attachment."""
        self._records.save(record)
        with self._guard:
            attachment = self._by_volume.setdefault(record.volume, Attachment(record))
            attachment.record = record
        return attachment

    def remove(self, attachment: Attachment) -> None:
        """Forget an attachment, durably."""
        self._records.remove(attachment.record)
        with self._guard:
            self._by_volume.pop(attachment.record.volume, None)

    @contextlib.contextmanager
    def turn(self, volume: str, what: str, *, patience_s: float = PATIENCE_S) -> Iterator[None]:
        """Be the only one at work on a volume; `what` is told to those who come meanwhile.

        Raises:
            AtWork: somebody else still is, after `patience_s`.
        """
        with self._guard:
            turn = self._turns.setdefault(volume, _Turn())
        if not turn.lock.acquire(timeout=patience_s):
            age_s = time.monotonic() - turn.since_s
            raise AtWork(
                f"{turn.what} of volume {volume} has been under way for {age_s:.0f} s: "
                "try again when it is done"
            )
        try:
            turn.what, turn.since_s = what, time.monotonic()
            yield
        finally:
            turn.lock.release()
