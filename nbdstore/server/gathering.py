"""Small writes of several clients of one volume, by one call of the store.

Owns the writes that came in this turn of the event loop, each from another client and alone, until
the turn's end; what becomes of one then is its session's.

One block costs the store 14 us, and eight together 24: they share the search for free slots, the
two system calls and the record in the journal. So where clients write by turns, as those do that
flush each write, their writes wait for the end of the turn in which they came. None of them is
acknowledged before it is with the kernel, and their order is free, as that of all requests in
flight is (proto.md, "Ordering of messages and writes").

A client that is alone, or writes when no other does, gains nothing: after 8 turns with one write
each, the next 256 writes do not wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import perf_counter_ns
from weakref import WeakValueDictionary

from nbdstore.errors import NotFound, StoreError
from nbdstore.protocol.constants import Command
from nbdstore.protocol.transmission import Request
from nbdstore.store import Image

log = logging.getLogger(__name__)

_WRITE = int(Command.WRITE)

MAX_BYTES = 16 << 10
"""A longer write gains too little by company."""
LONELY_TURNS = 8
SKIPPED_WRITES = 256


OnWritten = Callable[["Held", bool], None]
"""Called with whether the write is done; if not, it is to be done by itself."""


class Held:
    """A write that waits for the end of the turn.

    Attributes:
        request: the whole of it.
        write: (offset, payload).
        began_ns: when it came, by the clock of the counters.
        on_written: whom to tell; None once its client is lost.
    """

    __slots__ = ("began_ns", "on_written", "request", "write")

    def __init__(self, request: Request, on_written: OnWritten) -> None:
        payload = request[5]
        assert payload is not None
        self.request = request
        self.write = request[3], payload
        self.began_ns = perf_counter_ns()
        self.on_written: OnWritten | None = on_written

    def drop(self) -> None:
        """The client is lost: what is not written by now must not be."""
        self.on_written = None


class Gathering:
    """The writes of one volume's clients.

    Attributes:
        n_clients: who is attached now.
    """

    def __init__(self, volume: Image) -> None:
        self.n_clients = 0
        self._volume = volume
        self._held: list[Held] = []
        self._n_lonely_turns = 0
        self._n_skipped = 0

    def wants(self, request: Request) -> bool:
        """Whether a request that came alone is a write, and should wait for others."""
        command, flags, _, _, length, _, verdict = request
        if self.n_clients < 2 or command != _WRITE or flags or verdict or length > MAX_BYTES:
            return False
        if self._n_lonely_turns < LONELY_TURNS:
            return True
        self._n_skipped += 1
        if self._n_skipped == SKIPPED_WRITES:
            self._n_skipped, self._n_lonely_turns = 0, LONELY_TURNS - 1
        return False

    def hold(self, request: Request, on_written: OnWritten) -> Held:
        """Hold a write until the end of this turn; its payload must stay where it is until then."""
        held = Held(request, on_written)
        self._held.append(held)
        if len(self._held) == 1:
            asyncio.get_running_loop().call_soon(self.write)
        return held

    def write(self) -> None:
        """Write what is held, now."""
        held = [one for one in self._held if one.on_written is not None]
        self._held = []
        if not held:
            return
        self._n_lonely_turns = self._n_lonely_turns + 1 if len(held) == 1 else 0
        try:
            is_done = self._volume.write_now([one.write for one in held], n_clients=len(held))
        except (StoreError, NotFound):
            is_done = False  # by itself, each gets its own error
        except Exception:
            # Nor may a bug leave all of them without an answer: whose write it is ends by itself.
            log.exception("bug: writes of %d clients broke", len(held))
            is_done = False
        for one in held:
            if one.on_written is not None:  # not lost by the reply to another one
                one.on_written(one, is_done)


class Gatherings:
    """The gathering of each volume that has clients."""

    def __init__(self) -> None:
        self._by_id: WeakValueDictionary[int, Gathering] = WeakValueDictionary()

    def of(self, volume: Image) -> Gathering:
        """Return the one that all clients of a volume share."""
        found = self._by_id.get(volume.id)
        if found is None:
            found = self._by_id[volume.id] = Gathering(volume)
        return found
