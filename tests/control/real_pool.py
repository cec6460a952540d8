"""A real pool, served: NBD and the control API over it, on a loop of a thread of its own."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from nbdstore import unix_socket
from nbdstore.control.client import ControlClient
from nbdstore.control.endpoint import Endpoint
from nbdstore.control.listeners import Listeners
from nbdstore.control.operations import Operations
from nbdstore.server import Server, ServerOptions
from nbdstore.store import Pool

T = TypeVar("T")
TIMEOUT_S = 60
MIB = 1 << 20


@dataclass(frozen=True)
class Response:
    """What came back, whole."""

    status: int
    headers: http.client.HTTPMessage
    content: bytes

    @property
    def value(self) -> Any:
        """The content if it is JSON, else None."""
        is_json = self.headers.get_content_subtype() in ("json", "problem+json")
        return json.loads(self.content) if is_json and self.content else None


class Served:
    """A pool of 1 GiB, its NBD server on ``nbd.sock`` and its control API."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "pool"
        self.nbd_path = directory / "nbd.sock"
        Pool.create(self.directory, capacity=1 << 30, journal_size=1 << 20)
        self.loop = uvloop.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.run(self._start())
        self.client = ControlClient(self.endpoint.addresses[0])

    async def _start(self) -> None:
        self.pool = await Pool.open(self.directory)
        self.server = Server(self.pool, ServerOptions(listen=[f"unix:{self.nbd_path}"]))
        self.operations = Operations(self.pool, self.server)
        await self.operations.begin()
        await self.server.start()
        self.server.observer.tell = self.operations.events.tell
        self.endpoint = Endpoint(self.operations, Listeners(self.directory))
        await self.endpoint.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop of the server and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(TIMEOUT_S)

    def fill(self, size: int) -> None:
        """Make a volume ``db`` of random bytes, and its snapshot ``db@a``."""

        async def make() -> None:
            volume = await self.pool.create_volume("db", size)
            for offset in range(0, size, MIB):
                await volume.write(offset, os.urandom(MIB))
            await self.pool.create_snapshots([(volume, "a")])

        self.run(make())

    def connect(self) -> http.client.HTTPConnection:
        """Connect to the control API's unix socket."""
        connection = http.client.HTTPConnection("localhost")
        connection.sock = unix_socket.connect(self.directory / "control.sock", TIMEOUT_S)
        return connection

    def call(
        self,
        method: str,
        path: str,
        body: bytes | dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Response:
        """Call the API over its unix socket."""
        connection = self.connect()
        payload = json.dumps(body).encode() if isinstance(body, dict) else body
        connection.request(method, path, payload, headers or {})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return Response(response.status, response.headers, content)

    def close(self) -> None:
        self.run(self._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _stop(self) -> None:
        await self.endpoint.stop()
        await self.operations.close()
        await self.server.drain(5)
        await self.pool.close()
