"""Writes: every offset and length, batches, merging, and many at once."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdstore.errors import NotFound, StoreError
from nbdstore.store import Pool, Volume
from nbdstore.store.layout import I64, runs, slots_of
from nbdstore.store.slots import Slots
from tests.store.pools import (
    MIB,
    assert_clean,
    check,
    cold,
    findings,
    killed,
    make_pool,
    opened,
    read,
    read_now,
)


def data(n: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(n)


async def both_ways(volume: Volume, offset: int, piece: bytes, content: bytearray) -> None:
    """Write by the way that does not wait, or else by the one that does."""
    content[offset : offset + len(piece)] = piece
    if not volume.write_now([(offset, piece)]):
        await volume.write(offset, piece)


@pytest.mark.parametrize(
    "later",
    [
        pytest.param((5 * 4096 + 100, 50), id="a part of a block again"),
        pytest.param((5 * 4096, 4096), id="a block again"),
        pytest.param((3 * 4096, 7 * 4096), id="blocks again"),
        pytest.param((39 * 4096, 2 * 4096), id="the last block again, and one more"),
        pytest.param((50 * 4096, 100), id="a part of another block"),
        pytest.param((50 * 4096, 40 * 4096), id="other blocks"),
    ],
)
async def test_long_writes_of_a_batch_take_effect_in_their_order(
    pool: Pool, later: tuple[int, int]
) -> None:
    volume = await pool.create_volume("v", MIB)
    content = bytearray(MIB)
    batch = [(0, data(40 * 4096)), (later[0], data(later[1], seed=2))]
    for offset, piece in batch:
        content[offset : offset + len(piece)] = piece
    assert volume.write_now(batch)
    assert await read(volume, 0, MIB) == content


@pytest.mark.parametrize("first_block", [0, 3, 250])
async def test_writes_that_follow_one_another_become_one_run(pool: Pool, first_block: int) -> None:
    volume = await pool.create_volume("v", 2 * MIB)
    pieces = [data(n * 4096, seed=n) for n in (32, 1, 7, 64)]
    starts = itertools.accumulate(map(len, pieces), initial=first_block * 4096)
    before = volume.core.journal.seq
    assert volume.write_now(list(zip(starts, pieces, strict=False)))
    assert volume.core.journal.seq == before + 1
    slots = slots_of(volume.map.locations(first_block, first_block + 104))
    assert len(runs(slots)) == 1
    assert await read(volume, first_block * 4096, 104 * 4096) == b"".join(pieces)
    assert volume.info.n_mapped == 104


async def test_a_long_write_beyond_the_end_is_refused_whole(pool: Pool) -> None:
    volume = await pool.create_volume("v", MIB)
    piece = data(MIB // 2)
    with pytest.raises(StoreError):
        volume.write_now([(0, piece), (MIB // 2, piece), (MIB, piece)])
    assert volume.info.n_mapped == 0
    assert await read(volume, 0, MIB) == bytes(MIB)


async def test_a_long_write_waits_for_leaves_that_are_not_in_memory(tmp_path: Path) -> None:
    make_pool(tmp_path / "p")
    async with opened(tmp_path / "p") as pool:
        volume = await pool.create_volume("v", 4 * MIB)
        assert volume.write_now([(0, data(2 * MIB))])
    async with opened(tmp_path / "p") as pool:
        volume = pool.volumes["v"]
        content = bytearray(data(2 * MIB) + bytes(2 * MIB))
        for at, is_there in ((MIB - 64 * 4096, False), (2 * MIB - 64 * 4096, True)):
            piece = data(128 * 4096, seed=at)  # from one leaf into the next
            assert volume.write_now([(at, piece)]) is is_there
            await both_ways(volume, at, piece, content)
        assert await read(volume, 0, 4 * MIB) == content


async def test_a_long_write_goes_into_scattered_slots(pool: Pool) -> None:
    volume = await pool.create_volume("v", 2 * MIB)
    content = bytearray(data(2 * MIB))
    assert volume.write_now([(0, bytes(content))])
    scatter(volume.core.slots)
    content[:MIB] = data(MIB, seed=2)
    assert volume.write_now([(0, content[:MIB])])
    assert len(runs(slots_of(volume.map.locations(0, MIB // 4096)))) > 10
    assert await read(volume, 0, 2 * MIB) == content


def scatter(slots: Slots) -> None:
    """Let `slots` give out no multiples of 7."""
    allocate = slots.allocate

    def scattered(n: int, floor: int) -> I64 | None:
        found = allocate(2 * n, floor)
        assert found is not None
        chosen = found[found % 7 != 0][:n]
        slots.give_back(np.setdiff1d(found, chosen))
        return chosen

    slots.allocate = scattered  # type: ignore[method-assign]
    slots.allocate_run = lambda n, floor: 0  # type: ignore[method-assign]


@pytest.mark.parametrize("is_kept", [False, True], ids=["", "of a snapshot"])
@pytest.mark.parametrize(
    "old",
    [
        pytest.param([], id="holes"),
        pytest.param([(0, 100)], id="one run"),
        pytest.param([(0, 60), (60, 100)], id="two runs"),
        pytest.param([(0, 100), (60, 61)], id="a run but for one block"),
        pytest.param([(0, 50)], id="a run and holes"),
    ],
)
async def test_a_long_write_frees_what_it_replaces(
    tmp_path: Path, old: list[tuple[int, int]], is_kept: bool
) -> None:
    async with opened(make_pool(tmp_path / "p")) as pool:
        volume = await pool.create_volume("v", MIB)
        await volume.write_zeroes(120 * 4096, 80 * 4096, no_hole=True)
        for number, (start, stop) in enumerate(old):
            piece = data((stop - start) * 4096, seed=number)
            assert volume.write_now([(start * 4096, piece)])
            assert volume.write_now([(MIB - 4096 * (number + 1), piece[:4096])])  # not in one run
        before = await read(volume)
        if is_kept:
            await pool.create_snapshots([(volume, "s")])
        content = bytearray(before)
        for seed, start in enumerate([10, 10, 20, 130]):
            piece = data(90 * 4096, seed=50 + seed)
            content[start * 4096 : start * 4096 + len(piece)] = piece
            assert volume.write_now([(start * 4096, piece)])
        assert await read(volume) == content
        n_mapped = sum(any(content[at : at + 4096]) for at in range(0, MIB, 4096))
        n_reserved = sum(
            not any(content[at : at + 4096]) for at in range(120 * 4096, 200 * 4096, 4096)
        )
        status = volume.status()
        assert (status["mapped"], status["reserved"]) == (n_mapped * 4096, n_reserved * 4096)
        if is_kept:
            assert await read(pool.snapshots["v@s"]) == before
        await volume.flush()
        killed(pool.directory, tmp_path / "k")
        async with opened(tmp_path / "k") as again:
            assert await read(again.volumes["v"]) == content
    await assert_clean(tmp_path / "p")
    await assert_clean(tmp_path / "k")


EDGES = [0, 1, 511, 512, 513, 4095]


@pytest.mark.parametrize("wait", [False, True])
async def test_writes_of_every_alignment_change_their_bytes_and_no_others(
    tmp_path: Path, block_size: int, wait: bool
) -> None:
    make_pool(tmp_path / "p", block_size=block_size)
    async with opened(tmp_path / "p") as pool:
        volume = await pool.create_volume("v", 6 * block_size)
        content = bytearray(data(volume.size))
        assert volume.write_now([(0, content)])
        starts = [block + edge for block in (0, 2 * block_size) for edge in EDGES]
        stops = [block + edge for block in (block_size, 4 * block_size) for edge in EDGES]
        for number, (start, stop) in enumerate(itertools.product(starts, stops)):
            if start >= stop:
                continue
            piece = data(stop - start, number)
            content[start:stop] = piece
            if wait:
                await volume.write(start, piece)
            else:
                assert volume.write_now([(start, piece)])
        assert await read(volume) == content
        assert read_now(volume, 0, volume.size) == content
    await assert_clean(tmp_path / "p")


async def test_a_write_to_a_hole_fills_the_rest_of_its_block_with_zeros(volume: Volume) -> None:
    assert volume.write_now([(10_000, b"x")])
    assert await read(volume) == bytes(10_000) + b"x" + bytes(volume.size - 10_001)
    assert volume.status()["mapped"] == 4096


@pytest.mark.parametrize("is_kept", [False, True], ids=["", "snapshots"])
@pytest.mark.parametrize("few", [0, 6, 24])
async def test_few_blocks_and_many_are_accounted_alike(
    tmp_path: Path, few: int, is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small batches go without arrays: over data, a snapshot's too, holes, space set aside."""
    monkeypatch.setattr("nbdstore.store.writing._FEW", few)
    rng = random.Random(3)
    async with opened(make_pool(tmp_path / "p")) as pool:
        volume = await pool.create_volume("v", 4 * MIB)
        content = bytearray(volume.size)
        kept: list[bytes] = []
        await volume.write_zeroes(MIB, MIB, no_hole=True)
        checkpoint: asyncio.Task[None] | None = None
        for number in range(600):
            blocks = rng.sample(range(volume.size // 4096), rng.choice([1, 1, 2, 3, 6, 7, 9]))
            writes = [(block * 4096, rng.randbytes(4096)) for block in blocks]
            old = volume.map.locations(0, volume.map.n_blocks)[blocks]
            assert volume.n_filling_few(old.tolist()) == volume.n_filling(old)
            assert volume.write_now(writes)
            for offset, piece in writes:
                content[offset : offset + len(piece)] = piece
            if is_kept and number % 150 == 120:
                await pool.create_snapshots([(volume, f"s{number}")])
                kept.append(bytes(content))
            if number % 100 == 50:
                checkpoint = asyncio.create_task(pool.checkpoint())
            if number % 7 == 0:
                await asyncio.sleep(0)
            if number % 90 == 0:
                await volume.flush()
        assert checkpoint is not None
        await checkpoint
        assert await read(volume) == content
        assert [await read(snapshot) for snapshot in pool.snapshots.values()] == kept
        n_mapped = sum(any(content[at : at + 4096]) for at in range(0, len(content), 4096))
        assert volume.status()["mapped"] == n_mapped * 4096
        n_written = sum(any(content[at : at + 4096]) for at in range(MIB, 2 * MIB, 4096))
        assert volume.status()["reserved"] == MIB - n_written * 4096
        async with opened(killed(pool.directory, tmp_path / "k")) as again:
            assert await read(again.volumes["v"]) == content
    await assert_clean(tmp_path / "p")
    await assert_clean(tmp_path / "k")


async def test_an_empty_write_does_nothing(volume: Volume) -> None:
    before = volume.last_seq
    assert volume.write_now([])
    assert volume.write_now([(5, b"")])
    await volume.write(100, b"")
    assert volume.last_seq == before
    assert volume.status()["mapped"] == 0


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_any_buffer_is_taken(volume: Volume, kind: type) -> None:
    raw = data(10_000)
    assert volume.write_now([(3, kind(raw))])
    await volume.write(20_000, kind(raw))
    assert await read(volume, 3, 10_000) == await read(volume, 20_000, 10_000) == raw


async def test_the_caller_may_reuse_its_buffer_at_once(volume: Volume) -> None:
    buffer = bytearray(data(12_288))
    first = bytes(buffer)
    assert volume.write_now([(0, buffer), (100_000, memoryview(buffer)[:5000])])
    buffer[:] = bytes(len(buffer))
    assert await read(volume, 0, 12_288) == first
    assert await read(volume, 100_000, 5000) == first[:5000]


# -- batches -------------------------------------------------------------------------------------


async def test_a_batch_is_one_record(volume: Volume) -> None:
    before = volume.core.journal.seq
    assert volume.write_now([(n * 50_000, data(4096, n)) for n in range(50)])
    assert volume.core.journal.seq == before + 1


async def test_the_last_of_a_batch_wins(volume: Volume) -> None:
    writes = [(0, b"a" * 8192), (4096, b"b" * 4096), (4000, b"c" * 200), (4100, b"d"), (4100, b"e")]
    assert volume.write_now(writes)
    expected = bytearray(b"a" * 4096 + b"b" * 4096)
    expected[4000:4200] = b"c" * 200
    expected[4100:4101] = b"e"
    assert await read(volume, 0, 8192) == expected
    assert volume.status()["mapped"] == 8192


async def test_the_same_block_many_times_in_a_batch_takes_one_slot(
    pool: Pool, volume: Volume
) -> None:
    before = pool.status()["used"]
    assert volume.write_now([(8192, bytes([n]) * 4096) for n in range(100)])
    assert pool.status()["used"] - before == 4096
    assert await read(volume, 8192, 4096) == bytes([99]) * 4096


async def test_a_batch_over_many_leaves(pool: Pool) -> None:
    volume = await pool.create_volume("wide", 4 << 40)
    places = [n * (37 << 30) + n * 4096 for n in range(100)]
    assert volume.write_now([(place, data(1000, n)) for n, place in enumerate(places)])
    for n, place in enumerate(places):
        assert await read(volume, place, 1000) == data(1000, n)
    assert volume.status()["mapped"] == 100 * 4096


async def test_a_batch_that_would_wait_does_nothing_at_all(pool: Pool, volume: Volume) -> None:
    assert volume.write_now([(0, data(4096, 1)), (50_000, data(4096, 2))])
    with cold():
        assert not volume.write_now([(100_000, data(4096)), (10, b"needs the old block")])
    assert await read(volume, 100_000, 4096) == bytes(4096)
    assert await read(volume, 0, 4096) == data(4096, 1)


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    batches=st.lists(
        st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 20_000)), max_size=6), max_size=5
    )
)
def test_batches_do_what_their_writes_would_do_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[tuple[int, int]]]
) -> None:
    async def main() -> None:
        place = tmp_path_factory.mktemp("batches") / "pool"
        async with opened(make_pool(place, 16 * MIB)) as pool:
            volume = await pool.create_volume("v", 81_920)
            content = bytearray(volume.size)
            for number, batch in enumerate(batches):
                writes = [(at, data(length, number + at)) for at, length in batch]
                for at, piece in writes:
                    content[at : at + len(piece)] = piece
                assert volume.write_now(writes)
            assert await read(volume) == content

    asyncio.run(main())


