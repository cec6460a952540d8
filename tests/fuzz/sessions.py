"""Target: the whole server over a socketpair, from the hello to the end, with a pool in memory.

The client asks and waits, or asks on and on; reads lazily, or not before it has said all; ends by
DISC, by nonsense, or by leaving. The volume is warm, or cold, or full for a while, or breaks.

What must hold: every request is answered once, by a reply that the strict client understands, if
the client keeps to the protocol, and once at most if it does not; the connection ends; reads tell
what was written; and nothing is left of the client afterwards: no connection, no memory that is
accounted to it, no write that comes late.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import cast

from nbdstore.errors import Corruption, NoSpace
from nbdstore.protocol.agreement import CONTEXTS, ReplyMode
from nbdstore.protocol.client import ClientHandshake, ClientTransmission, Reply, option_exchange
from nbdstore.protocol.constants import Command, CommandFlag, Errno, OptionReply
from nbdstore.server import Limits, Server, ServerOptions, connection
from nbdstore.server import server as server_module
from nbdstore.store import Pool
from tests.fuzz.program import Program
from tests.server.memory_pool import MemoryPool, MemoryVolume

SIZE = 64 << 10
DEADLINE_S = 20.0
"""A conversation that takes longer hangs."""

LIMITS = Limits(
    max_connections=2,
    max_in_flight=8,
    max_client_bytes=96 << 10,
    max_held_bytes=128 << 10,
    max_unsent_bytes=32 << 10,
    max_round_bytes=16 << 10,
    max_extents=5,
    linger_s=DEADLINE_S,
)
"""Small, so that inputs reach them."""

SEND_BYTES = 4 << 10
"""So is the socket's buffer for replies, in some conversations."""

LOOK_EVERY_S = 0.002
"""How often the server looks for clients that have gone unnoticed."""

PATIENCE = 40
"""Turns of the loop after which a client takes it that the server waits for it."""

QUERIES = tuple(context.label for context in CONTEXTS)
LENGTHS = (0, 1, 511, 512, 4095, 4096, 4097, 8192, 16384, SIZE, SIZE + 1, 1 << 25, (1 << 32) - 1)


class Talk:
    """One client's conversation.

    Arguments:
        program: what it says.
        sock: its end of the socketpair.
        volume: what it says it about.
    """

    def __init__(self, program: Program, sock: socket.socket, volume: MemoryVolume) -> None:
        self._program = program
        self._sock = sock
        self._volume = volume
        self._loop = asyncio.get_running_loop()
        self.mode = program.choose(tuple(ReplyMode))
        knobs, more = program.byte(), program.byte()
        self._may_read = asyncio.Event()
        if not more & 1:
            self._may_read.set()
        if more & 2:
            volume.space.clear()
        self._gone = False
        """The connection was closed in the middle."""

        self._in_step = bool(knobs & 1)
        volume.cold = bool(knobs & 2)
        self._breaks_after = knobs >> 4 if knobs & 4 else -1
        self._honest = True
        self._left = False
        """DISC was sent."""

        self._client = ClientTransmission(self.mode)
        self._n_requests = 0
        self._last_range = 0, 4096
        self._answered: dict[int, Reply] = {}
        self._asked: dict[int, tuple[int, int, int, bytes]] = {}
        """Command, offset, length and payload by cookie."""

        self._content = bytearray(SIZE)
        self._trimmed = bytearray(SIZE)
        """1 = this byte of the content may be zero instead."""

    async def run(self) -> None:
        """Talk to the end, and check what the server says."""
        await self._shake_hands()
        reading = asyncio.ensure_future(self._read_all())
        try:
            await self._say_all(reading)
            self._may_read.set()
            if not self._gone:
                self._volume.space.set()
                await reading
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        if self._honest:
            assert self._client.n_pending == 0, f"{self._client.n_pending} without a reply"

    async def _say_all(self, reading: asyncio.Future[None]) -> None:
        try:
            while self._program and self._honest and not self._left:
                await self._say(reading)
            if self._honest and not self._left:
                # To close without it would mean to give up what is in flight.
                _, disc = self._client.request(Command.DISC)
                await self._send(disc)
            if not (self._honest or self._gone):
                self._sock.shutdown(socket.SHUT_WR)
        except ConnectionError:
            assert not self._honest, "an honest client is cut off"

    async def _send(self, data: bytes) -> None:
        """Send, and begin to read if the server takes no more before."""
        sending = asyncio.ensure_future(self._loop.sock_sendall(self._sock, data))
        for _ in range(PATIENCE):
            if sending.done():
                break
            await asyncio.sleep(0)
        else:
            self._may_read.set()
            self._volume.space.set()
        await sending

    async def _shake_hands(self) -> None:
        client = ClientHandshake()
        while (hello := client.hello()) is None:
            client.receive(await self._loop.sock_recv(self._sock, 1 << 16))
        await self._loop.sock_sendall(self._sock, hello)
        queries = QUERIES if self.mode is not ReplyMode.SIMPLE else ()
        for option in option_exchange("disk", self.mode, queries):
            await self._loop.sock_sendall(self._sock, option)
            while (answer := client.answer()) is None or not answer.is_last:
                if answer is None:
                    client.receive(await self._loop.sock_recv(self._sock, 1 << 16))
            assert answer.reply == OptionReply.ACK
        assert client.unread() == b""

    # --- Requests ----------------------------------------------------------------------------

    async def _say(self, reading: asyncio.Future[None]) -> None:
        """Send one request, or something that is none."""
        program = self._program
        kind = program.byte() % 16
        if kind == 15:
            self._honest = False
            await self._send(program.text())
            return
        if kind == 14:
            self._honest, self._gone, self._left = False, True, True
            return
        command = program.byte() % 9 if kind else program.number(16)
        if kind > 7:
            offset, length = self._last_range
        else:
            offset = program.number(64) if kind == 1 else program.number(16)
            length = program.choose(LENGTHS)
        self._last_range = offset, length
        flags = (0, 0, 1 << program.byte() % 8, program.number(16))[program.byte() % 4]
        cookie, data = self._build(command, offset, length, flags, kind)
        await self._send(data)
        if command == Command.DISC:
            self._left = True
            return
        self._n_requests += 1
        if self._n_requests == self._breaks_after:
            self._volume.error = program.choose((Corruption("slot 1", "a", "b"), NoSpace("full")))
        n_turns = 0
        while self._in_step and cookie not in self._answered and not reading.done():
            await asyncio.sleep(0)
            n_turns += 1
            if n_turns > PATIENCE:
                self._may_read.set()
                self._volume.space.set()

    def _build(
        self, command: int, offset: int, length: int, flags: int, kind: int
    ) -> tuple[int, bytes]:
        program, payload = self._program, None
        flags &= ~CommandFlag.PAYLOAD_LEN  # the client sets it where there is a payload
        if command == Command.WRITE:
            payload = bytes([program.byte()]) * min(length, SIZE + 1)
        if command == Command.BLOCK_STATUS and kind == 2 and self.mode is ReplyMode.EXTENDED:
            ids = [program.byte() % 4 for _ in range(program.byte() % 4)]
            return self._client.filtered_block_status(offset, length, ids, flags)
        cookie, data = self._client.request(command, offset, length, flags, payload)
        self._asked[cookie] = (command, offset, length, payload or b"")
        return cookie, data

    # --- Replies -----------------------------------------------------------------------------

    async def _read_all(self) -> None:
        """Receive until the server closes."""
        await self._may_read.wait()
        try:
            while data := await self._loop.sock_recv(self._sock, 1 << 18):
                for reply in self._client.receive(data):
                    self._check(reply)
        except ConnectionError:
            assert not self._honest, "the connection is reset"

    def _check(self, reply: Reply) -> None:
        assert reply.cookie not in self._answered
        self._answered[reply.cookie] = reply
        assert not reply.error or reply.error in list(Errno)
        if self._in_step and not reply.error:
            self._follow(reply)

    def _follow(self, reply: Reply) -> None:
        """Do to the model what was done to the volume; compare what was read."""
        command, offset, length, payload = self._asked.get(reply.cookie, (-1, 0, 0, b""))
        if command == Command.WRITE:
            self._become(offset, payload)
        elif command == Command.WRITE_ZEROES:
            self._become(offset, bytes(length))
        elif command == Command.TRIM:
            self._trimmed[offset : offset + length] = b"\1" * length
        elif command == Command.READ:
            assert reply.data is not None and len(reply.data) == length
            for at, byte in enumerate(reply.data, offset):
                expected = self._content[at]
                assert byte == expected or (self._trimmed[at] and not byte), f"{byte} at {at}"

    def _become(self, offset: int, data: bytes) -> None:
        assert offset + len(data) <= SIZE or not data
        self._content[offset : offset + len(data)] = data
        self._trimmed[offset : offset + len(data)] = bytes(len(data))


