"""Small writes of several clients go to the store together, and to each client its own reply."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from unittest import mock

import pytest

from nbdstore.errors import NoSpace
from nbdstore.protocol.constants import Command, CommandFlag, Errno
from nbdstore.protocol.transmission import Request
from nbdstore.qos import Qos
from nbdstore.server import Server
from nbdstore.server.gathering import (
    LONELY_TURNS,
    MAX_BYTES,
    SKIPPED_WRITES,
    Gathering,
    Held,
    OnWritten,
)
from nbdstore.server.limiter import Limiter
from nbdstore.server.session import Session
from tests.server.conftest import Connect, Serve
from tests.server.memory_pool import MemoryPool, MemoryVolume
from tests.server.nbd_client import NbdClient

BLOCK = 4096
N_CLIENTS = 3


class Batches(list[list[int]]):
    """The offsets of each batch that the store got, and what it does with it."""

    refused: int | None = None
    broken_above = N_CLIENTS

    def write_now(
        self, volume: MemoryVolume, writes: list[tuple[int, memoryview]], *, n_clients: int = 1
    ) -> bool:
        assert n_clients == len(writes)
        self.append([offset for offset, _ in writes])
        if len(writes) > self.broken_above:
            raise RuntimeError("a bug")
        if self.refused in self[-1]:
            raise NoSpace("the pool is full")
        return _write_now(volume, writes)


_write_now = MemoryVolume.write_now


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    found = Batches()

    def write_now(volume: MemoryVolume, *args: object, **kwargs: object) -> bool:
        return found.write_now(volume, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(MemoryVolume, "write_now", write_now)
    return found


@pytest.fixture
async def server(serve: Serve) -> Server:
    return await serve()


@pytest.fixture
async def clients(server: Server, connect: Connect) -> list[NbdClient]:
    clients = [await connect() for _ in range(N_CLIENTS)]
    for client in clients:
        await client.go("disk")
    return clients


def write_all(clients: list[NbdClient]) -> list[int]:
    """Have each client send a write of its number to the block of its number."""
    return [
        client.start(Command.WRITE, number * BLOCK, payload=bytes([number]) * BLOCK)
        for number, client in enumerate(clients)
    ]


async def errors(clients: list[NbdClient], cookies: list[int]) -> list[int]:
    return [
        (await client.reply(cookie)).error for client, cookie in zip(clients, cookies, strict=True)
    ]


async def test_writes_of_one_turn_are_one_batch(
    batches: Batches, clients: list[NbdClient], pool: MemoryPool
) -> None:
    assert await errors(clients, write_all(clients)) == [0] * N_CLIENTS
    assert sorted(batches[0]) == [number * BLOCK for number in range(N_CLIENTS)]
    assert len(batches) == 1
    blocks = pool.volumes["disk"].blocks
    assert [blocks[number] for number in range(N_CLIENTS)] == [
        bytes([number]) * BLOCK for number in range(N_CLIENTS)
    ]


async def test_each_client_gets_its_own_error(batches: Batches, clients: list[NbdClient]) -> None:
    batches.refused = BLOCK
    assert await errors(clients, write_all(clients)) == [0, Errno.ENOSPC, 0]


async def test_a_bug_in_the_batch_leaves_nobody_without_an_answer(
    batches: Batches, clients: list[NbdClient], caplog: pytest.LogCaptureFixture
) -> None:
    batches.broken_above = 1
    assert await errors(clients, write_all(clients)) == [0] * N_CLIENTS
    assert len(batches) == 1 + N_CLIENTS
    assert "bug: writes of 3 clients broke" in caplog.text


async def test_writes_that_must_wait_do_so_each_by_itself(
    clients: list[NbdClient], pool: MemoryPool
) -> None:
    volume = pool.volumes["disk"]
    volume.space.clear()
    cookies = write_all(clients)
    while volume.calls.count("write") < N_CLIENTS:
        await asyncio.sleep(0)
    assert volume.blocks == {}
    volume.space.set()
    assert await errors(clients, cookies) == [0] * N_CLIENTS
    assert [volume.blocks[number][0] for number in range(N_CLIENTS)] == [0, 1, 2]


def before_the_end_of_the_turn(
    monkeypatch: pytest.MonkeyPatch, server: Server, step: Callable[[Session], None]
) -> None:
    """Do something with the first session of a server after its write is held."""
    session = next(iter(server._connections)).session
    assert session is not None
    original = Gathering.hold
    steps = [step]

    def hold(self: Gathering, request: Request, on_written: OnWritten) -> Held:
        if request[3] == 0 and steps:
            asyncio.get_running_loop().call_soon(steps.pop(), session)
        return original(self, request, on_written)

    monkeypatch.setattr(Gathering, "hold", hold)


async def test_the_write_of_a_client_that_is_lost_meanwhile_is_not_done(
    batches: Batches,
    server: Server,
    clients: list[NbdClient],
    pool: MemoryPool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault = ConnectionAbortedError("fenced")
    before_the_end_of_the_turn(monkeypatch, server, lambda session: session.lose(fault))
    cookies = write_all(clients)
    assert await errors(clients[1:], cookies[1:]) == [0] * (N_CLIENTS - 1)
    await clients[0].until_closed()
    assert 0 not in pool.volumes["disk"].blocks
    assert all(0 not in batch for batch in batches)


async def test_the_buffer_of_a_client_that_is_lost_meanwhile_is_free_at_once(
    server: Server, clients: list[NbdClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when garbage is collected: the write that was held lies in it."""
    buffers: list[weakref.ref[object]] = []

    def lose(session: Session) -> None:
        buffers.append(weakref.ref(session._parser._view.obj))
        session.lose(ConnectionAbortedError("fenced"))

    before_the_end_of_the_turn(monkeypatch, server, lose)
    gc.disable()
    try:
        clients[0].start(Command.WRITE, 0, payload=b"1" * BLOCK)
        await clients[0].until_closed()
        assert [buffer() for buffer in buffers] == [None]
    finally:
        gc.enable()