# -- sizes that are no multiple of a block ---------------------------------------------------------


@pytest.mark.parametrize("extra", [512, 3584])
async def test_the_last_partial_block_is_written_and_read(pool: Pool, extra: int) -> None:
    volume = await pool.create_volume("odd", 4096 * 300 + extra)
    content = bytearray(volume.size)
    for offset, length in [
        (volume.size - extra, extra),
        (volume.size - 1, 1),
        (volume.size - 5000, 5000),
        (volume.size - 9000, 100),
    ]:
        await both_ways(volume, offset, data(length, length), content)
        assert await read(volume) == content
    assert (volume.size - extra) // 4096 == 300


async def test_a_volume_of_one_sector(pool: Pool) -> None:
    volume = await pool.create_volume("tiny", 512)
    assert volume.write_now([(0, data(512))])
    assert await read(volume) == data(512)
    assert read_now(volume, 511, 1) == data(512)[511:]


# -- waiting ---------------------------------------------------------------------------------------


async def test_a_merge_with_a_block_that_is_not_cached_waits_for_it(volume: Volume) -> None:
    await volume.write(0, data(20_000))
    with cold():
        assert not volume.write_now([(100, b"new")])
        await volume.write(100, b"new")
        await volume.write(8190, b"over two blocks")
    expected = bytearray(data(20_000))
    expected[100:103] = b"new"
    expected[8190:8205] = b"over two blocks"
    assert await read(volume, 0, 20_000) == expected


