"""A filesystem of the host on a volume, without an nbd driver: nbdfuse and a loop device."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.children import Children
from tests.clients.served_pool import ServedPool

pytestmark = pytest.mark.requires(
    *("root", "/dev/fuse", "/dev/loop-control"),
    *("nbdfuse", "fusermount3", "losetup", "mount", "mkfs.ext4", "mkfs.xfs"),
)

MOUNT_TIMEOUT_S = 30


@pytest.fixture
def loop(served: ServedPool, children: Children, tmp_path: Path) -> Iterator[str]:
    """The volume "disk" as a loop device."""
    directory = tmp_path / "fuse"
    directory.mkdir()
    pidfile = tmp_path / "nbdfuse.pid"
    os.mkfifo(pidfile)
    reader = os.open(pidfile, os.O_RDONLY | os.O_NONBLOCK)
    fuse = children.start(
        "nbdfuse", "--pidfile", pidfile, str(directory), served.unix_uri(), log="nbdfuse.log"
    )
    try:
        # nbdfuse writes its process id when the file system is mounted.
        readable, _, _ = select.select([reader], [], [], MOUNT_TIMEOUT_S)
        assert readable, "nbdfuse has not mounted the volume"
        device = children.run(
            *("losetup", "--find", "--show", "--direct-io=off", directory / "nbd")
        ).strip()
        try:
            yield device
        finally:
            children.run("losetup", "--detach", device)
    finally:
        os.close(reader)
        children.run("fusermount3", "-u", "-z", directory)
        fuse.wait(MOUNT_TIMEOUT_S)


@pytest.mark.parametrize(
    ("make", "check"),
    [("mkfs.ext4 -q", "e2fsck -f -n"), ("mkfs.xfs -q", "xfs_repair -n")],
    ids=["ext4", "xfs"],
)
def test_files_on_a_mounted_volume(
    children: Children, tmp_path: Path, loop: str, make: str, check: str
) -> None:
    contents = {f"file {n}": os.urandom(n * 3000) for n in range(40)}
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    children.run(*make.split(), loop)
    children.run("mount", loop, mountpoint)
    try:
        for name, content in contents.items():
            (mountpoint / name).write_bytes(content)
    finally:
        children.run("umount", mountpoint)

    children.run(*check.split(), loop)
    children.run("mount", "-o", "ro", loop, mountpoint)
    try:
        assert {name: (mountpoint / name).read_bytes() for name in contents} == contents
    finally:
        children.run("umount", mountpoint)
