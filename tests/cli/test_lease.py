"""``nbdstore lease``, with and without a server that holds the pool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nbdstore.control.operations import Operations
from nbdstore.store import Pool
from tests.cli.conftest import CommandLine, HeldPool
from tests.control.memory_pool import MemoryConnection

Hold = Callable[[CommandLine], HeldPool]


def lease_to(commands: CommandLine, holder: str) -> None:
    async def acquire() -> None:
        pool = await Pool.open(commands.directory)
        await Operations(pool).leases.acquire("db", holder, force=True)
        await pool.close()

    asyncio.run(acquire())


def test_nobody_holds_one(either: CommandLine) -> None:
    assert either.run("lease", "list") == "no volume is leased\n"
    assert either.json("lease", "list") == []


def test_without_a_server(commands: CommandLine) -> None:
    commands.run("volume", "create", "db", "--size", "1G")
    lease_to(commands, "node-1")
    lease_to(commands, "node-2")
    header, row = commands.run("lease", "list").splitlines()
    assert header.split() == ["VOLUME", "HOLDER", "EPOCH", "SINCE", "CONNECTIONS"]
    assert row.split()[:3] == ["db", "node-2", "2"]
    assert "nobody holds a lease of volume db now" in commands.run("lease", "break", "db")
    assert commands.json("lease", "list") == []
    commands.run("lease", "break", "db")


def test_with_a_server(commands: CommandLine, hold: Hold) -> None:
    commands.run("volume", "create", "db", "--size", "1G")
    lease_to(commands, "node-1")
    hold(commands)
    commands.server.connections.append(MemoryConnection("db", holder="node-1", lease_epoch=1))
    (item,) = commands.json("lease", "list")
    assert (item["holder"], item["connections"], item["token"]) == ("node-1", 1, None)
    assert " node-1 " in commands.run("volume", "list")
    assert "leased    to node-1 since 2" in commands.run("volume", "show", "db")
    message = commands.fail("volume", "delete", "db")
    assert "leased to 'node-1' since" in message
    assert "'nbdstore lease break db' ends the lease" in message
    commands.run("lease", "break", "db")
    assert commands.server.connections == []
    assert commands.run("volume", "delete", "db") == "deleted volume db\n"


def test_of_a_volume_that_is_not_there(either: CommandLine) -> None:
    assert "no volume 'db'" in either.fail("lease", "break", "db")