async def test_a_merge_with_a_hole_or_a_whole_block_needs_no_read(volume: Volume) -> None:
    with cold():
        assert volume.write_now([(100, b"x"), (4096, data(4096))])
        await volume.write_zeroes(81_920, 8192, no_hole=True)
        assert volume.write_now([(81_930, b"y")])


async def test_a_write_whose_leaf_is_not_in_memory_waits_for_it(pool: Pool, volume: Volume) -> None:
    await volume.write(0, data(10_000))
    await pool.checkpoint()
    volume.map.evict(1 << 30)
    assert not volume.write_now([(0, b"x")])
    await volume.write(0, b"x")
    assert await read(volume, 0, 10_000) == b"x" + data(10_000)[1:]


async def test_overlapping_writes_at_once_lose_nothing(volume: Volume) -> None:
    """Each writer has its own bytes of each block; all go on at once, merging."""
    await volume.write(0, data(16_384))
    content = bytearray(data(16_384))
    writers = []
    for writer in range(64):
        at = writer * 256 + 7
        piece = data(200, writer)
        content[at : at + 200] = piece
        writers.append(volume.write(at, piece))
    with cold():
        await asyncio.gather(*writers)
    assert await read(volume, 0, 16_384) == content


async def test_writes_over_block_borders_at_once_lose_nothing(volume: Volume) -> None:
    content = bytearray(volume.size)
    jobs = []
    for round_ in range(4):
        for n in range(40):
            at, piece = n * 6000 + round_ * 1500, data(1500, n * 4 + round_)
            content[at : at + 1500] = piece
            jobs.append(volume.write(at, piece))
    random.Random(1).shuffle(jobs)
    with cold():
        await asyncio.gather(*jobs)
    assert await read(volume) == content


