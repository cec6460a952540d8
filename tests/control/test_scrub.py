"""Scrubbing served volumes: what is read, what is found, stopped and gone on with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nbdstore.control import scrub
from nbdstore.control.model import OperationInfo
from nbdstore.control.operations import Operations
from nbdstore.control.scrub import Progress
from nbdstore.errors import Busy, InvalidArgument, NotFound
from nbdstore.store import Pool, PoolOptions, Volume
from nbdstore.store.image import Image
from nbdstore.store.layout import slots_of
from tests.control.real_pool import Served

BLOCK = 4096
MIB = 1 << 20
FAST = 1 << 40


class Bench:
    """A real pool, and the operations on it."""

    def __init__(self, directory: Path, pool: Pool) -> None:
        self.directory = directory
        self.pool = pool
        self.operations = Operations(pool)

    async def volume(self, name: str, *writes: tuple[int, int], size: int = 64 * MIB) -> Volume:
        """Make a volume with data at (offset, length)."""
        volume = await self.pool.create_volume(name, size)
        for offset, length in writes:
            await volume.write(offset, b"x" * length)
        return volume

    async def scrub(self, name: str | None = None, **how: Any) -> OperationInfo:
        """Scrub to the end."""
        info, _ = self.operations.scrubs.start(name, **({"rate": FAST} | how))
        return await self.operations.running.wait(info.id, 60)

    def damage(self, volume: Volume, block: int) -> None:
        self.damage_image(volume, block)

    def damage_image(self, image: Image, block: int) -> None:
        slot = int(slots_of(image.map.locations(block, block + 1))[0])
        with (self.directory / "data").open("r+b") as data:
            data.seek(slot * BLOCK + 17)
            data.write(b"damage")


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    directory = tmp_path / "pool"
    Pool.create(directory, capacity=1 << 30, journal_size=MIB)
    pool = await Pool.open(directory, PoolOptions())
    found = Bench(directory, pool)
    yield found
    await found.operations.close()
    await pool.close()


async def test_all_that_is_mapped_is_read_once(bench: Bench) -> None:
    await bench.volume("a", (0, 10 * MIB), (50 * MIB + 5, 1))
    await bench.volume("b", (0, BLOCK), size=1 << 40)
    await bench.volume("empty")
    info = await bench.scrub()
    n_bytes = 10 * MIB + 2 * BLOCK
    assert (info.state, info.done, info.total) == ("done", n_bytes, n_bytes)
    assert info.result == {"volumes": 3, "bytes": n_bytes, "damaged": 0, "damage": []}
    described = bench.operations.volume("a")
    assert described.scrubbed is not None
    assert described.scrub_damaged == 0


async def test_damage_is_told_block_by_block_and_does_not_stop_it(bench: Bench) -> None:
    volume = await bench.volume("a", (0, 20 * BLOCK))
    for block in (2, 3, 17):
        bench.damage(volume, block)
    info = await bench.scrub("a")
    assert (info.state, info.done) == ("done", 20 * BLOCK)
    assert info.result["damaged"] == 3
    assert [(d["volume"], d["offset"]) for d in info.result["damage"]] == [
        ("a", 2 * BLOCK),
        ("a", 3 * BLOCK),
        ("a", 17 * BLOCK),
    ]
    assert "expected checksum" in info.result["damage"][0]["detail"]
    assert bench.operations.volume("a").scrub_damaged == 3


async def test_what_is_listed_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "MAX_SHOWN", 2)
    volume = await bench.volume("a", (0, 5 * BLOCK))
    for block in range(5):
        bench.damage(volume, block)
    info = await bench.scrub()
    assert (info.result["damaged"], len(info.result["damage"])) == (5, 2)


async def test_snapshots_are_read_where_they_differ(bench: Bench) -> None:
    volume = await bench.volume("a", (0, 8 * BLOCK))
    await bench.pool.create_snapshots([(volume, "s1")])
    old = await bench.volume("b", (0, BLOCK))
    await volume.write(0, b"y" * 2 * BLOCK)
    await bench.pool.create_snapshots([(volume, "s2")])
    await volume.write(0, b"z" * BLOCK)
    await bench.pool.delete_volume(old)
    info = await bench.scrub("a")
    # The volume 8 blocks, s2 its first, s1 its first two.
    assert info.result["bytes"] == 11 * BLOCK
    bench.damage_image(bench.pool.snapshots["a@s1"], 0)
    info = await bench.scrub("a")
    assert [(d["volume"], d["offset"]) for d in info.result["damage"]] == [("a@s1", 0)]


async def test_a_snapshot_that_is_deleted_meanwhile_hides_nothing(bench: Bench) -> None:
    volume = await bench.volume("a", (0, 8 * MIB))
    s1, s2 = [(await bench.pool.create_snapshots([(volume, name)]))[0] for name in ("s1", "s2")]
    await volume.trim(0, 64 * MIB)
    info, _ = bench.operations.scrubs.start(rate=MIB)
    while bench.operations.running.find(info.id).done < scrub.STEP_BYTES:  # of s2
        await asyncio.sleep(0)
    await bench.pool.delete_snapshot(s2)
    await s1.load(0, 2)
    bench.damage_image(s1, 1)
    info = await bench.operations.running.wait(info.id, 60)
    assert info.state == "done", info.error
    assert [d["volume"] for d in info.result["damage"]] == ["a@s1"]


async def stopped(bench: Bench, name: str | None, at: int) -> OperationInfo:
    """Start a slow scrub, and cancel it when it has done `at` bytes."""
    info, _ = bench.operations.scrubs.start(name, rate=MIB)
    while bench.operations.running.find(info.id).done < at:
        await asyncio.sleep(0)
    return await bench.operations.running.cancel(info.id)


async def test_it_goes_on_where_it_was_stopped(bench: Bench) -> None:
    volume = await bench.volume("a", (0, 16 * MIB))
    bench.damage(volume, 1)
    first = await stopped(bench, None, scrub.STEP_BYTES)
    assert (first.state, first.done) == ("cancelled", scrub.STEP_BYTES)
    assert 0 < first.progress < 1
    record = Progress.of(volume)
    assert record is not None
    assert (record.image, record.position, record.damaged) == (volume.id, scrub.STEP_BYTES, 1)
    second = await bench.scrub()
    assert second.result["bytes"] == 16 * MIB - scrub.STEP_BYTES
    assert second.result["damaged"] == 1, "found before it was stopped"
    third = await bench.scrub()
    assert third.result["bytes"] == 16 * MIB, "a new one"


async def test_it_goes_on_after_a_restart_of_the_server(bench: Bench, tmp_path: Path) -> None:
    await bench.volume("a", (0, 4 * MIB))
    await bench.volume("b", (0, 16 * MIB))
    await stopped(bench, None, 8 * MIB)  # all of a, some of b
    await bench.operations.close()
    await bench.pool.close()
    bench.pool = await Pool.open(bench.directory)
    bench.operations = Operations(bench.pool)
    info = await bench.scrub()
    assert info.result["bytes"] == 12 * MIB
    await bench.operations.close()
    await bench.pool.close()


async def test_or_begins_anew_if_asked(bench: Bench) -> None:
    await bench.volume("a", (0, 16 * MIB))
    await stopped(bench, None, scrub.STEP_BYTES)
    assert (await bench.scrub(restart=True)).result["bytes"] == 16 * MIB


async def test_a_rate_is_kept(bench: Bench) -> None:
    """No faster: how much slower is the machine's."""
    await bench.volume("a", (0, 8 * MIB))
    began_s = time.monotonic()
    await bench.scrub(rate=32 * MIB)
    assert time.monotonic() - began_s >= 8 / 32 - 0.01


