"""Leases on the wire: who may attach, and that nothing of a fenced client is executed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nbdstore import lease
from nbdstore.control.operations import Operations
from nbdstore.protocol.client import build_info, build_option
from nbdstore.protocol.constants import Command, CommandFlag, Option, OptionReply
from nbdstore.server import Server
from nbdstore.store import Pool
from tests.server.conftest import Connect, Serve
from tests.server.loop import until
from tests.server.memory_pool import MemoryPool
from tests.server.nbd_client import NbdClient

BLOCK = 4096
SINCE = "2026-01-01T00:00:00+00:00"


def lease_to(pool: MemoryPool, holder: str) -> str:
    """Record a lease of `disk`; return the export's name with it."""
    volume = pool.volumes["disk"]
    granted, properties = lease.grant(volume.properties, holder, SINCE)
    volume.properties |= properties
    return granted.export("disk")


class TestAttaching:
    async def test_by_the_lease(self, serve: Serve, connect: Connect, pool: MemoryPool) -> None:
        server = await serve()
        name = lease_to(pool, "node-1")
        client = await connect()
        await client.go(name)
        await client.write(0, b"x" * BLOCK)
        (info,) = server.connections
        assert (info.export, info.holder, info.lease_epoch) == ("disk", "node-1", 1)

    async def test_by_several_connections(
        self, serve: Serve, connect: Connect, pool: MemoryPool
    ) -> None:
        await serve()
        name = lease_to(pool, "node-1")
        first, second = await connect(), await connect()
        await first.go(name)
        await second.go(name)
        await first.write(0, b"x" * BLOCK)
        assert await second.read(0, BLOCK) == b"x" * BLOCK

    @pytest.mark.parametrize("option", [Option.GO, Option.INFO])
    async def test_refusals_say_who_holds_it(
        self, client: NbdClient, pool: MemoryPool, option: Option
    ) -> None:
        stale = lease_to(pool, "node-1")
        valid = lease_to(pool, "node-2")
        wrong = valid[:-1] + ("0" if valid[-1] != "0" else "1")
        for name, said in (
            ("disk", "is leased to 'node-2' since 2026-"),
            ("", "is leased to 'node-2' since 2026-"),
            (stale, "has ended: it is leased to 'node-2' since 2026-"),
            (wrong, "has ended: it is leased to 'node-2' since 2026-"),
        ):
            (answer,) = await client.ask(option, build_info(name))
            assert answer.reply == OptionReply.ERR_POLICY
            assert said in answer.data.decode()
            assert valid.partition("-")[2] not in answer.data.decode(), "the token is a secret"

    async def test_info_answers_like_go(self, client: NbdClient, pool: MemoryPool) -> None:
        name = lease_to(pool, "node-1")
        told = await client.ask(Option.INFO, build_info(name))
        agreed = await client.ask(Option.GO, build_info(name))
        assert [(item.reply, item.data) for item in told] == [
            (item.reply, item.data) for item in agreed
        ]
        assert told[-1].reply == OptionReply.ACK

    async def test_one_that_was_released(self, client: NbdClient, pool: MemoryPool) -> None:
        name = lease_to(pool, "node-1")
        pool.volumes["disk"].properties |= lease.ended()
        answer = await client.try_go(name)
        assert answer.reply == OptionReply.ERR_POLICY
        assert "has ended: ask for a new one" in answer.data.decode()
        await client.go("disk")

    async def test_lists_show_what_can_be_attached(
        self, client: NbdClient, pool: MemoryPool
    ) -> None:
        lease_to(pool, "node-1")
        pool.create("other", 1 << 20)
        assert [answer.data[4:] for answer in await client.ask(Option.LIST)] == [b"other", b""]

    async def test_of_a_volume_that_is_not_there(self, client: NbdClient) -> None:
        answer = await client.try_go("nope,lease=1-ab")
        assert answer.reply == OptionReply.ERR_UNKNOWN
        assert "no export 'nope'" in answer.data.decode()

    async def test_not_while_it_changes_hands(
        self, serve: Serve, connect: Connect, pool: MemoryPool
    ) -> None:
        server = await serve()
        name = lease_to(pool, "node-1")
        client = await connect()
        with server.barred(pool.volumes["disk"]):
            for tried in (name, "disk"):
                answer = await client.try_go(tried)
                assert answer.reply == OptionReply.ERR_POLICY
                assert "is being changed: try again" in answer.data.decode()
        await client.go(name)


