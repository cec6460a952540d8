"""The host's disk is full before the pool is: a real filesystem, real clients.

Writes wait for space on the host, what is shown says so and what to do, and nothing is lost; also
not when the server is killed and started again while the disk is still full.
"""

from __future__ import annotations

import filecmp
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.children import Children
from tests.clients.served_pool import ServedPool
from tests.clients.small_filesystem import leave_free, small_filesystem
from tests.clients.test_full_pool import start_copy

pytestmark = pytest.mark.requires("root", "mount", "mkfs.ext4", "nbdcopy", "qemu-io", "/dev/loop0")

MIB = 1 << 20
HOST_BYTES = 128 * MIB
FREE_BYTES = 52 * MIB
# The image fits into what is free, but not beside what the other volume holds.
IMAGE_BYTES = 44 * MIB
OTHER = "16M"


class SmallHost:
    """A pool of 1 GiB on a filesystem that has 52 MiB free, and a file that takes the rest."""

    def __init__(self, children: Children, host: Path) -> None:
        self.pool = ServedPool(children, host)
        self.pool.create("--capacity", "1G", "--journal-size", "8M")
        self.pool.create_volume("disk", "1G")
        self.pool.create_volume("other", "1G")
        self.ballast = leave_free(host, FREE_BYTES)
        self.pool.start("--full-timeout", "0")


@pytest.fixture(params=["ext4", "tmpfs"])
def small(
    children: Children, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[SmallHost]:
    with small_filesystem(children, tmp_path / "host", request.param, HOST_BYTES) as host:
        small = SmallHost(children, host)
        yield small
        small.pool.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(IMAGE_BYTES))
    return path


def qemu_io(pool: ServedPool, *commands: str) -> None:
    options = [word for command in commands for word in ("-c", command)]
    pool.children.run("qemu-io", "-f", "raw", "-d", "unmap", *options, pool.uri("other"))


def wait_until_well(pool: ServedPool) -> None:
    deadline = time.monotonic() + 60
    while (shown := pool.show())["state"] != "ok":
        assert time.monotonic() < deadline, shown


def check_copy(pool: ServedPool, image: Path, directory: Path) -> None:
    pool.children.run("nbdcopy", f"--request-size={MIB}", pool.unix_uri(), directory / "copy")
    with (directory / "copy").open("r+b") as file:
        file.truncate(IMAGE_BYTES)  # beyond it there is nothing but a hole
    assert filecmp.cmp(image, directory / "copy", shallow=False)


def test_a_person_sees_that_the_host_is_full_and_what_helps(
    small: SmallHost, image: Path, tmp_path: Path
) -> None:
    pool = small.pool
    qemu_io(pool, f"write -P 5 0 {OTHER}")
    copy = start_copy(pool, image)
    shown = pool.show()
    assert (shown["state"], shown["shortage"]) == ("full", "host")
    assert shown["free_on_host"] < 16 * MIB < shown["free"]
    text = pool.nbdstore("pool", "show")
    assert "full: free space on the filesystem below" in text
    assert "waiting for space" in text
    small.ballast.unlink()
    assert copy.wait(60) == 0
    wait_until_well(pool)
    check_copy(pool, image, tmp_path)
    qemu_io(pool, f"read -P 5 0 {OTHER}")


def test_a_trim_makes_room_on_a_full_host(small: SmallHost, image: Path, tmp_path: Path) -> None:
    qemu_io(small.pool, f"write -P 5 0 {OTHER}")
    copy = start_copy(small.pool, image)
    qemu_io(small.pool, f"discard 0 {OTHER}")
    assert copy.wait(60) == 0
    check_copy(small.pool, image, tmp_path)


def test_a_server_that_is_killed_on_a_full_host_comes_back(
    small: SmallHost, image: Path, tmp_path: Path
) -> None:
    pool = small.pool
    qemu_io(pool, f"write -P 5 0 {OTHER}", "flush")
    copy = start_copy(pool, image)
    pool.kill()
    assert copy.wait(60) != 0
    pool.check()
    pool.restart()
    qemu_io(pool, f"read -P 5 0 {OTHER}", f"discard 0 {OTHER}", "flush", f"read -P 0 0 {OTHER}")
    copy = pool.children.start("nbdcopy", image, pool.uri(), log="nbdcopy.log")
    assert copy.wait(60) == 0
    check_copy(pool, image, tmp_path)