async def test_volumes_that_change_meanwhile(bench: Bench) -> None:
    first = await bench.volume("a", (0, 16 * MIB), size=16 * MIB)
    await bench.volume("b", (0, 16 * MIB))
    info, _ = bench.operations.scrubs.start(rate=MIB)
    while bench.operations.running.find(info.id).done < scrub.STEP_BYTES:
        await asyncio.sleep(0)
    await bench.pool.resize_volume(first, 5 * MIB + 512, force=True)
    await bench.pool.delete_volume(bench.pool.volumes["b"])
    info = await bench.operations.running.wait(info.id, 60)
    assert info.state == "done", info.error
    assert info.result["volumes"] == 1


async def test_other_properties_stay(bench: Bench) -> None:
    await bench.operations.create_volume("a", MIB, ["alice"])
    await bench.scrub()
    assert bench.operations.volume("a").allow == ["alice"]


async def test_mistakes(bench: Bench) -> None:
    with pytest.raises(NotFound, match="no volume 'x'"):
        bench.operations.scrubs.start("x")
    with pytest.raises(InvalidArgument, match="never end"):
        bench.operations.scrubs.start(rate=1)
    await bench.volume("a", (0, 16 * MIB))
    info, _ = bench.operations.scrubs.start(rate=MIB, operation_id="mine")
    assert bench.operations.scrubs.start(rate=MIB, operation_id="mine") == (info, False)
    with pytest.raises(Busy, match="scrub mine is running"):
        bench.operations.scrubs.start(rate=MIB)


