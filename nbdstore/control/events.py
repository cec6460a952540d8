"""What happens to a pool, told as it happens to whoever listens.

Owns the kinds of events and the listeners. Telling is cheap and never waits: a listener that does
not keep up is dropped, and knows it, rather than holding up what it listens to. Events are not
kept: who comes, or comes again, asks for the state first.

::

    kind                     subject     detail
    -----------------------  ----------  ---------------------------------------------------------
    volume.created           volume      size
    volume.changed           volume      what was changed: size, name, allow, iops, ...,
                                         rolled_back_to
    volume.deleted           volume
    volume.imported          volume      size, mapped
    snapshot.created         snapshot    size
    snapshot.deleted         snapshot
    client.attached          export      connection, peer, read_only
    client.detached          export      connection, peer, bytes_read, bytes_written
    lease.granted            volume      holder, epoch
    lease.ended              volume      holder, epoch, why
    pool.state               -           state, before, failure, shortage
    pool.held                -           held_writes; 0 = no write waits for space any more
    pool.corruption          -           count, detail (the newest, as the log has it)
    operation.started        operation   kind, request
    operation.progress       operation   progress, done, total; at most once a second
    operation.ended          operation   state, result, error
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import itertools
from collections.abc import Callable
from typing import Any

from nbdstore.control.model import Record

MAX_BEHIND = 1000
"""Events that a listener may be behind."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event(Record):
    """Something that happened.

    id: counts the events of this server, so that a gap shows. kind, subject, detail: by kind, see
    nbdstore/control/events.py.
    """

    id: int
    time: str
    kind: str
    subject: str | None
    detail: dict[str, Any]


class Listener:
    """Yields events as they come, until it is closed or dropped."""

    def __init__(self, forget: Callable[[Listener], None]) -> None:
        self._forget = forget
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self.is_closed = False
        """Whether nothing is queued any more."""
        self.on_drop: Callable[[], None] | None = None

    async def next(self, timeout_s: float) -> Event | None:
        """Return the next event; None if there is none in time, or at the end (`is_closed`)."""
        try:
            return await asyncio.wait_for(self._queue.get(), timeout_s)
        except TimeoutError:
            return None

    def close(self) -> None:
        """Stop to listen."""
        self.is_closed = True
        self._forget(self)
        self._queue.put_nowait(None)

    def tell(self, event: Event) -> None:
        """Queue an event; drop the listener if it is too far behind."""
        if self._queue.qsize() < MAX_BEHIND:
            self._queue.put_nowait(event)
            return
        self.close()
        if self.on_drop is not None:
            self.on_drop()


class Events:
    """The events of one server, and who listens."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._listeners: dict[Listener, None] = {}

    def listen(self) -> Listener:
        """Return a listener that gets what happens from now on."""
        listener = Listener(lambda gone: self._listeners.pop(gone, None))
        self._listeners[listener] = None
        return listener

    def tell(self, kind: str, subject: str | None = None, /, **detail: Any) -> None:
        """Tell all listeners that something happened; on the loop's thread."""
        event_id = next(self._ids)
        if not self._listeners:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        event = Event(id=event_id, time=now, kind=kind, subject=subject, detail=detail)
        for listener in list(self._listeners):
            listener.tell(event)

    def close(self) -> None:
        """End all listeners: the server stops."""
        for listener in list(self._listeners):
            listener.close()
