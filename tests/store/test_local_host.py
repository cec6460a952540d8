"""The real disk: what the operating system says, in the store's words."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdstore.errors import NoSpace, PoolLocked, ReadFailed, StoreError, WriteFailed
from nbdstore.store import Pool
from nbdstore.store.local_host import IOV_MAX, LOCAL, LocalDisk, LocalFile
from tests.store.pools import MIB, assert_clean, make_pool, opened, read, until


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[LocalDisk]:
    found = LocalDisk(tmp_path)
    yield found
    found.close()


@pytest.fixture
def file(disk: LocalDisk) -> LocalFile:
    return disk.open("file", create=True)


# -- files ---------------------------------------------------------------------------------------


def test_what_is_written_is_read_in_every_way(file: LocalFile) -> None:
    raw = random.Random(1).randbytes(20_000)
    file.pwritev([raw[:5000], memoryview(raw)[5000:5001], bytearray(raw[5001:])], 12_288)
    assert file.size == 32_288
    assert file.pread(20_000, 12_288) == raw
    assert file.pread(100, 32_238) == raw[-50:]
    buffer = bytearray(20_000)
    assert file.preadv(buffer, 12_288) == 20_000
    assert buffer == raw
    assert file.pread_direct(4096, 12_288) == raw[:4096]
    buffer = bytearray(4096)
    if file.preadv_cached(buffer, 12_288) > 0:
        assert buffer == raw[:4096]


def test_many_places_are_read_from_the_page_cache_at_once(file: LocalFile) -> None:
    raw = random.Random(1).randbytes(40_000)
    file.pwritev([raw], 0)
    parts = [[bytearray(4096)], [bytearray(100), bytearray(5000)], [bytearray(1)]]
    if file.preadv_cached_all(parts, [8192, 30_000, 7], 9197):
        assert parts == [[raw[8192:12_288]], [raw[30_000:30_100], raw[30_100:35_100]], [raw[7:8]]]
    # One that ends beyond the file is not made up for by any other.
    assert not file.preadv_cached_all([[bytearray(10)], [bytearray(10)]], [39_995, 0], 20)
    assert not file.preadv_cached_all([[bytearray(10)], [bytearray(10)]], [0, 50_000], 20)


def test_reading_beyond_the_end_gives_what_there_is(file: LocalFile) -> None:
    file.pwritev([b"x" * 5000], 0)
    buffer = bytearray(8192)
    assert file.preadv(buffer, 0) == 5000
    assert file.preadv_cached(bytearray(8192), 0) in (5000, -1)
    assert file.preadv_cached(bytearray(8192), 8192) in (0, -1)
    assert file.pread(10, 100_000) == b""
    assert file.pread_direct(4096, 4096) == b"x" * 904
    assert file.pread_direct(4096, 8192) == b""


def test_more_buffers_than_the_kernel_takes_at_once(file: LocalFile) -> None:
    buffers = [bytes([n % 251]) * 7 for n in range(3 * IOV_MAX + 5)]
    file.pwritev(buffers, 3)
    assert file.pread(100_000, 3) == b"".join(buffers)


def test_a_short_write_is_completed(file: LocalFile, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev

    def short(fd: int, buffers: list[bytes], offset: int) -> int:
        return real(fd, [b"".join(buffers)[:5]], offset)

    monkeypatch.setattr(os, "pwritev", short)
    file.pwritev([b"hello ", b"world"], 0)
    assert file.pread(20, 0) == b"hello world"


def test_punching_gives_space_back_and_reads_as_zeros(file: LocalFile) -> None:
    file.pwritev([b"x" * 4 * MIB], 0)
    file.fdatasync()
    before = file.allocated
    if not file.punch(MIB, 2 * MIB):
        assert file.pread(1, MIB) == b"x"  # a filesystem without holes: nothing is done
        return
    assert file.allocated <= before - 2 * MIB + 65536
    assert file.size == 4 * MIB
    assert file.pread(4 * MIB, 0) == b"x" * MIB + bytes(2 * MIB) + b"x" * MIB


def test_holes_are_not_held(file: LocalFile) -> None:
    file.truncate(8 * MIB)
    file.pwritev([b"x" * MIB], MIB)
    file.pwritev([b"x" * MIB], 4 * MIB)
    if not file.punch(MIB, 0x1000):
        pytest.skip("a filesystem without holes")
    assert file.held(0, 8 * MIB) == [(MIB + 0x1000, 2 * MIB), (4 * MIB, 5 * MIB)]
    assert file.held(3 * MIB // 2, 3 * MIB) == [(3 * MIB // 2, 2 * MIB), (4 * MIB, 9 * MIB // 2)]
    assert file.held(2 * MIB, 2 * MIB) == file.held(6 * MIB, 8 * MIB) == []


def test_all_is_held_where_nobody_can_tell(
    file: LocalFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: int) -> int:
        raise OSError(errno.EINVAL, "no such whence")

    monkeypatch.setattr(os, "lseek", refused)
    assert file.held(5, 10) == [(5, 15)]


CALLS: dict[str, Callable[[LocalFile], Any]] = {
    "pwritev": lambda f: f.pwritev([b"x"], 0),
    "ftruncate": lambda f: f.truncate(5),
    "fdatasync": lambda f: f.fdatasync(),
    "pread": lambda f: f.pread(1, 0),
    "preadv": lambda f: f.preadv(bytearray(1), 0),
}
ERRORS = [
    ("pwritev", errno.ENOSPC, NoSpace),
    ("pwritev", errno.EDQUOT, NoSpace),
    ("pwritev", errno.EFBIG, NoSpace),
    ("pwritev", errno.EIO, WriteFailed),
    ("ftruncate", errno.ENOSPC, NoSpace),
    ("ftruncate", errno.EIO, WriteFailed),
    ("fdatasync", errno.EIO, WriteFailed),
    ("fdatasync", errno.ENOSPC, WriteFailed),  # the pages are dropped: there is no second try
    ("pread", errno.EIO, ReadFailed),
    ("preadv", errno.EIO, ReadFailed),
]


@pytest.mark.parametrize(("call", "code", "expected"), ERRORS)
def test_errors_of_the_system_are_told_in_the_stores_words(
    file: LocalFile,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    code: int,
    expected: type[StoreError],
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(expected, match=f"file: {os.strerror(code)}") as caught:
        CALLS[call](file)
    assert type(caught.value) is expected


async def test_after_a_failed_sync_none_says_that_all_is_well(
    disk: LocalDisk, file: LocalFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of an error once, and takes the pages that it lost for clean."""
    running: list[int] = []

    def fail_once(_fd: int) -> None:
        running.append(1)
        assert sum(running) == 1, "two syncs at once: one of them would not learn of an error"
        time.sleep(0.01)
        running.append(-1)
        if len(running) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail_once)
    syncs = [disk.offload(file.fdatasync) for _ in range(4)]
    outcomes = await asyncio.gather(*syncs, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [WriteFailed] * 4
    with pytest.raises(WriteFailed, match="earlier"):
        file.fdatasync()


def test_a_filesystem_that_wants_another_alignment_is_read_through_the_cache(
    file: LocalFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    file.pwritev([b"x" * 8192], 0)
    monkeypatch.setattr(os, "preadv", refuse)
    assert file.pread_direct(4096, 4096) == b"x" * 4096


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EOPNOTSUPP])
def test_a_read_that_would_wait_or_cannot_be_asked_not_to_is_no_error(
    file: LocalFile, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "preadv", fail)
    assert file.preadv_cached(bytearray(10), 0) == -1
    assert not file.preadv_cached_all([[bytearray(10)], [bytearray(10)]], [0, 10], 20)


