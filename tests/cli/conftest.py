"""A pool of a test's own and the command line on it, with and without a server that holds it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nbdstore.cli import cli
from nbdstore.control.client import ControlClient
from nbdstore.control.endpoint import Endpoint
from nbdstore.control.listeners import Listeners
from nbdstore.control.operations import Operations
from nbdstore.store import Pool
from tests.control.conftest import answering
from tests.control.memory_pool import MemoryServer

__all__ = ["answering"]

BLOCK = 4096


class CommandLine:
    """Runs commands on the pool in `directory` and checks what every command promises."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.server = MemoryServer()

    def run(self, *args: object, status: int = 0, stdin: bytes | None = None) -> str:
        """Run a command that must end with `status`; return its standard output."""
        __tracebackhide__ = True
        return self._invoke(args, status, stdin).stdout

    def fail(self, *args: object, status: int = 1, stdin: bytes | None = None) -> str:
        """Run a command that must fail with one line on standard error; return that line."""
        __tracebackhide__ = True
        result = self._invoke(args, status, stdin)
        assert result.stderr.startswith("nbdstore: ")
        assert result.stderr.count("\n") == 1, result.stderr
        return str(result.stderr)

    def json(self, *args: object) -> Any:
        """Run a command with --json and return what it says."""
        return json.loads(self.run(*args, "--json"))

    def _invoke(self, args: tuple[object, ...], status: int, stdin: bytes | None) -> Any:
        __tracebackhide__ = True
        words = ["--pool", str(self.directory), *map(str, args)]
        result = CliRunner().invoke(cli, words, input=stdin)
        if not isinstance(result.exception, SystemExit | None):
            raise result.exception
        assert result.exit_code == status, result.output
        assert "Traceback" not in result.output
        return result


class HeldPool:
    """A pool that is open elsewhere and answers on its control socket, as under a server."""

    def __init__(self, directory: Path, server: MemoryServer) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.run(self._open(directory, server))

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    async def _open(self, directory: Path, server: MemoryServer) -> None:
        self.pool = await Pool.open(directory)
        self.operations = Operations(self.pool, server)
        self.endpoint = Endpoint(self.operations, Listeners(directory))
        await self.endpoint.start()

    def close(self) -> None:
        # Once this was answered, connections of before have been accepted, and seen to be closed.
        ControlClient(self.endpoint.addresses[0]).pool()
        self.run(self.endpoint.stop())
        self.run(self.operations.close())
        self.run(self.pool.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def commands(tmp_path: Path) -> CommandLine:
    """The command line on a fresh pool that nobody holds."""
    directory = tmp_path / "pool"
    Pool.create(directory, capacity=1 << 30, journal_size=1 << 20)
    return CommandLine(directory)


@pytest.fixture
def hold() -> Iterator[Callable[[CommandLine], HeldPool]]:
    """Have somebody hold a pool until the end of the test."""
    held: list[HeldPool] = []

    def begin(commands: CommandLine) -> HeldPool:
        held.append(HeldPool(commands.directory, commands.server))
        return held[-1]

    yield begin
    for pool in held:
        pool.close()


@pytest.fixture(params=["alone", "through a server"])
def either(
    request: pytest.FixtureRequest,
    commands: CommandLine,
    hold: Callable[[CommandLine], HeldPool],
) -> CommandLine:
    """The command line on a fresh pool, once with nobody holding it and once through a server."""
    if request.param == "through a server":
        hold(commands)
    return commands
