"""One connection of a client: real bytes through the strict protocol client, over the network.

Owns the handshake, the sending of requests and the matching of replies; what a reply means is its
request's (requests.py).  A reply that breaks a rule of NBD is a fault of the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdstore.errors import ProtocolError
from nbdstore.protocol.agreement import ReplyMode
from nbdstore.protocol.client import (
    ClientHandshake,
    ClientTransmission,
    ExportSize,
    OptionAnswer,
    Reply,
    option_exchange,
    parse_info_export,
)
from nbdstore.protocol.constants import Command, OptionReply
from tests.simulation.network import SimulatedSocket
from tests.simulation.oracle import NEVER, History, Wrong
from tests.simulation.requests import Request

if TYPE_CHECKING:
    from tests.simulation.world import World

ANSWER_S: Final = 90.0
"""A request on a living connection that has no answer after this is never going to have one: writes
are held for 5 s at most, a disk takes tenths of a second, a link some seconds."""
_LOOK_S: Final = 5.0
NOTICE_S: Final = 0.001


class Lost(Exception):
    """The connection is gone; the request was not answered on it."""


class Refused(Exception):
    """The server does not let this client have the export."""


@dataclass(eq=False)
class Sending:
    """A request that was sent over one connection.

    Attributes:
        history: what was known of the volume then; what begins anew has nothing of it.
    """

    request: Request
    history: History
    start: int
    sent_s: float
    answered: asyncio.Future[Reply]


class Connection:
    """One client's connection to an export.

    Attributes:
        export: what the handshake told.
        stalled: the client reads nothing for a while.
        in_flight: requests by cookie.
        fenced: since then the server does nothing that comes over it.
    """

    def __init__(self, world: World, sock: SimulatedSocket, mode: ReplyMode) -> None:
        self._world = world
        self._sock = sock
        self._mode = mode
        self._loop = asyncio.get_running_loop()
        self._random = random.Random(world.random.random())
        self._handshake = ClientHandshake()
        self._parser = ClientTransmission(mode)
        self._unsent: deque[bytes] = deque()
        self._more = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._leaving = False
        self.lost = False
        self.stalled = False
        self.export = ExportSize(0, 0)
        self.in_flight: dict[int, Sending] = {}
        self.fenced = NEVER
        self.ended = self._loop.create_future()

    @property
    def name(self) -> str:
        return self._sock.name

    # --- Handshake ---------------------------------------------------------------------------

    async def shake_hands(self, name: str) -> None:
        """Negotiate, up to the transmission phase.

        Raises:
            OSError: the connection broke.
            Refused: there is no such export.
        """
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._negotiate(name)
        except (OSError, Refused):
            self._sock.close()
            raise
        except TimeoutError:
            self._complain("no answer in the handshake")
            self._sock.close()
            raise
        self._tasks = [self._world.start(work()) for work in (self._read, self._write, self._watch)]

    async def _negotiate(self, name: str) -> None:
        while (hello := self._handshake.hello()) is None:
            self._handshake.receive(await self._receive())
        await self._sock.send_all(hello)
        queries = () if self._mode is ReplyMode.SIMPLE else ("base:allocation",)
        for option in option_exchange(name, self._mode, queries):
            await self._sock.send_all(option)
            while not (answer := await self._answer()).is_last:
                if answer.reply == OptionReply.INFO and answer.data[:2] == b"\0\0":
                    self.export = parse_info_export(answer.data)
            if answer.reply != OptionReply.ACK:
                raise Refused(f"{name}: {answer.data.decode()}")
        if self._handshake.unread():
            raise Wrong("bytes behind the handshake that nobody asked for")

    async def _answer(self) -> OptionAnswer:
        while (answer := self._handshake.answer()) is None:
            self._handshake.receive(await self._receive())
        return answer

    async def _receive(self) -> bytes:
        data = await self._sock.receive()
        if not data:
            raise ConnectionResetError("closed in the handshake")
        return data

    # --- Requests ----------------------------------------------------------------------------

    async def perform(self, request: Request) -> Reply:
        """Send a request and return its reply, which the model knows by then.

        Raises:
            Lost: there will be none.
        """
        if self.lost:
            raise Lost
        cookie, data = self._parser.request(
            request.command, request.place, request.length, request.flags, request.payload()
        )
        start = self._world.trace.note(self.name, "sends", cookie, request)
        history, answered = request.export.history, self._loop.create_future()
        sending = Sending(request, history, start, self._loop.time(), answered)
        self.in_flight[cookie] = sending
        request.sent(start)
        self._unsent.append(data)
        self._more.set()
        return await sending.answered

    def _take(self, reply: Reply) -> None:
        sending = self.in_flight.pop(reply.cookie)
        now = self._world.trace.note(self.name, "gets", reply.cookie, reply.error)
        if sending.start > self.fenced:
            raise Wrong(f"{self.name}: {sending.request} is answered after a fence")
        sending.request.answered(reply, sending.start, now)
        self._world.n_answered += 1
        if not sending.answered.done():
            sending.answered.set_result(reply)

    async def leave(self) -> None:
        """Say DISC once everything is answered, and wait for the server to close."""
        self._leaving = True
        while self.in_flight and not self.lost:
            await asyncio.wait([s.answered for s in self.in_flight.values()])
        if not self.lost:
            self._unsent.append(self._parser.request(Command.DISC)[1])
            self._more.set()
        await asyncio.wait([self.ended], timeout=self._world.plan.patience_s)
        self.drop("nobody says goodbye")

    def drop(self, why: str) -> None:
        """Leave at once, without a word."""
        if not self.lost:
            self._world.trace.note(self.name, "drops", why)
            self._end()

    # --- Tasks -------------------------------------------------------------------------------

    async def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self._sock.receive():
                try:
                    replies = self._parser.receive(data)
                except ProtocolError as fault:
                    raise Wrong(f"{self.name}: the server broke the protocol: {fault}") from fault
                for reply in replies:
                    self._take(reply)
                if self._random.random() < self._world.plan.stalls:
                    await self._stall()
        self._end()

    async def _stall(self) -> None:
        self.stalled = True
        self._world.n_stalls += 1
        await asyncio.sleep(self._random.choice((0.1, 1.0, 10.0)))
        self.stalled = False
        for sending in self.in_flight.values():
            sending.sent_s = self._loop.time()

    async def _write(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                while self._unsent:
                    await self._sock.send_all(self._unsent.popleft())
                self._more.clear()
                await self._more.wait()
        # The reading task learns of it as well, and ends the connection.

    async def _watch(self) -> None:
        """Look for requests that are not answered; give a silent server up."""
        patience = self._world.plan.patience_s
        while True:
            await asyncio.sleep(_LOOK_S)
            if not self.in_flight or self.stalled:
                continue
            waited = self._loop.time() - min(s.sent_s for s in self.in_flight.values())
            if waited > ANSWER_S:
                self._complain("not answered")
            if waited > patience:
                self._world.n_timeouts += 1
                self.drop("tired of waiting")

    def _complain(self, what: str) -> None:
        """Nothing has come for long: that is wrong, unless the network is to blame."""
        link = self._sock.link
        if link.is_quiet and not link.is_silent and not link.server.closed:
            waiting = [str(s.request) for s in self.in_flight.values()]
            self._world.fail(Wrong(f"{self.name}: {what} in {ANSWER_S:g} s: {waiting}"))

    def _end(self) -> None:
        """The connection is over: its requests were not answered."""
        if self.lost:
            return
        self.lost = True
        self._world.trace.note(self.name, "is over")
        for task in self._tasks:
            task.cancel()
        sendings, self.in_flight = [*self.in_flight.values()], {}
        for sending in sendings:
            self._world.n_lost += 1
            self._hand_over(sending)
            if not sending.answered.done():
                sending.answered.set_exception(Lost())
        self._sock.close()
        if not self.ended.done():
            self.ended.set_result(None)

    def _hand_over(self, sending: Sending) -> None:
        """What was sent may have its effect until the server knows that the client is gone."""
        server, request, start = self._sock.link.server, sending.request, sending.start
        trace, loop = self._world.trace, self._loop

        def is_over() -> None:
            if request.export.history is sending.history:
                request.over(start, trace.now)

        def over() -> None:
            # Tasks of the server that are ready now run before it has cancelled them.
            loop.call_later(NOTICE_S, is_over)

        if server.closed:
            over()
        else:
            server.on_end.append(over)