class TestSchedule:
    async def test_what_is_due(self, bench: Bench) -> None:
        volume = await bench.volume("a", (0, BLOCK))
        created = scrub.due_at(volume, 0)
        scrubs = bench.operations.scrubs
        assert scrubs.start_due(3600, FAST) is None, "it is new"
        assert scrubs.next_due(3600) == created + 3600
        info = scrubs.start_due(-3600, FAST)
        assert info is not None
        assert (await bench.operations.running.wait(info.id, 60)).state == "done"
        assert scrub.due_at(volume, 0) > created

    async def test_one_that_was_stopped_is_due(self, bench: Bench) -> None:
        await bench.volume("a", (0, 16 * MIB))
        await bench.volume("b", (0, BLOCK))
        await stopped(bench, "a", scrub.STEP_BYTES)
        info = bench.operations.scrubs.start_due(3600, FAST)
        assert info is not None
        info = await bench.operations.running.wait(info.id, 60)
        assert info.result["bytes"] == 16 * MIB - scrub.STEP_BYTES

    async def test_without_volumes(self, bench: Bench) -> None:
        assert bench.operations.scrubs.start_due(1, FAST) is None
        assert bench.operations.scrubs.next_due(3600) > time.time()


def test_over_http(served: Served) -> None:
    served.client.create_volume("db", 64 * MIB)
    served.run(served.pool.volumes["db"].write(0, b"x" * 16 * MIB))
    info = served.client.start_scrub("db", rate=MIB)
    assert [found.id for found in served.client.operations()] == [info.id]
    assert served.client.cancel_operation(info.id).state == "cancelled"
    info = served.client.start_scrub(rate=FAST)
    info = served.client.operation(info.id, wait_s=60)
    assert (info.state, info.progress) == ("done", 1.0)
    keyed = {"Idempotency-Key": "k1"}
    first = served.call("POST", "/v1/scrub", {}, keyed)
    again = served.call("POST", "/v1/scrub", {}, keyed)
    assert (first.status, again.status) == (202, 200)
    assert first.headers["Location"] == "/v1/operations/k1"
    other = served.call("POST", "/v1/scrub", {"id": "k2"}, keyed)
    assert (other.status, other.value["code"]) == (400, "invalid-argument")
    reused = served.call("POST", "/v1/scrub", {"volume": "db"}, keyed)
    assert (reused.status, reused.value["code"]) == (409, "already-exists")
    with pytest.raises(NotFound):
        served.client.operation("k3")