async def test_a_large_write_is_done_in_pieces(volume: Volume) -> None:
    raw = data(7 * MIB + 1000)
    await volume.write(100, raw)
    assert await read(volume, 100, len(raw)) == raw


async def test_writes_wait_for_the_checkpoint_that_makes_room_in_the_journal(
    pool: Pool, volume: Volume
) -> None:
    before = pool.status()["checkpoints"]
    content = bytearray(volume.size)
    n_waited = 0
    for number in range(10_000):  # each a record of 128 bytes
        at = number * 7 % 2048 * 4096
        piece = number.to_bytes(4) * 1024
        content[at : at + 4096] = piece
        if not volume.write_now([(at, piece)]):
            n_waited += 1
            await volume.write(at, piece)
    assert n_waited > 0
    assert pool.status()["checkpoints"] > before
    assert pool.status()["journal"]["used"] <= MIB
    assert await read(volume) == content


# -- what the process leaves -----------------------------------------------------------------------


async def test_what_is_acknowledged_survives_sigkill(
    tmp_path: Path, directory: Path, pool: Pool, volume: Volume
) -> None:
    content = bytearray(volume.size)
    rng = random.Random(5)
    for number in range(200):
        offset = rng.randrange(volume.size - 30_000)
        await both_ways(volume, offset, data(rng.randrange(30_000), number), content)
    copy = killed(directory, tmp_path / "killed")
    assert findings(await check(copy)) == []
    async with opened(copy) as again:
        assert await read(again.volumes["v"]) == content
    await assert_clean(copy)