def test_an_error_of_a_cached_read_is_one(file: LocalFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ReadFailed):
        file.preadv_cached(bytearray(10), 0)
    assert not file.preadv_cached_all([[bytearray(10)], [bytearray(10)]], [0, 10], 20)


# -- directories ---------------------------------------------------------------------------------


def test_a_missing_directory_and_a_file_in_its_place_are_store_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(StoreError, match=str(place)):
            LocalDisk(place)


def test_creating_what_exists_and_opening_what_does_not_are_store_errors(disk: LocalDisk) -> None:
    disk.open("a", create=True)
    with pytest.raises(StoreError, match="a: File exists"):
        disk.open("a", create=True)
    with pytest.raises(StoreError, match="b: No such file"):
        disk.open("b")
    assert disk.exists("a") and not disk.exists("b")
    disk.rename("a", "b")
    disk.sync()
    assert disk.exists("b") and not disk.exists("a")
    disk.remove("b")
    assert not disk.exists("b")


def test_a_name_that_cannot_be_changed_is_a_store_error(disk: LocalDisk) -> None:
    with pytest.raises(WriteFailed, match="missing"):
        disk.remove("missing")
    with pytest.raises(WriteFailed, match="missing"):
        disk.rename("missing", "new")


def test_new_directories_are_durable_in_their_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []

    def fsync(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink())

    monkeypatch.setattr(os, "fsync", fsync)
    assert LOCAL.make_directory(tmp_path / "a" / "b")
    assert not LOCAL.make_directory(tmp_path / "a" / "b")
    assert sorted(synced) == [tmp_path, tmp_path / "a"]


