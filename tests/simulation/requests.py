"""Requests of clients, and what their replies say to the model.

Owns each command's meaning: which cells it changes or reads, which replies are right, and what an
acknowledgement promises.  A request may be sent several times, over one connection after the other,
until it is answered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdstore.protocol.client import Reply
from nbdstore.protocol.constants import Allocation, Command, CommandFlag, Errno
from tests.simulation.oracle import (
    CELL,
    Effect,
    History,
    Wrong,
    content,
    stamp,
    stamps_of,
)

if TYPE_CHECKING:
    from tests.simulation.export import Export

BASE_ALLOCATION_ID: Final = 1
_BEYOND_THE_END: Final = (Errno.EIO, Errno.EINVAL, Errno.ENOSPC)
PIECE_BYTES: Final = 3 << 20
"""Writes up to this are one record of the journal, and there whole or not at all (writing.py)."""


class Request:
    """One request for cells `[first, stop)` of an export.

    Attributes:
        serial: what the data of a write says.
    """

    def __init__(
        self, export: Export, command: Command, first: int, stop: int, flags: int, serial: int
    ) -> None:
        self.export = export
        self.command = command
        self.flags = flags
        self.first = first
        self.stop = stop
        self.serial = serial
        self._history: History | None = None
        self._effects: list[Effect] = []
        self._edges: list[Effect] = []

    def __str__(self) -> str:
        return (
            f"{self.command.name}+{self.flags} {self.serial} of {self.export.id}: "
            f"[{self.first}, {self.stop})"
        )

    @property
    def place(self) -> int:
        """Offset in bytes."""
        return self.export.spread.place(self.first * CELL) if self.stop else 0

    @property
    def length(self) -> int:
        return (self.stop - self.first) * CELL

    @property
    def changes(self) -> bool:
        return self.command in (Command.WRITE, Command.WRITE_ZEROES, Command.TRIM)

    def payload(self) -> bytes | None:
        if self.command != Command.WRITE:
            return None
        return content(stamp(self.serial, self.first, self.stop))

    # --- What it does ------------------------------------------------------------------------

    def sent(self, now: int) -> None:
        """It is on its way, once more or for the first time."""
        history = self.export.history
        if self._history is not history:
            # Since the last sending the world has ended, and begun anew in a known state.
            self._history = history
            self._effects, self._edges = self._make_effects(now) if self.changes else ([], [])
            for effect in self._effects + self._edges:
                history.begin(effect)
        for effect in self._effects + self._edges:
            effect.sent()
        history.begin_read(now)

    def _make_effects(self, now: int) -> tuple[list[Effect], list[Effect]]:
        """What it will do for sure, and what it may do beside that."""
        first, stop = self.first, self.stop
        if self.command == Command.WRITE:
            return [Effect(self.serial, first, stop, now, whole=self.length <= PIECE_BYTES)], []
        if self.command == Command.WRITE_ZEROES:
            return [Effect(0, first, stop, now, whole=False)], []
        # TRIM: whole blocks for sure; the part of the last one if it is the volume's, which
        # depends on its size when the request is served.
        block = self.export.block_cells
        low, high = first + -first % block, stop - stop % block
        sure = [Effect(0, low, high, now, whole=False)] if low < high else []
        edge = max(high, low)
        return sure, [Effect(0, edge, stop, now, whole=False)] if edge < stop else []

    def over(self, start: int, now: int) -> None:
        """What was sent at `start` can have no effect any more."""
        if self._history is not None and self._history is self.export.history:
            for effect in self._effects + self._edges:
                effect.over(now)
            self._history.end_read(start)

    def give_up(self, now: int) -> None:
        """It will not be sent again."""
        for effect in self._effects + self._edges:
            effect.settle(now)

    # --- Replies -----------------------------------------------------------------------------

    def answered(self, reply: Reply, start: int, now: int) -> None:
        """Its reply has come, to what was sent at `start`.

        Raises:
            Wrong: it is not one that may come.
        """
        if self._history is not self.export.history:
            raise Wrong(f"{self}: answered by a server that was dead")
        history = self.export.history
        if reply.error:
            self._check_error(reply)
        elif self.command == Command.READ:
            assert reply.data is not None
            history.check_read(self.first, stamps_of(reply.data), start, now)
        elif self.command == Command.BLOCK_STATUS:
            self._check_status(reply, start, now)
        elif self.command == Command.FLUSH:
            history.flushed(start)
        elif self.changes:
            self._acknowledge(start, now)
        self.over(start, now)
        self.give_up(now)

    def _acknowledge(self, start: int, now: int) -> None:
        history, durable = self.export.history, bool(self.flags & CommandFlag.FUA)
        for effect in self._effects:
            history.acknowledge(effect, now, durable=durable)
        if durable and self._effects:
            # It is there after a crash, and so is all that was acknowledged before it was sent.
            history.flushed(max(effect.start for effect in self._effects))

    def _check_error(self, reply: Reply) -> None:
        allowed = self.export.errors
        if reply.error == Errno.ENOTSUP and self.flags & CommandFlag.FAST_ZERO:
            return
        if self.stop > self.export.smallest and reply.error in _BEYOND_THE_END:
            return  # the volume was shrunk, before or after the client connected
        if reply.error not in allowed:
            name = Errno(reply.error).name
            raise Wrong(f"{self}: error {name} ({reply.message}), for which there is no reason")
        self.export.count_error()

    def _check_status(self, reply: Reply, start: int, now: int) -> None:
        at = self.place
        zero_flags = Allocation.HOLE | Allocation.ZERO
        for length, status in reply.extents[BASE_ALLOCATION_ID]:
            stop = min(at + length, self.place + self.length)
            if status & zero_flags:
                first = self.first + -(-(at - self.place) // CELL)
                last = self.first + (stop - self.place) // CELL
                self.export.history.check_zeros(first, last, start, now)
            at = stop
