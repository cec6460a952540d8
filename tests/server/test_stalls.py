"""Clients that sit on memory: what all of them can take is bounded, and they are cut off in time.

The budget's rules are in test_budget.py; here are the sessions that go by them.
"""

from __future__ import annotations

import asyncio
import logging

import pytest

from nbdstore.protocol.constants import REQUEST, REQUEST_MAGIC, Command
from nbdstore.server import Limits
from nbdstore.server import server as server_module
from nbdstore.server.stall import PROGRESS_BYTES
from tests.server.loop import until
from tests.server.test_hostile import read_request

MIB = 1 << 20


def small_budget(stall_timeout_s: float = 0, **limits: int) -> Limits:
    """A share of 1 MiB for each of 8 connections, and 8 MiB for all."""
    return Limits(
        max_connections=8,
        max_client_bytes=16 * MIB,
        stall_timeout_s=stall_timeout_s,
        linger_s=0.1,
        **limits,
    )


def sessions(server):
    return [connection.session for connection in server._connections]


async def deaf_client(connect, n_requests: int = 100, length: int = MIB):
    """A client that asks for much and reads nothing."""
    client = await connect()
    await client.go()
    client.writer.transport.pause_reading()
    client.send(read_request(0, length) * n_requests)
    return client


def unfinished_write(length: int) -> bytes:
    """All of a WRITE but its last byte."""
    header = REQUEST.pack(REQUEST_MAGIC, 0, Command.WRITE, bytes(8), 0, length)
    return header + bytes(length - 1)


# --- The budget of all ---------------------------------------------------------------------------


async def test_clients_that_never_read_share_one_budget(serve, connect):
    server = await serve(limits=small_budget())
    deaf = [await deaf_client(connect) for _ in range(7)]
    await until(lambda: all(session._blocked for session in sessions(server)))
    other = await connect()
    await other.go()
    for _ in range(20):
        assert await other.read(0, MIB) == bytes(MIB)
    assert sum(session._account.held for session in sessions(server)) <= 17 * MIB
    for client in deaf:
        client.writer.transport.abort()
    await until(lambda: len(server.connections) == 1)
    assert server._settings.budget.common_free == 8 * MIB


async def test_payloads_on_their_way_count(serve, connect):
    """Of 7 writes of 4 MiB that never end, 8 MiB for all let two or three come in whole."""
    server = await serve(limits=small_budget())
    clients = [await connect() for _ in range(7)]
    for client in clients:
        await client.go()
        client.send(unfinished_write(4 * MIB))
    budget = server._settings.budget
    await until(lambda: not budget.free_for_all)
    other = await connect()
    await other.go()
    for _ in range(20):
        await other.write(0, bytes(MIB))
    receiving = [session._receiving for session in sessions(server)]
    assert sorted(receiving)[-3:].count(4 * MIB) >= 2
    assert sum(receiving) <= 16 * MIB
    # The others go on when these are gone, each with its write.
    for client in clients:
        client.send(b"!")
    for client in clients:
        assert (await client.receive())[:4] == bytes.fromhex("67446698")
    assert budget.common_free == 8 * MIB


async def test_a_large_request_waits_for_its_turn(serve, connect):
    server = await serve(limits=small_budget())
    deaf = [await deaf_client(connect) for _ in range(6)]
    await until(lambda: not server._settings.budget.free_for_all)
    other = await connect()
    await other.go()
    reading = asyncio.ensure_future(other.read(0, 8 * MIB))
    session = next(s for s in sessions(server) if not s._blocked)
    await until(lambda: session._account.is_waiting)
    for client in deaf:
        client.writer.transport.abort()
    assert await reading == bytes(8 * MIB)


async def test_a_payload_does_not_take_the_room_of_what_comes_before_it(serve, connect):
    """A large read waits until nobody uses the common part, also the write that comes behind it."""
    await serve(limits=Limits(max_connections=8, max_client_bytes=4 * MIB))
    client = await connect()
    await client.go()
    start = client.transmission.request
    requests = [start(Command.READ, 0, 1), start(Command.READ, 0, 3 * MIB)]
    requests.append(start(Command.WRITE, 0, payload=bytes(MIB)))
    raw = b"".join(data for _, data in requests)
    client.send(raw[:1000])
    await asyncio.sleep(0)
    client.send(raw[1000:])
    for cookie, _ in requests:
        assert (await client.reply(cookie)).error == 0


async def test_all_go_on_when_there_is_room_again(pool, serve, connect):
    """Writes held by a full pool take the budget; what waited for it is served afterwards."""
    await serve(limits=small_budget())
    volume = pool.volumes["disk"]
    clients = [await connect() for _ in range(8)]
    for client in clients:
        await client.go()
    volume.space.clear()
    cookies = [
        [
            client.start(Command.WRITE, (8 * number + i) * MIB, payload=bytes([number + 1]) * MIB)
            for i in range(8)
        ]
        for number, client in enumerate(clients)
    ]
    await until(lambda: volume.calls.count("write") >= 8)
    volume.space.set()
    for number, client in enumerate(clients):
        for cookie in cookies[number]:
            assert (await client.reply(cookie)).error == 0
        for i in range(8):
            assert await client.read((8 * number + i) * MIB, 1) == bytes([number + 1])


async def test_an_idle_client_keeps_no_large_payload(serve, connect):
    """Its buffer is for the next who has one, or is freed if it is very large."""
    server = await serve()
    for length in (3 * MIB, 32 * MIB):
        client = await connect()
        await client.go()
        await client.write(0, bytes(length))
    assert [session._parser._lent for session in sessions(server)] == [None, None]
    assert [len(buffer) for buffer in server._settings.budget.spares.buffers] == [3 * MIB]


