"""Clients that mean no good, or are broken: nothing they do may harm others or fill memory."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import random
import socket
import struct
import weakref
from pathlib import Path

import pytest

from nbdstore.protocol import transmission
from nbdstore.protocol.agreement import ReplyMode
from nbdstore.protocol.client import build_info, build_option
from nbdstore.protocol.constants import REQUEST, REQUEST_MAGIC, Command, Errno, Option
from nbdstore.server import Limits, listener
from nbdstore.store import Extent, ExtentKind
from tests.server.conftest import SIZE
from tests.server.loop import until

MIB = 1 << 20


def read_request(offset: int, length: int, cookie: int = 0) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, 0, Command.READ, cookie.to_bytes(8), offset, length)


# --- Garbage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("phase", ["hello", "options", "transmission"])
async def test_garbage_closes_the_connection(serve, connect, seed, phase):
    server = await serve()
    client = await connect(flags=None if phase == "hello" else 3)
    if phase == "transmission":
        await client.go()
    client.send(b"\xff" + random.Random(seed).randbytes(2000))
    await client.until_closed()
    await until(lambda: not server.connections)
    other = await connect()
    await other.go()
    assert await other.read(0, 4) == bytes(4)


@pytest.mark.parametrize("part", [0, 1, 10, 27, 28, 29, 500, 1051])
async def test_a_client_that_stops_in_the_middle(pool, serve, connect, part):
    server = await serve()
    client = await connect()
    await client.go()
    _, request = client.transmission.request(Command.WRITE, 0, payload=b"x" * 1024)
    client.send(request[:part])
    client.writer.write_eof()
    assert await client.until_closed() == b""
    await until(lambda: not server.connections)
    assert pool.volumes["disk"].n_written_now == 0


async def test_a_client_that_vanishes(pool, serve, connect):
    """With requests in flight: they come to their end, and the connection to its own."""
    server = await serve()
    client = await connect()
    await client.go()
    volume = pool.volumes["disk"]
    volume.space.clear()
    client.start(Command.WRITE, 0, payload=b"held")
    await until(lambda: server.attached(volume) and server.connections[0].in_flight)
    client.writer.transport.abort()
    client.start(Command.READ, 0, 1)
    await asyncio.sleep(0)
    assert server.attached(volume) == 1, "deleting it would pull the ground from under the write"
    volume.space.set()
    await until(lambda: not server.connections)


async def test_a_half_closed_client_gets_its_replies(client):
    """proto.md does not say so, but a script that pipes requests into a socket does it."""
    await client.go()
    cookies = [client.start(Command.READ, 0, MIB) for _ in range(20)]
    client.writer.write_eof()
    assert [(await client.reply(cookie)).error for cookie in cookies] == [0] * 20
    assert await client.closed()


# --- Clients that do not read --------------------------------------------------------------------


@pytest.mark.parametrize("length", [4096, 32 * MIB])
async def test_a_client_that_never_reads_is_not_read_from(serve, connect, tmp_path, length):
    """What it makes the server hold stays below the limit and one request."""
    limits = Limits(max_unsent_bytes=2 * MIB, max_round_bytes=MIB, linger_s=0.1)
    server = await serve(limits=limits)
    deaf = await connect()
    await deaf.go()
    deaf.writer.transport.pause_reading()
    n_requests = 50_000
    deaf.send(read_request(0, length) * n_requests)
    other = await connect()
    await other.go()
    (session, _) = [connection.session for connection in server._connections]
    await until(lambda: session._blocked and not session._reading)
    for _ in range(10):
        assert await other.read(0, 4096) == bytes(4096)
        assert session._held() <= limits.max_unsent_bytes + max(MIB, length) + MIB
    assert not session._reading
    assert session.bytes_read < n_requests * length
    deaf.writer.transport.abort()


async def test_a_client_that_floods_with_options_lets_others_work(pool, serve, connect):
    for i in range(50):
        pool.create(f"volume{i}", MIB)
    await serve(limits=Limits(max_options=1_000_000))
    flooding, other = await connect(), await connect()
    flooding.send(build_option(Option.LIST) * 5000)
    reading = asyncio.ensure_future(flooding.until_closed())
    await other.go("disk")
    assert await other.read(0, 1) == b"\0"
    flooding.writer.transport.abort()
    await reading


async def test_a_client_that_never_stops_sending_is_closed_after_a_while(serve, connect):
    """Lingering for the sake of replies has an end, and does not stop the loop."""
    server = await serve(limits=Limits(linger_s=0.05))
    client = await connect()
    await client.go()
    client.start(Command.DISC)
    for _ in range(1000):
        client.send(bytes(1 << 16))
    await client.until_closed()
    await until(lambda: not server.connections)


async def test_a_client_that_never_reads_its_option_replies(serve, connect):
    """It is cut off by the deadline; until then, one option's replies are all that is held."""
    server = await serve(limits=Limits(handshake_timeout_s=0.3, max_options=1_000_000))
    client = await connect()
    client.writer.transport.pause_reading()
    for _ in range(100):
        client.send(build_option(Option.LIST) * 100)
    await until(lambda: not server.connections)


