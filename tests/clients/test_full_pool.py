"""A thin pool that fills up under clients: their writes wait for space, and go on with it."""

from __future__ import annotations

import filecmp
import random
import subprocess
import time
from pathlib import Path

import pytest

from tests.children import Children, CommandError
from tests.clients.served_pool import ServedPool

pytestmark = pytest.mark.requires("nbdcopy", "qemu-io")

IMAGE_BYTES = 160 << 20
HELD_TIMEOUT_S = 60.0


@pytest.fixture
def small(children: Children, tmp_path: Path) -> ServedPool:
    """A pool of 128 MiB, with volumes that promise more."""
    pool = ServedPool(children, tmp_path)
    pool.create("--capacity", "128M", "--journal-size", "16M")
    pool.create_volume("disk", str(IMAGE_BYTES))
    pool.create_volume("other", "1G")
    return pool


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image that does not fit into the pool."""
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(IMAGE_BYTES))
    return path


def start_copy(pool: ServedPool, image: Path) -> subprocess.Popen[bytes]:
    """Copy the image into the volume, as far as there is space."""
    copy = pool.children.start("nbdcopy", image, pool.uri(), log="nbdcopy.log")
    deadline = time.monotonic() + HELD_TIMEOUT_S
    while pool.show()["held_writes"] == 0:
        assert copy.poll() is None, "the copy has ended: nothing was held"
        assert time.monotonic() < deadline, "no write was held"
    return copy


def test_held_writes_go_on_when_the_pool_grows(
    small: ServedPool, children: Children, image: Path, tmp_path: Path
) -> None:
    small.start("--full-timeout", "0")
    copy = start_copy(small, image)
    small.nbdstore("pool", "grow", "1G")
    assert copy.wait(60) == 0
    children.run("nbdcopy", small.unix_uri(), tmp_path / "copy")
    assert filecmp.cmp(image, tmp_path / "copy", shallow=False)
    small.close()


def test_held_writes_go_on_when_a_volume_is_deleted(
    small: ServedPool, children: Children, image: Path
) -> None:
    small.start("--full-timeout", "0")
    children.run("qemu-io", "-f", "raw", "-c", "write -P 5 0 64M", small.uri("other"))
    copy = start_copy(small, image)
    shown = small.show()
    assert (shown["state"], shown["shortage"]) == ("full", "pool")
    assert "full: trim or delete volumes, or enlarge it" in small.nbdstore("pool", "show")
    small.nbdstore("volume", "delete", "other")
    small.nbdstore("pool", "grow", "200M")
    assert copy.wait(60) == 0
    small.close()


def test_held_writes_go_on_when_another_client_trims(
    small: ServedPool, children: Children, tmp_path: Path
) -> None:
    small.start("--full-timeout", "0")
    children.run("qemu-io", "-f", "raw", "-c", "write -P 5 0 64M", small.uri("other"))
    image = tmp_path / "image"
    image.write_bytes(random.Random(1).randbytes(96 << 20))
    copy = start_copy(small, image)
    children.run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "discard 0 64M", small.uri("other"))
    assert copy.wait(60) == 0
    small.close()


def test_writes_fail_at_once_if_the_server_was_told_so(
    small: ServedPool, children: Children
) -> None:
    small.start("--on-full", "error")
    write = ("qemu-io", "-f", "raw", "-c")
    with pytest.raises(CommandError, match="No space left on device"):
        children.run(*write, "write -P 5 0 160M", small.uri())
    children.run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "discard 0 160M", small.uri())
    children.run(*write, "write -P 6 0 32M", "-c", "read -P 6 0 32M", small.uri())
    small.close()