class TestFencing:
    async def test_ends_the_connections(
        self, serve: Serve, connect: Connect, pool: MemoryPool
    ) -> None:
        server = await serve()
        pool.create("other", 1 << 20)
        first, second, third = await connect(), await connect(), await connect()
        await first.go("disk")
        await second.go("disk")
        await third.go("other")
        assert await server.fence(pool.volumes["disk"], "a test") == 2
        assert server.attached(pool.volumes["disk"]) == 0
        assert await first.closed()
        assert await second.closed()
        await third.write(0, b"x")
        assert await server.fence(pool.volumes["disk"], "a test") == 0

    async def test_a_write_that_is_held_never_lands(
        self, serve: Serve, connect: Connect, pool: MemoryPool
    ) -> None:
        server = await serve()
        volume = pool.volumes["disk"]
        client = await connect()
        await client.go("disk")
        volume.space.clear()
        client.start(Command.WRITE, 0, payload=b"x" * BLOCK)
        client.start(Command.WRITE_ZEROES, BLOCK, BLOCK, CommandFlag.NO_HOLE)
        await until(lambda: server.connections[0].in_flight == 2)
        await server.fence(volume, "a test")
        volume.space.set()
        await drained_loop()
        assert (volume.blocks, volume.provisioned) == ({}, set())

    async def test_what_the_network_still_delivers_is_not_read(
        self, serve: Serve, connect: Connect, pool: MemoryPool
    ) -> None:
        """The write is in the server's socket when the fence begins."""
        server = await serve()
        volume = pool.volumes["disk"]
        client = await connect()
        await client.go("disk")
        await client.write(0, b"a" * BLOCK)
        client.start(Command.WRITE, 0, payload=b"x" * BLOCK)
        # On unix sockets what the writer has sent is there for the reader; the loop has not turned.
        await server.fence(volume, "a test")
        await client.until_closed()
        await drained_loop()
        assert volume.blocks[0] == b"a" * BLOCK

    async def test_requests_that_wait_for_their_turn_are_dropped(
        self, serve: Serve, connect: Connect, pool: MemoryPool
    ) -> None:
        server = await serve()
        volume = pool.volumes["disk"]
        client = await connect()
        await client.go("disk")
        volume.space.clear()
        for block in range(1500):  # beyond what is served at a time
            client.start(Command.WRITE, block * BLOCK, payload=b"x" * BLOCK)
        await until(lambda: server.connections[0].in_flight >= 1024)
        await server.fence(volume, "a test")
        volume.space.set()
        await drained_loop()
        assert volume.blocks == {}

    async def test_a_client_that_was_let_in_but_has_not_begun(
        self, serve: Serve, connect: Connect, pool: MemoryPool
    ) -> None:
        server = await serve()
        volume = pool.volumes["disk"]
        client = await connect()
        client.send(build_option(Option.GO, build_info("disk")))
        await until(lambda: server.attached(volume) == 1)
        assert await server.fence(volume, "a test") == 1
        client.send(b"anything")
        await client.until_closed()
        assert server.attached(volume) == 0

    async def test_disconnecting_ends_one(
        self, serve: Serve, connect: Connect, pool: MemoryPool
    ) -> None:
        server = await serve()
        first, second = await connect(), await connect()
        await first.go("disk")
        await second.go("disk")
        ids = [info.id for info in server.connections]
        assert await server.disconnect(ids[0], "a test")
        assert await first.closed()
        await second.write(0, b"x")
        assert not await server.disconnect(max(ids) + 1, "a test")


async def drained_loop() -> None:
    """Let everything that is ready run, and what that makes ready, many times over."""
    for _ in range(200):
        await asyncio.sleep(0)


class TestTheWhole:
    """Operations, server and a real pool together."""

    @pytest.fixture
    async def real_pool(self, tmp_path: Path) -> AsyncIterator[Pool]:
        Pool.create(tmp_path / "pool", capacity=64 << 20, journal_size=8 << 20)
        pool = await Pool.open(tmp_path / "pool")
        await pool.create_volume("disk", 8 << 20)
        yield pool
        await pool.close()

    @pytest.fixture
    async def server(self, real_pool: Pool, serve: Serve) -> Server:
        """Drained before the pool is closed: fixtures end in reverse order."""
        return await serve(pool=real_pool)

    async def test_a_busy_writer_is_fenced(
        self, real_pool: Pool, server: Server, connect: Connect
    ) -> None:
        """What the next holder reads after it got the lease is what it reads ever after."""
        operations = Operations(real_pool, server)
        for epoch in range(1, 20):
            info = await operations.leases.acquire("disk", f"node-{epoch}", force=True)
            assert info.epoch == epoch
            assert info.export
            reader = await connect()
            await reader.go(info.export)
            before = await reader.read(0, 64 * BLOCK)
            await drained_loop()
            assert await reader.read(0, 64 * BLOCK) == before
            writer = await connect()
            await writer.go(info.export)
            for block in range(64):
                flags = CommandFlag.FUA if block % 4 == 0 else 0
                payload = bytes([epoch]) * BLOCK
                writer.start(Command.WRITE, block * BLOCK, flags=flags, payload=payload)
            for _ in range(epoch):  # ever further into it
                await asyncio.sleep(0)

    async def test_who_attaches_at_the_same_moment(
        self, real_pool: Pool, server: Server, connect: Connect
    ) -> None:
        """Plain clients come all the time; none of them is attached beside the holder."""
        operations = Operations(real_pool, server)
        volume = real_pool.volumes["disk"]

        async def come_and_go() -> None:
            client = await connect()
            answer = await client.try_go("disk")
            assert answer.reply in (OptionReply.ACK, OptionReply.ERR_POLICY)
            client.close()

        for n in range(10):
            coming = [asyncio.create_task(come_and_go()) for _ in range(8)]
            for _ in range(3 * n):
                await asyncio.sleep(0)
            info = await operations.leases.acquire("disk", f"node-{n}", force=True)
            foreign = [item for item in server.connections if item.lease_epoch != info.epoch]
            assert [item.export for item in foreign if item.export] == []
            assert server.attached(volume) == 0
            results: list[Any] = await asyncio.gather(*coming, return_exceptions=True)
            lost = [item for item in results if item is not None]
            assert all(isinstance(item, AssertionError | ConnectionError) for item in lost)
            await operations.leases.break_("disk")
