"""A small real filesystem for a pool to fill, and a file on it that makes room when it goes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.children import Children, CommandError


@contextmanager
def small_filesystem(
    children: Children, mountpoint: Path, kind: str, n_bytes: int
) -> Iterator[Path]:
    """Mount a filesystem of `n_bytes` ("tmpfs", or "ext4" on a loop device) while this lasts.

    Skips the test on a machine, or in a container, where root may not mount.
    """
    mountpoint.mkdir()
    if kind == "tmpfs":
        what = ["-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs"]
    else:
        image = mountpoint.with_suffix(".image")
        with image.open("wb") as file:
            file.truncate(n_bytes)
        children.run("mkfs.ext4", "-q", "-m", "0", image)
        what = ["-o", "loop", str(image)]
    try:
        children.run("mount", *what, mountpoint)
    except CommandError as error:
        pytest.skip(f"cannot mount {kind}: {error.output.strip()}")
    try:
        yield mountpoint
    finally:
        children.close()  # nobody may use it any more
        children.run("umount", mountpoint)


def leave_free(filesystem: Path, n_bytes: int) -> Path:
    """Take all space but `n_bytes` by a file, and return its path."""
    ballast = filesystem / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(filesystem).free - n_bytes)
    return ballast
