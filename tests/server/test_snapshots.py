"""Snapshots as exports, and what has changed since them, over a real pool."""

from __future__ import annotations

import random

import pytest

from nbdstore.protocol.agreement import ReplyMode
from nbdstore.protocol.client import build_info
from nbdstore.protocol.constants import Command, Errno, Option, OptionReply
from nbdstore.server import Limits
from nbdstore.store import Pool

SIZE = 8 << 20
BLOCK = 4096
MODES = (ReplyMode.STRUCTURED, ReplyMode.EXTENDED)


@pytest.fixture
async def real_pool(tmp_path):
    Pool.create(tmp_path / "pool", capacity=64 << 20, journal_size=1 << 20)
    pool = await Pool.open(tmp_path / "pool")
    volume = await pool.create_volume("disk", SIZE)
    await volume.write(0, b"1" * 8 * BLOCK)
    await pool.create_snapshots([(volume, "first")])
    await volume.write(2 * BLOCK, b"2" * BLOCK)
    await volume.trim(6 * BLOCK, BLOCK)
    await pool.create_snapshots([(volume, "second")])
    await volume.write(4 * BLOCK + 1, b"3")
    yield pool
    await pool.close()


@pytest.fixture
async def served(real_pool, serve):
    return await serve(pool=real_pool, limits=Limits(linger_s=0.1))


async def test_a_snapshot_is_an_export_that_can_only_be_read(served, connect) -> None:
    client = await connect()
    await client.go("disk@first", ReplyMode.STRUCTURED, ["base:allocation"])
    assert await client.read(0, 8 * BLOCK) == b"1" * 8 * BLOCK
    for command, payload in ((Command.WRITE, b"x"), (Command.TRIM, None)):
        reply = await client.do(command, 0, 1, payload=payload)
        assert reply.error == Errno.EPERM
    assert (await client.do(Command.FLUSH)).error == 0
    reply = await client.do(Command.BLOCK_STATUS, 0, SIZE)
    assert reply.extents == {1: [(8 * BLOCK, 0), (SIZE - 8 * BLOCK, 3)]}


async def test_volumes_are_listed_with_their_snapshots(served, connect) -> None:
    client = await connect()
    answers = await client.ask(Option.LIST)
    names = [answer.data[4 : 4 + answer.data[3]].decode() for answer in answers[:-1]]
    assert names == ["disk", "disk@first", "disk@second"]


@pytest.mark.parametrize("name", ["disk@third", "other@first", "disk@", "@first", "disk@first@x"])
async def test_what_is_no_snapshot_is_refused_by_name(served, connect, name: str) -> None:
    client = await connect()
    answer = (await client.ask(Option.GO, build_info(name)))[-1]
    assert answer.reply == OptionReply.ERR_UNKNOWN
    assert name in answer.data.decode()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("export", "since", "expected"),
    [
        ("disk", "first", [(2, 0), (1, 1), (1, 0), (1, 1), (1, 0), (1, 1), (2041, 0)]),
        ("disk", "second", [(4, 0), (1, 1), (2043, 0)]),
        ("disk@second", "first", [(2, 0), (1, 1), (3, 0), (1, 1), (2041, 0)]),
    ],
)
async def test_the_dirty_bitmap_tells_what_has_changed(
    served, connect, mode: ReplyMode, export: str, since: str, expected
) -> None:
    client = await connect()
    await client.go(export, mode, [f"qemu:dirty-bitmap:{since}", "base:allocation"])
    reply = await client.do(Command.BLOCK_STATUS, 0, SIZE)
    (bitmap,) = [extents for number, extents in reply.extents.items() if number > 2]
    assert [(length // BLOCK, status) for length, status in bitmap] == expected


async def test_a_snapshot_has_no_bitmap_of_a_younger_one(served, connect) -> None:
    client = await connect()
    name = b"disk@first"
    data = len(name).to_bytes(4) + name + (0).to_bytes(4)
    await client.ask(Option.STRUCTURED_REPLY)
    answers = await client.ask(Option.LIST_META_CONTEXT, data)
    labels = [answer.data[4:].decode() for answer in answers[:-1]]
    assert labels == ["base:allocation", "qemu:allocation-depth"]


async def test_parts_of_the_bitmap_fit_together(served, connect, real_pool) -> None:
    """Asked for in pieces of any size, the bitmap is the one that is asked for as a whole."""
    volume, rng = real_pool.volumes["disk"], random.Random(1)
    for _ in range(200):
        at = rng.randrange(SIZE - 3 * BLOCK)
        await volume.write(at, rng.randbytes(rng.randrange(1, 3 * BLOCK)))
    client = await connect()
    await client.go("disk", ReplyMode.STRUCTURED, ["qemu:dirty-bitmap:second"])

    async def dirty(offset: int, length: int) -> set[int]:
        found, end = set[int](), offset + length
        while offset < end:
            (extents,) = (
                await client.do(Command.BLOCK_STATUS, offset, end - offset)
            ).extents.values()
            for n, status in extents:
                assert n > 0
                if status:
                    found |= set(range(offset // BLOCK, -(-(offset + n) // BLOCK)))
                offset += n
        return found

    whole = await dirty(0, SIZE)
    parts = set[int]()
    at = 0
    while at < SIZE:
        length = min(rng.randrange(1, 90) * BLOCK, SIZE - at)
        parts |= await dirty(at, length)
        at += length
    assert parts == whole
    assert 100 < len(whole) < 800


async def test_a_deleted_snapshot_is_an_error_to_its_clients(served, connect, real_pool) -> None:
    snapshot_client, bitmap_client = await connect(), await connect()
    await snapshot_client.go("disk@second", ReplyMode.STRUCTURED)
    await bitmap_client.go("disk", ReplyMode.STRUCTURED, ["qemu:dirty-bitmap:second"])
    await real_pool.delete_snapshot(real_pool.snapshots["disk@second"])
    assert (await snapshot_client.do(Command.READ, 0, BLOCK)).error == Errno.ESHUTDOWN
    assert (await bitmap_client.do(Command.BLOCK_STATUS, 0, SIZE)).error == Errno.ESHUTDOWN
    await bitmap_client.write(0, b"x")


async def test_an_allow_list_holds_for_the_snapshots_of_a_volume(
    served, connect, real_pool
) -> None:
    await real_pool.set_properties(real_pool.volumes["disk"], {"allow": ["node-1"]})
    client = await connect()
    assert (await client.try_go("disk@first")).reply == OptionReply.ERR_POLICY
