"""The life of a server process: pool, NBD server and control API, from start to a clean stop.

Owns the order of things, and nothing else::

    open the pool (lock, recover) -> complete what a crash left -> listen for the control API
    -> serve NBD -> answer on the control API -> READY=1
    ... SIGTERM, SIGINT or SIGHUP, or the end of the one client ...
    STOPPING=1 -> control API ends -> NBD drains, with a deadline -> pool: flush, checkpoint, unlock

The first signal lets requests in flight finish; a second one cuts the drain short. Whatever
happens, the pool is closed last and in full: acknowledged writes are durable when the process ends
with status 0, and if they are not, it says so and ends with 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import datetime
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbdstore import __version__, systemd
from nbdstore.control import SOCKET_NAME
from nbdstore.control.capacity import GrowthMeter
from nbdstore.control.listeners import Listeners
from nbdstore.control.model import ServerInfo
from nbdstore.control.operations import Operations
from nbdstore.control.scrub import DEFAULT_RATE, Scrubber
from nbdstore.control.watch import PoolWatch
from nbdstore.errors import AlreadyExists, Busy, PoolFailed, PoolLocked
from nbdstore.server import HasVolumes, Server, ServerOptions, TlsOptions
from nbdstore.server.tls import TlsFiles
from nbdstore.store import Pool, PoolOptions

if TYPE_CHECKING:
    from nbdstore.control.endpoint import Endpoint
    from nbdstore.control.tokens import Tokens

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
DRAIN_TIMEOUT_S = 10.0
"""Requests in flight take milliseconds; only writes held by a full pool take longer than this."""
SAMPLE_EVERY_S = 60.0
KEPT_BLOCK_BYTES = 4 << 20
"""Blocks up to this size come from memory that is kept; larger ones cost a system call each."""
KEPT_FREE_BYTES = 8 << 20
"""Free memory that each thread keeps."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
SCRUB_LOOK_S = 60.0
SCRUB_LOOK_MOST_S = 3600.0
"""Between two looks for volumes that are due; new ones may come meanwhile."""
LOCK_PATIENCE_S = 5.0
LOCK_RETRY_S = 0.2
DEMO_VOLUME = "demo"
DEMO_SIZE = 10 << 30

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DaemonOptions:
    """What to serve and how.

    create: make the pool if there is none. demo: and a volume, if there is none.
    clients: connected sockets to serve, after whose end the process ends.
    control_tcp: (host, port) of the control API besides its unix socket; needs `control_tokens`.
    control_tls: certificate and key of the control API over TCP; None = plain HTTP.
    scrub_every_s: scrub each volume when its last scrub is as old as this; None = never unasked.
    scrub_rate: bytes per second that these scrubs read at most.
    environ: for the service manager's variables.
    """

    pool: Path
    pool_options: PoolOptions
    server_options: ServerOptions
    create: bool = False
    demo: bool = False
    clients: Sequence[socket.socket] = ()
    control_tcp: tuple[str, int] | None = None
    control_tokens: Tokens | None = None
    control_tls: TlsOptions | None = None
    control_sockets: Sequence[socket.socket] = ()
    scrub_every_s: float | None = None
    scrub_rate: int = DEFAULT_RATE
    environ: Mapping[str, str] = field(default_factory=dict)


Announce = Callable[[Pool, Server], None]


async def run(options: DaemonOptions, announce: Announce) -> None:
    """Serve until a signal, or the end of `options.clients`; `announce` is called when ready.

    Raises:
        NbdstoreError: the start failed, or the pool could not be written out at the end.
    """
    stop = _StopSignals()
    _raise_descriptor_limit()
    _keep_little_freed_memory()
    async with _open_pool(options) as pool:
        if not stop.requested.is_set():
            await _serve(pool, options, stop, announce)
    log.info("stopped; everything that was acknowledged is on disk")


async def serve_salvaged(
    pool: HasVolumes,
    options: ServerOptions,
    environ: Mapping[str, str],
    announce: Callable[[Server], None],
) -> None:
    """Serve the volumes of a pool that is open for salvage until a signal, and nothing else."""
    stop = _StopSignals()
    server = Server(pool, options)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(_drain, server, stop)
        await server.start()
        systemd.notify(environ, "READY=1")
        announce(server)
        await stop.requested.wait()
        systemd.notify(environ, "STOPPING=1")


def _raise_descriptor_limit() -> None:
    """Allow as many open files as this process may: the soft limit is often 1024.

    Python needs no select(2), which is what the low soft limit is there for.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _keep_little_freed_memory() -> None:
    """Have glibc give freed memory back to the system, in every thread.

    Unasked, it keeps up to 64 MiB for each thread that has ever freed a large block: readers of
    large requests would make the process larger by that, for good (mallopt(3)).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # else it is another library, with rules of its own
        mallopt(_M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_FREE_BYTES)


