"""Sockets that are not: bytes that travel late, in pieces, or not at all.

Owns what lies between two ends of a TCP connection: buffers with bounds, delays, partial
delivery, resets, peers that vanish; all of it from one seed.  The ends see what a real socket
would show them (tcp(7)): EAGAIN, short counts, ECONNRESET, EPIPE, the end of the stream.

    sendmsg -> unsent (bounded) -> the way: some bytes at a time, each after a delay
            -> arrived (bounded) -> recv_into

What happens to a connection:
- reset: both ends learn of it; bytes on their way are lost, those that have arrived may be;
- vanished: nothing passes any more, and neither end is told; keepalive finds out;
- paused: nothing passes for a while.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from tests.simulation.world_loop import Trace, Watch, is_ghost

MOST_BROKEN: Final = 200
"""Connections that the weather breaks; a large request may never come through without an end."""
QUIET_S: Final = 10.0
KEEPALIVE_S: Final = 120.0
"""A silent peer is given up after this (connection.py, KEEPALIVE_...)."""
RETRANSMISSION_S: Final = 924.0
"""And after this if it owes an acknowledgement (tcp(7), "tcp_retries2")."""


@dataclass(frozen=True)
class Weather:
    """How a network behaves.

    Attributes:
        delays: seconds that one step of bytes takes, drawn from these.
        whole: share of the steps that take all there is; others take any part.
        pauses: share of the steps before which nothing passes for some seconds.
        resets: share of the steps that end in a reset.
        vanishes: share of the steps after which nothing passes any more.
        buffer_bytes: sizes of the buffers at both ends, drawn from these.
    """

    delays: tuple[float, ...] = (0.00005, 0.0001, 0.0005)
    whole: float = 0.7
    pauses: float = 0.0
    resets: float = 0.0
    vanishes: float = 0.0
    buffer_bytes: tuple[int, ...] = (1 << 20,)


def reset_error() -> OSError:
    return ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


class Pipe:
    """One direction of a connection.

    Attributes:
        ends: the sender will send no more.
        at_end: and the receiver has been told so.
    """

    def __init__(self, link: Link, room: int) -> None:
        self._link = link
        self._room = room
        self.unsent = bytearray()
        self.arrived = bytearray()
        self.ends = False
        self.at_end = False
        self._moving = False
        self.sender: SimulatedSocket
        self.receiver: SimulatedSocket

    @property
    def free(self) -> int:
        """Bytes that the sender may add."""
        return self._room - len(self.unsent)

    def push(self) -> None:
        """Let the next step begin, if there is something to do."""
        if self._moving or self._link.is_silent or self.at_end:
            return
        can_move = self.unsent and len(self.arrived) < self._room
        if can_move or (self.ends and not self.unsent):
            self._moving = True
            self._link.after_a_while(self._step)

    def _step(self) -> None:
        self._moving = False
        link = self._link
        if link.is_silent or self.at_end:
            return
        n = link.choose(min(len(self.unsent), self._room - len(self.arrived)))
        if n and not self.receiver.closed:
            self.arrived += self.unsent[:n]
        del self.unsent[:n]
        if self.ends and not self.unsent:
            self.at_end = True
        if n and self.receiver.closed:
            link.reset("data for a closed socket")  # which is what a host answers then
            return
        self.receiver.reading.poke()
        self.sender.writing.poke()
        self.push()
        link.perhaps_break()


class Link:
    """A connection: two pipes and their fate."""

    def __init__(self, network: Network, name: str) -> None:
        self._network = network
        self._random = random.Random(network.random.random())
        self._free_from = 0.0
        self._moved_at = 0.0
        self.name = name
        self.is_silent = False
        """Nothing passes any more."""
        self.is_vanished = False
        weather = network.weather
        there = Pipe(self, self._random.choice(weather.buffer_bytes))
        back = Pipe(self, self._random.choice(weather.buffer_bytes))
        self.client = SimulatedSocket(self, f"{name}.client", back, there)
        self.server = SimulatedSocket(self, f"{name}.server", there, back)

    def after_a_while(self, step: Callable[[], None]) -> None:
        weather, loop = self._network.weather, self._network.loop
        if self._random.random() < weather.pauses:
            self._free_from = loop.time() + self._random.uniform(0.1, 20.0)
        delay = self._random.choice(weather.delays) * self._random.uniform(0.5, 2.0)
        self._moved_at = max(loop.time() + delay, self._free_from)
        loop.call_at(self._moved_at, step)

    @property
    def is_quiet(self) -> bool:
        """Whether no bytes have been on their way lately."""
        return self._network.loop.time() > self._moved_at + QUIET_S

    def choose(self, most: int) -> int:
        """How many bytes the next step takes."""
        if most <= 1 or self._random.random() < self._network.weather.whole:
            return most
        return self._random.randint(1, most)

    def perhaps_break(self) -> None:
        if self._network.n_broken >= MOST_BROKEN:
            return
        weather, chance = self._network.weather, self._random.random()
        self._network.n_broken += chance < weather.resets + weather.vanishes
        if chance < weather.resets:
            self.reset("by the network")
        elif chance < weather.resets + weather.vanishes:
            self.vanish()

    def reset(self, why: str) -> None:
        """Cut the connection; both ends learn of it."""
        if self.is_silent:
            return
        self._network.trace.note(self.name, "reset", why)
        self.is_silent = True
        self._network.n_resets += 1
        for end in (self.client, self.server):
            if self._random.random() < 0.5:
                end.incoming.arrived.clear()
            end.fail(reset_error())

    def vanish(self) -> None:
        """Let nothing pass any more; each host gives the other one up in the end."""
        if self.is_silent:
            return
        self._network.trace.note(self.name, "vanishes")
        self.is_silent = self.is_vanished = True
        self._network.n_vanished += 1
        # A client's host is told to be less patient.
        owed = RETRANSMISSION_S if self.server.outgoing.unsent else KEEPALIVE_S
        for end, delay_s in ((self.client, KEEPALIVE_S), (self.server, owed)):
            error = TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            self._network.loop.call_later(delay_s, end.fail, error)


class SimulatedSocket:
    """One end of a connection: of a socket.socket, what server and clients use."""

    family: Final = socket.AF_INET

    def __init__(self, link: Link, name: str, incoming: Pipe, outgoing: Pipe) -> None:
        self.link = link
        self.name = name
        self.incoming = incoming
        self.outgoing = outgoing
        incoming.receiver = self
        outgoing.sender = self
        loop = link._network.loop
        self.reading = Watch(loop, self._is_readable)
        self.writing = Watch(loop, self._is_writable)
        self.closed = False
        self.on_end: list[Callable[[], None]] = []
        """Called when the owner of this end has learned that the other one is gone, or closed."""
        self._error: OSError | None = None
        self._failed = False

    # --- Readiness ---------------------------------------------------------------------------

    def _is_readable(self) -> bool:
        return bool(self.incoming.arrived) or self.incoming.at_end or self._failed

    def _is_writable(self) -> bool:
        # Linux calls a socket writable when a third of its buffer is free (sock_writeable).
        return self._failed or self.outgoing.free * 3 > self.outgoing._room

    def fail(self, error: OSError) -> None:
        """Let this end learn of a fault."""
        if not self.closed and not self._failed:
            self._failed = True
            self._error = error
            self.reading.poke()
            self.writing.poke()

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    # --- socket.socket -----------------------------------------------------------------------

    def setblocking(self, flag: bool) -> None:
        assert not flag

    def setsockopt(self, *args: int) -> None:
        pass

    def getpeername(self) -> tuple[str, int]:
        return self.name, 1

    def recv_into(self, buffer: memoryview) -> int:
        if self.closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        arrived = self.incoming.arrived
        if not arrived:
            if self._failed or self.incoming.at_end:
                self._tell_of_the_end()
                self._raise_error()
                return 0
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        n = min(len(buffer), len(arrived))
        buffer[:n] = arrived[:n]
        del arrived[:n]
        self.incoming.push()
        return n

    def recv(self, length: int) -> bytes:
        buffer = bytearray(length)
        return bytes(buffer[: self.recv_into(memoryview(buffer))])

    def sendmsg(self, buffers: Sequence[bytes | bytearray | memoryview]) -> int:
        if is_ghost():
            return sum(map(len, buffers))
        if self.closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if self._failed:
            self._tell_of_the_end()
        self._raise_error()
        if self._failed or self.outgoing.ends:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        room = self.outgoing.free
        if room <= 0:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        data = b"".join(buffers)[:room]
        self.outgoing.unsent += data
        self.outgoing.push()
        return len(data)

    def has_hung_up(self) -> bool:
        """What Channel.has_hung_up asks the kernel (POLLRDHUP of poll(2))."""
        gone = self.incoming.at_end or self._failed
        if gone:
            self._tell_of_the_end()
        return gone

    def shutdown(self, how: int) -> None:
        assert how == socket.SHUT_WR
        if self._failed:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        if not is_ghost():
            self.outgoing.ends = True
            self.outgoing.push()

    def close(self) -> None:
        """Close; with bytes unread that is a reset (tcp(7), RFC 2525 2.17)."""
        if self.closed:
            return
        self.closed = True
        self.reading.clear()
        self.writing.clear()
        self.link._network.trace.note(self.name, "closed")
        if self.incoming.arrived:
            self.link.reset(f"{self.name} closed with bytes unread")
        self.outgoing.ends = True
        self.outgoing.push()
        self._tell_of_the_end()

    def _tell_of_the_end(self) -> None:
        calls, self.on_end = self.on_end, []
        for call in calls:
            call()

    # --- For clients -------------------------------------------------------------------------

    async def receive(self) -> bytes:
        """Receive some bytes, waiting for them; empty = the end."""
        while True:
            try:
                return self.recv(256 << 10)
            except BlockingIOError:
                await _until(self.reading)

    async def send_all(self, data: bytes) -> None:
        """Send, waiting for room."""
        view = memoryview(data)
        while view:
            try:
                view = view[self.sendmsg([view]) :]
            except BlockingIOError:
                await _until(self.writing)


async def _until(watch: Watch) -> None:
    ready = asyncio.get_running_loop().create_future()
    watch.set(lambda: ready.done() or ready.set_result(None), ())
    try:
        await ready
    finally:
        watch.clear()


class SimulatedListener:
    """A socket that listens."""

    family: Final = socket.AF_INET

    def __init__(self, network: Network) -> None:
        self._network = network
        self._backlog: deque[SimulatedSocket] = deque()
        self.reading = Watch(network.loop, lambda: bool(self._backlog))
        self.writing = Watch(network.loop, lambda: False)
        self.closed = False

    def setblocking(self, flag: bool) -> None:
        assert not flag

    def getsockname(self) -> tuple[str, int]:
        return "simulated", 10809

    def accept(self) -> tuple[SimulatedSocket, tuple[str, int]]:
        if not self._backlog:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        sock = self._backlog.popleft()
        return sock, sock.getpeername()

    def arrive(self, sock: SimulatedSocket) -> None:
        if self.closed:
            sock.link.reset("nobody listens any more")
            sock.close()
            return
        self._backlog.append(sock)
        self.reading.poke()

    def close(self) -> None:
        self.closed = True
        self.reading.clear()
        while self._backlog:
            sock = self._backlog.popleft()
            sock.link.reset("never accepted")
            sock.close()


class Network:
    """All connections of a world.

    Attributes:
        weather: may be changed at any time.
        n_connections, n_resets, n_vanished: so far.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, trace: Trace, seed: int, weather: Weather
    ) -> None:
        self.loop = loop
        self.trace = trace
        self.random = random.Random(seed)
        self.weather = weather
        self.listener: SimulatedListener | None = None
        self.links: list[Link] = []
        self.old_links: list[Link] = []
        self.n_broken = 0
        self.n_connections = self.n_resets = self.n_vanished = 0

    def listen(self) -> SimulatedListener:
        """Begin to listen, as the only one."""
        self.listener = SimulatedListener(self)
        return self.listener

    async def connect(self, name: str) -> SimulatedSocket:
        """Connect to who listens.

        Raises:
            ConnectionRefusedError: nobody does.
        """
        await asyncio.sleep(self.random.choice(self.weather.delays))
        listener = self.listener
        if listener is None or listener.closed:
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        self.n_connections += 1
        link = Link(self, f"{name}#{self.n_connections}")
        self.links = [li for li in self.links if not (li.server.closed and li.client.closed)]
        self.links.append(link)
        self.trace.note(link.name, "connects")
        listener.arrive(link.server)
        return link.client

    def cut_all(self) -> None:
        """The server's process is dead: its host resets, or closes, all of its connections."""
        if self.listener is not None:
            self.listener.close()
        self.old_links, self.links = self.links, []
        for link in self.old_links:
            if link.is_vanished:
                link.server.close()
                continue
            if self.random.random() < 0.5:
                link.server.incoming.arrived.clear()  # an orderly end, as seen from outside
            link.server.close()
