"""Superblocks of real filesystems, clean and not; formatting without force."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nbdstore.agent import filesystems
from nbdstore.agent.filesystems import (
    FILESYSTEMS,
    Damaged,
    filesystem,
    parse_superblock,
    read_superblock,
)
from nbdstore.errors import DeviceError, InvalidArgument
from tests.children import Children

SIZE = 320 << 20

pytestmark = pytest.mark.requires("mkfs.ext4", "mkfs.xfs", "e2fsck", "debugfs", "xfs_db")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.mark.parametrize("kind", FILESYSTEMS)
def test_a_filesystem_is_recognised_with_its_size(image: Path, kind: str) -> None:
    assert read_superblock(str(image)) is None
    filesystem(kind).make(str(image))
    found = read_superblock(str(image))
    assert found is not None
    assert (found.type, found.size, found.clean) == (kind, SIZE, True)


@pytest.mark.parametrize(
    "change",
    ["ssv state 3", "ssv state 0", "feature needs_recovery"],
    ids=["errors", "not unmounted", "journal not empty"],
)
def test_an_ext4_that_is_unclean(image: Path, children: Children, change: str) -> None:
    filesystem("ext4").make(str(image))
    children.run("debugfs", "-w", "-R", change, image)
    found = read_superblock(str(image))
    assert found is not None
    assert not found.clean
    filesystem("ext4").check(str(image))
    found = read_superblock(str(image))
    assert found is not None
    assert found.clean


def test_what_only_a_person_may_decide_is_not_repaired(image: Path, children: Children) -> None:
    filesystem("ext4").make(str(image))
    children.run("debugfs", "-w", "-R", "clri <2>", image)
    children.run("debugfs", "-w", "-R", "ssv state 2", image)
    with pytest.raises(Damaged, match="--fsck repair"):
        filesystem("ext4").check(str(image))
    assert filesystem("ext4").is_damaged(str(image))
    assert filesystem("ext4").repair(str(image))
    assert not filesystem("ext4").is_damaged(str(image))
    assert not filesystem("ext4").repair(str(image))
    children.run("e2fsck", "-f", "-n", image)


def test_mkfs_is_not_forced(image: Path) -> None:
    """The decision to format is made before; this is what still stands behind it."""
    filesystem("xfs").make(str(image))
    with pytest.raises(DeviceError, match="appears to contain an existing filesystem"):
        filesystem("xfs").make(str(image))


def test_other_bytes_are_no_superblock() -> None:
    assert parse_superblock(b"") is None
    assert parse_superblock(bytes(4096)) is None
    assert parse_superblock(b"x" * 4096) is None


@pytest.mark.requires("root", "/dev/loop-control", "unshare", "mount")
@pytest.mark.parametrize("mode", ["755", "0o2755", "+755"])
def test_a_mode_is_a_number_however_it_is_written(
    image: Path, children: Children, mode: str
) -> None:
    """As `parse_mode` takes it, which chmod(1) does not in each case."""
    filesystems.make("ext4", str(image), "5:6", mode)
    shown = children.run("debugfs", "-R", "stat <2>", image)
    assert re.search(r"User: +5 +Group: +6 ", shown), shown
    found = re.search(r"Mode: +([0-7]+)", shown)
    assert found and int(found[1], 8) == int(mode, 8), shown


def test_other_kinds_cannot_be_made() -> None:
    with pytest.raises(InvalidArgument, match=r"'ntfs' is no filesystem.*ext4 and xfs"):
        filesystem("ntfs")


def test_an_xfs_is_repaired_when_asked_for(image: Path, children: Children) -> None:
    filesystem("xfs").make(str(image))
    assert not filesystem("xfs").is_damaged(str(image))
    assert not filesystem("xfs").repair(str(image))
    children.run("xfs_db", "-x", "-c", "sb 0", "-c", "write fdblocks 1", image)
    filesystem("xfs").check(str(image))
    assert filesystem("xfs").is_damaged(str(image))
    assert filesystem("xfs").repair(str(image))
    children.run("xfs_repair", "-n", image)
