"""The way to the pool: through who holds it, by opening it, and what happens in between."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nbdstore import unix_socket
from nbdstore.cli import cli
from nbdstore.commands import session
from nbdstore.commands.session import read_token
from nbdstore.control import SOCKET_NAME
from nbdstore.errors import InvalidArgument
from nbdstore.store.local_host import LocalDisk
from tests.cli.conftest import CommandLine, HeldPool
from tests.control.conftest import TOKEN, Answering

Hold = Callable[[CommandLine], HeldPool]


def test_the_socket_of_a_killed_server_is_in_nobody_s_way(
    commands: CommandLine, hold: Hold
) -> None:
    path = commands.directory / SOCKET_NAME
    unix_socket.listen(path).close()
    assert path.exists()
    commands.run("volume", "create", "db", "--size", "1G")
    hold(commands)
    assert commands.json("volume", "list")[0]["name"] == "db"


def test_a_pool_at_a_path_too_long_for_a_socket(tmp_path: Path, hold: Hold) -> None:
    commands = CommandLine(tmp_path / ("d" * 120) / ("e" * 120))
    commands.run("pool", "create", "--capacity", "1G", "--journal-size", "1M")
    hold(commands)
    commands.run("volume", "create", "db", "--size", "1G")
    assert commands.json("volume", "list")[0]["name"] == "db"


class TestLockedPools:
    def test_one_that_nobody_answers_for(self, commands: CommandLine, monkeypatch: Any) -> None:
        monkeypatch.setattr(session, "LOCK_PATIENCE_S", 0.0)
        disk = LocalDisk(commands.directory)
        disk.lock()
        try:
            message = commands.fail("volume", "list")
        finally:
            disk.close()
        assert str(commands.directory) in message
        assert "nobody answers there" in message

    def test_a_command_waits_for_one_that_is_let_go(
        self, commands: CommandLine, monkeypatch: Any
    ) -> None:
        """As when two commands run at once: the second finds the pool open, and tries again."""
        disk = LocalDisk(commands.directory)
        disk.lock()
        monkeypatch.setattr(session.time, "sleep", lambda _s: disk.close())
        assert commands.json("volume", "list") == []

    def test_a_command_turns_to_a_server_that_starts_meanwhile(
        self, commands: CommandLine, hold: Hold, monkeypatch: Any
    ) -> None:
        disk = LocalDisk(commands.directory)
        disk.lock()

        def start_server(_seconds: float) -> None:
            disk.close()
            hold(commands)

        monkeypatch.setattr(session.time, "sleep", start_server)
        assert commands.json("volume", "list") == []


class TestServersElsewhere:
    def invoke(self, answering: Answering, *words: str) -> Any:
        args = ["--server", answering.http_url, *words]
        return CliRunner().invoke(cli, args)

    def test_with_the_token(self, answering: Answering, tmp_path: Path) -> None:
        token_file = tmp_path / "token"
        token_file.write_text(f"{TOKEN}\n")
        result = self.invoke(
            answering, "--token-file", str(token_file), "volume", "create", "db", "--size", "1M"
        )
        assert result.stdout == "created volume db, 1 MiB\n"
        assert list(answering.bench.pool.volumes) == ["db"]

    def test_without_the_token(self, answering: Answering) -> None:
        result = self.invoke(answering, "volume", "list")
        assert result.exit_code == 1
        assert "token for this control address is missing: give its file with" in result.stderr

    def test_the_server_wins_over_the_pool(self, answering: Answering, tmp_path: Path) -> None:
        args = ["--pool", str(tmp_path / "none"), "--server", answering.unix_url]
        result = CliRunner().invoke(cli, [*args, "pool", "show", "--json"])
        assert json.loads(result.stdout)["directory"] == "/memory"


@pytest.mark.parametrize("content", ["", "\n", "two\nlines\n", "two words", "gr\u00fcn"])
def test_token_files_that_make_no_sense(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    with pytest.raises(InvalidArgument, match="token file"):
        read_token(path)


class TestCompletion:
    def complete(self, commands: CommandLine, *words: str) -> list[str]:
        line = ["nbdstore", "--pool", str(commands.directory), *words]
        env = {
            "_NBDSTORE_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(line),
            "COMP_CWORD": str(len(line) - 1),
        }
        result = CliRunner().invoke(cli, [], env=env)
        return [line.partition(",")[2] for line in result.stdout.split()]

    def test_commands(self, commands: CommandLine) -> None:
        assert self.complete(commands, "vol") == ["volume"]

    def test_volume_names(self, either: CommandLine) -> None:
        for name in ("db", "data", "web"):
            either.run("volume", "create", name, "--size", "1M")
        assert self.complete(either, "volume", "delete", "d") == ["data", "db"]
        assert self.complete(either, "export", "w") == ["web"]

    def test_nothing_rather_than_an_error(self, tmp_path: Path) -> None:
        assert self.complete(CommandLine(tmp_path / "none"), "volume", "show", "d") == []

    def test_a_locked_pool_does_not_keep_the_shell_waiting(self, commands: CommandLine) -> None:
        disk = LocalDisk(commands.directory)
        disk.lock()
        assert self.complete(commands, "volume", "show", "d") == []
        disk.close()

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_every_shell_has_its_script(self, shell: str) -> None:
        script = CliRunner().invoke(cli, ["completion", shell]).stdout
        assert "_NBDSTORE_COMPLETE" in script
        assert "nbdstore" in script


def test_commands_at_once_wait_for_each_other(commands: CommandLine) -> None:
    """Whoever finds the pool open by another command tries again; none fails."""
    words = [sys.executable, "-m", "nbdstore", "--pool", str(commands.directory)]
    children = [
        subprocess.Popen([*words, "volume", "create", f"v{n}", "--size", "1M"]) for n in range(3)
    ]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    assert len(commands.json("volume", "list")) == 3
