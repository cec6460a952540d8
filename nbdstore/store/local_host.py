"""The host that a pool really stands on: the only module that talks to the operating system.

Owns files, locks, syncs, clocks and the threads that wait for disks; knows nothing of what the
bytes mean.  The contract, with all docstrings, is host.py's.

Errors leave here as the store's own: ENOSPC, EDQUOT and EFBIG as :class:`NoSpace`, every other
error of a write or sync as :class:`WriteFailed`, of a read as :class:`ReadFailed`.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import mmap
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

from nbdstore.errors import NoSpace, PoolLocked, ReadFailed, StoreError, WriteFailed
from nbdstore.store.host import Buffer, Failpoint, Host

IOV_MAX: Final = 1024
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_KEEP_SIZE: Final = 0x01  # FALLOC_FL_KEEP_SIZE, fallocate(2)
_PUNCH_HOLE: Final = 0x02  # FALLOC_FL_PUNCH_HOLE
# Six reads that miss the page cache (misses.py), four of maps' leaves or to verify (core.py), and
# four syncs: of a checkpoint and of a round, each of the data and of the journal.
_N_THREADS: Final = 14
_DIRECT_ALIGNMENT: Final = 4096

P = ParamSpec("P")
R = TypeVar("R")


def _write_error(name: str, what: str, error: OSError) -> StoreError:
    if error.errno in _NO_SPACE:
        return NoSpace(f"{name}: {error.strerror} while {what}: free space on that filesystem")
    return WriteFailed(f"{name}: {error.strerror} while {what}: see the kernel log for the device")


class LocalFile:
    """One open file of a pool."""

    def __init__(self, name: str, fd: int, directory_fd: int) -> None:
        self.name = name
        self._fd = fd
        self._directory_fd = directory_fd
        self._nowait_flag = os.RWF_NOWAIT
        self._syncing = threading.Lock()
        self._sync_failed = False

    @property
    def size(self) -> int:
        """Length in bytes."""
        return os.fstat(self._fd).st_size

    @property
    def allocated(self) -> int:
        """Bytes of the host's filesystem that the file holds; less than `size` if sparse."""
        return os.fstat(self._fd).st_blocks * 512

    def held(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The parts of `[offset, offset + length)` that are no holes of the file (lseek(2))."""
        found: list[tuple[int, int]] = []
        at, end = offset, offset + length
        while at < end:
            try:
                start = os.lseek(self._fd, at, os.SEEK_DATA)
                stop = os.lseek(self._fd, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # all that follows is a hole
                    break
                return [(offset, end)]
            if start < end:
                found.append((start, min(stop, end)))
            at = stop
        return found

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all of `buffers` at byte `offset`, into the page cache."""
        try:
            if len(buffers) <= IOV_MAX:
                expected = sum(map(len, buffers)) if len(buffers) > 1 else len(buffers[0])
                if os.pwritev(self._fd, buffers, offset) == expected:
                    return
            self._write_pieces(buffers, offset)
        except OSError as error:
            raise _write_error(self.name, f"writing at byte {offset}", error) from error

    def _write_pieces(self, buffers: Sequence[Buffer], offset: int) -> None:
        """Write in pieces: more buffers than the kernel takes at once, or after a short write."""
        for buffer in buffers:
            view = memoryview(buffer)
            while view:
                done = os.pwrite(self._fd, view, offset)
                offset += done
                view = view[done:]

    def pread(self, length: int, offset: int) -> bytes:
        """Read up to `length` bytes, fewer at the end of the file; may wait for the disk."""
        try:
            return os.pread(self._fd, length, offset)
        except OSError as error:
            raise self._read_error(offset, error) from error

    def preadv(self, buffer: Buffer, offset: int) -> int:
        """Fill `buffer` as far as the file goes; may wait for the disk.  Returns the bytes read."""
        view = memoryview(buffer)
        total = 0
        try:
            while total < len(view):
                done = os.preadv(self._fd, [view[total:]], offset + total)
                if done == 0:
                    break
                total += done
        except OSError as error:
            raise self._read_error(offset + total, error) from error
        return total

    def preadv_cached(self, buffer: Buffer, offset: int) -> int:
        """As File.preadv_cached (RWF_NOWAIT, preadv2(2))."""
        try:
            return os.preadv(self._fd, [buffer], offset, self._nowait_flag)
        except BlockingIOError:
            return -1
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # 9p: then every read goes by a thread
                return -1
            raise self._read_error(offset, error) from error

    def preadv_cached_all(
        self, parts: Sequence[Sequence[Buffer]], offsets: Sequence[int], length: int
    ) -> bool:
        """See File; no call gives more than its part, so that the sum tells of all."""
        fd, flag = repeat(self._fd), repeat(self._nowait_flag)
        try:
            return sum(map(os.preadv, fd, parts, offsets, flag)) == length
        except OSError:  # of one of them: which, and what, who reads it by itself is told
            return False

    def pread_direct(self, length: int, offset: int) -> bytes:
        """Read past the page cache; `offset` and `length` are multiples of 4096."""
        try:
            fd = os.open(self.name, os.O_RDONLY | os.O_DIRECT, dir_fd=self._directory_fd)
        except OSError:  # a filesystem without O_DIRECT: the best it can give is a second read
            return self.pread(length, offset)
        try:
            with mmap.mmap(-1, length) as buffer:
                done = os.preadv(fd, [buffer], offset)
                return buffer[:done]
        except OSError as error:
            if error.errno == errno.EINVAL:  # it wants another alignment
                return self.pread(length, offset)
            raise self._read_error(offset, error) from error
        finally:
            os.close(fd)

    def will_need(self, offset: int, length: int) -> None:
        """Tell the kernel to start reading `[offset, offset + length)`."""
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def fdatasync(self) -> None:
        """Make everything written so far durable; see File.

        One at a time: of two that wait for the same pages, the kernel tells only one of an error
        in writing them (a descriptor learns of each error once), and the other that all is well.
        """
        with self._syncing:
            if self._sync_failed:
                raise WriteFailed(f"{self.name}: an earlier sync failed: nothing more is durable")
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                self._sync_failed = True
                raise WriteFailed(f"{self.name}: {error.strerror} while syncing") from error

    def punch(self, offset: int, length: int) -> bool:
        """Give `[offset, offset + length)` back to the filesystem; False if it cannot."""
        libc = _libc()
        mode = _KEEP_SIZE | _PUNCH_HOLE
        if libc.fallocate(self._fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) == 0:
            return True
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise _write_error(
            self.name, f"punching at byte {offset}", OSError(code, os.strerror(code))
        )

    def truncate(self, size: int) -> None:
        """Set the length to `size` bytes."""
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise _write_error(self.name, f"setting the size to {size}", error) from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _read_error(self, offset: int, error: OSError) -> ReadFailed:
        return ReadFailed(
            f"{self.name}: {error.strerror} while reading at byte {offset}: "
            "see the kernel log for the device"
        )


class LocalDisk:
    """A directory with the files of one pool, locked by this process while it is open."""

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        """Open `directory`, which must exist; `read_only`, never to write anything there.

        Raises:
            StoreError: it does not exist, is no directory, or may not be entered.
        """
        self.directory = directory
        self._read_only = read_only
        try:
            self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise StoreError(f"pool directory {directory}: {error.strerror}") from error
        self._lock_fd: int | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._files: list[LocalFile] = []

    def lock(self) -> None:
        """Become the one process that uses the pool.

        Raises:
            PoolLocked: another one does; the message names its pid.
        """
        flags = os.O_RDONLY if self._read_only else os.O_RDWR | os.O_CREAT
        try:
            fd = os.open("lock", flags | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
        except OSError as error:
            if self._read_only and error.errno == errno.ENOENT:
                return  # who serves a pool makes this file: nobody does
            raise StoreError(
                f"cannot lock the pool {self.directory}: {error.strerror}: "
                "work on it as the user who owns it"
            ) from error
        try:
            kind = fcntl.LOCK_SH if self._read_only else fcntl.LOCK_EX
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise PoolLocked(
                f"pool {self.directory} is in use by another process (pid {holder}): "
                "stop it first, or talk to it through its control socket"
            ) from error
        if not self._read_only:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._lock_fd = fd

    def open(self, name: str, *, create: bool = False) -> LocalFile:
        """Open file `name`; with `create` it must not exist yet.

        Raises:
            StoreError: it is missing, or cannot be opened.
        """
        flags = os.O_RDONLY if self._read_only else os.O_RDWR
        flags |= os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        try:
            fd = os.open(name, flags, 0o600, dir_fd=self._fd)
        except OSError as error:
            raise StoreError(f"{self.directory / name}: {error.strerror}") from error
        self._files.append(LocalFile(name, fd, self._fd))
        return self._files[-1]

    def exists(self, name: str) -> bool:
        """Tell whether file `name` exists."""
        try:
            os.stat(name, dir_fd=self._fd)
        except FileNotFoundError:
            return False
        return True

    def remove(self, name: str) -> None:
        """Remove file `name`."""
        try:
            os.unlink(name, dir_fd=self._fd)
        except OSError as error:
            raise _write_error(str(self.directory / name), "removing it", error) from error

    def rename(self, old: str, new: str) -> None:
        """Rename a file; durable after :meth:`sync`."""
        try:
            os.rename(old, new, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except OSError as error:
            raise _write_error(str(self.directory / old), f"renaming it {new}", error) from error

    def sync(self) -> None:
        """Make creations, removals and renames in the directory durable."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise _write_error(str(self.directory), "syncing the directory", error) from error

    def free_bytes(self) -> int:
        """Bytes the filesystem under the pool has left for this process."""
        stat = os.fstatvfs(self._fd)
        return stat.f_bavail * stat.f_frsize

    def total_bytes(self) -> int:
        """Size of the filesystem under the pool, in bytes."""
        stat = os.fstatvfs(self._fd)
        return stat.f_blocks * stat.f_frsize

    async def offload(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a call that waits for the disk, such as a read or a sync, beside the event loop."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_N_THREADS, thread_name_prefix="nbdstore-disk")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: call(*args, **kwargs))

    def close(self) -> None:
        """Wait for the threads, close the files, release the lock."""
        if self._threads is not None:
            self._threads.shutdown()
        for file in self._files:
            file.close()
        if self._lock_fd is not None:
            if not self._read_only:
                os.ftruncate(self._lock_fd, 0)
            os.close(self._lock_fd)
        os.close(self._fd)


class LocalHost:
    """This machine."""

    def disk(self, directory: Path, *, read_only: bool = False) -> LocalDisk:
        """See Host."""
        return LocalDisk(directory, read_only=read_only)

    def make_directory(self, directory: Path) -> bool:
        """See Host."""
        missing = [path for path in (directory, *directory.parents) if not path.exists()]
        try:
            directory.mkdir(mode=0o700, parents=True)
            for path in missing:
                _sync_directory(path.parent)
        except FileExistsError:
            return False
        except OSError as error:
            raise StoreError(f"cannot make {directory}: {error.strerror}") from error
        return True

    def list_directory(self, directory: Path) -> list[str]:
        """See Host."""
        try:
            return sorted(path.name for path in directory.iterdir())
        except OSError as error:
            raise StoreError(f"cannot read {directory}: {error.strerror}") from error

    def remove_directory(self, directory: Path) -> None:
        """See Host."""
        directory.rmdir()

    def is_directory(self, directory: Path) -> bool:
        """See Host."""
        return directory.is_dir()

    def exists(self, path: Path) -> bool:
        """See Host."""
        return path.exists()

    def monotonic(self) -> float:
        """See Host."""
        return time.monotonic()

    def time(self) -> float:
        """See Host."""
        return time.time()

    def new_uuid(self) -> uuid.UUID:
        """See Host."""
        return uuid.uuid4()

    async def sleep(self, delay_s: float) -> None:
        """See Host."""
        await asyncio.sleep(delay_s)

    def reached(self, place: Failpoint) -> None:
        """See Host; nothing happens there."""


LOCAL: Final[Host] = LocalHost()


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _libc() -> ctypes.CDLL:
    global _LIBC
    if _LIBC is None:
        _LIBC = ctypes.CDLL(None, use_errno=True)
    return _LIBC


_LIBC: ctypes.CDLL | None = None