def test_the_lock_is_for_one_and_free_again_after_it(tmp_path: Path) -> None:
    first, second = LocalDisk(tmp_path), LocalDisk(tmp_path)
    first.lock()
    with pytest.raises(PoolLocked, match=f"pid {os.getpid()}"):
        second.lock()
    first.close()
    second.lock()
    second.close()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from nbdstore.store.local_host import LocalDisk\n"
        "disk = LocalDisk(Path(sys.argv[1]))\n"
        "disk.lock()\nprint('locked', flush=True)\ntime.sleep(60)"
    )
    holder = subprocess.Popen(
        ["python3", "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(os.sys.path)},  # type: ignore[attr-defined]
    )
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == b"locked\n"
        disk = LocalDisk(tmp_path)
        with pytest.raises(PoolLocked, match=f"pid {holder.pid}"):
            disk.lock()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        disk.lock()
        disk.close()


# -- errors that only a real filesystem makes ------------------------------------------------------


@pytest.fixture
def small_filesystem(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 24 MiB."""
    place = tmp_path / "mount"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24M", "none", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.requires("root")
async def test_a_full_filesystem_holds_writes_until_there_is_space(small_filesystem: Path) -> None:
    place = make_pool(small_filesystem / "pool", 256 * MIB)
    ballast = small_filesystem / "ballast"
    ballast.write_bytes(bytes(10 * MIB))
    async with opened(place) as pool:
        volume = await pool.create_volume("v", 64 * MIB)
        await volume.write(0, b"1" * 8 * MIB)
        await volume.flush()
        content = b"1" * 8 * MIB
        held = asyncio.create_task(volume.write(8 * MIB, b"2" * 8 * MIB))
        await until(lambda: pool.status()["state"] == "full")
        assert not held.done()
        assert await read(volume, 0, 8 * MIB) == content
        ballast.unlink()
        await held
        assert await read(volume, 0, 16 * MIB) == content + b"2" * 8 * MIB
    await assert_clean(place)


@pytest.mark.requires("root")
async def test_a_pool_on_a_full_filesystem_closes_opens_trims_and_goes_on(
    small_filesystem: Path,
) -> None:
    place = make_pool(small_filesystem / "pool", 256 * MIB)
    async with opened(place, on_full="error") as pool:
        volume = await pool.create_volume("v", 64 * MIB)
        n_written = 0
        with pytest.raises(NoSpace, match="filesystem under"):
            while True:
                await volume.write(n_written * MIB, bytes([n_written + 1]) * MIB)
                n_written += 1
        assert n_written > 15
    await assert_clean(place)
    async with opened(place, on_full="error") as pool:
        volume = pool.volumes["v"]
        for n in range(n_written):
            assert await read(volume, n * MIB, MIB) == bytes([n + 1]) * MIB
        await volume.trim(0, 5 * MIB)
        await pool._committer.settle()
        await volume.write(20 * MIB, b"x" * 3 * MIB)
    await assert_clean(place)


@pytest.mark.requires("root")
def test_a_filesystem_that_is_too_small_for_the_pool_is_left_empty(small_filesystem: Path) -> None:
    with pytest.raises(NoSpace):
        Pool.create(small_filesystem / "pool", journal_size=128 * MIB)
    assert list(small_filesystem.iterdir()) == []


async def test_the_limit_of_a_files_size_is_a_full_disk(directory: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        async with opened(directory, on_full="error") as pool:
            volume = await pool.create_volume("v", 64 * MIB)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, limits[1]))
            with pytest.raises(NoSpace):
                for n in range(10):
                    await volume.write(n * MIB, b"x" * MIB)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            await volume.write(10 * MIB, b"y" * MIB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    await assert_clean(directory)
