"""``nbdstore salvage --output``: what comes out, what is told, and the exit status."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdstore.store import Pool
from tests.cli.conftest import CommandLine, HeldPool

MARK = b"find me in the data file, please"
LENGTH = 32 * 1024


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(MARK * (LENGTH // len(MARK)))
    return path


@pytest.fixture
def damaged(commands: CommandLine, image: Path) -> CommandLine:
    """A pool whose volume db has one damaged block, and whose volume web is whole."""
    commands.run("import", image, "db", "--size", "1M")
    path = commands.directory / "data"
    first = path.read_bytes().index(MARK)
    commands.run("import", image, "web")
    with path.open("r+b") as file:
        file.seek(first + 4096)
        file.write(b"FIND")
    return commands


def test_all_volumes_come_out_and_what_is_lost_is_told(
    damaged: CommandLine, image: Path, tmp_path: Path
) -> None:
    text = damaged.run("salvage", "--output", tmp_path / "out", status=1)
    content = image.read_bytes()
    lost = content[:4096] + bytes(4096) + content[8192:]
    assert (tmp_path / "out/db.raw").read_bytes() == lost.ljust(1 << 20, b"\0")
    assert (tmp_path / "out/web.raw").read_bytes() == content
    lines = text.splitlines()
    assert lines[0].startswith("salvaged db: 1 MiB, 28 KiB of data intact, 4 KiB lost: ")
    assert lines[1].startswith("  lost: bytes 4096 to 8192: volume db at byte 4096 (slot ")
    assert lines[2].startswith("salvaged web: 32 KiB, 32 KiB of data intact, nothing lost: ")


def test_snapshots_come_out_beside_their_volumes(
    commands: CommandLine, image: Path, tmp_path: Path
) -> None:
    commands.run("import", image, "db")

    async def change() -> None:
        pool = await Pool.open(commands.directory)
        await pool.create_snapshots([(pool.volumes["db"], "before")])
        await pool.volumes["db"].trim(0, LENGTH)
        await pool.close()

    asyncio.run(change())
    text = commands.run("salvage", "--output", tmp_path / "out")
    assert "salvaged db@before: 32 KiB, 32 KiB of data intact, nothing lost: " in text
    assert (tmp_path / "out/db@before.raw").read_bytes() == image.read_bytes()
    assert (tmp_path / "out/db.raw").read_bytes() == bytes(LENGTH)
    commands.run("salvage", "--output", tmp_path / "one", "db@before")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["db@before.raw"]
    message = commands.fail("salvage", "--output", tmp_path, "db@never")
    assert "there is no snapshot 'db@never'" in message


def test_volumes_in_the_trash_come_out_by_their_ids(
    commands: CommandLine, image: Path, tmp_path: Path
) -> None:
    commands.run("import", image, "db")
    commands.run("volume", "delete", "db")
    commands.run("volume", "create", "db", "--size", "1M")
    text = commands.run("salvage", "--output", tmp_path / "out")
    (name,) = [path.name for path in (tmp_path / "out").iterdir() if path.name != "db.raw"]
    assert name.startswith("db~") and f"salvaged {name.removesuffix('.raw')}: 32 KiB, " in text
    assert (tmp_path / "out" / name).read_bytes() == image.read_bytes()


def test_for_programs(damaged: CommandLine, tmp_path: Path) -> None:
    result = damaged._invoke(("salvage", "--output", str(tmp_path), "--json"), 1, None)
    found = json.loads(result.stdout)
    assert found["complete"] is False
    db, web = found["volumes"]
    assert (db["name"], db["size"], db["intact"], db["lost"]) == ("db", 1 << 20, 28672, 4096)
    assert [(r["start"], r["stop"]) for r in db["ranges"]] == [(4096, 8192)]
    assert "expected checksum" in db["ranges"][0]["reason"]
    assert (web["lost"], web["ranges"]) == (0, [])
    assert Path(web["file"]) == tmp_path / "web.raw"


def test_volumes_that_are_named_come_out_alone(damaged: CommandLine, tmp_path: Path) -> None:
    damaged.run("salvage", "--output", tmp_path / "out", "web")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["web.raw"]
    assert "there is no volume 'none'" in damaged.fail("salvage", "--output", tmp_path, "none")


def test_a_file_that_cannot_be_written_keeps_none_of_the_others(
    commands: CommandLine, image: Path, tmp_path: Path
) -> None:
    for name in ("db", "web"):
        commands.run("import", image, name)
    (tmp_path / "out/db.raw").mkdir(parents=True)
    result = commands._invoke(("salvage", "--output", str(tmp_path / "out"), "--json"), 1, None)
    found = json.loads(result.stdout)
    db, web = found["volumes"]
    assert not found["complete"]
    assert f"'{tmp_path / 'out/db.raw'}'" in db["error"]
    assert web["error"] is None
    assert (tmp_path / "out/web.raw").read_bytes() == image.read_bytes()
    lines = commands.run("salvage", "--output", tmp_path / "out", status=1).splitlines()
    assert lines[0] == f"not salvaged db: {db['error']}"
    assert lines[1].startswith("salvaged web: 32 KiB, 32 KiB of data intact, nothing lost: ")


def test_what_is_in_the_trash_comes_out_last(
    commands: CommandLine, image: Path, tmp_path: Path
) -> None:
    for name in ("a", "z"):
        commands.run("import", image, name)
    commands.run("volume", "delete", "a")
    lines = commands.run("salvage", "--output", tmp_path / "out").splitlines()
    assert [line.partition("~")[0].partition(":")[0] for line in lines] == [
        "salvaged z",
        "salvaged a",
    ]


def test_holes_stay_holes(commands: CommandLine, tmp_path: Path) -> None:
    commands.run("volume", "create", "thin", "--size", "100G")
    commands.run("salvage", "--output", tmp_path / "out")
    info = (tmp_path / "out/thin.raw").stat()
    assert (info.st_size, info.st_blocks) == (100 << 30, 0)


def test_nothing_is_written_to_the_pool(damaged: CommandLine, tmp_path: Path) -> None:
    def state() -> dict[str, tuple[int, bytes]]:
        return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in damaged.directory.iterdir()}

    before = state()
    damaged.run("salvage", "--output", tmp_path / "out", status=1)
    assert state() == before


def test_damage_to_the_journal_is_told(damaged: CommandLine, tmp_path: Path) -> None:
    with (damaged.directory / "journal").open("r+b") as file:
        file.truncate(1000)
    text = damaged.run("salvage", "--output", tmp_path / "out", status=1)
    assert text.startswith("damage: ")
    assert "all volumes are as they were before the damage to the journal\n" in text


def test_a_pool_without_superblock_cannot_be_salvaged(damaged: CommandLine, tmp_path: Path) -> None:
    with (damaged.directory / "super").open("r+b") as file:
        file.write(bytes(8192))
    message = damaged.fail("salvage", "--output", tmp_path / "out")
    assert "put back a copy of 'super'" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --output or --socket"),
        (["--output", "a", "--socket", "b"], "give either --output or --socket"),
        (["--socket", "b", "--json"], "--json is for --output"),
    ],
)
def test_wrong_usage(commands: CommandLine, arguments: list[str], message: str) -> None:
    assert message in commands.fail("salvage", *arguments, status=2)


def test_a_pool_that_is_being_served_is_refused(
    commands: CommandLine, hold: Callable[[CommandLine], HeldPool], tmp_path: Path
) -> None:
    hold(commands)
    message = commands.fail("salvage", "--output", tmp_path / "out")
    assert "in use by another process" in message
