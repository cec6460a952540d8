"""Bad input: what is said, with which exit status; never a traceback."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from nbdstore import cli as cli_module
from nbdstore.cli import cli
from tests.cli.conftest import CommandLine

USAGE = [
    ("volumes", "no such command 'volumes'. Did you mean 'volume'?"),
    ("volume creat", "no such command 'creat'"),
    ("volume create", "missing argument 'NAME' (see 'nbdstore volume create --help')"),
    ("volume create x", "missing option '--size'"),
    ("volume create x --size", "option '--size' requires an argument"),
    ("volume create x --size ten", "'ten' is not a size: write it as 10G"),
    ("volume create x --size 10GB", "units are powers of 1024 and have no B"),
    ("volume create x --size -1", "'-1' is not a size"),
    ("volume create x --size 0", "volume size 0: must be above 0"),
    ("volume create x --size 1000", "must be a multiple of 512 bytes; the next one is 1024"),
    ("volume create x --size 7E", "the largest is"),
    ("volume create a/b --size 1G", "volume name 'a/b': use 1 to 255 letters"),
    ("volume create ../x --size 1G", "volume name '../x'"),
    ("volume create .x --size 1G", "beginning with a letter or digit"),
    ("volume create db@s --size 1G", "volume name 'db@s'"),
    (f"volume create {'n' * 256} --size 1G", "use 1 to 255 letters"),
    ("volume create x --size 1G --sise 2G", "no such option '--sise'"),
    ("volume list --pool /tmp", "--pool goes before the command: nbdstore --pool ..."),
    ("volume list extra", "got unexpected extra argument (extra)"),
    ("volume allow x a --anyone", "give certificate names or --anyone, not both"),
    ("volume resize x", "missing argument 'SIZE'"),
    ("pool grow 1K", "capacity 1 KiB"),
    ("pool create --block-size 3K", "block size 3 KiB: choose 4K, 8K"),
    ("serve --tls-cert x.pem", "--tls-cert wants --tls optional or --tls required"),
    ("serve --tls required", "--tls-cert is missing"),
    ("serve --tls required --tls-cert c --tls-key k --tls-verify-client", "--tls-ca is missing"),
    ("serve --tls required --tls-cert c --tls-key k --tls-ca a", "give --tls-verify-client, too"),
    ("serve --tls maybe", "'maybe' is not one of 'off', 'optional', 'required'"),
    ("serve --stdin --listen :10809", "--stdin serves one client, --listen many"),
    ("serve --listen localhost:http", "'http' in the address 'localhost:http' is not a port"),
    ("serve --listen unix:", "is not a port"),
    ("serve --listen ::1:10809", "write IPv6 as [ADDRESS]:PORT"),
    ("serve --control 10810", "'10810' is not HOST:PORT, such as 127.0.0.1:10810"),
    ("serve --control localhost:99999", "is not HOST:PORT"),
    ("serve --control localhost:10810", "--control wants --control-token-file"),
    ("serve --control-token-file t", "which is not given"),
    ("serve --control-tls-cert c", "--control-tls-cert and --control-tls-key belong together"),
    ("serve --control-tls-cert c --control-tls-key k", "which is not given"),
    ("serve --max-connections 0", "0 is not in the range x>=1"),
    ("serve --client-memory 63M", "--client-memory: give at least 64M"),
    ("serve --stall-timeout -1", "-1.0 is not in the range x>=0"),
    ("serve --full-timeout x", "'x' is not a valid float"),
    ("serve --log-level loud", "'loud' is not one of"),
    ("serve --stdin", "standard input (--stdin) is not a socket"),
    ("--server http:// volume list", "'http://' is not a server's address"),
    ("--server unix:/x serve", "works on a pool of this machine: give --pool, not --server"),
    ("--server unix:/x check", "works on a pool of this machine"),
    ("--server unix:/x pool create", "works on a pool of this machine"),
    ("--server unix:/x --token-file /no/such volume list", "cannot read the token file '/no/such'"),
    ("import /etc/passwd x --size 512", "'/etc/passwd' has"),
    ("import /etc x", "'/etc' is a directory"),
    ("import - x", "a pipe does not tell how long it is: give --size"),
    ("completion tcsh", "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
    ("capacity --containers -1", "-1 is not in the range"),
]

FAILURES = [
    ("volume show nope", "there is no volume 'nope': 'nbdstore volume list' shows what is"),
    ("volume resize nope 1G", "there is no volume 'nope'"),
    ("volume rename nope x", "there is no volume 'nope'"),
    ("volume delete nope", "there is no volume 'nope'"),
    ("volume allow nope x", "there is no volume 'nope'"),
    ("export nope out.img", "there is no volume 'nope'"),
    ("import /no/such/file x", "cannot read '/no/such/file': No such file or directory"),
    ("pool create", "holds a pool already"),
    ("--pool /proc/nope pool show", "/proc/nope holds no pool: make one with"),
    ("--pool /etc/passwd pool show", "/etc/passwd"),
    ("--server unix:/no/such.sock volume list", "no server answers at unix:/no/such.sock"),
    ("--server http://127.0.0.1:1 volume list", "no server answers at http://127.0.0.1:1"),
]


@pytest.mark.parametrize(("words", "message"), USAGE, ids=[case[0][:60] for case in USAGE])
def test_wrong_usage(commands: CommandLine, words: str, message: str) -> None:
    assert message in commands.fail(*words.split(), status=2)


@pytest.mark.parametrize(("words", "message"), FAILURES, ids=[case[0] for case in FAILURES])
def test_failures(
    commands: CommandLine, words: str, message: str, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in commands.fail(*words.split(), status=1)
    assert not (tmp_path / "out.img").exists()


class TestBugs:
    @pytest.fixture(autouse=True)
    def buggy(self, monkeypatch: Any) -> None:
        @click.command()
        def buggy() -> None:
            raise KeyError("what nobody\nforesaw")

        monkeypatch.setitem(cli.commands, "buggy", buggy)

    def test_a_bug_is_one_line_too(self) -> None:
        result = CliRunner().invoke(cli, ["buggy"])
        assert result.exit_code == 1
        assert re.fullmatch(r"nbdstore: bug: KeyError: .*foresaw.*--debug.*\n", result.stderr)

    def test_debug_shows_the_traceback(self) -> None:
        result = CliRunner().invoke(cli, ["--debug", "buggy"])
        assert isinstance(result.exception, KeyError)


@pytest.mark.parametrize("package", ["aiohttp", "numpy", "uvloop"])
def test_a_package_that_cannot_be_loaded(tmp_path: Path, package: str) -> None:
    """Whenever that is: the HTTP server comes last, when NBD is served already."""
    (tmp_path / f"{package}.py").write_text("raise ImportError('libx.so: no such file')\n")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "nbdstore",
            "--pool",
            "pool",
            "serve",
            "--create",
            "--log-level",
            "warning",
            "--listen",
            f"unix:{tmp_path}/nbd.sock",
        ],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    said = "a package that nbdstore needs cannot be loaded: libx.so: no such file: install nbdstore"
    assert done.stderr == f"nbdstore: {said} again, with what it requires\n"


class TestSignals:
    """The ends that shells look at; in processes of their own, since they are the end."""

    def run(self, code: str, **options: Any) -> subprocess.CompletedProcess[str]:
        program = (
            f"import click, os, signal, sys\nfrom nbdstore.cli import cli, main\n{code}\nmain()"
        )
        return subprocess.run(
            [sys.executable, "-c", program, "buggy"],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
            **options,
        )

    def test_ctrl_c_is_quiet(self) -> None:
        done = self.run(
            "@cli.command('buggy')\n"
            "def buggy():\n    print('some output')\n    os.kill(os.getpid(), signal.SIGINT)\n"
            "    signal.pause()\n",
            stdout=subprocess.DEVNULL,
        )
        assert (done.returncode, done.stderr) == (-signal.SIGINT, "")

    def test_a_broken_pipe_is_quiet(self) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        done = self.run(
            "@cli.command('buggy')\ndef buggy():\n    print('nobody reads this')\n",
            stdout=writing,
        )
        os.close(writing)
        assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")

    def test_no_standard_output_at_all(self) -> None:
        done = self.run(
            "os.close(1)\nsys.stdout = None\n"
            "@cli.command('buggy')\ndef buggy():\n    click.echo('nobody reads this')\n",
        )
        assert (done.returncode, done.stderr) == (0, "")


def raising(error: Exception) -> Any:
    def fail(*_: object) -> None:
        raise error

    return fail


class TestDefaults:
    def test_the_pool_of_root(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(cli_module.os, "geteuid", lambda: 0)
        assert cli_module._default_pool() == Path("/var/lib/nbdstore")

    def test_the_pool_of_others(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(cli_module.os, "geteuid", lambda: 1000)
        monkeypatch.setenv("HOME", "/home/ada")
        assert cli_module._default_pool() == Path("/home/ada/.local/share/nbdstore")

    def test_a_user_without_a_home(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(cli_module.os, "geteuid", lambda: 4242)
        monkeypatch.setattr(Path, "home", raising(RuntimeError("no home")))
        result = CliRunner().invoke(cli, ["pool", "show"])
        assert (result.exit_code, result.stdout) == (2, "")
        assert "nobody knows your home directory: say where with --pool" in result.stderr

    def test_the_environment(self, commands: CommandLine) -> None:
        result = CliRunner().invoke(
            cli, ["pool", "show", "--json"], env={"NBDSTORE_POOL": str(commands.directory)}
        )
        assert str(commands.directory) in result.stdout
        for name in ("NBDSTORE_SERVER", "BLOCK_STORAGE"):
            result = CliRunner().invoke(cli, ["pool", "show"], env={name: "unix:/no/such.sock"})
            assert "no server answers at unix:/no/such.sock" in result.stderr
