"""Range operations: trim, write_zeroes, and what a range holds; against a model block by block."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdstore.errors import NotFound
from nbdstore.store import Extent, ExtentKind, Pool, Volume
from nbdstore.store.core import Core
from nbdstore.store.writing import Hold
from tests.store.pools import (
    MIB,
    assert_clean,
    check,
    findings,
    killed,
    make_pool,
    opened,
    read,
)

HOLE, ZERO, DATA = ExtentKind.HOLE, ExtentKind.ZERO, ExtentKind.DATA
BLOCK = 4096
GIB = 1 << 30


async def extents(volume: Volume, offset: int = 0, length: int | None = None) -> list[Extent]:
    length = volume.size - offset if length is None else length
    return await volume.extents(offset, length, max_extents=1 << 30)


async def kinds(volume: Volume) -> list[tuple[int, ExtentKind]]:
    return [(extent.length, extent.kind) for extent in await extents(volume)]


# -- trim ----------------------------------------------------------------------------------------

TRIMS = [  # offset, length, first and last + 1 trimmed block
    (0, 0, 0, 0),
    (0, 4095, 0, 0),
    (0, 4096, 0, 1),
    (1, 4096, 0, 0),
    (1, 8191, 1, 2),
    (1, 8192, 1, 2),
    (4095, 4098, 1, 2),
    (8192, 12288, 2, 5),
    (100, 80_000, 1, 19),
]


@pytest.mark.parametrize(("offset", "length", "start", "stop"), TRIMS)
async def test_trim_shrinks_inwards_to_whole_blocks(
    pool: Pool, offset: int, length: int, start: int, stop: int
) -> None:
    volume = await pool.create_volume("t", 20 * BLOCK)
    content = bytearray(random.Random(1).randbytes(volume.size))
    assert volume.write_now([(0, content)])
    await volume.trim(offset, length)
    content[start * BLOCK : stop * BLOCK] = bytes((stop - start) * BLOCK)
    assert await read(volume) == content
    assert volume.status()["mapped"] == (20 - (stop - start)) * BLOCK


async def test_trim_to_the_end_takes_the_partial_last_block_with_it(pool: Pool) -> None:
    volume = await pool.create_volume("t", 3 * BLOCK + 512)
    assert volume.write_now([(0, b"x" * volume.size)])
    await volume.trim(2 * BLOCK + 1, volume.size - 2 * BLOCK - 1)
    assert await read(volume) == b"x" * 3 * BLOCK + bytes(512)
    assert volume.status()["mapped"] == 3 * BLOCK


async def test_trim_gives_the_space_back(pool: Pool, volume: Volume) -> None:
    before = pool.status()["used"]
    assert volume.write_now([(0, b"x" * MIB)])
    await volume.trim(0, volume.size)
    assert pool.status()["used"] == before
    assert volume.status()["mapped"] == 0


async def test_trimming_holes_does_nothing(volume: Volume) -> None:
    before = volume.last_seq
    await volume.trim(0, volume.size)
    await volume.write_zeroes(100, 100_000)
    assert volume.last_seq == before


# -- write_zeroes --------------------------------------------------------------------------------

ZEROES = [(0, 1), (1, 10), (4090, 12), (4096, 4096), (100, 8192), (1, 20 * BLOCK - 2), (4095, 4098)]


@pytest.mark.parametrize("no_hole", [False, True])
@pytest.mark.parametrize(("offset", "length"), ZEROES)
@pytest.mark.parametrize("before", ["data", "hole", "provisioned"])
async def test_write_zeroes_is_exact(
    pool: Pool, offset: int, length: int, no_hole: bool, before: str
) -> None:
    volume = await pool.create_volume("z", 20 * BLOCK)
    content = bytearray(volume.size)
    if before == "data":
        content[:] = random.Random(1).randbytes(volume.size)
        assert volume.write_now([(0, content)])
    elif before == "provisioned":
        await volume.write_zeroes(0, volume.size, no_hole=True)
    await volume.write_zeroes(offset, length, no_hole=no_hole)
    content[offset : offset + length] = bytes(length)
    assert await read(volume) == content
    if no_hole:
        assert all(e.kind is not HOLE for e in await extents(volume, offset, length))


async def test_zeroes_with_no_hole_keep_space_and_hold_no_data(pool: Pool, volume: Volume) -> None:
    free = pool.status()["free"]
    await volume.write_zeroes(0, MIB, no_hole=True)
    status = volume.status()
    assert (status["mapped"], status["reserved"]) == (0, MIB)
    assert pool.status()["free"] == free
    assert await kinds(volume) == [(MIB, ZERO), (7 * MIB, HOLE)]
    assert volume.write_now([(BLOCK, b"x" * BLOCK)])
    status = volume.status()
    assert (status["mapped"], status["reserved"]) == (BLOCK, MIB - BLOCK)
    await volume.trim(0, MIB)
    status = volume.status()
    assert (status["mapped"], status["reserved"]) == (0, 0)


async def test_zeroes_at_the_end_of_an_odd_volume(pool: Pool) -> None:
    volume = await pool.create_volume("odd", 5 * BLOCK + 1536)
    content = bytearray(b"x" * volume.size)
    assert volume.write_now([(0, content)])
    await volume.write_zeroes(4 * BLOCK + 7, BLOCK + 1529)
    content[4 * BLOCK + 7 :] = bytes(BLOCK + 1529)
    assert await read(volume) == content
    assert volume.status()["mapped"] == 5 * BLOCK  # the last one is a hole


@pytest.mark.parametrize("n_blocks", [44, 256, 300, 512, 555])
@pytest.mark.parametrize("back", [1, 10, 43])
async def test_provisioning_the_end_of_a_volume_promises_no_more_than_that(
    pool: Pool, n_blocks: int, back: int
) -> None:
    volume = await pool.create_volume("end", n_blocks * BLOCK)
    await volume.write_zeroes((n_blocks - back) * BLOCK, back * BLOCK, no_hole=True)
    assert volume.status()["reserved"] == back * BLOCK
    assert await kinds(volume) == [((n_blocks - back) * BLOCK, HOLE), (back * BLOCK, ZERO)]


# -- of any length -------------------------------------------------------------------------------


async def test_two_tebibytes_are_trimmed_zeroed_and_described_as_one(pool: Pool) -> None:
    volume = await pool.create_volume("huge", 2 << 40)
    places = [0, 3 * GIB, 1 << 40, (2 << 40) - BLOCK]
    assert volume.write_now([(place, b"x" * BLOCK) for place in places])
    assert [e.kind for e in await extents(volume)] == [DATA, HOLE, DATA, HOLE, DATA, HOLE, DATA]
    before = volume.core.journal.seq
    await volume.trim(1, volume.size - 1)
    assert volume.core.journal.seq - before < 20
    assert await kinds(volume) == [(BLOCK, DATA), ((2 << 40) - BLOCK, HOLE)]
    await volume.write_zeroes(0, volume.size)
    assert await kinds(volume) == [(2 << 40, HOLE)]
    assert volume.status()["mapped"] == 0


async def test_others_go_on_while_a_long_range_is_done(pool: Pool) -> None:
    volume = await pool.create_volume("wide", 1 << 40)
    assert volume.write_now([(n * GIB, b"x" * BLOCK) for n in range(1000)])
    trim = asyncio.create_task(volume.trim(0, volume.size))
    turns = 0
    while not trim.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 1000 // 64  # a part has so many leaves with entries at most


async def test_a_range_over_leaves_that_are_not_in_memory(pool: Pool) -> None:
    volume = await pool.create_volume("wide", 20 * GIB)
    assert volume.write_now([(n * 100 * MIB, b"x" * BLOCK) for n in range(200)])
    await volume.write_zeroes(5 * GIB, 10 * MIB, no_hole=True)
    expected = await kinds(volume)
    await pool.checkpoint()
    volume.map.evict(1 << 30)
    volume.map.nodes.evict(1 << 30)
    assert await kinds(volume) == expected
    await pool.checkpoint()
    volume.map.evict(1 << 30)
    volume.map.nodes.evict(1 << 30)
    await volume.trim(GIB, 19 * GIB - BLOCK)
    assert volume.status()["mapped"] == 11 * BLOCK
    assert volume.status()["reserved"] == 0


# -- room in the journal -------------------------------------------------------------------------


def fill(core: Core) -> None:
    """Take all the room that there is in the journal."""
    while core.journal.room_for(0):
        core.append(b"")


@contextmanager
def no_record_without_room(core: Core) -> Iterator[None]:
    append = core.append

    def checked(*groups: bytes) -> int:
        assert core.journal.room_for(sum(map(len, groups)))
        return append(*groups)

    with mock.patch.object(core, "append", checked):
        yield


async def test_a_trim_waits_for_room_that_others_took_while_it_read_the_map(tmp_path: Path) -> None:
    directory = make_pool(tmp_path / "pool")
    async with opened(directory) as pool:
        volume = await pool.create_volume("v", MIB)
        assert volume.write_now([(0, b"x" * MIB)])
    async with opened(directory) as pool:
        volume = pool.volumes["v"]
        load = volume.load

        async def load_slowly(start: int, stop: int) -> None:
            await load(start, stop)
            fill(pool._core)

        with mock.patch.object(volume, "load", load_slowly), no_record_without_room(pool._core):
            await volume.trim(0, MIB)
        assert await kinds(volume) == [(MIB, HOLE)]


async def test_zeroes_with_no_hole_wait_for_room_that_others_took_while_they_waited_for_space(
    pool: Pool, volume: Volume
) -> None:
    async def wait_for_slots(_hold: Hold) -> None:
        fill(pool._core)

    with (
        mock.patch.object(pool._core, "may_set_aside", side_effect=[False, True]),
        mock.patch.object(Hold, "wait_for_slots", wait_for_slots),
        no_record_without_room(pool._core),
    ):
        await volume.write_zeroes(0, MIB, no_hole=True)
    assert (await kinds(volume))[0] == (MIB, ZERO)


# -- extents -------------------------------------------------------------------------------------


async def test_extents_are_merged_and_cut_at_both_ends(volume: Volume) -> None:
    assert volume.write_now([(4 * BLOCK, b"x" * 3 * BLOCK), (7 * BLOCK, b"x" * BLOCK)])
    await volume.write_zeroes(8 * BLOCK, 2 * BLOCK, no_hole=True)
    assert await extents(volume, BLOCK + 5, 9 * BLOCK) == [
        Extent(3 * BLOCK - 5, HOLE),
        Extent(4 * BLOCK, DATA),
        Extent(2 * BLOCK, ZERO),
        Extent(5, HOLE),
    ]
    assert await extents(volume, 5 * BLOCK + 1, 1) == [Extent(1, DATA)]
    assert await extents(volume, 5, 0) == []


@pytest.mark.parametrize("most", [1, 2, 3, 5, 6, 7])
async def test_a_limited_number_of_extents_is_a_prefix(volume: Volume, most: int) -> None:
    assert volume.write_now([(n * 2 * BLOCK, b"x" * BLOCK) for n in range(3)])
    all_of_them = await extents(volume)
    assert len(all_of_them) == 6
    found = await volume.extents(0, volume.size, max_extents=most)
    assert found == all_of_them[:most]


async def test_going_on_behind_a_prefix_describes_the_whole_range(volume: Volume) -> None:
    rng = random.Random(4)
    assert volume.write_now([(rng.randrange(2000) * BLOCK, b"x" * BLOCK) for _ in range(500)])
    at, found = 0, []
    while at < volume.size:
        (extent,) = await volume.extents(at, volume.size - at, max_extents=1)
        found.append(extent)
        at += extent.length
    assert found == await extents(volume)


# -- against a model -----------------------------------------------------------------------------


class Model:
    """What each block of a volume is."""

    def __init__(self, size: int, block_size: int) -> None:
        self.block_size = block_size
        self.size = size
        self.kinds = [HOLE] * -(-size // block_size)
        self.content = bytearray(size)

    def _inside(self, offset: int, length: int) -> range:
        end = offset + length
        stop = len(self.kinds) if end == self.size else end // self.block_size
        return range(-(-offset // self.block_size), stop)

    def _touched(self, offset: int, length: int) -> range:
        return range(offset // self.block_size, -(-(offset + length) // self.block_size))

    def write(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data
        for block in self._touched(offset, len(data)):
            self.kinds[block] = DATA

    def trim(self, offset: int, length: int) -> None:
        for block in self._inside(offset, length):
            self.kinds[block] = HOLE
            start = block * self.block_size
            stop = min(start + self.block_size, self.size)
            self.content[start:stop] = bytes(stop - start)

    def zero(self, offset: int, length: int, no_hole: bool) -> None:
        self.content[offset : offset + length] = bytes(length)
        inside = self._inside(offset, length)
        for block in self._touched(offset, length) if length else ():
            if block in inside:
                self.kinds[block] = ZERO if no_hole else HOLE
            elif no_hole and self.kinds[block] is HOLE:
                self.kinds[block] = ZERO

    def extents(self, offset: int, length: int) -> list[Extent]:
        found: list[Extent] = []
        for block in self._touched(offset, length) if length else ():
            start = max(block * self.block_size, offset)
            n = min((block + 1) * self.block_size, offset + length) - start
            if found and found[-1].kind is self.kinds[block]:
                n += found.pop().length
            found.append(Extent(n, self.kinds[block]))
        return found

    def count(self, kind: ExtentKind) -> int:
        return self.kinds.count(kind) * self.block_size


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 1 << 32),
    block_size=st.sampled_from([4096, 4096, 65536]),
    size=st.integers(1, 8000).map(lambda n: n * 512),
)
def test_ranges_are_what_a_model_says(
    tmp_path_factory: pytest.TempPathFactory, seed: int, block_size: int, size: int
) -> None:
    rng = random.Random(seed)
    place = tmp_path_factory.mktemp("ranges")

    def a_range() -> tuple[int, int]:
        length = min(rng.choice((1, 512, 4096, 10_000, 300_000, size)), size)
        offset = rng.randrange(size - length + 1)
        if rng.random() < 0.5:
            offset -= offset % block_size
        return offset, size - offset if rng.random() < 0.2 else length

    async def main() -> None:
        async with opened(make_pool(place / "p", 32 * MIB, block_size=block_size)) as pool:
            volume = await pool.create_volume("v", size)
            model = Model(size, block_size)
            for _ in range(40):
                offset, length = a_range()
                await _do_something(rng, pool, volume, model, offset, length)
                offset, length = a_range()
                assert await extents(volume, offset, length) == model.extents(offset, length)
            status = volume.status()
            assert (status["mapped"], status["reserved"]) == (model.count(DATA), model.count(ZERO))
            assert await read(volume) == model.content
            copy = killed(place / "p", place / "killed")
        assert findings(await check(copy)) == []
        async with opened(copy) as pool:
            volume = pool.volumes["v"]
            assert await extents(volume) == model.extents(0, size)
            assert await read(volume) == model.content
        await assert_clean(copy)

    asyncio.run(main())


async def _do_something(
    rng: random.Random, pool: Pool, volume: Volume, model: Model, offset: int, length: int
) -> None:
    action = rng.randrange(5)
    if action <= 1:
        data = rng.randbytes(length)
        model.write(offset, data)
        await volume.write(offset, data)
    elif action == 2:
        model.trim(offset, length)
        await volume.trim(offset, length)
    else:
        no_hole = rng.random() < 0.5
        model.zero(offset, length, no_hole)
        await volume.write_zeroes(offset, length, no_hole=no_hole)
    if rng.random() < 0.1:
        await pool.checkpoint()
        volume.map.evict(1 << 30)
        volume.map.nodes.evict(1 << 30)


# -- while it goes on ----------------------------------------------------------------------------


async def test_a_trim_of_a_volume_that_is_deleted_meanwhile_ends(
    pool: Pool, directory: Path, tmp_path: Path
) -> None:
    volume = await pool.create_volume("wide", 1 << 40)
    assert volume.write_now([(n * GIB, b"x" * BLOCK) for n in range(500)])
    trim = asyncio.create_task(volume.trim(0, volume.size))
    await asyncio.sleep(0)
    await pool.delete_volume(volume)
    try:
        await trim
    except NotFound:
        pass
    with pytest.raises(NotFound):
        await volume.write_zeroes(0, volume.size)
    await assert_clean(killed(directory, tmp_path / "killed"))


async def test_writes_during_a_long_trim_are_kept_or_trimmed_whole(pool: Pool) -> None:
    volume = await pool.create_volume("wide", 64 * GIB)
    places = [n * GIB for n in range(64)]
    assert volume.write_now([(place, b"old" * 1000) for place in places])
    trim = asyncio.create_task(volume.trim(0, volume.size))
    for place in places:
        await asyncio.sleep(0)
        assert volume.write_now([(place, b"new" * 1000)])
    await trim
    for place in places:
        found = await read(volume, place, 3000)
        assert found in (b"new" * 1000, bytes(3000))
