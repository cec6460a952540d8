"""Making a pool: checking what a person asked for, and writing the first files.

Owns creation alone.  The superblock is written last and gets its name by a rename, so that there
is a whole pool or none; what a failed attempt made is removed again, and nothing else.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from nbdstore.errors import AlreadyExists, InvalidArgument, StoreError
from nbdstore.sizes import exact_size
from nbdstore.store import layout, superblock
from nbdstore.store.host import Disk, Failpoint, Host
from nbdstore.store.journal import format_ring
from nbdstore.store.superblock import NULL, Superblock

log = logging.getLogger("nbdstore.store")

_IGNORED: Final = frozenset({"lost+found", "lock"})


def create_pool(
    host: Host, directory: Path, *, block_size: int, capacity: int | None, journal_size: int
) -> None:
    """Make an empty pool; see Pool.create."""
    check_geometry(block_size, capacity, journal_size)
    made = _make_directory(host, directory)
    disk = host.disk(directory)
    try:
        disk.lock()  # not ours yet: if this fails, everything there is somebody else's
        made_files: list[str] = []
        try:
            if capacity is None:
                capacity = max(disk.total_bytes(), layout.MIN_CAPACITY)
            n_slots = min(capacity // block_size, layout.MAX_SLOTS)
            _format(host, disk, block_size, n_slots, journal_size, made_files)
        except BaseException:
            _remove(host, disk, made_files, directory if made else None)
            raise
    finally:
        disk.close()


def _remove(host: Host, disk: Disk, names: list[str], directory: Path | None) -> None:
    """Remove what a failed attempt made; what cannot be removed stays, and is told in the log."""
    for name in names:
        try:
            disk.remove(name)
        except StoreError as error:
            log.warning("left behind by a pool that could not be made: %s", error)
    if directory is not None and host.list_directory(directory) == ["lock"]:
        disk.remove("lock")
        host.remove_directory(directory)


def check_geometry(block_size: int, capacity: int | None, journal_size: int) -> None:
    """Refuse sizes in bytes that make no sense (InvalidArgument)."""
    if block_size & (block_size - 1) or not (
        layout.MIN_BLOCK_SIZE <= block_size <= layout.MAX_BLOCK_SIZE
    ):
        raise InvalidArgument(
            f"block size {exact_size(block_size)}: choose 4K, 8K, 16K, 32K or 64K"
        )
    if journal_size % block_size or not (
        layout.MIN_JOURNAL_SIZE <= journal_size <= layout.MAX_JOURNAL_SIZE
    ):
        raise InvalidArgument(
            f"journal size {exact_size(journal_size)}: choose a multiple of "
            f"{exact_size(block_size)} between 1 MiB and 64 GiB"
        )
    if capacity is not None:
        check_capacity(capacity, block_size)


def check_capacity(capacity: int, block_size: int) -> None:
    """Refuse a capacity in bytes that makes no sense (InvalidArgument)."""
    if capacity < layout.MIN_CAPACITY or capacity // block_size > layout.MAX_SLOTS:
        raise InvalidArgument(
            f"capacity {exact_size(capacity)}: choose between 16 MiB and "
            f"{exact_size(layout.MAX_SLOTS * block_size)}"
        )


def _make_directory(host: Host, directory: Path) -> bool:
    """Make `directory`, or make sure that it is empty; tell whether it was made."""
    if host.make_directory(directory):
        return True
    if not host.is_directory(directory):
        raise InvalidArgument(f"{directory} is not a directory: choose another place")
    found = [name for name in host.list_directory(directory) if name not in _IGNORED]
    if "super" in found:
        raise AlreadyExists(f"{directory} holds a pool already: use it, or choose another place")
    if found:
        raise InvalidArgument(
            f"{directory} is not empty (it holds {found[0]!r}): choose an empty directory"
        )
    return False


def _format(
    host: Host, disk: Disk, block_size: int, n_slots: int, journal_size: int, made: list[str]
) -> None:
    """Write the files; note in `made` what is there to be removed if this fails."""
    ring = disk.open("journal", create=True)
    made.append("journal")
    data = disk.open("data", create=True)
    made.append("data")
    super_file = disk.open("super.new", create=True)
    made.append("super.new")
    format_ring(ring, journal_size)
    ring.fdatasync()
    data.truncate(block_size)  # slot 0
    data.fdatasync()
    first = Superblock(
        uuid=host.new_uuid(),
        generation=1,
        block_size=block_size,
        n_slots=n_slots,
        journal_size=journal_size,
        journal_offset=0,
        journal_seq=1,
        catalogue=NULL,
        catalogue_bytes=0,
        free_map=NULL,
        created=int(host.time()),
    )
    for copy in (0, 1):
        superblock.write(super_file, first, copy)
    super_file.fdatasync()
    disk.sync()  # a crash keeps names one by one: "super" only with all that it needs
    host.reached(Failpoint.POOL_FILES_WRITTEN)
    disk.rename("super.new", "super")
    made[-1] = "super"
    host.reached(Failpoint.POOL_NAMED)
    disk.sync()
