"""Pools on a real disk for tests: made, opened, looked at, killed, and made to fail.

Owns the short ways to a pool in a test; what a test expects is its own.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final
from unittest import mock

from nbdstore.store import Pool, PoolOptions, Volume, local_host
from nbdstore.store.check import CheckReport, check_pool
from nbdstore.store.host import Buffer
from nbdstore.store.image import Image
from tests.store.workload import joined

MIB: Final = 1 << 20
FILES: Final = ("super", "journal", "data")


def make_pool(
    directory: Path, capacity: int = 64 * MIB, *, block_size: int = 4096, journal_size: int = MIB
) -> Path:
    """Make a small pool; return where it is."""
    Pool.create(directory, block_size=block_size, capacity=capacity, journal_size=journal_size)
    return directory


@asynccontextmanager
async def opened(directory: Path, **options: Any) -> AsyncIterator[Pool]:
    """An open pool; closed at the end."""
    pool = await Pool.open(directory, PoolOptions(**options))
    try:
        yield pool
    finally:
        await pool.close()


async def read(volume: Image, offset: int = 0, length: int | None = None) -> bytes:
    """The bytes of a range, of all by default, by the way that waits."""
    return joined(await volume.read(offset, volume.size - offset if length is None else length))


def read_now(volume: Volume, offset: int, length: int) -> bytes | None:
    """The bytes of a range by the way that does not wait, or None."""
    found = volume.read_now(offset, length)
    return None if found is None else joined(found)


def killed(directory: Path, to: Path) -> Path:
    """Copy what SIGKILL leaves of the process that has `directory` open now."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    for name in FILES:
        shutil.copyfile(directory / name, to / name)
    return to


async def check(directory: Path, *, repair: bool = False) -> CheckReport:
    """Check a pool that nobody has open."""
    return await asyncio.to_thread(check_pool, directory, repair=repair)


def findings(report: CheckReport) -> list[str]:
    """What a check found, but notices."""
    return [str(f) for f in report.findings if f.severity != "notice"]


async def assert_clean(directory: Path) -> None:
    """Assert that a check finds nothing, not even something harmless."""
    assert findings(await check(directory)) == []


async def until(condition: Callable[[], bool]) -> None:
    """Let others do their work until `condition` holds; the test's own timeout bounds it."""
    while not condition():
        await asyncio.sleep(0.001)


# -- faults ------------------------------------------------------------------------------------

Hook = Callable[[str, str], None]
"""Called with "write", "read", "cached", "sync" or "punch" and a file's name, before it is done."""


@contextmanager
def hooked(hook: Hook) -> Iterator[None]:
    """Call `hook` before whatever files opened from now on are asked to do."""

    class HookedFile(local_host.LocalFile):
        def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
            hook("write", self.name)
            super().pwritev(buffers, offset)

        def pread(self, length: int, offset: int) -> bytes:
            hook("read", self.name)
            return super().pread(length, offset)

        def preadv(self, buffer: Buffer, offset: int) -> int:
            hook("read", self.name)
            return super().preadv(buffer, offset)

        def preadv_cached(self, buffer: Buffer, offset: int) -> int:
            hook("cached", self.name)
            return super().preadv_cached(buffer, offset)

        def preadv_cached_all(
            self, parts: Sequence[Sequence[Buffer]], offsets: Sequence[int], length: int
        ) -> bool:
            hook("cached", self.name)
            return super().preadv_cached_all(parts, offsets, length)

        def fdatasync(self) -> None:
            hook("sync", self.name)
            super().fdatasync()

        def punch(self, offset: int, length: int) -> bool:
            hook("punch", self.name)
            return super().punch(offset, length)

    with mock.patch("nbdstore.store.local_host.LocalFile", HookedFile):
        yield


class Calls(list[tuple[str, str]]):
    """A hook that remembers what it was called with."""

    def __call__(self, operation: str, name: str) -> None:
        self.append((operation, name))

    def syncs(self) -> list[str]:
        """The names of the files synced, in order."""
        return [name for operation, name in self if operation == "sync"]


@contextmanager
def cold() -> Iterator[None]:
    """While this lasts, no read finds anything in the page cache."""
    file = local_host.LocalFile
    with (
        mock.patch.object(file, "preadv_cached", lambda *_: -1),
        mock.patch.object(file, "preadv_cached_all", lambda *_: False),
    ):
        yield
