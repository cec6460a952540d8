"""The limits of volumes as clients meet them: they wait, nobody else does, and nothing is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nbdstore.protocol.constants import Command
from nbdstore.server import Limits, Server
from nbdstore.store import Pool
from tests.server.conftest import QUICK, Connect, Serve
from tests.server.loop import until
from tests.server.memory_pool import MemoryPool, MemoryVolume
from tests.server.nbd_client import NbdClient

BLOCK = 4096
MIB = 1 << 20
NEVER = {"iops": 0, "bandwidth": 64 << 10, "burst_s": 0.0}
"""After 32 MiB, nothing may go for 512 s."""


def limit(server: Server, volume: MemoryVolume, limits: dict[str, float] | None) -> None:
    volume.properties["qos"] = limits
    server.limits_changed(volume)


async def use_up(server: Server, client: NbdClient) -> None:
    """Have a client ask for so much that the next request has to wait for very long."""
    await client.read(0, 32 * MIB)


@pytest.fixture
async def server(serve: Serve, pool: MemoryPool) -> Server:
    """With the volume `disk`, which is limited, and `other`, which is not."""
    server = await serve()
    pool.create("other", 64 * MIB)
    limit(server, pool.volumes["disk"], NEVER)
    return server


@pytest.fixture
async def limited(server: Server, connect: Connect) -> NbdClient:
    """A client of `disk` that has used up what it might."""
    client = await connect()
    await client.go("disk")
    await use_up(server, client)
    return client


def pending(server: Server) -> int:
    return sum(info.in_flight for info in server.connections)


class TestWaiting:
    async def test_ends_when_the_limits_change(
        self, server: Server, limited: NbdClient, pool: MemoryPool
    ) -> None:
        cookies = [
            limited.start(Command.WRITE, n * BLOCK, payload=bytes([n]) * BLOCK) for n in range(20)
        ]
        await until(lambda: pending(server) == 20)
        assert pool.volumes["disk"].blocks == {}
        limit(server, pool.volumes["disk"], {**NEVER, "bandwidth": 1 << 40})
        for cookie in cookies:
            assert (await limited.reply(cookie)).error == 0
        assert sorted(pool.volumes["disk"].blocks) == list(range(20))

    async def test_ends_when_there_are_none(
        self, server: Server, limited: NbdClient, pool: MemoryPool
    ) -> None:
        cookie = limited.start(Command.READ, 0, BLOCK)
        await until(lambda: pending(server) == 1)
        limit(server, pool.volumes["disk"], None)
        assert (await limited.reply(cookie)).error == 0
        await limited.write(0, b"x" * MIB)

    async def test_is_not_for_clients_of_other_volumes(
        self, server: Server, limited: NbdClient, connect: Connect
    ) -> None:
        limited.start(Command.READ, 0, BLOCK)
        await until(lambda: pending(server) == 1)
        other = await connect()
        await other.go("other")
        for _ in range(3):
            await other.write(0, b"x" * 8 * MIB)
            await other.read(0, 8 * MIB)

    async def test_is_for_clients_that_come_later(
        self, server: Server, limited: NbdClient, connect: Connect
    ) -> None:
        limited.close()
        client = await connect()
        await client.go("disk")
        client.start(Command.READ, 0, BLOCK)
        await until(lambda: pending(server) == 1)

    async def test_keeps_the_order_of_a_flush(
        self, server: Server, limited: NbdClient, pool: MemoryPool
    ) -> None:
        write = limited.start(Command.WRITE, 0, payload=b"x" * BLOCK)
        flush = limited.start(Command.FLUSH)
        await until(lambda: pending(server) == 2)
        limit(server, pool.volumes["disk"], None)
        assert (await limited.reply(write)).error == 0
        assert (await limited.reply(flush)).error == 0

    async def test_a_flush_alone_does_not_wait(self, limited: NbdClient) -> None:
        assert (await limited.do(Command.FLUSH)).error == 0

    @pytest.mark.parametrize("size", [128 << 10, MIB, 32 * MIB])
    async def test_large_payloads(
        self, server: Server, limited: NbdClient, pool: MemoryPool, size: int
    ) -> None:
        """Beyond some size their bytes are left unread meanwhile, and take no memory."""
        budget = server._settings.budget
        data = bytes(range(256)) * (size // 256)
        cookies = [limited.start(Command.WRITE, 0, payload=data)]
        cookies.append(limited.start(Command.READ, 0, size))
        session = next(iter(server._connections)).session
        assert session
        await until(lambda: session.gate.held)
        assert budget.common_free == budget.common_bytes
        limit(server, pool.volumes["disk"], None)
        assert (await limited.reply(cookies[0])).error == 0
        assert (await limited.reply(cookies[1])).data is not None
        assert await limited.read(0, size) == data

    async def test_small_requests_before_a_large_payload(
        self, server: Server, limited: NbdClient, pool: MemoryPool
    ) -> None:
        """All in one batch: the small ones are held when the large one's header has come."""
        cookies = [
            limited.start(Command.WRITE, n * BLOCK, payload=bytes([n]) * BLOCK) for n in range(9)
        ]
        cookies.append(limited.start(Command.WRITE, 9 * BLOCK, payload=b"y" * MIB))
        await until(lambda: pending(server) >= 9)
        limit(server, pool.volumes["disk"], None)
        for cookie in cookies:
            assert (await limited.reply(cookie)).error == 0
        assert [bytes(pool.volumes["disk"].blocks[n][:1])[0] for n in range(9)] == list(range(9))
        assert await limited.read(9 * BLOCK, MIB) == b"y" * MIB


