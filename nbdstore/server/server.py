"""The server: listeners, connections, and the way down.

Composes the parts of this package for one open pool. It neither opens nor closes the pool.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterable
from contextlib import AbstractContextManager

from nbdstore.protocol.agreement import TlsMode
from nbdstore.server.budget import Budget
from nbdstore.server.connection import Connection, ConnectionInfo, Observer, Settings
from nbdstore.server.counters import Counters, ImageMeasures
from nbdstore.server.exports import Exports, HasVolumes
from nbdstore.server.gathering import Gatherings
from nbdstore.server.limiter import Limiters, volume_of
from nbdstore.server.listener import Listener
from nbdstore.server.options import ServerOptions
from nbdstore.server.tls import TlsFiles
from nbdstore.server.wakefulness import Wakefulness
from nbdstore.store import Image, Volume

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
"""How often clients are looked for that have stalled, or gone unnoticed."""


class Server:
    """Serves the volumes of one pool.

    Arguments:
        pool: open; must stay open until `drain` has returned.
        options: see ServerOptions.

    Errors:
        InvalidArgument: the TLS files cannot be used.
    """

    def __init__(self, pool: HasVolumes, options: ServerOptions) -> None:
        self._options = options
        tls = options.tls if options.tls and options.tls.mode is not TlsMode.OFF else None
        self.observer = Observer()
        """Is told what clients do."""
        self._settings = Settings(
            observer=self.observer,
            counters=Counters(),
            exports=Exports(pool, options),
            limits=options.limits,
            limiters=Limiters(),
            budget=Budget(options.limits.max_client_bytes, options.limits.max_connections),
            wakefulness=Wakefulness(),
            gatherings=Gatherings(),
            tls_mode=tls.mode if tls else TlsMode.OFF,
            tls_files=TlsFiles(tls) if tls else None,
        )
        self._listener: Listener | None = None
        self._connections: dict[Connection, asyncio.Task[None]] = {}
        self._crowded = False
        self._patrol: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Bind all addresses and begin to serve.

        Errors:
            InvalidArgument: an address makes no sense, or cannot be had; none is bound then.
        """
        self._listener = Listener(self._options.listen, self._options.sockets, self._on_connect)
        self._listener.start()
        log.info("serving on %s", ", ".join(self.addresses) or "no address")

    async def serve_socket(self, sock: socket.socket) -> None:
        """Serve one connected socket; return when its client has left."""
        await asyncio.wait([self._begin(sock)])

    async def drain(self, timeout_s: float) -> None:
        """Stop: accept nobody, answer what was received, close.

        Connections that are not done after ``timeout_s`` are cut off, and their requests in
        flight cancelled; none of these was acknowledged.
        """
        if self._listener is not None:
            self._listener.close()
        for connection, task in self._connections.items():
            if not connection.drain():
                task.cancel()
        tasks = list(self._connections.values())
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=timeout_s)
        if late:
            log.warning("cutting off %d connections that did not end in %g s", len(late), timeout_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    # --- What there is -----------------------------------------------------------------------

    @property
    def addresses(self) -> list[str]:
        """Where clients can connect: ``127.0.0.1:10809``, ``unix:/run/x.sock``."""
        return self._listener.addresses if self._listener else []

    @property
    def connections(self) -> list[ConnectionInfo]:
        """All connections, those in their handshake included."""
        return [connection.info for connection in self._connections]

    def measures(self, images: Iterable[Image]) -> list[ImageMeasures]:
        """Tell what clients did to those of `images` that were ever attached."""
        return list(self._settings.counters.measures(images))

    def attached(self, volume: Image) -> int:
        """Count the connections that have a volume attached."""
        return sum(connection.volume is volume for connection in self._connections)

    def grown(self, volume: Volume) -> None:
        """Let the clients of a volume that has become larger use its new end.

        NBD has no way to tell them; who knows of it can go on without attaching again, as the
        kernel can with a device that is in use.
        """
        for connection in self._connections:
            if connection.volume is volume and connection.session is not None:
                connection.session.grow()

    def limits_changed(self, volume: Volume) -> None:
        """Hold the clients of a volume to the limits that it has now."""
        limiter = self._settings.limiters.of(volume)
        for connection in list(self._connections):
            image = connection.volume
            if image and volume_of(image) is volume and connection.session is not None:
                connection.session.limit(limiter)

    # --- Ending connections ------------------------------------------------------------------

    def barred(self, volume: Volume) -> AbstractContextManager[None]:
        """Let nobody attach a volume while the context lasts; not to be nested."""
        return self._settings.exports.barred(volume)

    async def fence(self, volume: Image, why: str) -> int:
        """End all connections of a volume; return how many there were.

        When this returns, no request of theirs is executed any more, whatever the network still
        delivers: a session that is lost parses nothing, its backlog is dropped, its tasks are
        cancelled where they wait, and their end is waited for here. The store writes on the loop's
        thread and only between awaits, so no write goes on behind a task that has ended. To keep
        out who comes again, bar the volume, and lease it to somebody else.
        """
        return await self._end([item for item in self._connections if item.volume is volume], why)

    async def disconnect(self, connection_id: int, why: str) -> bool:
        """End one connection as `fence` does; False if there is none of that id."""
        found = [item for item in self._connections if item.id == connection_id]
        return bool(await self._end(found, why))

    async def _end(self, connections: Iterable[Connection], why: str) -> int:
        ends: list[asyncio.Future[None]] = []
        for connection in connections:
            end = connection.give_up(why)
            if end is None:  # in its handshake, where it may have been told that it is attached
                end = self._connections[connection]
                end.cancel()
            ends.append(end)
        if ends:
            await asyncio.wait(ends)
        return len(ends)

    # --- Connections -------------------------------------------------------------------------

    def _on_connect(self, sock: socket.socket) -> None:
        """Take a new connection, or close it at once if there are too many."""
        limit = self._options.limits.max_connections
        crowded = len(self._connections) >= limit
        if crowded and not self._crowded:
            log.warning("refusing connections: there are %d, which is the limit", limit)
        self._crowded = crowded
        if crowded:
            sock.close()
            return
        try:
            self._begin(sock)
        except OSError as error:
            log.debug("a client was gone before it was served: %s", error)
            sock.close()

    def _begin(self, sock: socket.socket) -> asyncio.Task[None]:
        connection = Connection(sock, self._settings)
        task = asyncio.get_running_loop().create_task(connection.run())
        self._connections[connection] = task
        task.add_done_callback(lambda _: self._connections.pop(connection))
        if self._patrol is None:
            self._look_after_clients()
        return task

    def _look_after_clients(self) -> None:
        """Cut off who has stalled while others wait, and who has gone while nothing was read.

        Also takes the samples from which the rates of connections are told.

        A look at all instead of a timer for each: that would cost something per request. A client
        that stalls and harms nobody is left alone: it may be a virtual machine that was paused,
        and its filesystems would not survive the loss of their disk.
        """
        if not self._connections:
            self._patrol = None
            return
        timeout_s = self._options.limits.stall_timeout_s
        contended = self._settings.budget.is_contended
        loop = asyncio.get_running_loop()
        for connection in list(self._connections):
            connection.measure()
            connection.notice_hang_up()
            stall = connection.stall(loop.time(), timeout_s) if timeout_s else None
            if stall is not None and contended:
                connection.cut_off(stall)
        period_s = min(timeout_s / 4 or LOOK_EVERY_S, LOOK_EVERY_S)
        self._patrol = loop.call_later(period_s, self._look_after_clients)
