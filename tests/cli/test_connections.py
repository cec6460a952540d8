"""``nbdstore ps`` and ``nbdstore disconnect``."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cli.conftest import CommandLine, HeldPool
from tests.control.memory_pool import MemoryConnection

Hold = Callable[[CommandLine], HeldPool]


@pytest.fixture
def served(commands: CommandLine, hold: Hold) -> CommandLine:
    """A server with three connections, one of them in its handshake."""
    hold(commands)
    commands.run("volume", "create", "db", "--size", "1G")
    commands.server.connections += [
        MemoryConnection("db", id=7, holder="node-1", lease_epoch=3, in_flight=12),
        MemoryConnection("db", id=8),
        MemoryConnection(None, id=9),
    ]
    return commands


def test_nobody(either: CommandLine) -> None:
    assert either.run("ps") == "nobody is connected\n"
    assert either.json("ps") == []


def test_a_table(served: CommandLine) -> None:
    header, first, second = served.run("ps").splitlines()
    assert header.split("  ")[0].strip() == "ID"
    words = ["7", "192.0.2.7:4711", "db", "node-1", "2", "minutes", "250/s", "2", "MiB/s"]
    assert first.split() == [*words, "0", "B/s", "12"]
    assert second.split()[:4] == ["8", "192.0.2.7:4711", "db", "-"]


def test_exact_figures(served: CommandLine) -> None:
    item = served.json("ps")[0]
    assert (item["id"], item["age_s"], item["in_flight"]) == (7, 90, 12)
    assert (item["requests_per_s"], item["read_per_s"]) == (250.0, 2 << 20)
    assert (item["holder"], item["lease_epoch"]) == ("node-1", 3)


def test_ending_one(served: CommandLine) -> None:
    assert served.run("disconnect", 7) == "connection 7 is closed\n"
    assert [item["id"] for item in served.json("ps")] == [8]


def test_ending_one_that_is_not_there(served: CommandLine) -> None:
    served.run("disconnect", 7)
    for number in (7, 99999):
        said = served.run("disconnect", number)
        assert said == f"nobody is connected as {number}: 'nbdstore ps' lists who is\n"
    assert [item["id"] for item in served.json("ps")] == [8]


def test_ending_one_in_its_handshake(served: CommandLine) -> None:
    """It has no export yet, so it is not listed."""
    assert "nobody is connected as 9" in served.run("disconnect", 9)
    assert [item.id for item in served.server.connections] == [7, 8]


def test_ending_those_of_a_volume(served: CommandLine) -> None:
    assert served.run("disconnect", "db") == "closed 2 connections of volume db\n"
    assert served.run("disconnect", "db") == "closed 0 connections of volume db\n"
    assert [item.id for item in served.server.connections] == [9]


def test_ending_those_of_a_snapshot(served: CommandLine) -> None:
    served.run("snapshot", "create", "db@monday")
    served.server.connections.append(MemoryConnection("db@monday", id=10))
    assert served.run("disconnect", "db@monday") == "closed 1 connection of snapshot db@monday\n"
    assert [item["id"] for item in served.json("ps")] == [7, 8]
    assert "no snapshot 'db@tuesday'" in served.fail("disconnect", "db@tuesday")
    assert "no volume 'web'" in served.fail("disconnect", "web@monday")


def test_those_of_a_volume_that_is_not_there(either: CommandLine) -> None:
    assert "no volume 'web'" in either.fail("disconnect", "web")