async def test_a_snapshot_s_clients_share_the_limits_of_its_volume(
    tmp_path: Path, serve: Serve, connect: Connect
) -> None:
    Pool.create(tmp_path / "pool", capacity=64 * MIB, journal_size=MIB)
    pool = await Pool.open(tmp_path / "pool")
    try:
        volume = await pool.create_volume("disk", 32 * MIB)
        await pool.create_snapshots([(volume, "first")])
        server = await serve(pool=pool)
        early, late = await connect(), await connect()
        await early.go("disk@first")
        await pool.set_properties(volume, {"qos": NEVER})
        server.limits_changed(volume)
        await late.go("disk@first")
        await use_up(server, early)
        cookies = [(client, client.start(Command.READ, 0, BLOCK)) for client in (early, late)]
        await until(lambda: pending(server) == 2)
        await pool.set_properties(volume, {})
        server.limits_changed(volume)
        for client, cookie in cookies:
            assert (await client.reply(cookie)).error == 0
        await server.drain(timeout_s=5)
    finally:
        await pool.close()


class TestEnding:
    async def test_a_drain_answers_what_has_come(self, server: Server, limited: NbdClient) -> None:
        cookie = limited.start(Command.WRITE, 0, payload=b"x" * BLOCK)
        await until(lambda: pending(server) == 1)
        async with asyncio.timeout(10):  # what it would wait for otherwise are minutes
            drain = asyncio.create_task(server.drain(timeout_s=60))
            assert (await limited.reply(cookie)).error == 0
            assert await limited.closed()
            limited.close()
            await drain

    async def test_a_proper_goodbye_is_waited_for(
        self, server: Server, limited: NbdClient, pool: MemoryPool
    ) -> None:
        limited.start(Command.WRITE, 0, payload=b"x" * BLOCK)
        limited.start(Command.DISC)
        await until(lambda: pending(server) == 2)
        limited.writer.write_eof()
        limit(server, pool.volumes["disk"], None)
        await limited.until_closed()
        assert pool.volumes["disk"].blocks == {0: b"x" * BLOCK}

    async def test_who_hung_up_meanwhile_writes_nothing(
        self, server: Server, limited: NbdClient, pool: MemoryPool, connect: Connect
    ) -> None:
        """It may have come again, and written something newer."""
        limited.start(Command.WRITE, 0, payload=b"x" * BLOCK)
        await until(lambda: pending(server) == 1)
        limited.close()
        await limited.writer.wait_closed()
        limit(server, pool.volumes["disk"], None)
        await until(lambda: not server.connections)
        assert pool.volumes["disk"].blocks == {}

    async def test_who_hung_up_is_noticed_while_it_waits(
        self, server: Server, limited: NbdClient, pool: MemoryPool
    ) -> None:
        limited.start(Command.WRITE, 0, payload=b"x" * BLOCK)
        await until(lambda: pending(server) == 1)
        limited.close()
        await until(lambda: not server.connections)
        assert pool.volumes["disk"].blocks == {}

    async def test_a_fenced_client_writes_nothing(
        self, server: Server, limited: NbdClient, pool: MemoryPool
    ) -> None:
        volume = pool.volumes["disk"]
        limited.start(Command.WRITE, 0, payload=b"x" * BLOCK)
        await until(lambda: pending(server) == 1)
        await server.fence(volume, "a test")
        limit(server, volume, None)
        await limited.until_closed()
        assert volume.blocks == {}

    async def test_waiting_for_limits_is_no_stall(
        self, serve: Serve, connect: Connect, pool: MemoryPool
    ) -> None:
        limits = Limits(**{**vars(QUICK), "stall_timeout_s": 0.01, "max_client_bytes": 16 * MIB})
        server = await serve(limits=limits, listen=["127.0.0.1:0"])
        limit(server, pool.volumes["disk"], NEVER)
        client = await connect(server.addresses[0])
        await client.go("disk")
        await use_up(server, client)
        cookie = client.start(Command.WRITE, 0, payload=b"x" * 8 * MIB)
        session = next(iter(server._connections)).session
        assert session
        await until(lambda: session.gate.held)
        assert session.stall(1.0, 0.0) is None
        limit(server, pool.volumes["disk"], None)
        assert (await client.reply(cookie)).error == 0


async def test_everything_passes_and_nothing_changes(
    serve: Serve, connect: Connect, pool: MemoryPool
) -> None:
    """Limits that are felt all the time: several clients, all kinds of requests, right data."""
    server = await serve()
    volume = pool.volumes["disk"]
    limit(server, volume, {"iops": 4000, "bandwidth": 200 * MIB, "burst_s": 0.0})

    async def work(number: int) -> None:
        client = await connect()
        await client.go("disk")
        base = number * 8 * MIB
        model = bytearray(8 * MIB)
        for step in range(40):
            size = [BLOCK, 3 * BLOCK, 200 << 10, MIB][step % 4]
            offset = (step * 37 * BLOCK) % (8 * MIB - size)
            data = bytes([number * 40 + step]) * size
            write = client.start(Command.WRITE, base + offset, payload=data)
            client.start(Command.FLUSH)
            assert (await client.reply(write)).error == 0
            model[offset : offset + size] = data
            if step % 5 == 0:
                trim = await client.do(Command.WRITE_ZEROES, base + offset, BLOCK)
                assert trim.error == 0
                model[offset : offset + BLOCK] = bytes(BLOCK)
            assert await client.read(base + offset, size) == model[offset : offset + size]
            if step % 10 == 0:
                limit(server, volume, {"iops": 3000 + step, "bandwidth": 0, "burst_s": 0.0})
        assert await client.read(base, 8 * MIB) == model

    await asyncio.gather(*(work(number) for number in range(4)))
