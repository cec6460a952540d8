"""Reads: what is planned, what is cut, what waits; and that bad data never comes out."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstore.errors import Corruption, NotFound, ReadFailed, StoreError
from nbdstore.store import Pool, Volume
from nbdstore.store.layout import slots_of
from nbdstore.store.local_host import LocalFile
from nbdstore.store.misses import LONG_BYTES, Misses
from nbdstore.store.reading import _cut, _plan
from tests.store.pools import MIB, Calls, cold, hooked, make_pool, opened, read, read_now
from tests.store.workload import joined

BLOCK = 4096


# -- plans ---------------------------------------------------------------------------------------

PLANS = [
    ([7], [(0, 1, 7)]),
    ([0], [(0, 1, 0)]),
    ([7, 8, 9], [(0, 3, 7)]),
    ([0, 0, 0], [(0, 3, 0)]),
    ([0, 1], [(0, 1, 0), (1, 2, 1)]),
    ([1, 0, 0, 1], [(0, 1, 1), (1, 3, 0), (3, 4, 1)]),
    ([7, 7], [(0, 1, 7), (1, 2, 7)]),
    ([9, 8], [(0, 1, 9), (1, 2, 8)]),
    ([5, 6, 0, 0, 7, 8, 10], [(0, 2, 5), (2, 4, 0), (4, 6, 7), (6, 7, 10)]),
]


@pytest.mark.parametrize(("slots", "expected"), PLANS)
def test_a_plan_has_one_run_per_read(
    slots: list[int], expected: list[tuple[int, int, int]]
) -> None:
    assert _plan(np.array(slots, np.int64)) == expected


@given(st.lists(st.integers(0, 6), min_size=1))
def test_plans_cover_all_blocks_with_their_slots(slots: list[int]) -> None:
    covered = []
    for start, stop, slot in _plan(np.array(slots, np.int64)):
        assert start < stop
        covered += [slot + i if slot else 0 for i in range(stop - start)]
    assert covered == slots


@given(
    st.lists(st.one_of(st.integers(1, 50), st.binary(min_size=1, max_size=50)), min_size=1),
    st.data(),
)
def test_cutting_keeps_exactly_the_bytes_asked_for(
    segments: list[int | bytes], data: st.DataObject
) -> None:
    whole = joined(list(segments))
    skip = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, len(whole) - skip))
    found = _cut(list(segments), skip, length)
    assert joined(found) == whole[skip : skip + length]
    assert all(segment if isinstance(segment, int) else len(segment) for segment in found)


# -- both ways -----------------------------------------------------------------------------------


@pytest.fixture
async def filled(volume: Volume) -> Volume:
    """Data, holes and provisioned blocks, in scattered slots."""
    rng = random.Random(1)
    for _ in range(40):
        at = rng.randrange(volume.size // BLOCK - 16) * BLOCK
        assert volume.write_now([(at, rng.randbytes(rng.choice((BLOCK, 3 * BLOCK, 16 * BLOCK))))])
    await volume.write_zeroes(MIB, 20 * BLOCK, no_hole=True)
    return volume


@pytest.mark.parametrize("length", [1, 511, 4096, 4097, 100_000])
async def test_both_ways_return_the_same(filled: Volume, length: int) -> None:
    content = await read(filled)
    rng = random.Random(length)
    for _ in range(100):
        offset = rng.randrange(filled.size - length + 1)
        assert read_now(filled, offset, length) == content[offset : offset + length]
        assert await read(filled, offset, length) == content[offset : offset + length]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2), (1, 0, 2, 3)])
async def test_blocks_are_found_in_whatever_order_they_lie(
    volume: Volume, order: tuple[int, ...]
) -> None:
    content = random.Random(1).randbytes(4 * BLOCK)
    for block in order:
        part = content[block * BLOCK : (block + 1) * BLOCK]
        assert volume.write_now([(block * BLOCK, part)])
    slots = slots_of(volume.map.entries[:4, 0])
    assert (slots - slots.min()).tolist() == [order.index(block) for block in range(4)]
    for offset, length in [(0, 4 * BLOCK), (1, 4 * BLOCK - 2), (BLOCK, 2 * BLOCK)]:
        assert read_now(volume, offset, length) == content[offset : offset + length]
        assert await read(volume, offset, length) == content[offset : offset + length]


async def test_reads_of_nothing_and_to_the_very_end(filled: Volume) -> None:
    assert read_now(filled, 0, 0) == b""
    assert await read(filled, filled.size, 0) == b""
    assert read_now(filled, filled.size, 0) == b""
    assert read_now(filled, filled.size - 1, 1) == await read(filled, filled.size - 1, 1)


async def test_holes_and_provisioned_blocks_come_as_lengths(volume: Volume) -> None:
    assert volume.write_now([(2 * BLOCK, b"x" * BLOCK)])
    await volume.write_zeroes(3 * BLOCK, BLOCK, no_hole=True)
    for found in (volume.read_now(0, 5 * BLOCK), await volume.read(0, 5 * BLOCK)):
        assert found is not None
        assert [s if isinstance(s, int) else len(s) for s in found] == [8192, 4096, 8192]
        assert [isinstance(s, int) for s in found] == [True, False, True]


async def test_what_is_not_in_the_page_cache_is_read_by_the_way_that_waits(filled: Volume) -> None:
    content = await read(filled)
    with cold():
        assert filled.read_now(0, filled.size) is None
        assert await read(filled) == content


async def test_what_is_not_in_the_map_is_loaded_by_the_way_that_waits(
    pool: Pool, filled: Volume
) -> None:
    content = await read(filled)
    await pool.checkpoint()
    filled.map.evict(1 << 30)
    filled.map.nodes.evict(1 << 30)
    assert filled.read_now(0, 10) is None
    assert await read(filled) == content
    assert read_now(filled, 0, filled.size) == content


async def test_many_readers_load_a_leaf_once_evicted_again_and_again(
    pool: Pool, filled: Volume
) -> None:
    content = await read(filled)
    await pool.checkpoint()

    async def reader(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(30):
            offset = rng.randrange(filled.size - 10_000)
            assert await read(filled, offset, 10_000) == content[offset : offset + 10_000]
            filled.map.evict(rng.randrange(10))
            filled.map.nodes.evict(1)

    await asyncio.gather(*map(reader, range(10)))


async def test_a_tiny_memory_for_maps_serves_a_wide_volume(tmp_path: Path) -> None:
    make_pool(tmp_path / "p", block_size=65536, journal_size=4 * MIB)
    n_leaves = 600  # of 64 KiB each: more than twice the memory
    async with opened(tmp_path / "p", map_memory=16 * MIB) as pool:
        volume = await pool.create_volume("v", n_leaves * (256 << 20))
        for n in range(0, n_leaves, 2):
            await volume.write(n * (256 << 20), b"%d" % n)
        await pool.checkpoint()
        for n in range(n_leaves):
            expected = b"%d" % n if n % 2 == 0 else bytes(3)
            assert await read(volume, n * (256 << 20), len(expected)) == expected
            assert volume.map.n_resident <= 256


async def test_caching_loads_the_map_and_asks_the_kernel(pool: Pool, filled: Volume) -> None:
    await pool.checkpoint()
    filled.map.evict(1 << 30)
    await filled.cache(0, filled.size)
    assert filled.read_now(0, 10) is not None
    await filled.cache(0, 0)


@contextmanager
def arriving(n_bytes: int) -> Iterator[list[tuple[int, int]]]:
    """While this lasts, `n_bytes` come between two looks at a read.

    Tells (offset, length) of what was taken from the page cache.
    """
    taken: list[tuple[int, int]] = []
    looks = itertools.count()
    real = LocalFile.preadv

    def preadv_cached(file: LocalFile, buffer: memoryview, offset: int) -> int:
        if next(looks) % 2 == 0:
            return -1
        done = real(file, memoryview(buffer)[:n_bytes], offset)
        taken.append((offset, done))
        return done

    with mock.patch.object(LocalFile, "preadv_cached", preadv_cached):
        yield taken


@pytest.mark.parametrize("n_bytes", [4096, 12_288, 5000])
async def test_what_comes_bit_by_bit_is_taken_once_and_without_a_thread(
    filled: Volume, n_bytes: int
) -> None:
    content = await read(filled)
    no_thread = mock.patch.object(LocalFile, "preadv", side_effect=AssertionError)
    with arriving(n_bytes) as taken, no_thread:
        assert await read(filled) == content
    pages = [page for at, length in taken for page in range(at, at + length)]
    assert len(pages) == len(set(pages))


async def test_a_long_read_is_left_to_the_way_that_waits_while_others_wait(volume: Volume) -> None:
    content = random.Random(4).randbytes(MIB)
    assert volume.write_now([(0, content)])
    with mock.patch.object(Misses, "are_waiting", True):
        assert volume.read_now(0, LONG_BYTES) is None
        assert read_now(volume, 0, LONG_BYTES - BLOCK) == content[: LONG_BYTES - BLOCK]
        assert await read(volume, 0, MIB) == content
    assert read_now(volume, 0, MIB) == content


async def test_reads_side_by_side_get_each_its_own(filled: Volume) -> None:
    content = await read(filled)
    places = [(at, 40_000) for at in range(100, filled.size - 40_000, 33_333)]
    with arriving(8192):
        found = await asyncio.gather(*(read(filled, *place) for place in places))
    assert found == [content[at : at + length] for at, length in places]


async def test_the_disk_is_asked_for_all_runs_of_a_read_before_the_first_has_come(
    volume: Volume,
) -> None:
    for block in (9, 4, 7, 0):
        assert volume.write_now([(block * BLOCK, bytes([block]) * BLOCK)])
    asked = []
    with cold(), mock.patch.object(LocalFile, "will_need", lambda _, *range_: asked.append(range_)):
        content = await read(volume, 0, 10 * BLOCK)
    assert [content[block * BLOCK] for block in (0, 4, 7, 9)] == [0, 4, 7, 9]
    assert asked == [(place_of(volume, block), BLOCK) for block in (0, 4, 7, 9)]


async def test_what_is_damaged_when_it_comes_is_read_again_and_is_corruption(
    directory: Path,
) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        assert volume.write_now([(0, b"x" * 10 * BLOCK)])
        await volume.flush()
        damage(directory, place_of(volume, 5))
        with arriving(3 * BLOCK), pytest.raises(Corruption, match=f"at byte {5 * BLOCK} "):
            await volume.read(0, 10 * BLOCK)
        with arriving(3 * BLOCK):
            assert await read(volume, 0, 5 * BLOCK) == b"x" * 5 * BLOCK
            assert await read(volume, 6 * BLOCK, 4 * BLOCK) == b"x" * 4 * BLOCK


async def test_what_was_damaged_in_the_page_cache_when_it_came_is_healed(volume: Volume) -> None:
    content = random.Random(3).randbytes(10 * BLOCK)
    assert volume.write_now([(0, content)])
    real = LocalFile.preadv

    def damaging(file: LocalFile, buffer: memoryview, offset: int) -> int:
        done = real(file, buffer, offset)
        memoryview(buffer)[10:20] = b"bad memory"
        return done

    with arriving(3 * BLOCK), mock.patch.object(LocalFile, "preadv_cached", damaging):
        assert await read(volume, 0, 10 * BLOCK) == content


# -- while blocks move ---------------------------------------------------------------------------


async def test_what_a_reader_has_planned_stays_until_it_is_done(pool: Pool, volume: Volume) -> None:
    """Overwritten, trimmed, settled and written elsewhere: the reader sees what was."""
    content = random.Random(2).randbytes(volume.size)
    await volume.write(0, content)
    with cold():
        readers = [asyncio.create_task(read(volume, at, 65536)) for at in range(0, MIB, 65536)]
        await asyncio.sleep(0)
        for number in range(8):
            assert volume.write_now([(0, bytes([number]) * MIB)])
            await pool._committer.settle()
        for at, found in zip(range(0, MIB, 65536), await asyncio.gather(*readers), strict=True):
            assert found == content[at : at + 65536]
    assert await read(volume, 0, MIB) == b"\7" * MIB
    assert await read(volume, MIB) == content[MIB:]


async def test_a_deleted_volume_refuses_reads(pool: Pool, volume: Volume) -> None:
    await pool.delete_volume(volume)
    with pytest.raises(NotFound):
        volume.read_now(0, 1)
    with pytest.raises(NotFound):
        await volume.read(0, 1)


async def test_a_read_beyond_a_shrunk_volume_is_an_error(pool: Pool, volume: Volume) -> None:
    await pool.resize_volume(volume, MIB)
    with pytest.raises(StoreError):
        volume.read_now(MIB - 1, 2)
    with pytest.raises(StoreError):
        await volume.read(2 * MIB, 1)


# -- damage --------------------------------------------------------------------------------------


def place_of(volume: Volume, block: int) -> int:
    """The byte of the data file where a block lies."""
    return int(slots_of(volume.map.entries[block : block + 1, 0])[0]) * volume.block_size


def damage(directory: Path, place: int) -> None:
    with (directory / "data").open("r+b") as file:
        file.seek(place + 1000)
        file.write(b"damaged")


async def test_a_damaged_block_is_corruption_and_never_data(
    directory: Path, tmp_path: Path
) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        assert volume.write_now([(0, b"x" * 10 * BLOCK)])
        await volume.flush()
        damage(directory, place_of(volume, 5))
        assert read_now(volume, 0, 5 * BLOCK) == b"x" * 5 * BLOCK
        assert volume.read_now(5 * BLOCK, BLOCK) is None
        assert volume.read_now(4 * BLOCK, 3 * BLOCK) is None
        for offset, length in [(5 * BLOCK, BLOCK), (0, 10 * BLOCK), (5 * BLOCK + 100, 1)]:
            with pytest.raises(Corruption, match=f"volume v at byte {5 * BLOCK} "):
                await volume.read(offset, length)
        with pytest.raises(Corruption):  # a merge must not seal the damage with a new checksum
            await volume.write(5 * BLOCK + 1, b"y")
        assert pool.status()["corruptions"] == 4
        await volume.write(5 * BLOCK, b"z" * BLOCK)  # writing it whole heals it
        assert await read(volume, 0, 10 * BLOCK) == b"x" * 5 * BLOCK + b"z" * BLOCK + b"x" * 16384


async def test_damage_in_the_page_cache_alone_is_healed_by_reading_again(volume: Volume) -> None:
    assert volume.write_now([(0, b"x" * 4 * BLOCK)])
    real = volume.core.data.preadv

    def damaging(buffer: memoryview, offset: int) -> int:
        done = real(buffer, offset)
        buffer[10:20] = b"bad memory"
        return done

    volume.core.data.preadv = damaging  # type: ignore[method-assign, assignment]
    with cold():
        assert await read(volume, 0, 4 * BLOCK) == b"x" * 4 * BLOCK


async def test_a_data_file_cut_short_is_corruption(directory: Path) -> None:
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        assert volume.write_now([(0, b"x" * 10 * BLOCK)])
        with (directory / "data").open("r+b") as file:
            file.truncate(place_of(volume, 7) + 100)
        assert await read(volume, 0, 7 * BLOCK) == b"x" * 7 * BLOCK
        for block in (7, 8):
            with pytest.raises(Corruption, match="bytes"):
                await volume.read(block * BLOCK, BLOCK)


async def test_an_error_of_the_disk_is_an_error_of_the_read_and_no_more(directory: Path) -> None:
    broken = False

    def hook(operation: str, name: str) -> None:
        if broken and operation == "read" and name == "data":
            raise ReadFailed("data: Input/output error while reading")

    with hooked(hook), cold():
        async with opened(directory) as pool:
            volume = await pool.create_volume("v", MIB)
            assert volume.write_now([(0, b"x" * BLOCK)])
            broken = True
            with pytest.raises(ReadFailed):
                await volume.read(0, 10)
            with pytest.raises(ReadFailed):
                await volume.write(10, b"merge")
            assert volume.write_now([(BLOCK, b"y" * BLOCK)])
            broken = False
            assert await read(volume, 0, 2 * BLOCK) == b"x" * BLOCK + b"y" * BLOCK
            assert pool.status()["state"] == "ok"


async def test_a_read_from_the_page_cache_takes_one_call_per_run(directory: Path) -> None:
    calls = Calls()
    with hooked(calls):
        async with opened(directory) as pool:
            volume = await pool.create_volume("v", MIB)
            assert volume.write_now([(0, b"x" * 100 * BLOCK)])
            calls.clear()
            assert read_now(volume, 0, 100 * BLOCK) == b"x" * 100 * BLOCK
            assert calls == [("cached", "data")]


async def test_scattered_blocks_are_read_at_once_between_zeros(directory: Path) -> None:
    calls = Calls()
    with hooked(calls):
        async with opened(directory) as pool:
            volume = await pool.create_volume("v", MIB)
            raw = random.Random(1).randbytes(40 * BLOCK)
            for block in random.Random(2).sample(range(40), 40):
                if block not in (20, 21, 30):
                    place = slice(block * BLOCK, (block + 1) * BLOCK)
                    assert volume.write_now([(place.start, raw[place])])
            assert volume.write_now([(35 * BLOCK, raw[35 * BLOCK :])])  # a run among them
            calls.clear()
            found = volume.read_now(100, 40 * BLOCK - 200)
            assert found is not None
            sizes = [s if isinstance(s, int) else len(s) for s in found]
            assert sizes == [20 * BLOCK - 100, 2 * BLOCK, 8 * BLOCK, BLOCK, 9 * BLOCK - 100]
            assert calls == [("cached", "data")] * 3
            expected = bytearray(raw)
            expected[20 * BLOCK : 22 * BLOCK] = bytes(2 * BLOCK)
            expected[30 * BLOCK : 31 * BLOCK] = bytes(BLOCK)
            assert joined(found) == expected[100:-100]


async def test_of_scattered_blocks_the_one_that_cannot_be_read_is_named(
    volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    for block in (0, 2, 1, 3):
        assert volume.write_now([(block * BLOCK, bytes([block]) * BLOCK)])
    bad, real = place_of(volume, 2), os.preadv

    def fail(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if offset == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", fail)
    assert volume.read_now(0, 4 * BLOCK) is None
    with pytest.raises(ReadFailed, match=f"at byte {bad}:"):
        await volume.read(0, 4 * BLOCK)
    assert read_now(volume, 0, 2 * BLOCK) == bytes(BLOCK) + b"\1" * BLOCK


@pytest.mark.parametrize("is_scattered", [False, True])
async def test_what_was_read_stays_as_it_is_while_others_are_read(
    volume: Volume, is_scattered: bool
) -> None:
    raw = random.Random(1).randbytes(128 * BLOCK)
    for block in range(0, 128, 2 if is_scattered else 128):
        assert volume.write_now([(block * BLOCK, raw[block * BLOCK :])])
    kept = {at: volume.read_now(at * BLOCK, 32 * BLOCK) for at in range(0, 96, 8)}
    parts = {at: volume.read_now(at * BLOCK + 1, 32 * BLOCK - 2) for at in range(0, 96, 8)}
    for at in range(96):
        assert read_now(volume, at * BLOCK, 32 * BLOCK) == raw[at * BLOCK : (at + 32) * BLOCK]
    for at, found in kept.items():
        assert found is not None
        assert joined(found) == raw[at * BLOCK : (at + 32) * BLOCK]
    for at, found in parts.items():
        assert found is not None
        assert joined(found) == raw[at * BLOCK + 1 : (at + 32) * BLOCK - 1]


# -- verifying -----------------------------------------------------------------------------------


async def test_all_that_is_mapped_is_verified_and_nothing_else(tmp_path: Path) -> None:
    make_pool(tmp_path)
    async with opened(tmp_path) as pool:
        volume = await pool.create_volume("v", 64 * MIB)
        await volume.write(5 * BLOCK, bytes(range(256)) * 16 * 7)
        await volume.write(9 * MIB + 100, b"x")
        await volume.write_zeroes(20 * MIB, MIB, no_hole=True)
        verified = await volume.verify(0, volume.size)
        assert (verified.n_bytes, verified.faults) == (8 * BLOCK, [])
        assert (await volume.verify(6 * BLOCK + 1, BLOCK)).n_bytes == 2 * BLOCK
        assert (await volume.verify(30 * MIB, MIB)).n_bytes == 0
        with pytest.raises(StoreError, match="beyond its end"):
            await volume.verify(0, volume.size + 1)
        await pool.delete_volume(volume)
        with pytest.raises(NotFound):
            await volume.verify(0, BLOCK)


async def test_verifying_finds_each_damaged_block_and_goes_on(tmp_path: Path) -> None:
    make_pool(tmp_path)
    async with opened(tmp_path) as pool:
        volume = await pool.create_volume("v", 64 * MIB)
        await volume.write(0, random.Random(0).randbytes(20 * BLOCK))
        await volume.flush()
        slots = slots_of(volume.map.locations(0, 20)).tolist()
        for block in (3, 4, 19):
            damage(tmp_path, slots[block] * BLOCK)
        verified = await volume.verify(0, volume.size)
        assert verified.n_bytes == 20 * BLOCK
        assert [at for at, _ in verified.faults] == [3 * BLOCK, 4 * BLOCK, 19 * BLOCK]
        assert all(isinstance(fault, Corruption) for _, fault in verified.faults)
        assert "volume v at byte 12288" in str(verified.faults[0][1])
        assert pool.status()["corruptions"] == 3


async def test_a_snapshot_is_verified_as_it_was(tmp_path: Path) -> None:
    make_pool(tmp_path)
    async with opened(tmp_path) as pool:
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, b"a" * 2 * BLOCK)
        (snapshot,) = await pool.create_snapshots([(volume, "s")])
        await volume.trim(0, MIB)
        assert (await volume.verify(0, MIB)).n_bytes == 0
        assert (await snapshot.verify(0, MIB)).n_bytes == 2 * BLOCK


async def test_a_run_that_cannot_be_read_is_looked_at_block_by_block(tmp_path: Path) -> None:
    make_pool(tmp_path)
    async with opened(tmp_path) as pool:
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, b"a" * 4 * BLOCK)
        first = int(slots_of(volume.map.locations(0, 1))[0])
        real = pool._core.data.pread_direct

        def failing(length: int, offset: int) -> bytes:
            if offset <= (first + 2) * BLOCK < offset + length:
                raise ReadFailed("data: Input/output error")
            return real(length, offset)

        pool._core.data.pread_direct = failing  # type: ignore[method-assign]
        verified = await volume.verify(0, MIB)
        assert verified.n_bytes == 4 * BLOCK
        assert [(at, type(fault)) for at, fault in verified.faults] == [(2 * BLOCK, ReadFailed)]
