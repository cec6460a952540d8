"""The READs of one round: each gets its own answer, whatever the others beside it are."""

from __future__ import annotations

import random

import pytest

from nbdstore.errors import ReadFailed
from nbdstore.protocol.agreement import ReplyMode
from nbdstore.protocol.constants import Command, CommandFlag, Errno
from nbdstore.server import Limits
from nbdstore.store import Pool
from tests.store.test_reading import damage, place_of

BLOCK = 4096
MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture
async def content() -> bytes:
    """What the disk holds, with holes; written in order."""
    data = bytearray(random.Random(1).randbytes(SIZE))
    for block in range(0, 512, 7):
        data[block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK)
    return bytes(data)


@pytest.fixture
async def real_pool(tmp_path, content):
    Pool.create(tmp_path / "pool", capacity=64 * MIB, journal_size=8 * MIB)
    pool = await Pool.open(tmp_path / "pool")
    volume = await pool.create_volume("disk", SIZE)
    await volume.write(0, content)
    for block in range(0, 512, 7):
        await volume.trim(block * BLOCK, BLOCK)
    yield pool
    await pool.close()


@pytest.fixture
async def served(real_pool, serve):
    """Drained before the pool is closed: fixtures end in reverse order."""
    return await serve(pool=real_pool, limits=Limits(linger_s=0.1))


async def ask_at_once(client, requests):
    """Send all of (command, offset, length, flags, payload) at once; return the replies."""
    made = [client.transmission.request(*request) for request in requests]
    client.send(b"".join([data for _, data in made]))
    return [await client.reply(cookie) for cookie, _ in made]


def some_reads(seed: int, lengths: list[int], n: int):
    rng = random.Random(seed)
    for _ in range(n):
        length = rng.choice(lengths)
        offset = rng.randrange(SIZE - length)
        if rng.random() < 0.9:
            offset -= offset % BLOCK
        flags = CommandFlag.DF if rng.random() < 0.1 else 0
        yield (Command.READ, offset, length, flags, None)


@pytest.mark.parametrize("mode", ReplyMode)
@pytest.mark.parametrize(
    "lengths", [[BLOCK], [4 * BLOCK], [BLOCK, BLOCK, 2 * BLOCK, 100, 65536, 200_000]]
)
async def test_reads_that_come_together_get_each_its_own(
    served, connect, content, mode, lengths
) -> None:
    client = await connect()
    await client.go("disk", mode)
    for seed in range(5):
        # DF cannot be asked for without structured replies.
        reads = [
            (command, offset, length, 0 if mode is ReplyMode.SIMPLE else flags, payload)
            for command, offset, length, flags, payload in some_reads(seed, lengths, 60)
        ]
        replies = await ask_at_once(client, reads)
        for (_, offset, length, _, _), reply in zip(reads, replies, strict=True):
            assert reply.error == 0
            assert reply.data == content[offset : offset + length]


async def test_other_commands_between_them_are_done_too(served, connect, content) -> None:
    client = await connect()
    await client.go("disk", ReplyMode.STRUCTURED)
    upper = SIZE - MIB  # written here, while what is read lies below
    requests = []
    for i in range(40):
        requests.append((Command.READ, (i + 1) * BLOCK, BLOCK, 0, None))
        if i % 3 == 0:
            requests.append((Command.WRITE, upper + i * BLOCK, 0, 0, b"%04d" % i * 1024))
        if i % 8 == 0:
            requests.append((Command.FLUSH, 0, 0, 0, None))
            requests.append((Command.READ, SIZE, BLOCK, 0, None))
    replies = await ask_at_once(client, requests)
    for (command, offset, length, _, _), reply in zip(requests, replies, strict=True):
        is_beyond = command == Command.READ and offset == SIZE
        assert reply.error == (Errno.EINVAL if is_beyond else 0)
        if command == Command.READ and not is_beyond:
            assert reply.data == content[offset : offset + length]
    for i in range(0, 40, 3):
        assert await client.read(upper + i * BLOCK, BLOCK) == b"%04d" % i * 1024


def reads_beyond_the_holes(length: int):
    return [(Command.READ, (512 + block) * BLOCK, length, 0, None) for block in range(50)]


@pytest.mark.parametrize("length", [BLOCK, 4 * BLOCK])
async def test_they_are_counted_as_each_by_itself(served, connect, real_pool, length) -> None:
    client = await connect()
    await client.go("disk", ReplyMode.STRUCTURED)
    await ask_at_once(client, reads_beyond_the_holes(length))
    session = next(iter(served._connections)).session
    assert session.counts == (50, 50 * length, 0)
    (found,) = served.measures([real_pool.volumes["disk"]])
    assert [(told.command, told.n_requests) for told in found.latencies] == [("read", 50)]


@pytest.mark.parametrize("length", [BLOCK, 4 * BLOCK])
async def test_a_damaged_block_fails_those_that_read_it(
    served, connect, real_pool, content, tmp_path, length
) -> None:
    volume, bad = real_pool.volumes["disk"], 530
    await volume.flush()
    damage(tmp_path / "pool", place_of(volume, bad))
    client = await connect()
    await client.go("disk", ReplyMode.STRUCTURED)
    reads = reads_beyond_the_holes(length)
    replies = await ask_at_once(client, reads)
    for (_, offset, _, _, _), reply in zip(reads, replies, strict=True):
        if offset <= bad * BLOCK < offset + length:
            assert reply.error == Errno.EIO
        else:
            assert (reply.error, reply.data) == (0, content[offset : offset + length])
    (found,) = served.measures([volume])
    assert found.errors == {"EIO": length // BLOCK}


async def test_those_that_must_wait_are_answered_when_they_are_there(pool, serve, connect) -> None:
    volume = pool.volumes["disk"]
    for block in range(50):
        volume._write(block * BLOCK, bytes([block]) * BLOCK)
    await serve()
    client = await connect()
    await client.go()
    volume.cold = True
    reads = [(Command.READ, block * BLOCK, BLOCK, 0, None) for block in range(50)]
    replies = await ask_at_once(client, reads)
    assert [reply.data for reply in replies] == [bytes([i]) * BLOCK for i in range(50)]
    assert volume.calls.count("read") == 50


async def test_an_error_is_each_one_s_own(pool, serve, connect) -> None:
    volume = pool.volumes["disk"]
    await serve()
    client = await connect()
    await client.go()
    volume.error = ReadFailed("the disk is gone")
    reads = [(Command.READ, block * BLOCK, BLOCK, 0, None) for block in range(50)]
    replies = await ask_at_once(client, reads)
    assert [reply.error for reply in replies] == [Errno.EIO] * 50
    volume.error = None
    assert await client.read(0, 10) == bytes(10)
