"""``nbdstore check``: what is found is told, in words and in the exit status."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import CommandLine, HeldPool
from tests.store.anatomy import Anatomy
from tests.store.specimen import flip_slot

MARK = b"find me in the data file, please"


@pytest.fixture
def damaged(commands: CommandLine, tmp_path: Path) -> CommandLine:
    """A pool with one block of volume db damaged."""
    image = tmp_path / "image"
    image.write_bytes(MARK * 1024)
    commands.run("import", image, "db")
    path = commands.directory / "data"
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(data.index(MARK))
        file.write(b"FIND")
    return commands


def test_a_pool_in_order(commands: CommandLine) -> None:
    commands.run("volume", "create", "db", "--size", "1G")
    text = commands.run("check")
    assert text.startswith("checked 1 volume, 0 blocks, ")
    assert text.endswith(": all is well\n")
    assert commands.json("check")["clean"]


def test_damage(damaged: CommandLine) -> None:
    text = damaged.run("check", status=1)
    assert text.startswith("damage: volume db")
    assert text.endswith(": 1 fault left\n")
    assert damaged.run("check", "--repair", status=1).endswith(": 1 fault left\n")


def test_damage_for_programs(damaged: CommandLine) -> None:
    result = damaged._invoke(("check", "--json"), 1, None)
    assert '"severity": "damage"' in result.stdout
    assert '"clean": false' in result.stdout


def test_exporting_damage_is_one_line_and_leaves_no_file(
    damaged: CommandLine, tmp_path: Path
) -> None:
    message = damaged.fail("export", "db", tmp_path / "back")
    assert "expected checksum" in message
    assert not (tmp_path / "back").exists()


def test_what_is_derived_is_repaired(commands: CommandLine) -> None:
    with (commands.directory / "super").open("r+b") as file:
        file.write(b"torn")
    commands.run("check")  # a notice: the other superblock serves
    assert "repaired" in commands.run("check", "--repair")
    assert "repaired" not in commands.run("check")


def test_what_damage_has_cut_off_is_given_up(commands: CommandLine, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(MARK * 1024)
    commands.run("import", image, "db", "--size", "1M")
    (leaf,) = Anatomy(commands.directory).of_kind("leaf")
    flip_slot(commands.directory, leaf)
    lines = commands.run("check", "--repair", status=1).splitlines()
    assert lines[0].startswith("damage: map of db, leaf 0 (slot ")
    assert lines[0].endswith(", given up")
    lost = "damage: volume db, bytes 0 to 1048576: expected data, found nothing: "
    assert lines[1].startswith(lost)
    assert lines[2].endswith(": 1 fault left, 1 fault given up")
    lines = commands.run("check", status=1).splitlines()
    assert lines[0].startswith(lost)
    assert lines[1].endswith(": 1 fault left")
    commands.run("import", image, "db", "--overwrite")
    assert "all is well" in commands.run("check")


def test_a_pool_that_is_served(
    commands: CommandLine, hold: Callable[[CommandLine], HeldPool]
) -> None:
    hold(commands)
    message = commands.fail("check")
    assert f"{commands.directory} is being served: stop its server first" in message


def test_no_pool(tmp_path: Path) -> None:
    assert "holds no pool" in CommandLine(tmp_path).fail("check")