# --- Stalls --------------------------------------------------------------------------------------


async def stalled_client(connect, fault: str):
    """A client that does its part no further."""
    if fault == "does not read":
        return await deaf_client(connect)
    client = await connect()
    await client.go()
    part = unfinished_write(2 * MIB)
    client.send(part if fault == "stops in a payload" else part[:20])
    return client


async def crowd(server, connect) -> list:
    """Make others wait for memory, which clients that never read hold."""
    deaf = [await deaf_client(connect) for _ in range(6)]
    await until(lambda: server._settings.budget.is_contended)
    return deaf


@pytest.mark.parametrize("fault", ["does not read", "stops in a payload", "stops in a header"])
async def test_a_client_that_stalls_is_cut_off_if_others_wait(
    serve, connect, caplog, monkeypatch, fault
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(server_module, "LOOK_EVERY_S", 0.02)
    server = await serve(limits=small_budget(stall_timeout_s=0.2))
    await stalled_client(connect, fault)
    (session,) = sessions(server)
    await until(lambda: session._stall is not None)
    since_s = session._stall.since_s
    await until(lambda: server._patrol.when() - since_s > 0.5)  # more than the timeout
    assert session in sessions(server), "it harms nobody"
    await crowd(server, connect)
    await until(lambda: session not in sessions(server))
    line = next(record.message for record in caplog.records if "cut off" in record.message)
    assert "others wait" in line
    assert ("read its replies" if fault == "does not read" else "middle of a request") in line
    assert "detached disk" in caplog.text


async def test_whoever_waits_is_served_once_the_stalled_are_gone(serve, connect, monkeypatch):
    monkeypatch.setattr(server_module, "LOOK_EVERY_S", 0.02)
    server = await serve(limits=small_budget(stall_timeout_s=0.1))
    deaf = await crowd(server, connect)
    other = await connect()
    await other.go()
    assert await other.read(0, 8 * MIB) == bytes(8 * MIB)
    for client in deaf:
        client.writer.transport.abort()


async def test_idle_clients_and_clients_that_wait_for_us_are_not_cut_off(
    pool, serve, connect, monkeypatch
):
    monkeypatch.setattr(server_module, "LOOK_EVERY_S", 0.02)
    server = await serve(limits=small_budget(stall_timeout_s=0.1))
    idle, waiting = await connect(), await connect()
    for client in (idle, waiting):
        await client.go()
    pool.volumes["disk"].space.clear()
    cookies = [waiting.start(Command.WRITE, 0, payload=bytes(MIB)) for _ in range(20)]
    deaf = await crowd(server, connect)
    await until(lambda: len(server.connections) < 8)  # by now the others are as old as the deaf
    assert await idle.read(0, 1) == b"\0"
    pool.volumes["disk"].space.set()
    for cookie in cookies:
        assert (await waiting.reply(cookie)).error == 0
    for client in deaf:
        client.writer.transport.abort()


async def test_a_slow_client_is_not_stalled(serve, connect):
    """It takes its replies, or sends its payload, a little at a time."""
    server = await serve(limits=small_budget(stall_timeout_s=1000))
    client = await connect()
    await client.go()
    (session,) = sessions(server)
    client.send(unfinished_write(8 * MIB)[: PROGRESS_BYTES // 2])
    await until(lambda: session._n_partial + 28 >= PROGRESS_BYTES // 2)
    assert session.stall(0, 10) is None
    assert session.stall(9, 10) is None
    assert session.stall(10, 10) is not None
    client.send(bytes(PROGRESS_BYTES))
    await until(lambda: session._n_partial >= PROGRESS_BYTES * 3 // 2)
    assert session.stall(11, 10) is None
    assert session.stall(20, 10) is None
    assert session.stall(21, 10) == "it stopped in the middle of a request: for 10 s"


async def test_a_request_at_any_rate_shows_that_the_client_lives(serve, connect):
    """Small requests are complete before a megabyte has come, and are no stall."""
    server = await serve(limits=small_budget(stall_timeout_s=1000))
    client = await connect()
    await client.go()
    (session,) = sessions(server)
    header = read_request(0, 1)
    client.send(header[:5])
    await until(lambda: not session._parser.is_between_requests)
    assert session.stall(0, 10) is None
    client.send(header[5:] + header[:5])
    await client.receive()
    assert session.stall(100, 10) is None
    assert session.stall(109, 10) is None
    client.send(header[5:])
    await client.receive()
    assert session.stall(200, 10) is None


async def test_zero_is_for_ever(serve, connect, monkeypatch):
    n_looks = 0

    def look(self):
        nonlocal n_looks
        n_looks += 1
        original(self)

    original = server_module.Server._look_after_clients
    monkeypatch.setattr(server_module.Server, "_look_after_clients", look)
    monkeypatch.setattr(server_module, "LOOK_EVERY_S", 0.001)
    server = await serve(limits=small_budget(stall_timeout_s=0))
    deaf = [await deaf_client(connect) for _ in range(6)]
    await until(lambda: not server._settings.budget.free_for_all)
    other = await connect()
    await other.go()
    reading = asyncio.ensure_future(other.read(0, 8 * MIB))
    await until(lambda: server._settings.budget.is_contended)
    n_looks = 0
    await until(lambda: n_looks > 10)
    assert len(server.connections) == 7
    for client in deaf:
        client.writer.transport.abort()
    assert await reading == bytes(8 * MIB)
