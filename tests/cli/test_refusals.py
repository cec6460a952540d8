"""What commands that are refused say: who is in the way, and what else would do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cli.conftest import CommandLine, HeldPool
from tests.control.memory_pool import MemoryConnection

Hold = Callable[[CommandLine], HeldPool]
WHO = "is attached by 192.0.2.7:4711 (1 connection): "


@pytest.fixture
def attached(commands: CommandLine, hold: Hold) -> CommandLine:
    """A server with a volume that is attached, and so is its snapshot."""
    hold(commands)
    commands.run("volume", "create", "db", "--size", "1G")
    commands.run("snapshot", "create", "db@monday")
    commands.server.connections += [MemoryConnection("db"), MemoryConnection("db@monday")]
    return commands


def test_rolling_an_attached_volume_back(attached: CommandLine) -> None:
    said = attached.fail("snapshot", "rollback", "db@monday")
    end = "detach it before rolling it back to 'db@monday', or end that with --fence\n"
    assert said == f"nbdstore: volume 'db' {WHO}{end}"
    attached.run("snapshot", "rollback", "db@monday", "--fence")


def test_deleting_an_attached_volume(attached: CommandLine) -> None:
    said = attached.fail("volume", "delete", "db", "--snapshots")
    assert said.endswith("detach it before deleting it, or end that with --fence\n")


def test_shrinking_an_attached_volume_has_no_other_way(attached: CommandLine) -> None:
    said = attached.fail("volume", "resize", "db", "1M", "--shrink")
    assert said.endswith("detach it before shrinking it\n")


def test_deleting_an_attached_snapshot(attached: CommandLine) -> None:
    said = attached.fail("snapshot", "delete", "db@monday")
    assert said.startswith(f"nbdstore: snapshot 'db@monday' {WHO}detach it before deleting it, or ")
    assert "'nbdstore disconnect db@monday'" in said


def test_deleting_a_volume_whose_snapshot_is_attached(attached: CommandLine) -> None:
    said = attached.fail("volume", "delete", "db", "--snapshots", "--fence")
    assert said.startswith(f"nbdstore: snapshot 'db@monday' {WHO}detach it before deleting its vol")
    attached.run("disconnect", "db@monday")
    attached.run("volume", "delete", "db", "--snapshots", "--fence")


def test_restoring_a_volume_whose_name_is_taken(either: CommandLine) -> None:
    either.run("volume", "create", "db", "--size", "1G")
    either.run("volume", "delete", "db")
    either.run("volume", "create", "db", "--size", "2G")
    said = either.fail("trash", "restore", "db")
    assert said.endswith("exists already: give the one in the trash another name, with --as\n")
    assert "exists already" in either.fail("trash", "restore", "db", "--as", "db")
    assert either.run("trash", "restore", "db", "--as", "old") == "restored volume old, 1 GiB\n"


@pytest.mark.parametrize(
    "command",
    [("export", "db@monday", "-"), ("volume", "show", "db@monday"), ("flatten", "db@monday")],
    ids=" ".join,
)
def test_a_snapshot_where_a_volume_is_wanted(either: CommandLine, command: tuple[str, ...]) -> None:
    either.run("volume", "create", "db", "--size", "1G")
    either.run("snapshot", "create", "db@monday")
    said = either.fail(*command)
    assert said.startswith("nbdstore: 'db@monday' is a snapshot, where a volume is wanted: ")


def test_a_volume_that_is_in_the_trash(either: CommandLine) -> None:
    either.run("volume", "create", "db", "--size", "1G")
    either.run("volume", "delete", "db")
    said = either.fail("volume", "delete", "db", "--now")
    assert "'nbdstore trash restore db'" in said and "'nbdstore trash empty db'" in said