async def test_what_is_held_is_written_before_more_is_received_over_it(
    server: Server,
    clients: list[NbdClient],
    pool: MemoryPool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cookies: list[int] = []

    def receive(session: Session) -> None:
        second = clients[0].start(Command.WRITE, 9 * BLOCK, payload=b"2" * BLOCK)
        cookies.append(second)
        session._guard(session._receive)

    before_the_end_of_the_turn(monkeypatch, server, receive)
    first = clients[0].start(Command.WRITE, 0, payload=b"1" * BLOCK)
    assert (await clients[0].reply(first)).error == 0
    assert (await clients[0].reply(cookies[0])).error == 0
    blocks = pool.volumes["disk"].blocks
    assert (blocks[0], blocks[9]) == (b"1" * BLOCK, b"2" * BLOCK)


async def test_what_the_volumes_limits_let_go_meanwhile_is_answered_too(
    server: Server, clients: list[NbdClient], pool: MemoryPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the store cannot do at once what is held."""
    volume = pool.volumes["disk"]
    volume.space.clear()
    session = next(iter(server._connections)).session
    assert session is not None
    session.limit(Limiter(Qos(iops=1)))
    before_the_end_of_the_turn(monkeypatch, server, lambda session: session.limit(None))
    made = [
        clients[0].transmission.request(Command.WRITE, number * BLOCK, payload=b"1" * BLOCK)
        for number in range(3)
    ]
    clients[0].send(b"".join([data for _, data in made]))
    while "write" not in volume.calls:
        await asyncio.sleep(0)
    volume.space.set()
    assert await errors([clients[0]] * 3, [cookie for cookie, _ in made]) == [0] * 3
    assert sorted(volume.blocks) == [0, 1, 2]


async def test_a_drained_server_answers_what_is_held(
    server: Server, clients: list[NbdClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    before_the_end_of_the_turn(monkeypatch, server, lambda session: session.drain())
    assert await errors(clients, write_all(clients)) == [0] * N_CLIENTS
    await clients[0].until_closed()


# -- which writes wait ----------------------------------------------------------------------------


def a_write(length: int = BLOCK, flags: int = 0, verdict: int = 0) -> Request:
    return (Command.WRITE, flags, bytes(8), 0, length, memoryview(bytes(length)), verdict)


@pytest.fixture
def gathering() -> Gathering:
    found = Gathering(mock.Mock(write_now=mock.Mock(return_value=True)))
    found.n_clients = 2
    return found


@pytest.mark.parametrize(
    "request_",
    [
        a_write(flags=CommandFlag.FUA),
        a_write(verdict=Errno.ENOSPC),
        a_write(MAX_BYTES + 1),
        (int(Command.READ), 0, bytes(8), 0, BLOCK, None, 0),
        (int(Command.FLUSH), 0, bytes(8), 0, 0, None, 0),
    ],
)
async def test_only_small_plain_writes_wait(gathering: Gathering, request_: Request) -> None:
    assert gathering.wants(a_write(MAX_BYTES))
    assert not gathering.wants(request_)


async def test_a_client_that_is_alone_does_not_wait(gathering: Gathering) -> None:
    gathering.n_clients = 1
    assert not gathering.wants(a_write())


async def write_in_one_turn(gathering: Gathering, n: int) -> None:
    for _ in range(n):
        assert gathering.wants(a_write())
        gathering.hold(a_write(), lambda _held, _is_done: None)
    await asyncio.sleep(0)


async def test_who_writes_when_nobody_else_does_waits_only_now_and_then(
    gathering: Gathering,
) -> None:
    for n_lonely in (LONELY_TURNS, 1, 1):
        for _ in range(n_lonely):
            await write_in_one_turn(gathering, 1)
        for _ in range(SKIPPED_WRITES):
            assert not gathering.wants(a_write())
    await write_in_one_turn(gathering, 2)
    for _ in range(LONELY_TURNS):
        await write_in_one_turn(gathering, 1)
    assert not gathering.wants(a_write())
