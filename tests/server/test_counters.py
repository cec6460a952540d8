"""Counters: which requests they see, in what buckets, and that they outlive connections."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from nbdstore.errors import ReadFailed
from nbdstore.protocol.constants import Command, CommandFlag, Errno
from nbdstore.server.counters import Counters, ImageCounters, ImageMeasures
from tests.server.conftest import SIZE, Connect, Serve
from tests.server.memory_pool import MemoryPool

BLOCK = 4096


@dataclass(eq=False)
class OneSession:
    bytes_read: int = 0
    bytes_written: int = 0
    n_pending: int = 0


@dataclass
class OneImage:
    id: int
    name: str


def measured(counters: ImageCounters) -> ImageMeasures:
    return counters.measures("disk")


def numbers(measures: ImageMeasures) -> dict[str, int]:
    return {latency.command: latency.n_requests for latency in measures.latencies}


@pytest.mark.parametrize(
    ("elapsed_ns", "n_within"),
    [
        (0, 12),
        (16_000, 12),
        (17_000, 11),
        (65_000, 11),
        (66_000, 10),
        (1_000_000, 9),
        (1_100_000, 8),
        (60_000_000_000, 1),
        (70_000_000_000, 0),
        (10**15, 0),
    ],
)
def test_buckets(elapsed_ns: int, n_within: int) -> None:
    """Each bound is a power of two nanoseconds, and four times the one before."""
    counters = ImageCounters()
    counters.observe(Command.READ, 3, elapsed_ns)
    (latency,) = measured(counters).latencies
    assert (latency.command, latency.n_requests) == ("read", 3)
    assert latency.sum_s == pytest.approx(3 * elapsed_ns / 1e9)
    assert [n for _, n in latency.buckets] == [0] * (12 - n_within) + [3] * n_within
    assert all(elapsed_ns / 1e9 < bound for bound, n in latency.buckets if n)
    assert all(elapsed_ns / 1e9 >= bound for bound, n in latency.buckets if not n)


def test_bytes_outlive_a_session_and_count_once() -> None:
    counters = ImageCounters()
    first, second = OneSession(10, 1, n_pending=2), OneSession(100, 5)
    counters.begin(first)
    counters.begin(second)
    assert (measured(counters).bytes_read, measured(counters).in_flight) == (110, 2)
    for _ in range(2):
        counters.end(first)
    found = measured(counters)
    assert (found.bytes_read, found.bytes_written, found.connections) == (110, 6, 1)
    assert found.in_flight == 0


def test_an_image_has_the_name_of_now_and_is_forgotten_with_it() -> None:
    counters, session = Counters(), OneSession(7)
    image = OneImage(1, "old")
    counters.of(image).begin(session)
    image.name = "new"
    assert [m.name for m in counters.measures([image, OneImage(2, "never attached")])] == ["new"]
    assert list(counters.measures([])) == []
    assert counters.of(image).in_use, "its client has not left yet"
    counters.of(image).end(session)
    assert list(counters.measures([])) == []
    assert measured(counters.of(image)).bytes_read == 0


async def test_what_clients_do_is_counted(serve: Serve, connect: Connect, pool: MemoryPool) -> None:
    server = await serve()
    client = await connect()
    await client.go("disk")
    await client.write(0, b"x" * 2 * BLOCK)
    await client.read(0, BLOCK)
    await client.read(BLOCK, BLOCK)
    await client.do(Command.WRITE, 0, BLOCK, payload=b"y" * BLOCK, flags=CommandFlag.FUA)
    await client.do(Command.FLUSH, 0, 0)
    await client.do(Command.TRIM, 0, BLOCK)
    volume = pool.volumes["disk"]
    volume.cold = True
    await client.read(BLOCK, BLOCK)
    (found,) = server.measures([volume])
    assert numbers(found) == {"read": 3, "write": 2, "flush": 1, "trim": 1}
    assert (found.bytes_read, found.bytes_written) == (3 * BLOCK, 3 * BLOCK)
    assert (found.errors, found.connections, found.in_flight) == ({}, 1, 0)


async def test_errors_are_counted_by_kind(serve: Serve, connect: Connect, pool: MemoryPool) -> None:
    server = await serve()
    client = await connect()
    await client.go("disk")
    assert (await client.do(Command.READ, SIZE, BLOCK)).error == Errno.EINVAL
    volume = pool.volumes["disk"]
    await client.write(0, b"x" * BLOCK)
    volume.error = ReadFailed("broken")
    assert (await client.do(Command.READ, 0, BLOCK)).error == Errno.EIO
    (found,) = server.measures([volume])
    assert found.errors == {"EIO": 1, "EINVAL": 1}


async def test_counters_survive_a_reconnect(
    serve: Serve, connect: Connect, pool: MemoryPool
) -> None:
    server = await serve()
    for _ in range(2):
        client = await connect()
        await client.go("disk")
        await client.write(0, b"x" * BLOCK)
        client.close()
        while server.connections:
            await asyncio.sleep(0)
    (found,) = server.measures([pool.volumes["disk"]])
    assert (found.bytes_written, numbers(found), found.connections) == (2 * BLOCK, {"write": 2}, 0)
