"""nbdstore's server in a thread of the test, over a pool in memory: it can be broken from outside.

The conformance client blocks, so that the server needs an event loop in a thread of its own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import uvloop

from nbdstore.server import Limits, Server, ServerOptions
from nbdstore.store import Pool
from tests.server.memory_pool import MemoryPool

SIZE = 64 << 20
STOP_TIMEOUT_S = 20.0
LIMITS = Limits(linger_s=0.1)


@contextmanager
def served(pool: MemoryPool, directory: Path, **options: Any) -> Iterator[str]:
    """Serve a pool on a unix socket while the context lasts; yield the path of the socket."""
    path = directory / "inside.sock"
    merged: dict[str, Any] = {"listen": [f"unix:{path}"], "limits": LIMITS} | options
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server")
    thread.start()
    try:
        server = Server(cast(Pool, pool), ServerOptions(**merged))
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(STOP_TIMEOUT_S)
        try:
            yield str(path)
        finally:
            stopping = asyncio.run_coroutine_threadsafe(server.drain(timeout_s=0.2), loop)
            stopping.result(STOP_TIMEOUT_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(STOP_TIMEOUT_S)
        loop.close()


def memory_pool() -> MemoryPool:
    """A pool with the volumes ``disk`` and ``other``."""
    pool = MemoryPool()
    pool.create("disk", SIZE)
    pool.create("other", SIZE)
    return pool
