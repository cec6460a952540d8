"""Changed blocks and backups: what can be asked of one pool, by the names of its images.

Joins `sending` and `receiving`, and finds what names and tokens mean.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import ExitStack
from typing import Any

from nbdstore.control import sending
from nbdstore.control.backup_stream import BackupWriter, ResumeToken
from nbdstore.control.contracts import ImageLike, PoolLike
from nbdstore.control.diff import Extent, merged
from nbdstore.control.events import Events
from nbdstore.control.long_operations import LongOperations
from nbdstore.control.receiving import Receiving
from nbdstore.control.snapshots import Snapshots
from nbdstore.control.stream import Buffer
from nbdstore.control.usage import Usage
from nbdstore.errors import InvalidArgument, NotFound


class Backups:
    """The backups of one pool.

    receiving: the half that takes them in.
    """

    def __init__(
        self,
        usage: Usage,
        pool: PoolLike,
        snapshots: Snapshots,
        running: LongOperations,
        events: Events,
    ) -> None:
        self._usage = usage
        self._pool = pool
        self._snapshots = snapshots
        self.receiving = Receiving(usage, pool, running, events)

    def find(self, name: str) -> ImageLike:
        """Return the volume ``VOLUME`` or the snapshot ``VOLUME@NAME``; NotFound if it is none."""
        image: ImageLike = self._snapshots.find(name) if "@" in name else self._usage.find(name)
        return image

    def diff(
        self, newer: str, older: str | None
    ) -> tuple[int, int | None, AsyncGenerator[Extent, None]]:
        """Tell what is in image `newer` and not the same in `older`; see `BackupService`.

        Returns the sizes of both, and the extents, ascending and not adjacent; until that is
        exhausted or closed, snapshots among the two cannot be deleted.
        """
        now = self.find(newer)
        before = None if older is None else self.find(older)
        return now.size, before.size if before else None, self._changed(before, now)

    async def _changed(self, before: Any | None, now: Any) -> AsyncGenerator[Extent, None]:
        with ExitStack() as users:
            for image in (before, now):
                if image is not None and "@" in image.name:
                    users.enter_context(image.in_use())
            async for extent in merged(self._pool.changes(before, now)):
                yield extent

    def send(
        self, name: str, since: str | None = None, *, writer: BackupWriter | None = None
    ) -> AsyncGenerator[list[Buffer], None]:
        """Send a snapshot, or what it has beyond an older one; see `sending.stream`."""
        if "@" not in name:
            raise InvalidArgument(
                f"'{name}' is a volume, which changes while it is sent: make a snapshot, "
                f"'nbdstore snapshot create {name}@NAME', and send that"
            )
        base = None if since is None else self._snapshots.find(since)
        return sending.stream(self._pool, self._snapshots.find(name), base, writer=writer)

    def resume(
        self, token: str, *, writer: BackupWriter | None = None
    ) -> AsyncGenerator[list[Buffer], None]:
        """Go on with a transfer that broke off."""
        found = ResumeToken.decode(token)
        snapshot = self._by_uuid(found.uuid)
        if found.start > snapshot.size:
            raise InvalidArgument(f"the resume token goes beyond the end of {snapshot.name}")
        base = None if found.base is None else self._by_uuid(found.base)
        return sending.stream(self._pool, snapshot, base, found.start, writer=writer)

    def _by_uuid(self, uuid: str) -> Any:
        for snapshot in self._pool.snapshots.values():
            if snapshot.status()["uuid"] == uuid:
                return snapshot
        raise NotFound(
            f"the snapshot {uuid} that the resume token names is not here any more: give up what "
            "was received with 'nbdstore receive --abort', and send again"
        )
