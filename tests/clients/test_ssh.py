"""Backups over ssh into another pool: whole, and when the connection breaks in the middle."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdstore.control.model import OperationInfo
from nbdstore.store import Pool
from tests.children import Children
from tests.clients.secure_shell import SecureShell
from tests.control.real_pool import Served
from tests.store.pools import assert_clean
from tests.store.workload import joined

pytestmark = pytest.mark.requires("sshd", "ssh", "ssh-keygen")
README = (Path(__file__).parents[2] / "README.md").read_text()
MIB = 1 << 20
SIZE = 24 * MIB
DEADLINE_S = 60.0


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Served]:
    """The pool behind ssh, which a server holds."""
    directory = tmp_path / "there"
    directory.mkdir()
    pool = Served(directory)
    yield pool
    pool.close()


class Here:
    """The pool that is sent from, and commands beside it."""

    def __init__(self, children: Children, directory: Path, shell: SecureShell) -> None:
        self._children = children
        self._env = {"NBDSTORE_POOL": str(directory), **shell.env}

    def run(self, command: str) -> str:
        """Run a shell command that must succeed; one that fails in a pipe fails all."""
        return self._children.run("bash", "-o", "pipefail", "-c", command, env=self._env)

    def send_half(self, command: str, stream: bytes) -> subprocess.Popen[bytes]:
        """Start a command, give it the first half of a stream, and leave its input open."""
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **self._env},
        )
        assert process.stdin is not None
        process.stdin.write(stream[: len(stream) // 2])
        return process


@pytest.fixture
def shell(children: Children, there: Served) -> SecureShell:
    return SecureShell(children, there.directory)


@pytest.fixture
async def here(children: Children, shell: SecureShell, tmp_path: Path) -> Here:
    """A pool with ``db@monday``, and ``db@tuesday`` that has a little more."""
    directory = tmp_path / "here"
    Pool.create(directory, capacity=1 << 30, journal_size=1 << 20)
    pool = await Pool.open(directory)
    volume = await pool.create_volume("db", SIZE)
    for offset in range(0, SIZE, MIB):
        await volume.write(offset, os.urandom(MIB))
    await pool.create_snapshots([(volume, "monday")])
    await volume.write(3 * MIB, os.urandom(MIB))
    await pool.create_snapshots([(volume, "tuesday")])
    await pool.close()
    return Here(children, directory, shell)


def documented() -> Iterator[tuple[str, str]]:
    """Yield the README's commands over ssh, and what they print."""
    (block,) = re.findall(r"^```console ssh\n(.*?)^```", README, re.M | re.S)
    yield from re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.M)


def content(pool: Served, name: str) -> bytes:
    return joined(pool.run(pool.pool.snapshots[name].read(0, SIZE)))


def half_received(pool: Served) -> OperationInfo:
    """Return the receive that runs, once it has written something."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        for info in pool.client.operations():
            if info.kind == "receive" and info.is_running and info.done:
                return info
        assert time.monotonic() < deadline, "nothing is received"


async def test_what_the_readme_says(here: Here, there: Served, tmp_path: Path) -> None:
    commands = dict(documented())
    assert len(commands) == 3
    full, incremental, resumed = commands
    for command in (full, incremental):
        found = here.run(command)
        for line in commands[command].splitlines():
            assert re.search(re.escape(line).replace(r"\.\.\.", ".*"), found), found
    assert there.client.volume("db").snapshots == 2
    # The last one goes on with what broke off.
    there.client.delete_volume("db", snapshots=True, now=True)
    stream = tmp_path / "stream"
    here.run(f"nbdstore send db@tuesday > {stream}")
    half = stream.stat().st_size // 2
    here.run(f"! head -c {half} {stream} | ssh backup nbdstore receive db")
    assert "received" in here.run(resumed)
    assert list(there.pool.snapshots) == ["db@tuesday"]


@pytest.mark.parametrize("who", ["ssh", "sshd"])
async def test_a_connection_that_breaks_leaves_what_came(
    here: Here, there: Served, shell: SecureShell, tmp_path: Path, who: str
) -> None:
    stream = tmp_path / "stream"
    here.run(f"nbdstore send db@tuesday > {stream}")
    sending = here.send_half("ssh backup nbdstore receive db", stream.read_bytes())
    running = half_received(there)
    if who == "ssh":
        sending.kill()
    else:
        shell.cut_connections()
    assert sending.wait(DEADLINE_S) != 0
    assert sending.stdin is not None
    sending.stdin.close()
    assert there.client.operation(running.id, wait_s=60).state == "failed"
    half = there.client.backups.receiving("db")
    assert 0 < half.position < SIZE
    assert not half.running
    token = here.run("ssh backup nbdstore receive --resume-token db").strip()
    assert token == half.token
    here.run(f"nbdstore send --resume {token} | ssh backup nbdstore receive db")
    assert content(there, "db@tuesday") == await _content_of(tmp_path / "here", "db@tuesday")
    await assert_clean(tmp_path / "here")


async def _content_of(directory: Path, name: str) -> bytes:
    pool = await Pool.open(directory)
    try:
        return joined(await pool.snapshots[name].read(0, SIZE))
    finally:
        await pool.close()
