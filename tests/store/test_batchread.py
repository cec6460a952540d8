"""Many ranges at once: as each by itself, or left to that; and that bad data never comes."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from nbdstore.store import Pool, Volume
from nbdstore.store.batchread import BUFFER_BYTES, MAX_LENGTH
from nbdstore.store.image import Image
from tests.store.pools import MIB, cold, make_pool, opened, read, read_now
from tests.store.test_reading import BLOCK, damage, place_of
from tests.store.workload import joined

SIZE = 8 * MIB
SMALL = [BLOCK, 2 * BLOCK, 4 * BLOCK, 16 * BLOCK]


@pytest.fixture
async def directory(tmp_path: Path) -> Path:
    return make_pool(tmp_path / "p")


@pytest.fixture
async def pool(directory: Path) -> AsyncIterator[Pool]:
    async with opened(directory) as pool:
        yield pool


@pytest.fixture
async def volume(pool: Pool) -> Volume:
    """Written in order, so that all of it is simple."""
    volume = await pool.create_volume("v", SIZE)
    content = random.Random(7).randbytes(SIZE)
    for at in range(0, SIZE, MIB):
        assert volume.write_now([(at, content[at : at + MIB])])
    return volume


def batch(image: Image, offsets: Sequence[int], length: int) -> list[bytes | None]:
    found = image.read_batch_now(offsets, length)
    assert len(found) == len(offsets)
    return [None if content is None else bytes(content) for content in found]


def some_offsets(seed: int, length: int, n: int = 40) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange((SIZE - length) // BLOCK + 1) * BLOCK for _ in range(n)]


@pytest.mark.parametrize("length", SMALL)
async def test_many_ranges_come_as_each_by_itself(volume: Volume, length: int) -> None:
    offsets = [*some_offsets(1, length), 0, 0, SIZE - length, 256 * BLOCK - length]
    if length > BLOCK:
        offsets.append(256 * BLOCK - BLOCK)  # in two leaves
    found = batch(volume, offsets, length)
    assert found == [read_now(volume, offset, length) for offset in offsets]
    assert None not in found


async def test_more_than_a_buffer_has_comes_too(volume: Volume) -> None:
    offsets = some_offsets(2, BLOCK, 3 * BUFFER_BYTES // BLOCK + 5)
    content = await read(volume)
    assert batch(volume, offsets, BLOCK) == [content[at : at + BLOCK] for at in offsets]


async def test_what_is_not_simple_is_left(volume: Volume) -> None:
    content = bytearray(await read(volume))
    await volume.trim(5 * BLOCK, BLOCK)
    await volume.write_zeroes(9 * BLOCK, BLOCK, no_hole=True)
    await volume.write_zeroes(1024 * BLOCK, 256 * BLOCK, no_hole=True)  # a whole leaf
    await volume.trim(512 * BLOCK, 256 * BLOCK)
    assert volume.write_now([(20 * BLOCK, b"n" * BLOCK)])  # out of the order of the others
    content[20 * BLOCK : 21 * BLOCK] = b"n" * BLOCK

    def part(block: int, n: int) -> bytes:
        return bytes(content[block * BLOCK : (block + n) * BLOCK])

    blocks = [4, 5, 6, 8, 9, 10, 19, 20, 600, 1100]
    singles = batch(volume, [block * BLOCK for block in blocks], BLOCK)
    left = {5, 9, 600, 1100}
    assert singles == [None if block in left else part(block, 1) for block in blocks]
    pairs = batch(volume, [block * BLOCK for block in blocks], 2 * BLOCK)
    left = {4, 5, 8, 9, 19, 20, 600, 1100}
    assert pairs == [None if block in left else part(block, 2) for block in blocks]


@pytest.mark.parametrize("length", [0, 1, BLOCK - 1, BLOCK + 512, MAX_LENGTH + BLOCK, 128 * BLOCK])
async def test_other_lengths_are_left(volume: Volume, length: int) -> None:
    assert batch(volume, [0] * 20, length) == [None] * 20


async def test_ranges_that_begin_within_a_block_are_left(volume: Volume) -> None:
    content = await read(volume)
    found = batch(volume, [0, 1, BLOCK, BLOCK + 512], BLOCK)
    assert found == [content[:BLOCK], None, content[BLOCK : 2 * BLOCK], None]


async def test_blocks_in_another_order_are_left_whatever_they_hold(pool: Pool) -> None:
    """The slots between may hold what was chosen to have the same checksums."""
    for order in itertools.permutations(range(3)):
        volume = await pool.create_volume("-".join(map(str, order)), MIB)
        for block in order:
            assert volume.write_now([(block * BLOCK, b"x" * BLOCK)])
        expected = b"x" * 3 * BLOCK if order == (0, 1, 2) else None
        assert batch(volume, [0] * 20, 3 * BLOCK) == [expected] * 20


async def test_what_is_not_in_the_page_cache_is_left(volume: Volume) -> None:
    with cold():
        assert batch(volume, some_offsets(3, BLOCK), BLOCK) == [None] * 40
    assert None not in batch(volume, some_offsets(3, BLOCK), BLOCK)


async def test_what_has_no_leaf_in_memory_is_left(pool: Pool, volume: Volume) -> None:
    content = await read(volume)
    await pool.checkpoint()
    volume.map.evict_leaf(1)
    last, first = (256 * BLOCK - BLOCK, 256 * BLOCK)
    found = batch(volume, [last, first, 512 * BLOCK], BLOCK)
    assert found == [content[last:first], None, content[512 * BLOCK : 513 * BLOCK]]
    assert batch(volume, [last, first, 512 * BLOCK - BLOCK], 2 * BLOCK) == [None] * 3


@pytest.mark.parametrize("length", SMALL)
async def test_damaged_blocks_are_never_data(directory: Path, volume: Volume, length: int) -> None:
    content = await read(volume)
    await volume.flush()
    for block in (7, 300):
        damage(directory, place_of(volume, block))
    offsets = [*range(0, 400 * BLOCK, BLOCK)]
    n_found = 0
    for offset, found in zip(offsets, batch(volume, offsets, length), strict=True):
        assert found in (None, content[offset : offset + length])
        has_damage = any(offset <= block * BLOCK < offset + length for block in (7, 300))
        assert found is None or not has_damage
        n_found += found is not None
    assert n_found > 0


async def test_an_image_that_is_gone_or_shorter_tells_nothing(pool: Pool, volume: Volume) -> None:
    offsets = [0, SIZE // 2 - BLOCK, SIZE // 2]
    assert None not in batch(volume, offsets, BLOCK)
    await volume.trim(SIZE // 2, SIZE // 2)
    await pool.resize_volume(volume, SIZE // 2, force=True)
    assert batch(volume, offsets, BLOCK) == [None] * 3
    assert None not in batch(volume, offsets[:2], BLOCK)
    await pool.delete_volume(volume)
    assert batch(volume, offsets[:2], BLOCK) == [None] * 2


async def test_a_snapshot_keeps_what_it_had(pool: Pool, volume: Volume) -> None:
    content = await read(volume)
    (snapshot,) = await pool.create_snapshots([(volume, "s")])
    assert volume.write_now([(0, b"n" * MIB)])
    offsets = [*some_offsets(4, BLOCK), 0]
    assert batch(snapshot, offsets, BLOCK) == [None] * 41  # its map is not in memory yet
    assert await read(snapshot) == content
    assert batch(snapshot, offsets, BLOCK) == [content[at : at + BLOCK] for at in offsets]


async def test_what_was_read_stays_as_it_is(volume: Volume) -> None:
    content = await read(volume)
    rounds = [(seed, some_offsets(seed, BLOCK)) for seed in range(20)]
    kept = [volume.read_batch_now(offsets, BLOCK) for _, offsets in rounds]
    assert volume.write_now([(0, b"n" * MIB)])
    for (_, offsets), found in zip(rounds, kept, strict=True):
        assert joined([part for part in found if part is not None]) == b"".join(
            [content[at : at + BLOCK] for at in offsets]
        )
