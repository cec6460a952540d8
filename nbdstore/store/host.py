"""The I/O layer: everything that the store gets from outside, as one contract.

Owns the interface of a host: its files, its clocks, its chance, the way to let time pass.  There
are two implementations: the operating system's (local_host.py), and one for tests that loses,
tears, fails and waits on demand, the same each time for a seed.  No other module of the store
reads a clock, draws a random number, sleeps, or calls the operating system.

What is durable when: bytes of a file after its :meth:`File.fdatasync`; that a file exists, under
which name, after :meth:`Disk.sync`.  Of anything younger a crash may keep all, parts, or nothing,
in any order.

Errors are the store's own: no space is :class:`~nbdstore.errors.NoSpace`, any other error of a
write or sync :class:`~nbdstore.errors.WriteFailed`, of a read
:class:`~nbdstore.errors.ReadFailed`.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

Buffer = bytes | bytearray | memoryview

P = ParamSpec("P")
R = TypeVar("R")


class Failpoint(enum.StrEnum):
    """Places between two steps whose order matters to a crash; tests stop the world there."""

    POOL_FILES_WRITTEN = "pool: files written, not yet named"
    POOL_NAMED = "pool: named, the directory not yet synced"
    RECOVERY_REPLAYED = "recovery: journal replayed in memory, nothing written yet"
    RECOVERY_INLINE_WRITTEN = "recovery: inline blocks written, not yet synced"
    COMMIT_SEALED = "commit: journal sealed, not yet synced"
    COMMIT_SYNCED = "commit: synced, not yet told"
    CHANGE_JOURNALLED = "change: journalled, not yet made"
    CHANGE_MADE = "change: made, not yet durable"
    CHECKPOINT_FROZEN = "checkpoint: frozen, nothing written yet"
    CHECKPOINT_LEAVES_WRITTEN = "checkpoint: leaves of a volume written"
    CHECKPOINT_NODES_WRITTEN = "checkpoint: nodes of a volume written"
    CHECKPOINT_WRITTEN = "checkpoint: written, not yet synced"
    CHECKPOINT_SYNCED = "checkpoint: synced, superblock not yet written"
    CHECKPOINT_FLIPPED = "checkpoint: a copy of the superblock written, not yet synced"
    CHECKPOINT_DURABLE = "checkpoint: durable, nothing released yet"
    CHECKPOINT_RELEASED = "checkpoint: journal and slots released"


class File(Protocol):
    """One open file of a pool.

    Attributes:
        name: without its directory.
    """

    name: str

    @property
    def size(self) -> int:
        """Length in bytes."""

    @property
    def allocated(self) -> int:
        """Bytes of the host's filesystem that the file holds; less than `size` if sparse."""

    def held(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The parts `[start, stop)` of `[offset, offset + length)` that the host has space for.

        Writing there needs no more of it.  All of it, if the filesystem cannot tell.
        """

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all of `buffers` at byte `offset`, into the page cache."""

    def pread(self, length: int, offset: int) -> bytes:
        """Read up to `length` bytes, fewer at the end of the file; may wait for the disk."""

    def preadv(self, buffer: Buffer, offset: int) -> int:
        """Fill `buffer` as far as the file goes; may wait for the disk.  Returns the bytes read."""

    def preadv_cached(self, buffer: Buffer, offset: int) -> int:
        """Fill `buffer` as far as the page cache goes, and have the host read the rest.

        Returns the bytes read: 0 = the file ends here, -1 = all of it would have to be waited for.
        """

    def preadv_cached_all(
        self, parts: Sequence[Sequence[Buffer]], offsets: Sequence[int], length: int
    ) -> bool:
        """Fill each of `parts`, of `length` bytes together, from where `offsets` says.

        False if one would have to be waited for, ends beyond the file, or cannot be read, which
        :meth:`preadv_cached` tells of each; others may be filled then.
        """

    def pread_direct(self, length: int, offset: int) -> bytes:
        """Read past the page cache; `offset` and `length` are multiples of 4096."""

    def will_need(self, offset: int, length: int) -> None:
        """Tell the host to start reading `[offset, offset + length)`."""

    def fdatasync(self) -> None:
        """Make everything written so far durable.

        A failure is final, and every later call fails as well: what the kernel has dropped then,
        no sync brings to the disk (fsync(2)).
        """

    def punch(self, offset: int, length: int) -> bool:
        """Give `[offset, offset + length)` back to the filesystem; False if it cannot."""

    def truncate(self, size: int) -> None:
        """Set the length to `size` bytes."""


class Disk(Protocol):
    """A directory with the files of one pool.

    Attributes:
        directory: where it is.
    """

    directory: Path

    def lock(self) -> None:
        """Become the one process that uses the pool, until :meth:`close` or the process's end.

        A disk opened read-only shares it with others that are.

        Raises:
            PoolLocked: another one does; the message names its pid.
        """

    def open(self, name: str, *, create: bool = False) -> File:
        """Open file `name`; with `create` it must not exist yet.

        Raises:
            StoreError: it is missing, or cannot be opened.
        """

    def exists(self, name: str) -> bool:
        """Tell whether file `name` exists."""

    def remove(self, name: str) -> None:
        """Remove file `name`."""

    def rename(self, old: str, new: str) -> None:
        """Rename a file; durable after :meth:`sync`."""

    def sync(self) -> None:
        """Make creations, removals and renames in the directory durable."""

    def free_bytes(self) -> int:
        """Bytes the filesystem under the pool has left for this process."""

    def total_bytes(self) -> int:
        """Size of the filesystem under the pool, in bytes."""

    async def offload(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a call that waits for the disk, such as a read or a sync, beside the event loop."""

    def close(self) -> None:
        """Wait for calls that were offloaded, close the files, release the lock."""


class Host(Protocol):
    """What a pool stands on."""

    def disk(self, directory: Path, *, read_only: bool = False) -> Disk:
        """Open `directory`; `read_only`, nothing in it is ever written, its lock included.

        Raises:
            StoreError: it does not exist, is no directory, or may not be entered.
        """

    def make_directory(self, directory: Path) -> bool:
        """Make `directory` and its parents, for its owner only; False if it is there already.

        That they exist is durable when this returns.

        Raises:
            StoreError: it cannot be made.
        """

    def list_directory(self, directory: Path) -> list[str]:
        """The names in `directory`, sorted.

        Raises:
            StoreError: it cannot be read.
        """

    def remove_directory(self, directory: Path) -> None:
        """Remove `directory`, which is empty."""

    def is_directory(self, directory: Path) -> bool:
        """Tell whether `directory` is one."""

    def exists(self, path: Path) -> bool:
        """Tell whether there is anything at `path`."""

    def monotonic(self) -> float:
        """Seconds since some moment; never goes back."""

    def time(self) -> float:
        """Seconds since 1970."""

    def new_uuid(self) -> uuid.UUID:
        """A random UUID."""

    async def sleep(self, delay_s: float) -> None:
        """Let others go on, for `delay_s` seconds at least; 0 = a turn of the event loop."""

    def reached(self, place: Failpoint) -> None:
        """The store has come to `place`."""
