"""What the host's page cache holds of a server's files, so that each sample finds the same."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def sync(files: Iterable[Path]) -> None:
    """Write out what is dirty, so that one peer's writeback is not the next one's load."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)


def drop(files: Iterable[Path]) -> None:
    """Take the files out of the page cache: what is read next comes from the disk.

    Without root's /proc/sys/vm/drop_caches, which would hit everybody on the machine. What lies
    below (a hypervisor's cache, the disk's own) is not reached.
    """
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
