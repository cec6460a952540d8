"""A control API that answers: an Endpoint on a pool in memory, on a loop of its own thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from nbdstore.control.client import ControlClient
from nbdstore.control.endpoint import Endpoint
from nbdstore.control.listeners import Listeners
from nbdstore.control.routing import Access, Caller
from nbdstore.control.tokens import Token, Tokens
from tests.control.backup_pools import Site, site
from tests.control.memory_pool import Bench, MemoryServer
from tests.control.real_pool import Served
from tests.store.pools import assert_clean

TOKEN = "s3cret"
READ_TOKEN = "0nlyl00k1ng"
TOKENS = Tokens(
    [
        Token(TOKEN.encode(), Caller(Access.ADMIN, "alice")),
        Token(READ_TOKEN.encode(), Caller(Access.READ, "prometheus")),
    ]
)


class Answering:
    """An endpoint over a unix socket and TCP, with the bench behind it."""

    def __init__(self, directory: Path) -> None:
        self.bench = Bench()
        self.loop = uvloop.new_event_loop()  # as the daemon
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.listeners = Listeners(directory, tcp=("127.0.0.1", 0), tokens=TOKENS)
        self.endpoint = Endpoint(self.bench.operations, self.listeners)
        self.run(self.endpoint.start)
        self.unix_url, self.http_url = self.endpoint.addresses
        self.client = ControlClient(self.unix_url)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a coroutine function on the endpoint's loop and return its result."""
        return asyncio.run_coroutine_threadsafe(function(*args), self.loop).result(30)

    def close(self) -> None:
        # Once this was answered, connections of before have been accepted, and seen to be closed.
        self.client.pool()
        self.run(self.endpoint.stop)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Answering]:
    api = Answering(tmp_path)
    yield api
    api.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    pool = Served(tmp_path)
    yield pool
    pool.close()


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Site]:
    async with site(tmp_path / "here") as found:
        yield found
    await assert_clean(tmp_path / "here")


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer()


@pytest.fixture
async def there(tmp_path: Path, server: MemoryServer) -> AsyncIterator[Site]:
    async with site(tmp_path / "there", server) as found:
        yield found
    await assert_clean(tmp_path / "there")
