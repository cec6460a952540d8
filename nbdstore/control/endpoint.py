"""Answers of the control API on its `Listeners`: HTTP, and who gets as far as that.

Owns the bounds on callers who have not shown a token yet: how many they are, and how long they may
take. Connections that came before it was started have waited, and are answered like others.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import sys
from typing import TYPE_CHECKING, cast

from aiohttp import web

from nbdstore.control.api import application
from nbdstore.control.listeners import Listeners
from nbdstore.control.operations import Operations
from nbdstore.control.tokens import Tokens

if TYPE_CHECKING:
    from nbdstore.control.listeners import GetContext

MAX_CONNECTIONS = 64
"""Callers over TCP at a time, whoever they are: they would else take the descriptors that the NBD
clients of the same process need. Over the unix socket there is only the owner."""
HEAD_TIMEOUT_S = 30.0
"""How long a caller may take to send the head of its first request, and how long it may be idle
before its next: who does not know the token must not hold one of the connections for longer."""
MAX_HEAD_BYTES = 32 << 10
"""aiohttp's own bounds on a request's head are narrower; it answers what is beyond them."""
ACCEPT_AGAIN_S = 1.0
STOP_TIMEOUT_S = 5.0
"""Seconds that calls under way get to finish when the server stops, and as many again to end when
they are cancelled: what is being changed in the store is waited for."""
UNREAD_TIMEOUT_S = 5.0
"""Seconds after which a stop cuts off callers who have not read what was written to them by then,
because they do not read, or slowly: cancelling does nothing about these, so each would take twice
the other."""

log = logging.getLogger(__name__)


class Endpoint:
    """The control API on `listeners`, from `start` to `stop`, which closes them.

    Arguments:
        operations: what callers may do.
        listeners: where they come in, and what is demanded of them there.
    """

    def __init__(self, operations: Operations, listeners: Listeners) -> None:
        self._operations = operations
        self._listeners = listeners
        self._runners: list[web.AppRunner] = []
        self._servers: list[asyncio.Server | _Hall] = []
        self._entrances: list[_Entrance] = []

    @property
    def addresses(self) -> list[str]:
        """Where it answers; see `Listeners`."""
        return self._listeners.addresses

    async def start(self) -> None:
        """Begin to answer on every listener; on a failure none is left behind."""
        listeners = self._listeners
        try:
            await self._serve(listeners.unix)
            if listeners.tcp:
                await self._serve(listeners.tcp, tokens=listeners.tokens, tls=listeners.tls)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Listen no more, let calls finish, close."""
        for server in self._servers:
            server.close()
        self._listeners.close()
        for entrance in self._entrances:
            entrance.close()
        cut_off = asyncio.get_running_loop().call_later(UNREAD_TIMEOUT_S, self._cut_off)
        try:
            await asyncio.gather(*(runner.cleanup() for runner in self._runners))
        finally:
            cut_off.cancel()
        self._servers.clear()
        self._entrances.clear()
        self._runners.clear()

    def _cut_off(self) -> None:
        """Close the connections of those who have not read all that was written to them."""
        for entrance in self._entrances:
            for connection in entrance.server.connections:
                stream = connection.transport
                if stream is not None and stream.get_write_buffer_size():
                    stream.abort()

    async def _serve(
        self,
        sockets: list[socket.socket],
        *,
        tokens: Tokens | None = None,
        tls: GetContext | None = None,
    ) -> None:
        runner = web.AppRunner(
            application(self._operations, tokens=tokens),
            access_log=None,
            shutdown_timeout=STOP_TIMEOUT_S,
            keepalive_timeout=HEAD_TIMEOUT_S,
            auto_decompress=False,  # no caller of ours compresses, and a bomb is not unpacked
        )
        await runner.setup()
        self._runners.append(runner)
        server = runner.server
        assert server is not None
        over_tcp = any(sock.family != socket.AF_UNIX for sock in sockets)
        entrance = _Entrance(server, MAX_CONNECTIONS if over_tcp else sys.maxsize)
        self._entrances.append(entrance)
        loop = asyncio.get_running_loop()
        for sock in sockets:
            if tls is not None:
                self._servers.append(_Hall(entrance, sock, tls))
            else:
                accept = functools.partial(_Turnstile, entrance)
                self._servers.append(await loop.create_server(accept, sock=sock))


class _Entrance:
    """Hands connections to aiohttp once they have sent the head of a request.

    Those that take too long for that are closed, and so are those that are too many.
    """

    def __init__(self, server: web.Server, limit: int) -> None:
        self.server = server
        self.limit = limit
        self.waiting: set[asyncio.Transport] = set()
        self.n_shaking = 0
        """Callers that TLS has not let in yet."""

    def is_crowded(self) -> bool:
        return len(self.server.connections) + len(self.waiting) + self.n_shaking >= self.limit

    def close(self) -> None:
        """Let nobody in who is still waiting."""
        for stream in self.waiting:
            stream.abort()


class _Hall:
    """Takes connections in from one listening socket to TLS, where they count as waiting, too.

    The loop's own way (`create_server` with a context) shows connections when they have shaken
    hands, which callers need not do for minutes.
    """

    def __init__(self, entrance: _Entrance, sock: socket.socket, tls: GetContext) -> None:
        self._entrance = entrance
        self._sock = sock
        self._tls = tls
        self._tasks = {asyncio.create_task(self._accept())}

    def close(self) -> None:
        """Take nobody in any more, and leave those alone who have not shaken hands."""
        for task in self._tasks:
            task.cancel()
        self._sock.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        self._sock.setblocking(False)
        while True:
            try:
                sock, _ = await loop.sock_accept(self._sock)
            except OSError as error:  # no descriptors, most likely: others may end
                log.error("cannot take a caller of the control API in: %s", error)
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            if self._entrance.is_crowded():
                sock.close()
                continue
            self._entrance.n_shaking += 1
            task = loop.create_task(self._shake_hands(sock))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _shake_hands(self, sock: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: _Turnstile(self._entrance),
                sock,
                ssl=self._tls(),
                ssl_handshake_timeout=HEAD_TIMEOUT_S,
            )
        except OSError as error:  # ssl.SSLError is one
            log.debug("a caller of the control API failed at TLS: %s", error)
            sock.close()
        finally:
            self._entrance.n_shaking -= 1


class _Turnstile(asyncio.Protocol):
    """One connection before its first request is there.

    Whether there are too many is not decided when the protocol is made: a whole batch of
    connections is accepted before the first of them counts.
    """

    def __init__(self, entrance: _Entrance) -> None:
        self._entrance = entrance
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._stream = cast("asyncio.Transport", transport)  # uvloop's is none by its class
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(HEAD_TIMEOUT_S, self._stream.abort)
        if self._entrance.is_crowded():
            self._stream.abort()
        else:
            self._entrance.waiting.add(self._stream)

    def data_received(self, data: bytes) -> None:
        self._head += data
        if not self._head[:1].isalpha():  # TLS, by mistake: HTTP begins with a method
            self._stream.abort()
            return
        if b"\r\n\r\n" not in self._head and len(self._head) < MAX_HEAD_BYTES:
            return
        self._leave()
        handler = self._entrance.server()
        self._stream.set_protocol(handler)
        handler.connection_made(self._stream)
        handler.data_received(self._head)

    def connection_lost(self, error: Exception | None) -> None:
        self._leave()

    def _leave(self) -> None:
        self._deadline.cancel()
        self._entrance.waiting.discard(self._stream)