# --- The server ----------------------------------------------------------------------------------


async def converse(data: bytes) -> None:
    """Serve one client, whose program is ``data``."""
    pool = MemoryPool()
    volume = pool.create("disk", SIZE)
    server = Server(cast(Pool, pool), ServerOptions(limits=LIMITS))
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    serving = asyncio.ensure_future(server.serve_socket(theirs))
    budget = server._settings.budget
    try:
        async with asyncio.timeout(DEADLINE_S):
            await Talk(Program(data), ours, volume).run()
            ours.close()
            await serving
        assert server.connections == []
        assert budget.common_free == budget.common_bytes and not budget.is_contended
        await nothing_comes_late(volume)
    finally:
        ours.close()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await server.drain(0)


async def nothing_comes_late(volume: MemoryVolume) -> None:
    """Give space to what may still wait for it: the client is gone, and it must not write."""
    before = {block: bytes(data) for block, data in volume.blocks.items()}
    volume.space.set()
    for _ in range(PATIENCE):
        await asyncio.sleep(0)
    assert volume.blocks == before, "a write after the end"


_loops: list[asyncio.AbstractEventLoop] = []


class Bugs(logging.Handler):
    """What the server logs when it meets a bug of its own: it goes on, but a fuzzer must not."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(logging.Formatter().format(record))


def run(data: bytes) -> None:
    """Run one input."""
    usual = connection.UNIX_SEND_BYTES, server_module.LOOK_EVERY_S
    if len(data) % 2:
        connection.UNIX_SEND_BYTES = SEND_BYTES
    server_module.LOOK_EVERY_S = LOOK_EVERY_S
    try:
        run_in_loop(data)
    finally:
        connection.UNIX_SEND_BYTES, server_module.LOOK_EVERY_S = usual


def run_in_loop(data: bytes) -> None:
    if not _loops:
        _loops.append(asyncio.new_event_loop())
    log, bugs = logging.getLogger("nbdstore"), Bugs()
    log.addHandler(bugs)
    log.propagate = False
    try:
        _loops[0].run_until_complete(converse(data))
    finally:
        log.removeHandler(bugs)
        log.propagate = True
    assert not bugs.found, "\n".join(bugs.found)
