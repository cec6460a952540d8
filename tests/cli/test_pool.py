"""``nbdstore pool`` and ``nbdstore capacity``, with and without a server that holds the pool."""

from __future__ import annotations

from pathlib import Path

from nbdstore.commands.capacity import format_duration
from tests.cli.conftest import CommandLine


class TestCreate:
    def test_a_pool(self, tmp_path: Path) -> None:
        commands = CommandLine(tmp_path / "new" / "pool")
        text = commands.run(
            *("pool", "create", "--capacity", "1G", "--block-size", "16K", "--journal-size", "2M")
        )
        assert text == f"created pool {commands.directory}: 1 GiB in blocks of 16 KiB\n"
        assert commands.json("pool", "show")["journal"]["size"] == 2 << 20

    def test_in_a_directory_that_holds_other_things(self, tmp_path: Path) -> None:
        (tmp_path / "homework").touch()
        message = CommandLine(tmp_path).fail("pool", "create", status=2)
        assert "is not empty (it holds 'homework')" in message

    def test_where_nobody_may_write(self) -> None:
        message = CommandLine(Path("/proc/pool")).fail("pool", "create")
        assert "cannot make /proc/pool" in message


class TestShow:
    def test_for_people(self, either: CommandLine) -> None:
        either.run("volume", "create", "db", "--size", "10G")
        lines = dict(line.split(None, 1) for line in either.run("pool", "show").splitlines())
        assert lines["pool"] == str(either.directory)
        assert lines["capacity"] == "1 GiB"
        assert lines["volumes"] == "1, 10 GiB provisioned, 0 B mapped"
        assert lines["state"] == "ok"

    def test_for_programs(self, either: CommandLine) -> None:
        shown = either.json("pool", "show")
        assert (shown["capacity"], shown["block_size"], shown["volumes"]) == (1 << 30, 4096, 0)
        assert shown["server"] is None


class TestGrow:
    def test_takes_effect_at_once(self, either: CommandLine) -> None:
        assert ": 2 GiB, " in either.run("pool", "grow", "2G")
        assert either.json("pool", "show")["capacity"] == 2 << 30

    def test_never_shrinks(self, either: CommandLine) -> None:
        assert "a pool can only grow" in either.fail("pool", "grow", "512M", status=2)


class TestCapacity:
    def test_the_model(self, either: CommandLine) -> None:
        either.run("volume", "create", "db", "--size", "3G")
        report = either.json("capacity", "--containers", "4", "--container-size", "1G")
        assert report["block_capacity"] == report["n_blocks"] * report["block_size"] == 1 << 30
        assert report["container_capacity"] == 4 << 30
        assert report["integrated_capacity"] == 5 << 30
        assert report["overcommit"] == 3.0
        assert report["exhausted_in_s"] is None

    def test_for_people(self, either: CommandLine) -> None:
        text = either.run("capacity")
        assert "block storage C_b  1 GiB       262144 x 4 KiB\n" in text
        assert "runs out           unknown: a running server knows" in text

    def test_what_is_left_is_what_clients_may_write(self, either: CommandLine) -> None:
        pool = either.json("pool", "show")
        left = either.json("capacity")["free"]
        # Opening the pool in between moves a few blocks of its own.
        assert abs(left - (pool["free"] - pool["reserved"])) < 64 * 4096

    def test_durations(self) -> None:
        assert [format_duration(s) for s in (5, 60, 3 * 3600, 36 * 3600, 864000)] == [
            "5 seconds",
            "1 minute",
            "3 hours",
            "2 days",
            "10 days",
        ]
