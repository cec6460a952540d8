"""Repairing a filesystem, which may lose data, with a way back: a snapshot taken before.

    look                                        nothing is wrong: no snapshot, which a full pool
                                                would refuse
    snapshot VOLUME@before-fsck-TIME, repair:   nothing was wrong     the snapshot is deleted
                                                repaired, or in vain  it stays, people are told
                                                nothing is wrong any  it stays: what was in vain
                                                more after one in     may have changed something
                                                vain

An agent tries again what it was started to mount. As long as a repair is in vain, nobody else has
had the lease and it was not mounted meanwhile, what the volume held before the first attempt is
what matters, and there is one snapshot of it, not one for each attempt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from nbdstore.agent.records import AttachRecord
from nbdstore.agent.store_server import StoreServer
from nbdstore.errors import DeviceError, NbdstoreError

PREFIX: Final = "before-fsck-"

log = logging.getLogger(__name__)


class Repairs:
    """Repairs filesystems of volumes of `server`; each is done by whoever has the volume's turn."""

    def __init__(self, server: StoreServer) -> None:
        self._server = server
        self._in_vain: dict[str, tuple[str, int]] = {}
        """By the volume's uuid: the snapshot before a repair that failed, and the lease's epoch."""

    def repair(
        self, record: AttachRecord, is_damaged: Callable[[], bool], repair: Callable[[], bool]
    ) -> str:
        """Have the filesystem of a volume repaired, whose device must have been synced.

        Arguments:
            is_damaged: tells whether that is needed; called unless an attempt in vain went before.
            repair: returns whether it has changed anything; raises DeviceError in vain.

        Returns:
            What people are to know; "" if nothing was wrong.

        Raises:
            DeviceError: it was in vain, or is not begun, for there is no room for a snapshot.
        """
        earlier = self._earlier_snapshot(record)
        if not earlier and not is_damaged():
            return ""
        before = earlier or self._snapshot(record)
        self._in_vain[record.volume_uuid] = (before, record.epoch)
        try:
            changed = repair()
        except DeviceError as error:
            raise DeviceError(
                f"{error}; the snapshot {before} holds what was there before"
            ) from error
        del self._in_vain[record.volume_uuid]
        if changed or earlier:
            return f"the filesystem was repaired; the snapshot {before} holds what was there before"
        try:
            self._server.control.delete_snapshot(before)
        except NbdstoreError as error:
            log.warning("the snapshot %s is not needed, and stays: %s", before, error)
        return ""

    def forget(self, record: AttachRecord) -> None:
        """Take note that a volume is about to be mounted: what it holds then is a new state."""
        self._in_vain.pop(record.volume_uuid, None)

    def _earlier_snapshot(self, record: AttachRecord) -> str:
        """Name the snapshot before a repair in vain, if it is there and nobody has written since;
        "" if there is none."""
        before, epoch = self._in_vain.get(record.volume_uuid, ("", 0))
        if not before or record.epoch - epoch > 1:
            return ""
        try:
            there = [item.snapshot for item in self._server.control.snapshots(record.volume)]
        except NbdstoreError as error:
            raise _not_begun(record, error) from error
        return before if before in there else ""

    def _snapshot(self, record: AttachRecord) -> str:
        name = f"{record.volume}@{PREFIX}{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
        try:
            self._server.control.create_snapshots([name])
        except NbdstoreError as error:
            raise _not_begun(record, error) from error
        return name


def _not_begun(record: AttachRecord, error: NbdstoreError) -> DeviceError:
    return DeviceError(
        f"the filesystem of volume {record.volume} is not repaired, for no snapshot could be taken "
        f"before ({error}): make that possible, and try again"
    )
