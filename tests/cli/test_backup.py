"""``diff``, ``send``, ``receive``, ``stream show`` and ``du``, with and without a server."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nbdstore.cli import cli
from nbdstore.commands.local import LocalService
from nbdstore.store import Pool
from tests.cli.conftest import CommandLine, HeldPool

MIB = 1 << 20
BLOCK = 4096


class Result:
    """What a command did."""

    def __init__(self, result: Any) -> None:
        self.status = result.exit_code
        self.stdout: bytes = result.stdout_bytes
        self.stderr: str = result.stderr


def run(
    commands: CommandLine, *args: object, stdin: bytes | io.BufferedReader | None = None
) -> Result:
    """Run a command whose output is not text."""
    words = ["--pool", str(commands.directory), *map(str, args)]
    return Result(CliRunner().invoke(cli, words, input=stdin))


class LateStream(io.RawIOBase):
    """A stream whose sender does something else before the first byte of it."""

    def __init__(self, before: Callable[[], bytes]) -> None:
        self._before = before
        self._stream: io.BytesIO | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._stream is None:
            self._stream = io.BytesIO(self._before())
        return self._stream.readinto(buffer)


@pytest.fixture
def db(either: CommandLine, tmp_path: Path) -> CommandLine:
    """A volume db of 8 MiB with snapshots a and b, of which b has 3 blocks changed."""
    image = tmp_path / "image"
    image.write_bytes(os.urandom(2 * MIB))
    either.run("import", image, "db", "--size", "8M")
    either.run("snapshot", "create", "db@a")
    with image.open("r+b") as file:
        file.seek(BLOCK)
        file.write(os.urandom(BLOCK) + bytes(BLOCK))
        file.seek(MIB)
        file.write(os.urandom(512))
    either.run("import", image, "db", "--overwrite")
    either.run("snapshot", "create", "db@b")
    return either


@pytest.fixture
def other(tmp_path: Path) -> CommandLine:
    directory = tmp_path / "other"
    Pool.create(directory, capacity=1 << 30, journal_size=1 << 20)
    return CommandLine(directory)


def exported(commands: CommandLine, name: str, tmp_path: Path) -> bytes:
    path = tmp_path / "exported"
    commands.run("export", name, path)
    return path.read_bytes()


class TestDiff:
    def test_between_images(self, db: CommandLine) -> None:
        changed = db.json("diff", "db@a", "db@b")
        assert changed[-1] == {"offset": MIB, "length": BLOCK} or len(changed) == 1
        assert db.json("diff", "db@b", "db") == []
        assert db.json("diff", "db@b", "db@b") == []
        assert db.json("diff", "db@a") == [{"offset": 0, "length": 2 * MIB}]

    def test_for_people(self, db: CommandLine) -> None:
        found = run(db, "diff", "db@a")
        assert found.stdout.decode().split() == ["OFFSET", "LENGTH", "0", str(2 * MIB)]
        assert found.stderr == "nbdstore: 1 extent, 2 MiB of 8 MiB held\n"
        found = run(db, "diff", "db@b", "db")
        assert (found.stdout, found.stderr) == (b"", "nbdstore: 0 extents, 0 B of 8 MiB changed\n")

    def test_says_that_sizes_differ(self, db: CommandLine) -> None:
        db.run("volume", "resize", "db", "9M")
        text = run(db, "diff", "db@b", "db").stderr
        assert "db is 1 MiB larger than db@b: 9 MiB, not 8 MiB" in text

    def test_of_what_is_not_there(self, db: CommandLine) -> None:
        assert "no snapshot 'db@x'" in db.fail("diff", "db@x", "db")
        assert "no volume 'x'" in db.fail("diff", "db@a", "x")


class TestSendAndReceive:
    def test_everything_and_changes(
        self, db: CommandLine, other: CommandLine, tmp_path: Path
    ) -> None:
        full = run(db, "send", "db@a")
        assert (full.status, full.stderr) == (0, "nbdstore: sent db@a: 2 MiB of data\n")
        text = other.run("receive", "copy", stdin=full.stdout)
        assert text == "received copy@a: 2 MiB of data\n"
        changes = run(db, "send", "db@b", "--since", "db@a")
        assert "sent db@b since db@a: " in changes.stderr
        assert len(changes.stdout) <= len(full.stdout) + 4096
        summary = json.loads(run(other, "receive", "copy", "--json", stdin=changes.stdout).stdout)
        assert summary["snapshot"] == "copy@b"
        assert exported(other, "copy", tmp_path) == exported(db, "db", tmp_path)
        ours, theirs = db.json("snapshot", "list"), other.json("snapshot", "list")
        assert [info["uuid"] for info in ours] == [info["uuid"] for info in theirs]

    def test_a_summary_beside_the_stream(self, db: CommandLine) -> None:
        summary = json.loads(run(db, "send", "db@a", "--json").stderr)
        assert (summary["snapshot"], summary["data"], summary["base"]) == ("a", 2 * MIB, None)

    def test_what_breaks_off_goes_on(
        self, db: CommandLine, other: CommandLine, tmp_path: Path
    ) -> None:
        stream = run(db, "send", "db@a").stdout
        message = other.fail("receive", "copy", stdin=stream[: MIB + MIB // 2])
        assert "cut off" in message
        assert "--resume-token copy" in message
        assert "receiving  db@a, not whole yet: " in other.run("volume", "show", "copy")
        assert "half received, with db@a\n" in other.run("volume", "list")
        token = other.run("receive", "--resume-token", "copy").strip()
        assert other.json("receive", "--resume-token", "copy")["position"] == MIB
        rest = run(db, "send", "--resume", token)
        assert len(rest.stdout) < len(stream) - MIB // 2
        text = other.run("receive", "copy", stdin=rest.stdout)
        assert text == "received copy@a: 1 MiB of data, from 1 MiB on\n"
        db.run("snapshot", "rollback", "db@a")
        assert exported(other, "copy", tmp_path) == exported(db, "db", tmp_path)

    def test_the_sender_may_ask_for_its_token_while_the_receiver_waits(
        self, db: CommandLine, other: CommandLine
    ) -> None:
        """As the shell does that starts all commands of a pipe at once."""
        stream = run(db, "send", "db@a").stdout
        other.fail("receive", "copy", stdin=stream[: MIB + MIB // 2])
        token = other.run("receive", "--resume-token", "copy").strip()
        rest = run(db, "send", "--resume", token).stdout

        def ask() -> bytes:
            with closing(LocalService(other.directory)) as service:
                assert service.backups.receiving("copy").token == token
            return rest

        received = run(other, "receive", "copy", stdin=io.BufferedReader(LateStream(ask)))
        assert received.stdout == b"received copy@a: 1 MiB of data, from 1 MiB on\n"

    def test_giving_up(self, db: CommandLine, other: CommandLine) -> None:
        stream = run(db, "send", "db@a").stdout
        other.fail("receive", "copy", stdin=stream[:-1])
        text = other.run("receive", "--abort", "copy")
        assert text == "gave up what was received into volume copy\n"
        assert other.json("volume", "list") == []
        assert "no volume 'copy'" in other.fail("receive", "--abort", "copy")

    def test_wrong_bytes(self, db: CommandLine, other: CommandLine) -> None:
        stream = bytearray(run(db, "send", "db@a").stdout)
        stream[700] ^= 1
        assert "is damaged: send it again" in other.fail("receive", "copy", stdin=bytes(stream))
        assert other.json("volume", "list") == []
        assert "not a backup stream" in other.fail("receive", "copy", stdin=b"x" * 1000)
        assert "cut off" in other.fail("receive", "copy", stdin=b"")

    def test_another_base(self, db: CommandLine, other: CommandLine) -> None:
        stream = run(db, "send", "db@b", "--since", "db@a").stdout
        assert "builds on db@a: receive that first" in other.fail("receive", "x", stdin=stream)

    def test_into_the_pool_it_comes_from(self, db: CommandLine, tmp_path: Path) -> None:
        db.run("receive", "copy", stdin=run(db, "send", "db@b").stdout)
        assert exported(db, "copy", tmp_path) == exported(db, "db", tmp_path)

    @pytest.mark.parametrize(
        ("args", "says"),
        [
            (["send"], "give a snapshot VOL@B"),
            (["send", "db@a", "--resume", "x"], "give a snapshot VOL@B"),
            (["send", "--resume", "x", "--since", "db@a"], "give a snapshot VOL@B"),
            (["send", "--resume", "x"], "no resume token"),
            (["send", "db"], "make a snapshot"),
            (["receive", "db", "--abort", "--resume-token"], "not both"),
        ],
    )
    def test_wrong_usage(self, db: CommandLine, args: list[str], says: str) -> None:
        assert says in db.fail(*args, status=2)

    def test_what_is_not_there(self, db: CommandLine) -> None:
        assert "no snapshot 'db@x'" in db.fail("send", "db@x")
        assert "not half received" in db.fail("receive", "--resume-token", "db")
        assert "not half received" in db.fail("receive", "--abort", "db")


class TestStreamShow:
    def test_a_whole_one(self, db: CommandLine, tmp_path: Path) -> None:
        path = tmp_path / "stream"
        path.write_bytes(run(db, "send", "db@b", "--since", "db@a").stdout)
        text = db.run("stream", "show", path)
        assert "snapshot   db@b\n" in text
        assert "builds on  db@a (" in text
        assert "verified   all of it is whole\n" in text
        assert db.json("stream", "show", path)["snapshot"] == "b"

    def test_from_a_pipe(self, db: CommandLine) -> None:
        stream = run(db, "send", "db@a").stdout
        assert "full one" in db.run("stream", "show", "-", stdin=stream)

    def test_a_damaged_one(self, db: CommandLine, tmp_path: Path) -> None:
        path = tmp_path / "stream"
        stream = run(db, "send", "db@a").stdout
        path.write_bytes(stream[:-5])
        assert "cut off" in db.fail("stream", "show", path)
        path.write_bytes(stream[:5000] + b"?" + stream[5001:])
        assert "damaged" in db.fail("stream", "show", path)
        assert "cannot read" in db.fail("stream", "show", tmp_path / "nothing")


class TestDu:
    def test_adds_up(self, db: CommandLine) -> None:
        report = db.json("du")
        images = {image["name"]: image for image in report["images"]}
        assert list(images) == ["db", "db@a", "db@b"]
        assert report["data"] == sum(image["own"] for image in images.values())
        assert report["used"] == report["data"] + report["maps"]
        assert report["capacity"] == report["used"] + report["reclaimable"] + report["free"]
        assert images["db@a"]["unique"] > 0

    def test_for_people(self, db: CommandLine) -> None:
        text = db.run("du")
        assert "NAME  PROVISIONED" in text
        assert "capacity     1 GiB\n" in text

    def test_of_an_empty_pool(self, either: CommandLine) -> None:
        assert either.run("du").startswith("capacity ")


def test_a_server_receives_while_another_sends(
    db: CommandLine,
    other: CommandLine,
    hold: Callable[[CommandLine], HeldPool],
    tmp_path: Path,
) -> None:
    hold(other)
    other.run("receive", "copy", stdin=run(db, "send", "db@b").stdout)
    assert exported(other, "copy", tmp_path) == exported(db, "db", tmp_path)