class _StopSignals:
    """Signals as events: `requested` by the first, `hurry` by the second."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.hurry = asyncio.Event()
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup(1)
            asyncio.get_running_loop().add_signal_handler(number, self._arrived, number)

    def _arrived(self, number: signal.Signals) -> None:
        if not self.requested.is_set():
            log.info("%s: stopping, requests in flight may finish", number.name)
            self.requested.set()
        else:
            log.warning("%s again: dropping clients, still writing the pool out", number.name)
            self.hurry.set()


@contextlib.asynccontextmanager
async def _open_pool(options: DaemonOptions) -> AsyncIterator[Pool]:
    if options.create or options.demo:
        with contextlib.suppress(AlreadyExists):
            Pool.create(options.pool)
    pool = await _locked_pool(options)
    try:
        if options.demo and not pool.volumes:
            await pool.create_volume(DEMO_VOLUME, DEMO_SIZE)
        yield pool
    finally:
        failure = pool.status()["failure"]
        await pool.close()
    if failure:
        raise PoolFailed(
            f"the pool had failed ({failure}): what was written after its last flush may be lost; "
            "start again to recover the rest"
        )


async def _locked_pool(options: DaemonOptions) -> Pool:
    """Open the pool; wait a little if a command has it, which keeps it for a moment only."""
    deadline_s = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            return await Pool.open(options.pool, options=options.pool_options)
        except PoolLocked:
            if _is_served(options.pool) or time.monotonic() >= deadline_s:
                raise
            log.info("the pool is open elsewhere: waiting until it is let go")
        await asyncio.sleep(LOCK_RETRY_S)


def _is_served(directory: Path) -> bool:
    """Tell whether another server holds the pool."""
    from nbdstore.control.client import ControlClient  # late: few starts come here

    return ControlClient(f"unix:{directory / SOCKET_NAME}").reachable()


async def _serve(
    pool: Pool, options: DaemonOptions, stop: _StopSignals, announce: Announce
) -> None:
    server = Server(pool, options.server_options)
    async with contextlib.AsyncExitStack() as stack:
        growth = GrowthMeter()
        operations = Operations(pool, server, growth=growth)
        server.observer.tell = operations.events.tell
        await operations.begin()  # so that no client is refused for what a crash has left
        stack.push_async_callback(_drain, server, stop)
        listeners = _control_listeners(options)
        stack.callback(listeners.close)
        await server.start()
        operations.server_info = _server_info(server, options.server_options)
        stack.push_async_callback(operations.close)
        # In a thread, since NBD clients are served already.
        endpoint = (await asyncio.to_thread(_load_control_api))(operations, listeners)
        await endpoint.start()
        stack.push_async_callback(endpoint.stop)
        for work in _housekeeping(pool, operations, options, growth):
            stack.callback(asyncio.create_task(work).cancel)
        systemd.notify(options.environ, "READY=1")
        announce(pool, server)
        await _until_done(server, options.clients, stop)
        systemd.notify(options.environ, "STOPPING=1")


def _control_listeners(options: DaemonOptions) -> Listeners:
    return Listeners(
        options.pool,
        tcp=options.control_tcp,
        tokens=options.control_tokens,
        tls=TlsFiles(options.control_tls).context if options.control_tls else None,
        passed=options.control_sockets,
    )


def _load_control_api() -> type[Endpoint]:
    """Import the HTTP server, which takes as long as all the rest of the start."""
    from nbdstore.control.endpoint import Endpoint

    return Endpoint


def _server_info(server: Server, options: ServerOptions) -> ServerInfo:
    return ServerInfo(
        version=__version__,
        pid=os.getpid(),
        since=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        addresses=list(server.addresses),
        read_only=options.read_only,
    )


def _housekeeping(
    pool: Pool, operations: Operations, options: DaemonOptions, growth: GrowthMeter
) -> Iterator[Coroutine[Any, Any, None]]:
    """Yield what goes on by itself until the server stops."""
    yield _sample(pool, growth)
    yield PoolWatch(pool, operations.events).run()
    if options.scrub_every_s is not None:
        yield _scrub_now_and_then(operations.scrubs, options.scrub_every_s, options.scrub_rate)


async def _scrub_now_and_then(scrubs: Scrubber, every_s: float, rate: int) -> None:
    """Scrub what is due, for ever."""
    while True:
        with contextlib.suppress(Busy):  # somebody else's scrub runs: later, then
            scrubs.start_due(every_s, rate)
        wait_s = scrubs.next_due(every_s) - time.time()
        await asyncio.sleep(min(max(wait_s, SCRUB_LOOK_S), SCRUB_LOOK_MOST_S))


async def _until_done(server: Server, clients: Sequence[socket.socket], stop: _StopSignals) -> None:
    """Wait for the first signal or, if there are `clients`, until the last of them has left."""
    stopped = asyncio.create_task(stop.requested.wait())
    serving = [asyncio.create_task(server.serve_socket(sock)) for sock in clients]
    if not serving:
        await stopped
        return
    served = asyncio.gather(*serving)
    waiting: set[asyncio.Future[Any]] = {stopped, served}
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if served.done():
        served.result()  # a bug in serving is not to be hidden; after a signal the drain ends them


async def _drain(server: Server, stop: _StopSignals) -> None:
    """Stop accepting and let requests finish, until a second signal or the deadline."""
    drain = asyncio.ensure_future(server.drain(DRAIN_TIMEOUT_S))
    hurry = asyncio.ensure_future(stop.hurry.wait())
    await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    if not drain.done():
        drain.cancel()
        await asyncio.wait({drain})
        await server.drain(0)
    else:
        drain.result()


async def _sample(pool: Pool, growth: GrowthMeter) -> None:
    """Feed the forecast of `nbdstore capacity`, for ever."""
    while True:
        growth.add(time.monotonic(), pool.status()["used"])
        await asyncio.sleep(SAMPLE_EVERY_S)
