"""Pools: made, refused, locked, opened and closed."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from unittest import mock

import pytest
import xxhash

from nbdstore.errors import (
    AlreadyExists,
    InvalidArgument,
    NoSpace,
    PoolFormatError,
    PoolLocked,
    StoreError,
)
from nbdstore.sizes import exact_size
from nbdstore.store import Pool, PoolOptions
from nbdstore.store.local_host import LocalDisk
from tests.store.pools import (
    MIB,
    assert_clean,
    check,
    findings,
    hooked,
    make_pool,
    opened,
    read,
)

BLOCK = 4096


# -- making ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [4096, 8192, 16384, 32768, 65536])
async def test_a_new_pool_is_empty_and_clean(tmp_path: Path, block_size: int) -> None:
    place = make_pool(tmp_path / "p", block_size=block_size)
    assert sorted(path.name for path in place.iterdir()) == ["data", "journal", "lock", "super"]
    assert (place / "journal").read_bytes() == bytes(MIB)
    await assert_clean(place)
    async with opened(place) as pool:
        status = pool.status()
        assert pool.volumes == {}
        assert status["capacity"] == 64 * MIB
        assert status["block_size"] == block_size
        assert status["state"] == "ok"
        assert status["fill"] < 0.2
    await assert_clean(place)


def test_a_pool_is_for_its_owner_alone(tmp_path: Path) -> None:
    place = make_pool(tmp_path / "p")
    assert place.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in place.iterdir())


def test_an_empty_directory_and_one_to_be_made_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty" / "lost+found").mkdir(parents=True)
    make_pool(tmp_path / "empty")
    make_pool(tmp_path / "not" / "there" / "yet")


async def test_the_default_capacity_is_the_filesystem(tmp_path: Path) -> None:
    Pool.create(tmp_path / "p", journal_size=MIB)
    stat = os.statvfs(tmp_path)
    async with opened(tmp_path / "p") as pool:
        assert abs(pool.status()["capacity"] - stat.f_blocks * stat.f_frsize) < 65536


REFUSED = [
    {"block_size": 0},
    {"block_size": 512},
    {"block_size": 2048},
    {"block_size": 5000},
    {"block_size": 131072},
    {"block_size": -4096},
    {"capacity": 0},
    {"capacity": -1},
    {"capacity": (16 << 20) - 1},
    {"capacity": 1 << 62},
    {"journal_size": 0},
    {"journal_size": (1 << 20) - 4096},
    {"journal_size": (1 << 20) + 1},
    {"journal_size": 65 << 30},
]


@pytest.mark.parametrize("values", REFUSED, ids=str)
def test_values_that_make_no_sense_are_refused_and_leave_nothing(
    tmp_path: Path, values: dict[str, int]
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Pool.create(tmp_path / "p", **values)  # type: ignore[arg-type]
    assert exact_size(*values.values()) in str(caught.value)
    assert not (tmp_path / "p").exists()


def test_a_second_pool_in_one_place_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    place = make_pool(tmp_path / "p")
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(AlreadyExists):
        make_pool(place)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before


def test_a_directory_with_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InvalidArgument, match=r"thesis\.tex"):
        make_pool(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("x")
    with pytest.raises(InvalidArgument):
        make_pool(tmp_path / "p")
    with pytest.raises(StoreError):
        make_pool(tmp_path / "p" / "below")


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("operation", "name"), [("write", "journal"), ("sync", "data"), ("write", "super.new")]
)
def test_a_failed_create_leaves_nothing_behind(
    tmp_path: Path, existing: bool, operation: str, name: str
) -> None:
    def hook(done: str, file: str) -> None:
        if (done, file) == (operation, name):
            raise NoSpace("no space left on device")

    if existing:
        (tmp_path / "p").mkdir()
    with hooked(hook), pytest.raises(NoSpace):
        make_pool(tmp_path / "p")
    if existing:
        assert {path.name for path in (tmp_path / "p").iterdir()} <= {"lock"}
    else:
        assert not (tmp_path / "p").exists()
    make_pool(tmp_path / "p")


def test_a_create_that_meets_another_one_leaves_its_files_alone(tmp_path: Path) -> None:
    other = LocalDisk(tmp_path)
    other.lock()
    try:
        with pytest.raises(PoolLocked):
            make_pool(tmp_path)
        assert (tmp_path / "lock").exists()
    finally:
        other.close()


def test_what_another_create_made_meanwhile_is_not_removed(tmp_path: Path) -> None:
    """The other one is done between our look at the directory and our lock."""
    real = LocalDisk.lock

    def lock(self: LocalDisk) -> None:
        with mock.patch.object(LocalDisk, "lock", real):
            make_pool(tmp_path / "other")
        for path in (tmp_path / "other").iterdir():
            path.rename(tmp_path / "p" / path.name)
        real(self)

    with mock.patch.object(LocalDisk, "lock", lock), pytest.raises(StoreError):
        make_pool(tmp_path / "p")
    assert {path.name for path in (tmp_path / "p").iterdir()} >= {"super", "journal", "data"}


# -- opening ---------------------------------------------------------------------------------------


async def test_where_there_is_no_pool_none_is_opened(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(PoolFormatError, match="pool create"):
            await Pool.open(place)
    assert list(tmp_path.iterdir()) == []


async def test_a_second_opener_is_refused_by_the_pid_of_the_first(directory: Path) -> None:
    async with opened(directory):
        with pytest.raises(PoolLocked, match=str(os.getpid())):
            await Pool.open(directory)
    async with opened(directory):
        pass


def with_field(directory: Path, offset: int, value: int) -> None:
    """Set a field of both superblocks, and their checksums."""
    raw = bytearray((directory / "super").read_bytes())
    for copy in (0, 4096):
        struct.pack_into("<I", raw, copy + offset, value)
        digest = xxhash.xxh3_64_intdigest(bytes(raw[copy : copy + 4088]))
        struct.pack_into("<Q", raw, copy + 4088, digest)
    (directory / "super").write_bytes(raw)


@pytest.mark.parametrize(("offset", "value"), [(8, 2), (8, 0), (20, 3), (20, 1 << 31)])
async def test_a_newer_format_is_refused_untouched(
    directory: Path, offset: int, value: int
) -> None:
    with_field(directory, offset, value)
    before = {n: (directory / n).read_bytes() for n in ("super", "journal", "data")}
    with pytest.raises(PoolFormatError, match="newer"):
        await Pool.open(directory)
    with pytest.raises(PoolFormatError, match="newer"):
        await check(directory, repair=True)
    assert {n: (directory / n).read_bytes() for n in before} == before


async def test_an_unknown_feature_that_forbids_writing_lets_a_check_read(directory: Path) -> None:
    with_field(directory, 16, 4)
    before = {n: (directory / n).read_bytes() for n in ("super", "journal", "data")}
    with pytest.raises(PoolFormatError, match="check"):
        await Pool.open(directory)
    assert findings(await check(directory)) == []
    assert {n: (directory / n).read_bytes() for n in before} == before


async def test_repair_does_not_write_to_a_pool_with_an_unknown_feature(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        volume.info.n_mapped += 5  # something to repair
    with_field(directory, 16, 4)
    before = {n: (directory / n).read_bytes() for n in ("super", "journal", "data")}
    try:
        report = await check(directory, repair=True)
        assert not report.clean
    except PoolFormatError:
        pass
    assert {n: (directory / n).read_bytes() for n in before} == before


async def test_an_unknown_compatible_feature_is_ignored_and_kept(directory: Path) -> None:
    with_field(directory, 12, 64)
    async with opened(directory) as pool:
        await pool.create_volume("v", MIB)
    raw = (directory / "super").read_bytes()
    assert [struct.unpack_from("<I", raw, copy + 12)[0] for copy in (0, 4096)] == [64, 64]


async def test_opening_and_closing_leaves_no_descriptor_and_no_thread(directory: Path) -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    async with opened(directory) as pool:
        await pool.create_volume("v", MIB)
    before = open_files()
    for _ in range(5):
        async with opened(directory) as pool:
            await read(pool.volumes["v"])
        await check(directory)
    assert open_files() <= before + 1  # asyncio.to_thread may have begun a thread


async def test_a_failed_open_leaves_no_descriptor_and_no_lock(directory: Path) -> None:
    journal = (directory / "journal").read_bytes()
    (directory / "journal").write_bytes(b"")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with pytest.raises(StoreError):
            await Pool.open(directory)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    (directory / "journal").write_bytes(journal)
    async with opened(directory):
        pass


async def test_two_pools_live_side_by_side(tmp_path: Path) -> None:
    one, two = make_pool(tmp_path / "one"), make_pool(tmp_path / "two", block_size=65536)
    async with opened(one) as first, opened(two) as second:
        volumes = [await pool.create_volume("v", MIB) for pool in (first, second)]
        for number, volume in enumerate(volumes):
            assert volume.write_now([(0, bytes([number + 1]) * 100_000)])
            await volume.flush()
        for number, volume in enumerate(volumes):
            assert await read(volume, 0, 100_000) == bytes([number + 1]) * 100_000
        assert first.status()["uuid"] != second.status()["uuid"]


async def test_closing_twice_is_closing_once(directory: Path) -> None:
    pool = await Pool.open(directory)
    await pool.close()
    await pool.close()


async def test_a_clean_close_leaves_nothing_to_replay(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, b"x" * 100_000)
    report = await check(directory)
    assert (report.n_journal_records, report.n_volumes, report.n_blocks) == (0, 1, 25)


@pytest.mark.parametrize(
    "options",
    [{"on_full": "panic"}, {"map_memory": 1 << 20}, {"full_timeout_s": -1.0}],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        PoolOptions(**options)  # type: ignore[arg-type]
    assert str(*options.values()) in str(caught.value)
