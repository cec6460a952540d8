"""Events: what is told, to whom, and what becomes of listeners that do not keep up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdstore import unix_socket
from nbdstore.control import events
from nbdstore.control.events import Event, Events
from nbdstore.control.watch import PoolWatch
from tests.control.memory_pool import MemoryPool
from tests.control.real_pool import Served
from tests.server.nbd_client import NbdClient

SIZE = 1 << 20


class Following:
    """Somebody who follows the events of a served pool over HTTP."""

    def __init__(self, served: Served) -> None:
        self._connection = served.connect()
        self._connection.request("GET", "/v1/events")
        self._response = self._connection.getresponse()
        assert self._response.headers.get_content_type() == "application/x-ndjson"
        assert self._response.readline() == b"\n"

    def next(self) -> dict[str, Any]:
        """Wait for the next event."""
        while not (line := self._response.readline()).strip():
            assert line, "the stream has ended"
        event: dict[str, Any] = json.loads(line)
        return event

    def at_end(self) -> bool:
        """Wait for the end of the stream, which must have no more events."""
        return not self._response.read().strip()

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def following(served: Served) -> Iterator[Following]:
    follower = Following(served)
    yield follower
    follower.close()


def test_the_life_of_a_volume(served: Served, following: Following) -> None:
    served.client.create_volume("db", SIZE)
    served.client.update_volume("db", size=2 * SIZE, new_name="web")
    served.client.acquire_lease("web", "node-1")
    served.client.break_lease("web")
    served.client.delete_volume("web")
    told = [following.next() for _ in range(5)]
    assert [(event["kind"], event["subject"]) for event in told] == [
        ("volume.created", "db"),
        ("volume.changed", "db"),
        ("lease.granted", "web"),
        ("lease.ended", "web"),
        ("volume.deleted", "web"),
    ]
    assert told[1]["detail"] == {"size": 2 * SIZE, "name": "web"}
    assert "token" not in json.dumps(told)
    ids = [event["id"] for event in told]
    assert ids == list(range(ids[0], ids[0] + 5))


def test_clients_that_come_and_go(served: Served, following: Following) -> None:
    served.client.create_volume("db", SIZE)

    async def visit() -> None:
        client = await NbdClient.connect(f"unix:{served.nbd_path}")
        await client.go("db")
        await client.write(0, b"x" * 4096)
        client.close()

    served.run(visit())
    created, attached, detached = (following.next() for _ in range(3))
    assert (attached["kind"], attached["subject"]) == ("client.attached", "db")
    assert (detached["kind"], detached["detail"]["bytes_written"]) == ("client.detached", 4096)
    assert attached["detail"]["connection"] == detached["detail"]["connection"]
    assert created["detail"] == {"size": SIZE}


def test_a_stop_ends_the_stream(tmp_path: Path) -> None:
    served = Served(tmp_path)
    follower = Following(served)
    served.close()
    assert follower.at_end()
    follower.close()


def test_the_client_follows(served: Served) -> None:
    follow = served.client.events()
    served.loop.call_soon_threadsafe(told_when_heard, served.operations.events)
    assert next(follow)["kind"] == "test"
    follow.close()  # type: ignore[attr-defined]


def told_when_heard(told: Events) -> None:
    """Tell an event once somebody listens."""
    if told._listeners:
        told.tell("test")
    else:
        asyncio.get_running_loop().call_soon(told_when_heard, told)


def test_who_does_not_read_is_dropped_and_holds_up_nobody(served: Served) -> None:
    with unix_socket.connect(served.directory / "control.sock", 30) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
        assert slow.recv(12) == b"HTTP/1.1 200"

        async def flood() -> None:
            told = served.operations.events
            while told._listeners:
                told.tell("flood", "x" * 10_000)
                await asyncio.sleep(0)

        served.run(flood())
        with contextlib.suppress(ConnectionResetError):
            while slow.recv(1 << 20):
                pass
    assert served.client.volumes() == []


async def test_a_listener_that_is_behind_is_dropped_alone() -> None:
    told = Events()
    slow, fast = told.listen(), told.listen()
    dropped = []
    slow.on_drop = lambda: dropped.append(True)
    for _ in range(events.MAX_BEHIND + 1):
        told.tell("tick")
        assert await fast.next(1) is not None
    assert (slow.is_closed, fast.is_closed, dropped) == (True, False, [True])


async def test_a_gap_shows_in_the_ids() -> None:
    told = Events()
    told.tell("unheard")
    listener = told.listen()
    told.tell("heard", "db", size=1)
    event = await listener.next(1)
    assert isinstance(event, Event)
    assert (event.id, event.kind, event.subject, event.detail) == (2, "heard", "db", {"size": 1})


async def test_what_becomes_of_the_pool() -> None:
    pool, told = MemoryPool(), Events()
    watch, listener = PoolWatch(pool, told), told.listen()
    watch.look()
    pool.state = "full"
    pool.held_writes = 3
    watch.look()
    pool.held_writes = 1
    pool.corruptions = 2
    watch.look()
    pool.state, pool.held_writes = "ok", 0
    watch.look()
    found = []
    while (event := await listener.next(0.01)) is not None:
        found.append((event.kind, event.detail))
    assert [kind for kind, _ in found] == [
        *("pool.state", "pool.held", "pool.corruption", "pool.state", "pool.held"),
    ]
    assert found[0][1]["state"] == "full"
    assert found[1][1] == {"held_writes": 3}
    assert found[2][1] == {"count": 2, "detail": "block 7"}
    assert found[4][1] == {"held_writes": 0}
