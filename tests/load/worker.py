"""One connection's load: mixed requests on one volume, several in flight, every reply verified.

Knows the protocol through the tests' client and the volume through its model; when the load ends,
and what a lost connection means, is the caller's business.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from nbdstore.protocol.agreement import ReplyMode
from nbdstore.protocol.client import Reply
from nbdstore.protocol.constants import Allocation, Command, CommandFlag
from tests.load.figures import Figures
from tests.load.model import Change, Look, VolumeModel
from tests.load.stamps import SECTOR
from tests.server.nbd_client import NbdClient

KINDS: Final = {
    Command.WRITE: 45,
    Command.READ: 35,
    Command.TRIM: 6,
    Command.WRITE_ZEROES: 6,
    Command.FLUSH: 4,
    Command.BLOCK_STATUS: 3,
    Command.CACHE: 1,
}
LENGTHS: Final = {1: 15, 3: 10, 8: 35, 13: 5, 32: 15, 64: 8, 256: 10, 2048: 2}  # sectors
FUA_SHARE: Final = 0.05
ALIGNED_SHARE: Final = 0.7
HOT_SHARE: Final = 0.5
"""Requests that go to the first eighth of the volume, where blocks are written again and again."""
TRIES: Final = 8


class RequestFailed(AssertionError):
    """The server answered with an error, though nothing was wrong with the request."""


@dataclass(frozen=True)
class Sent:
    """A request that waits for its reply."""

    command: Command
    at_s: float
    change: Change | None = None
    look: Look | None = None


class Worker:
    """The load of one connection.

    Arguments:
        client: connected to the volume, in its transmission phase.
        model: what the volume may hold; shared with the other connections to it.
        source: decides everything.
        figures: what is counted.
        depth: requests in flight.
    """

    def __init__(
        self,
        client: NbdClient,
        model: VolumeModel,
        source: random.Random,
        figures: Figures,
        depth: int,
    ) -> None:
        self.client = client
        self.model = model
        self.source = source
        self.figures = figures
        self.depth = depth
        self._in_flight: dict[int, Sent] = {}
        self._commands = [
            command
            for command in KINDS
            if command != Command.BLOCK_STATUS or client.transmission.mode is not ReplyMode.SIMPLE
        ]

    async def run(self, go_on: Callable[[], bool]) -> None:
        """Send and verify for as long as `go_on` says, then wait for the last replies.

        Raises ConnectionError if the server ends the connection.
        """
        closing = self.client.writer.transport.is_closing
        try:
            while True:
                is_going = go_on()
                while is_going and len(self._in_flight) < self.depth and not closing():
                    self._send_any()
                if not self._in_flight:
                    return
                await self._collect()
        finally:
            for sent in self._in_flight.values():
                if sent.look is not None:
                    self.model.end_look(sent.look)

    async def leave(self) -> None:
        """End the connection as the protocol wants it."""
        self.client.start(Command.DISC)
        self.client.close()
        await self.client.writer.wait_closed()

    # --- Requests ---

    def _send_any(self) -> None:
        """Send a random request; a FLUSH if nothing else is possible among what is in flight."""
        for _ in range(TRIES):
            weights = [KINDS[command] for command in self._commands]
            (command,) = self.source.choices(self._commands, weights)
            first, stop = self._range()
            if command in (Command.READ, Command.BLOCK_STATUS):
                return self._look(command, first, stop)
            if command in (Command.FLUSH, Command.CACHE):
                break
            if self.model.is_free(first, stop):
                return self._change(command, first, stop)
        else:
            command = Command.FLUSH
        length = (stop - first) * SECTOR if command == Command.CACHE else 0
        self._send(Sent(command, time.monotonic()), first * SECTOR if length else 0, length)

    def _range(self) -> tuple[int, int]:
        source, n_sectors = self.source, self.model.n_sectors
        (length,) = source.choices(list(LENGTHS), list(LENGTHS.values()))
        length = min(length, n_sectors)
        end = n_sectors // 8 if source.random() < HOT_SHARE else n_sectors
        first = source.randrange(max(1, end - length + 1))
        if source.random() < ALIGNED_SHARE:
            first -= first % min(8, n_sectors)
        return first, min(first + length, n_sectors)

    def _look(self, command: Command, first: int, stop: int) -> None:
        look = self.model.begin_look(first, stop)
        sent = Sent(command, time.monotonic(), look=look)
        self._send(sent, first * SECTOR, (stop - first) * SECTOR)

    def _change(self, command: Command, first: int, stop: int) -> None:
        flags = CommandFlag.FUA if self.source.random() < FUA_SHARE else CommandFlag(0)
        payload = None
        if command == Command.WRITE:
            change, payload = self.model.begin_write(first, stop)
        elif command == Command.TRIM:
            change = self.model.begin_trim(first, stop)
        else:
            change = self.model.begin_zero(first, stop)
            flags |= self.source.choice([CommandFlag(0), CommandFlag.NO_HOLE])
        sent = Sent(command, time.monotonic(), change=change)
        self._send(sent, first * SECTOR, (stop - first) * SECTOR, flags, payload)

    def _send(
        self,
        sent: Sent,
        offset: int,
        length: int,
        flags: int = 0,
        payload: bytes | None = None,
    ) -> None:
        cookie = self.client.start(sent.command, offset, length, flags, payload)
        self._in_flight[cookie] = sent

    # --- Replies ---

    async def _collect(self) -> None:
        data = await self.client.receive_or_end()
        if not data:
            raise ConnectionResetError("the server has closed the connection")
        for reply in self.client.transmission.receive(data):
            self._settle(self._in_flight.pop(reply.cookie), reply)

    def _settle(self, sent: Sent, reply: Reply) -> None:
        name = sent.command.name.lower()
        if reply.error:
            raise RequestFailed(f"{name}: error {reply.error} {reply.message}")
        self.figures.took(name, time.monotonic() - sent.at_s)
        if sent.change is not None:
            self.model.acknowledged(sent.change)
            if sent.command == Command.WRITE:
                self.figures.bytes_written += (sent.change.stop - sent.change.first) * SECTOR
        if sent.look is not None:
            if sent.command == Command.READ:
                assert reply.data is not None
                self.model.verify(sent.look, reply.data)
                self.figures.bytes_verified += len(reply.data)
            else:
                self._verify_status(sent.look, reply)
            self.model.end_look(sent.look)

    def _verify_status(self, look: Look, reply: Reply) -> None:
        """What is said to be zeroes must be that; the first sector may be covered in part."""
        (extents,) = reply.extents.values()
        end = look.first + len(look.before)
        edges = [look.first * SECTOR]
        for length, _ in extents:
            edges.append(edges[-1] + length)
        for (start, stop), (_, status) in zip(pairwise(edges), extents, strict=True):
            if status & Allocation.ZERO:
                first, last = -(-start // SECTOR), min(end, stop // SECTOR)
                if first < last:
                    self.model.verify_zeroes(look, first, last)


async def read_volume(client: NbdClient, model: VolumeModel, step: int = 1 << 20) -> bytes:
    """Read a volume whole."""
    n_bytes = model.n_sectors * SECTOR
    pieces = [
        await client.read(offset, min(step, n_bytes - offset)) for offset in range(0, n_bytes, step)
    ]
    return b"".join(pieces)
