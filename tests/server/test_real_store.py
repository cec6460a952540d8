"""The server over a real pool: what clients wrote is what any of them reads, against a model."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest

from nbdstore.protocol.agreement import ReplyMode
from nbdstore.protocol.constants import Command, CommandFlag, Errno
from nbdstore.server import Limits
from nbdstore.store import Pool, PoolOptions
from nbdstore.store.layout import SLOT_MASK
from nbdstore.store.local_host import LocalFile

SIZE = 8 << 20
MIB = 1 << 20


@pytest.fixture
async def real_pool(tmp_path):
    Pool.create(tmp_path / "pool", capacity=64 * MIB, journal_size=8 * MIB)
    pool = await Pool.open(tmp_path / "pool", options=PoolOptions(on_full="error"))
    await pool.create_volume("disk", SIZE)
    yield pool
    await pool.close()


@pytest.fixture
async def served(real_pool, serve):
    """Drained before the pool is closed: fixtures end in reverse order."""
    return await serve(pool=real_pool, limits=Limits(linger_s=0.1))


def some_range(rng: random.Random) -> tuple[int, int]:
    length = rng.choice([1, 512, 4096, 4096, 8192, 65536, rng.randrange(1, 300_000)])
    offset = rng.randrange(SIZE - length)
    return (offset - offset % 4096, length) if rng.random() < 0.6 else (offset, length)


class Model:
    """What the disk must hold, and a client that changes both."""

    def __init__(self, client, rng: random.Random) -> None:
        self.client = client
        self.rng = rng
        self.data = bytearray(SIZE)

    async def step(self) -> None:
        choose = self.rng.choices(
            [self.write, self.read, self.zero, self.trim, self.flush], [6, 5, 1, 1, 1]
        )[0]
        await choose(*some_range(self.rng))

    async def write(self, offset: int, length: int) -> None:
        data = self.rng.randbytes(length)
        flags = CommandFlag.FUA if self.rng.random() < 0.1 else 0
        reply = await self.client.do(Command.WRITE, offset, 0, flags, data)
        assert reply.error == 0
        self.data[offset : offset + length] = data

    async def read(self, offset: int, length: int) -> None:
        flags = CommandFlag.DF if self.client.transmission.mode is not ReplyMode.SIMPLE else 0
        reply = await self.client.do(Command.READ, offset, length, self.rng.choice([0, flags]))
        assert reply.data == self.data[offset : offset + length]

    async def zero(self, offset: int, length: int) -> None:
        flags = self.rng.choice([0, CommandFlag.NO_HOLE, CommandFlag.FAST_ZERO, CommandFlag.FUA])
        assert (await self.client.do(Command.WRITE_ZEROES, offset, length, flags)).error == 0
        self.data[offset : offset + length] = bytes(length)

    async def trim(self, offset: int, length: int) -> None:
        assert (await self.client.do(Command.TRIM, offset, length)).error == 0
        first, stop = -(-offset // 4096) * 4096, (offset + length) // 4096 * 4096
        if first < stop:
            self.data[first:stop] = bytes(stop - first)

    async def flush(self, offset: int, length: int) -> None:
        assert (await self.client.do(Command.FLUSH)).error == 0


@pytest.mark.parametrize("mode", ReplyMode)
async def test_the_disk_is_as_the_model(served, connect, mode):
    client = await connect()
    await client.go("disk", mode)
    model = Model(client, random.Random(mode.value))
    for _ in range(400):
        await model.step()
    other = await connect()
    await other.go("disk", ReplyMode.STRUCTURED)
    assert await other.read(0, SIZE) == model.data


@pytest.mark.parametrize("mode", ReplyMode)
async def test_many_requests_at_once(served, connect, mode):
    """Each block has one writer at a time; the order between them does not matter."""
    client = await connect()
    await client.go("disk", mode)
    rng = random.Random(mode.value)
    expected = bytearray(SIZE)
    for _ in range(5):
        blocks = rng.sample(range(SIZE // 4096), 500)
        cookies = []
        for block in blocks:
            data = rng.randbytes(4096)
            expected[block * 4096 : block * 4096 + 4096] = data
            cookies.append(client.start(Command.WRITE, block * 4096, payload=data))
        cookies.append(client.start(Command.FLUSH))
        assert {(await client.reply(cookie)).error for cookie in cookies} == {0}
        reads = [client.start(Command.READ, block * 4096, 4096) for block in blocks]
        for block, cookie in zip(blocks, reads, strict=True):
            reply = await client.reply(cookie)
            assert reply.data == expected[block * 4096 : block * 4096 + 4096]
    assert await client.read(0, SIZE) == expected


async def test_block_status_tells_what_was_written(served, connect):
    client = await connect()
    await client.go("disk", ReplyMode.EXTENDED, ["base:allocation", "qemu:allocation-depth"])
    await client.write(MIB, b"x" * MIB)
    await client.do(Command.WRITE_ZEROES, 3 * MIB, MIB, CommandFlag.NO_HOLE)
    reply = await client.do(Command.BLOCK_STATUS, 0, SIZE)
    assert reply.extents == {
        1: [(MIB, 3), (MIB, 0), (MIB, 3), (MIB, 2), (4 * MIB, 3)],
        2: [(MIB, 0), (MIB, 1), (MIB, 0), (MIB, 1), (4 * MIB, 0)],
    }


async def test_a_full_pool_is_enospc_and_trim_helps(real_pool, served, connect):
    await real_pool.create_volume("large", 256 * MIB)
    client = await connect()
    await client.go("large", ReplyMode.STRUCTURED)
    payload = random.Random(1).randbytes(MIB)
    n_written = 0
    while (await client.do(Command.WRITE, n_written * MIB, payload=payload)).error == 0:
        n_written += 1
        assert n_written < 65
    reply = await client.do(Command.WRITE, 200 * MIB, payload=payload)
    assert (reply.error, reply.message) == (Errno.ENOSPC, "The pool is full.")
    for flags, error in (
        (CommandFlag.NO_HOLE, Errno.ENOSPC),
        (CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO, Errno.ENOTSUP),
        (CommandFlag.FAST_ZERO, 0),
    ):
        assert (await client.do(Command.WRITE_ZEROES, 200 * MIB, 8 * MIB, flags)).error == error
    assert await client.read(0, MIB) == payload
    assert (await client.do(Command.TRIM, 0, 256 * MIB)).error == 0
    assert (await client.do(Command.FLUSH)).error == 0
    await client.write(0, payload)


async def test_a_deleted_volume_answers_shutdown(real_pool, served, connect):
    client = await connect()
    await client.go("disk", ReplyMode.STRUCTURED)
    await client.write(0, b"x" * 4096)
    await real_pool.delete_volume(real_pool.volumes["disk"])
    for command, payload in [
        (Command.READ, None),
        (Command.WRITE, b"y" * 4096),
        (Command.TRIM, None),
        (Command.WRITE_ZEROES, None),
    ]:
        reply = await client.do(command, 0, 4096, 0, payload)
        assert (command, reply.error) == (command, Errno.ESHUTDOWN)


async def test_connections_write_side_by_side(served, connect):
    clients = [await connect() for _ in range(4)]
    for client in clients:
        await client.go("disk")

    async def work(client, share: int) -> bytes:
        rng = random.Random(share)
        data = rng.randbytes(SIZE // 4)
        for start in range(0, len(data), 65536):
            await client.write(share * len(data) + start, data[start : start + 65536])
            if rng.random() < 0.2:
                assert (await client.do(Command.FLUSH)).error == 0
        return data

    parts = await asyncio.gather(*(work(client, i) for i, client in enumerate(clients)))
    assert await clients[0].read(0, SIZE) == b"".join(parts)


async def test_clients_go_on_while_one_waits_for_a_disk_that_hangs(
    real_pool, served, connect, monkeypatch
):
    """Nothing of the first 64 KiB of the pool's data comes until the disk is let go."""
    waiter, other = await connect(), await connect()
    for client in (waiter, other):
        await client.go("disk")
    content = random.Random(5).randbytes(2 * MIB)
    await waiter.write(0, content)
    volume = real_pool.volumes["disk"]
    place = (volume.map.words[0] & SLOT_MASK) * volume.block_size
    cached, waiting = LocalFile.preadv_cached, LocalFile.preadv
    let_go = threading.Event()

    def is_cold(offset: int) -> bool:
        return place <= offset < place + 65536 and not let_go.is_set()

    def hang(file, buffer, offset):
        if is_cold(offset):
            let_go.wait()
        return waiting(file, buffer, offset)

    monkeypatch.setattr(LocalFile, "preadv", hang)
    monkeypatch.setattr(
        LocalFile,
        "preadv_cached",
        lambda file, buffer, offset: -1 if is_cold(offset) else cached(file, buffer, offset),
    )
    cold = [waiter.start(Command.READ, at, 4096) for at in range(0, 65536, 4096)]
    try:
        for at in range(65536, MIB, 4096):
            assert await other.read(at, 4096) == content[at : at + 4096]
            await other.write(MIB + at, b"n" * 4096)
        assert (await other.do(Command.FLUSH)).error == 0
        assert await waiter.read(65536, 4096) == content[65536:69632]
    finally:
        let_go.set()
    found = [await waiter.reply(cookie) for cookie in cold]
    assert b"".join(reply.data for reply in found) == content[:65536]
