"""A server in the test's own loop, over a pool in memory or a real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from nbdstore.server import Limits, Server, ServerOptions
from tests.server.memory_pool import MemoryPool
from tests.server.nbd_client import NbdClient

SIZE = 64 << 20

Serve = Callable[..., Awaitable[Server]]
Connect = Callable[..., Awaitable[NbdClient]]

QUICK = Limits(linger_s=0.2)


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run all of these tests on the loop that the daemon uses."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
def pool() -> MemoryPool:
    pool = MemoryPool()
    pool.create("disk", SIZE)
    return pool


@pytest.fixture
async def serve(pool: MemoryPool, tmp_path: Path) -> AsyncIterator[Serve]:
    """Start a server on ``nbd.sock``, with any of ServerOptions; drained when the test ends."""
    servers = []

    async def start(pool: MemoryPool = pool, **options: object) -> Server:
        options = {"listen": [f"unix:{tmp_path / 'nbd.sock'}"], "limits": QUICK} | options
        server = Server(pool, ServerOptions(**options))
        await server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        await server.drain(timeout_s=5)


@pytest.fixture
async def connect(tmp_path: Path) -> AsyncIterator[Connect]:
    """Connect a client to ``nbd.sock``; it is closed when the test ends."""
    clients = []

    async def start(address: str = f"unix:{tmp_path / 'nbd.sock'}", **kwargs: object) -> NbdClient:
        client = await NbdClient.connect(address, **kwargs)
        clients.append(client)
        return client

    yield start
    for client in clients:
        client.close()


@pytest.fixture
async def client(serve: Serve, connect: Connect) -> NbdClient:
    """A client in the option phase of a server with the defaults."""
    await serve()
    return await connect()