async def test_a_deleted_volume_refuses_writes(pool: Pool, volume: Volume) -> None:
    await pool.delete_volume(volume)
    with pytest.raises(NotFound):
        volume.write_now([(0, b"x")])
    with pytest.raises(NotFound):
        await volume.write(0, b"x")


async def test_a_write_beyond_a_shrunk_volume_is_an_error(pool: Pool, volume: Volume) -> None:
    await pool.resize_volume(volume, MIB)
    with pytest.raises(StoreError):
        volume.write_now([(0, b"fits"), (MIB - 1, b"xy")])
    with pytest.raises(StoreError):
        await volume.write(2 * MIB, b"x")
    assert await read(volume) == bytes(MIB)


async def test_a_write_into_a_last_block_that_ends_beyond_the_volume_waits_for_what_it_holds(
    tmp_path: Path,
) -> None:
    make_pool(tmp_path)
    async with opened(tmp_path) as pool:
        volume = await pool.create_volume("v", 5 * 4096 + 512)
        content = bytearray(data(volume.size))
        await volume.write(0, content)
        with cold():
            assert not volume.write_now([(volume.size - 300, b"x" * 100)])
            await volume.write(volume.size - 300, b"x" * 100)
        content[-300:-200] = b"x" * 100
        assert await read(volume) == content
    await assert_clean(tmp_path)
