"""``nbdstore scrub``, ``operation`` and ``events``."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable

import click
import pytest

from nbdstore.commands import parameters
from nbdstore.control.model import OperationInfo
from nbdstore.store.layout import slots_of
from tests.cli.conftest import BLOCK, CommandLine, HeldPool
from tests.cli.test_serve import NBDSTORE, TIMEOUT_S, Serving, serving

__all__ = ["serving"]

MIB = 1 << 20


def fill(commands: CommandLine, name: str, n_bytes: int) -> None:
    path = commands.directory.with_name(f"{name}.img")
    path.write_bytes(b"x" * n_bytes)
    commands.run("import", path, name)


class TestScrub:
    def test_all_is_well(self, either: CommandLine) -> None:
        fill(either, "a", 3 * MIB)
        fill(either, "b", MIB)
        assert either.run("scrub") == "scrubbed 2 volumes, 4 MiB read: all is well\n"
        assert either.run("scrub", "b") == "scrubbed 1 volume, 1 MiB read: all is well\n"
        info = either.json("scrub", "a", "--rate", "1G")
        assert (info["state"], info["result"]["bytes"]) == ("done", 3 * MIB)
        shown = either.run("volume", "show", "a")
        assert "scrubbed" in shown
        assert "never" not in shown

    def test_damage(self, commands: CommandLine, hold: Callable[[CommandLine], HeldPool]) -> None:
        fill(commands, "a", 3 * MIB)
        held = hold(commands)
        volume = held.pool.volumes["a"]
        held.run(volume.load(0, 3))
        slot = int(slots_of(volume.map.locations(2, 3))[0])
        with (commands.directory / "data").open("r+b") as data:
            data.seek(slot * BLOCK)
            data.write(b"damage")
        said = commands.run("scrub", status=1)
        assert f"damage: volume a at byte {2 * BLOCK} (slot {slot}" in said
        assert "3 MiB read: 1 damaged block" in said
        assert commands.json("volume", "list")[0]["scrub_damaged"] == 1
        assert "1 damaged block" in commands.run("volume", "show", "a")
        assert "damage met 1 time: run" in commands.run("pool", "show")
        commands.run("scrub", status=1)  # the same block again
        assert "damage met 2 times: run" in commands.run("pool", "show")

    def test_mistakes(self, either: CommandLine) -> None:
        assert "no volume 'x'" in either.fail("scrub", "x")
        assert "give at least" in either.fail("scrub", "--rate", "1K", status=2)

    def test_nobody_to_leave_it_to(self, commands: CommandLine) -> None:
        fill(commands, "a", MIB)
        assert "none is running" in commands.fail("scrub", "--detach", status=2)

    def test_in_the_background(
        self, commands: CommandLine, hold: Callable[[CommandLine], HeldPool]
    ) -> None:
        fill(commands, "a", 16 * MIB)
        hold(commands)
        assert "no operation is running" in commands.run("operation", "list")
        info = commands.json("scrub", "--detach", "--rate", "1M")
        assert info["state"] == "running"
        assert info["id"] in commands.run("operation", "list")
        assert "scrub is running" not in commands.run("operation", "show", info["id"])
        assert f"scrub {info['id']} is running" in commands.fail("scrub")
        assert commands.json("operation", "cancel", info["id"])["state"] == "cancelled"
        assert "state      cancelled" in commands.run("operation", "show", info["id"])
        assert "no operation 'x'" in commands.fail("operation", "show", "x")

    def test_an_interruption_stops_it_for_the_next_to_go_on(
        self, commands: CommandLine, hold: Callable[[CommandLine], HeldPool]
    ) -> None:
        fill(commands, "a", 16 * MIB)
        held = hold(commands)
        process = subprocess.Popen(
            [*NBDSTORE, "--pool", str(commands.directory), "scrub", "--rate", "2M"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not any(info.done for info in running_of(held)):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == -signal.SIGINT
        assert "the next scrub goes on from here" in said
        assert commands.json("scrub", "--rate", "1G")["result"]["bytes"] < 16 * MIB

    def test_an_interruption_without_a_server(self, commands: CommandLine) -> None:
        fill(commands, "a", 16 * MIB)
        process = subprocess.Popen(
            [*NBDSTORE, "--pool", str(commands.directory), "--debug", "scrub", "--rate", "1M"],
            stderr=subprocess.PIPE,
            text=True,
        )
        lock = commands.directory / "lock"
        while lock.read_text().strip() != str(process.pid):  # it has the pool
            assert process.poll() is None
        # Somewhere between opening the pool and the scrub's first step: it must end either way.
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == -signal.SIGINT
        assert commands.run("scrub", "--rate", "1G").endswith("all is well\n")


def running_of(held: HeldPool) -> list[OperationInfo]:
    """The operations of a held pool, asked on its loop."""

    async def ask() -> list[OperationInfo]:
        return held.operations.running.list()

    found: list[OperationInfo] = held.run(ask())
    return found


class TestEvents:
    def test_follow(self, commands: CommandLine, hold: Callable[[CommandLine], HeldPool]) -> None:
        held = hold(commands)
        process = subprocess.Popen(
            [*NBDSTORE, "--pool", str(commands.directory), "events", "--json"],
            stdout=subprocess.PIPE,
            text=True,
        )
        while not held.operations.events._listeners:
            assert process.poll() is None
        commands.run("volume", "create", "db", "--size", "1M")
        assert process.stdout is not None
        event = json.loads(process.stdout.readline())
        assert (event["kind"], event["subject"]) == ("volume.created", "db")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == -signal.SIGINT

    def test_what_there_is_to_tell_is_told_in_a_line(
        self, commands: CommandLine, hold: Callable[[CommandLine], HeldPool]
    ) -> None:
        held = hold(commands)
        process = subprocess.Popen(
            [*NBDSTORE, "--pool", str(commands.directory), "events"],
            stdout=subprocess.PIPE,
            text=True,
        )
        while not held.operations.events._listeners:
            assert process.poll() is None
        commands.run("volume", "create", "db", "--size", "1M")
        commands.run("flatten", "db")
        assert process.stdout is not None
        lines = [process.stdout.readline().split(maxsplit=3) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=TIMEOUT_S)
        assert [line[1] for line in lines] == [
            "volume.created",
            "operation.started",
            "operation.ended",
        ]
        assert lines[0][2:] == ["db", "size=1 MiB\n"]
        assert lines[2][3] == "state=done\n"  # and no result that is empty, nor an error of None

    def test_nothing_happens_to_a_pool_that_nobody_serves(self, commands: CommandLine) -> None:
        assert "nobody serves the pool" in commands.fail("events")


def test_a_server_scrubs_by_itself(serving: Serving) -> None:
    serving.ready("--listen", "127.0.0.1:0", "--demo")
    serving.end(signal.SIGTERM)
    serving.forget()
    serving.ready("--listen", "127.0.0.1:0", "--scrub-every", "0.000001s")
    while not serving.client.operations():
        pass
    (info,) = serving.client.operations()
    info = serving.client.operation(info.id, wait_s=TIMEOUT_S)
    assert (info.kind, info.state) == ("scrub", "done")
    assert serving.client.volume("demo").scrubbed is not None
    assert serving.end(signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("text", "seconds"), [("7d", 604800), ("1.5h", 5400), ("30M", 1800), ("90s", 90)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parameters.duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "0s", "1w", "nand", "infd", "1e9d"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(click.BadParameter, match="7d, 12h"):
        parameters.duration_s(text)