async def test_held_writes_are_bounded(pool, serve, connect):
    """A full pool: payloads pile up to the limit, then the client waits."""
    volume = pool.volumes["disk"]
    server = await serve(limits=Limits(max_held_bytes=4 * MIB))
    client = await connect()
    await client.go()
    volume.space.clear()
    payloads = [(b"%02d" % i) * (MIB // 2) for i in range(20)]
    cookies = [
        client.start(Command.WRITE, i * MIB, payload=data) for i, data in enumerate(payloads)
    ]
    session = next(iter(server._connections)).session
    await until(lambda: session.in_flight and not session._reading)
    assert session._bytes_in_flight <= 6 * MIB
    volume.space.set()
    for i, cookie in enumerate(cookies):
        assert (await client.reply(cookie)).error == 0
        assert await client.read(i * MIB + 2, 2) == b"%02d" % i


async def test_requests_in_flight_are_bounded(pool, serve, connect):
    volume = pool.volumes["disk"]
    volume.cold = True
    await serve(limits=Limits(max_in_flight=8))
    client = await connect()
    await client.go()
    await client.write(0, bytes(range(256)) * 4)
    cookies = [client.start(Command.READ, i, 1) for i in range(1000)]
    data = b"".join([(await client.reply(cookie)).data for cookie in cookies])
    assert data == bytes(range(256)) * 3 + bytes(range(1000 - 768))


async def test_tiny_writes_in_flight_are_bounded(pool, serve, connect):
    """A full pool: thousands of them come in one round, and each would be a task."""
    volume = pool.volumes["disk"]
    server = await serve(limits=Limits(max_in_flight=8))
    client = await connect()
    await client.go()
    volume.space.clear()
    cookies = [client.start(Command.WRITE, i, payload=bytes([i % 256])) for i in range(2000)]
    session = next(iter(server._connections)).session
    await until(lambda: session.in_flight and not session._reading)
    assert session.in_flight < 2 * 8
    volume.space.set()
    for cookie in cookies:
        assert (await client.reply(cookie)).error == 0
    assert await client.read(0, 2000) == (bytes(range(256)) * 8)[:2000]


@pytest.mark.parametrize("command", [Command.BLOCK_STATUS, Command.CACHE])
async def test_commands_that_keep_the_loop_busy_take_turns(pool, serve, connect, command):
    """None of them may have to wait, so each would delay all others by its own time."""
    volume, n_calls, most = pool.volumes["disk"], 0, 0

    async def busy(*_, **__):
        nonlocal n_calls
        n_calls += 1
        return [Extent(SIZE, ExtentKind.HOLE)]

    async def watch():
        nonlocal most
        while True:
            before = n_calls
            await asyncio.sleep(0)
            most = max(most, n_calls - before)

    volume.extents = volume.cache = busy
    await serve()
    client = await connect()
    await client.go("disk", ReplyMode.STRUCTURED, ["base:allocation"])
    watcher = asyncio.create_task(watch())
    cookies = [client.start(command, 0, SIZE) for _ in range(50)]
    for cookie in cookies:
        assert (await client.reply(cookie)).error == 0
    watcher.cancel()
    assert n_calls >= 50
    assert most <= 2


@pytest.mark.parametrize("leave", ["in the middle", "properly", "by a reset"])
async def test_memory_of_clients_that_left_is_free_at_once(serve, connect, monkeypatch, leave):
    """Not when garbage is collected: of that there is too little for it to be soon."""
    buffers = []

    def reserve(n_bytes):
        buffer = transmission.mmap(-1, n_bytes)
        buffers.append(weakref.ref(buffer))
        return buffer

    monkeypatch.setattr(transmission, "reserve", reserve)
    server = await serve()
    client = await connect()
    await client.go()
    gc.disable()
    try:
        await client.write(0, b"x" * MIB)
        if leave != "properly":
            client.send(REQUEST.pack(REQUEST_MAGIC, 0, Command.WRITE, bytes(8), 0, MIB) + b"yes")
            session = next(iter(server._connections)).session
            await until(lambda: not session._parser.is_between_requests)
        if leave == "by a reset":
            sock = client.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.writer.transport.abort()
        else:
            client.writer.write_eof()
            await client.until_closed()
        await until(lambda: not server.connections)
        assert len(buffers) >= 2
        left = {id(buffer()) for buffer in buffers if buffer() is not None}
        assert left <= {id(spare) for spare in server._settings.budget.spares.buffers}
    finally:
        gc.enable()


async def test_held_writes_survive_the_receive_buffer(pool, serve, connect):
    """Payloads that wait are copied out of it, or handed over."""
    volume = pool.volumes["disk"]
    await serve()
    client = await connect()
    await client.go()
    volume.space.clear()
    sizes = [1, 100, 5000, 300_000, 3 * MIB, 7]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    cookies = [
        client.start(Command.WRITE, start, payload=bytes([65 + i]) * size)
        for i, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]
    await client.read(SIZE - MIB, MIB)
    volume.space.set()
    for cookie in cookies:
        assert (await client.reply(cookie)).error == 0
    data = await client.read(0, sum(sizes))
    assert data == b"".join(bytes([65 + i]) * size for i, size in enumerate(sizes))


async def test_a_round_gives_way_to_others(serve, connect):
    """A thousand large reads in one go: another client's read comes between them."""
    await serve(limits=Limits(max_round_bytes=MIB))
    greedy, other = await connect(), await connect()
    await greedy.go()
    await other.go()
    cookies = [greedy.start(Command.READ, 0, MIB) for _ in range(200)]
    await greedy.reply(cookies[0])
    await other.read(0, 1)
    assert greedy.transmission.n_pending > 0
    for cookie in cookies[1:]:
        await greedy.reply(cookie)


# --- Crowds --------------------------------------------------------------------------------------


async def test_thousands_of_connections(serve, connect, tmp_path):
    """Beyond the limit they are closed at once, and do not keep the others from working."""
    server = await serve(limits=Limits(max_connections=20, linger_s=0.1))
    first = await connect()
    await first.go()
    crowd: list[socket.socket] = []
    for _ in range(100):
        crowd += [begin_to_connect(tmp_path / "nbd.sock") for _ in range(50)]
        assert await first.read(0, 1) == b"\0"
        assert len(server.connections) <= 20
        while len(crowd) > 100:
            crowd.pop(0).close()
    for sock in crowd:
        sock.close()
    await first.read(0, 1)
    await until(lambda: len(server.connections) == 1)


def begin_to_connect(path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):  # the backlog is full
        sock.connect(str(path))
    return sock


async def test_refused_clients_may_come_back(serve, connect):
    server = await serve(limits=Limits(max_connections=2, linger_s=0.1))
    first, second = await connect(), await connect()
    for _ in range(3):
        with pytest.raises((AssertionError, ConnectionError)):
            await connect()
    second.close()
    await until(lambda: len(server.connections) == 1)
    await (await connect()).go()
    await first.go()


async def test_being_out_of_descriptors_passes(serve, connect, monkeypatch):
    """accept fails with EMFILE: the listener pauses, then serves those who wait."""
    monkeypatch.setattr(listener, "PAUSE_S", 0.01)
    server = await serve()
    (sock,) = server._listener._sockets

    class Exhausted:
        """A listening socket of a process without descriptors."""

        n_accepts = 0

        def accept(self):
            self.n_accepts += 1
            raise OSError(errno.EMFILE, "Too many open files")

        def __getattr__(self, name):
            return getattr(sock, name)

    exhausted = Exhausted()
    server._listener._accept(exhausted)
    assert exhausted.n_accepts == 1
    await (await connect()).go()


# --- Sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [Command.TRIM, Command.WRITE_ZEROES, Command.CACHE])
async def test_effects_of_gigabytes_are_one_request(pool, serve, connect, command):
    volume = pool.create("huge", 1 << 41)
    calls = []

    async def note(offset, length, **_):
        calls.append((offset, length))

    volume.trim = volume.write_zeroes = volume.cache = note
    await serve()
    client = await connect()
    await client.go("huge", ReplyMode.SIMPLE)
    assert (await client.do(command, 0, 0xFFFFF000)).error == 0
    assert sum(length for _, length in calls) == 0xFFFFF000


async def test_a_large_cache_lets_others_come_between(pool, serve, connect):
    volume, steps = pool.create("huge", 1 << 41), []

    async def at_once(offset, length):
        steps.append(offset)

    volume.cache = at_once
    await serve()
    client, other = await connect(), await connect()
    await client.go("huge", ReplyMode.EXTENDED)
    await other.go("disk")
    cookie = client.start(Command.CACHE, 0, 1 << 41)
    await until(lambda: steps)
    await other.read(0, 1)
    assert len(steps) < (1 << 41) // (32 * MIB)
    assert (await client.reply(cookie)).error == 0
    assert len(steps) == (1 << 41) // (32 * MIB)


async def test_lengths_that_lie_about_a_payload_cost_nothing(serve, connect):
    """A WRITE that announces 32 MiB and sends none: 40 of them would be 1.25 GiB."""
    server = await serve()
    clients = [await connect() for _ in range(40)]
    for client in clients:
        await client.go()
    before = resident_bytes()
    for client in clients:
        client.start(Command.READ, 0, 1)
        client.send(REQUEST.pack(REQUEST_MAGIC, 0, Command.WRITE, bytes(8), 0, 32 * MIB))
        client.send(bytes(10))
    sessions = [connection.session for connection in server._connections]
    await until(lambda: all(not session._parser.is_between_requests for session in sessions))
    assert resident_bytes() - before < 64 * MIB
    for client in clients:
        client.writer.write_eof()
        await client.until_closed()


def resident_bytes() -> int:
    n_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return n_pages * os.sysconf("SC_PAGE_SIZE")


async def test_a_payload_beyond_everything_closes(client):
    await client.go()
    client.send(REQUEST.pack(REQUEST_MAGIC, 0, Command.WRITE, bytes(8), 0, 0xFFFFFFFF))
    assert await client.until_closed() == b""


async def test_a_store_that_breaks_costs_one_connection(pool, serve, connect, caplog):
    """A bug, not an error: the session ends, the server goes on, and the log has the trace."""
    await serve()
    client, other = await connect(), await connect()
    await client.go()
    await other.go()
    pool.volumes["disk"].error = ZeroDivisionError("a bug")
    client.start(Command.READ, 0, 1)
    assert await client.until_closed() == b""
    cookie = other.start(Command.FLUSH)
    with pytest.raises((AssertionError, ConnectionError)):
        await other.reply(cookie)
    assert caplog.text.count("ZeroDivisionError: a bug") == 2
    pool.volumes["disk"].error = None
    third = await connect()
    third.send(build_option(Option.GO, build_info("disk")))
    assert (await third.answer()).data


@pytest.mark.parametrize("mode", ReplyMode)
async def test_errors_of_every_request_at_once(client, mode):
    await client.go("disk", mode)
    cookies = [client.start(Command.READ, SIZE, 1) for _ in range(5000)]
    assert {(await client.reply(cookie)).error for cookie in cookies} == {Errno.EINVAL}
