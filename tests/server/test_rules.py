"""The rules of NBD where a look inside is needed: what reaches the store, waits, or breaks.

What a client can see by itself is the business of tests/conformance, whose numbers for the rules
these are. Where a rule comes from stands in its docstring: a section of proto.md (of
github.com/NetworkBlockDevice/nbd, or of its branch extension-ext-header), or the program that got
it wrong.
"""

from __future__ import annotations

import socket

import pytest

from nbdstore.errors import Corruption, NotFast
from nbdstore.protocol.agreement import ReplyMode
from nbdstore.protocol.constants import (
    Command,
    CommandFlag,
    Errno,
    Option,
    OptionReply,
)
from nbdstore.server import Limits
from tests.server.conftest import SIZE
from tests.server.loop import until
from tests.server.memory_pool import BLOCK

SIMPLE, STRUCTURED, EXTENDED = ReplyMode
CONTEXTS = ("base:allocation", "qemu:allocation-depth")
FAST_NO_HOLE = CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO


@pytest.mark.parametrize("mode", ReplyMode)
async def test_16_a_failing_read_sends_no_content(pool, client, mode):
    """proto.md, "NBD_CMD_READ": an error after content has begun would need more than an error."""
    await client.go("disk", mode)
    pool.volumes["disk"].error = Corruption("slot 7", "aa", "bb")
    reply = await client.do(Command.READ, 0, 8192)
    assert (reply.error, reply.data, len(reply.chunks)) == (Errno.EIO, None, mode is not SIMPLE)
    pool.volumes["disk"].error = None
    assert await client.read(0, 10) == bytes(10)


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
async def test_17_errors_have_a_number_and_a_sentence(client, mode):
    """proto.md, "NBD_REPLY_TYPE_ERROR"; nbd-client cuts the last byte off."""
    await client.go("disk", mode)
    reply = await client.do(Command.WRITE, SIZE, payload=b"x")
    assert reply.error == Errno.ENOSPC
    assert reply.message.endswith(".")


@pytest.mark.parametrize("mode", ReplyMode)
async def test_19_payloads_above_the_maximum_are_consumed(client, mode):
    """proto.md, "Block size constraints" allows to drop the client; libnbd sends up to 64 MiB."""
    await client.go("disk", mode)
    reply = await client.do(Command.WRITE, 0, payload=bytes((32 << 20) + 1))
    assert reply.error == Errno.EINVAL
    assert await client.read(0, 1) == b"\0"


async def test_21_disc_finishes_what_is_in_flight(pool, client):
    """proto.md, "NBD_CMD_DISC"; what follows it is ignored."""
    volume = pool.volumes["disk"]
    await client.go()
    volume.space.clear()
    cookie = client.start(Command.WRITE, 0, payload=b"held")
    client.start(Command.DISC)
    client.send(b"garbage")
    await until(lambda: "write" in volume.calls)
    volume.space.set()
    assert (await client.reply(cookie)).error == 0
    assert await client.closed()


async def test_22_flush_reaches_the_disk(pool, serve, connect):
    """proto.md, "NBD_CMD_FLUSH": of any connection."""
    await serve()
    first, second = await connect(), await connect()
    await first.go()
    await second.go()
    await first.write(100, b"covered")
    assert (await second.do(Command.FLUSH)).error == 0
    assert pool.volumes["disk"].calls == ["flush"]


@pytest.mark.parametrize("command", [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES])
async def test_23_fua_reaches_the_disk(pool, client, command):
    """proto.md, "NBD_CMD_FLAG_FUA": also of TRIM and WRITE_ZEROES."""
    await client.go()
    payload = b"x" * 512 if command == Command.WRITE else None
    assert (await client.do(command, 0, 512, CommandFlag.FUA, payload)).error == 0
    assert pool.volumes["disk"].calls[-1] == "flush"
    assert (await client.do(Command.READ, 0, 1, CommandFlag.FUA)).error == 0
    assert (await client.do(Command.FLUSH, flags=CommandFlag.FUA)).error == 0


async def test_24_no_hole_reaches_the_store(pool, client):
    """proto.md, "NBD_CMD_FLAG_NO_HOLE"."""
    await client.go()
    assert (await client.do(Command.WRITE_ZEROES, 0, BLOCK, FAST_NO_HOLE)).error == 0
    assert pool.volumes["disk"].calls == ["write_zeroes no_hole=True"]


@pytest.mark.parametrize("mode", [SIMPLE, STRUCTURED, EXTENDED])
async def test_24_fast_zeroes_never_wait_for_space(pool, client, caplog, mode):
    """proto.md, "NBD_CMD_FLAG_FAST_ZERO": ENOTSUP at once, and nothing changed."""
    await client.go("disk", mode)
    await client.write(0, b"x" * BLOCK)
    pool.volumes["disk"].space.clear()
    for flags in (FAST_NO_HOLE, FAST_NO_HOLE | CommandFlag.FUA):
        assert (await client.do(Command.WRITE_ZEROES, 0, BLOCK, flags)).error == Errno.ENOTSUP
    assert await client.read(0, BLOCK) == b"x" * BLOCK
    assert (await client.do(Command.WRITE_ZEROES, 0, BLOCK, CommandFlag.FAST_ZERO)).error == 0
    assert [r for r in caplog.records if r.levelname == "WARNING"] == [], "no fault of anybody's"


async def test_24_not_supported_is_for_fast_zeroes_only(pool, client):
    """proto.md, "Error values": ENOTSUP in answer to anything else breaks clients."""
    await client.go("disk", STRUCTURED)
    pool.volumes["disk"].error = NotFast("a bug in the store")
    for command, payload in ((Command.READ, None), (Command.WRITE, b"x"), (Command.FLUSH, None)):
        length = 1 if command == Command.READ else 0
        assert (await client.do(command, 0, length, 0, payload)).error == Errno.EIO


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
async def test_25_block_status(client, mode):
    """proto.md, "NBD_CMD_BLOCK_STATUS": a chunk per context, merged, and one extent for REQ_ONE."""
    await client.go("disk", mode, CONTEXTS)
    await client.write(BLOCK, b"x" * 2 * BLOCK)
    await client.do(Command.WRITE_ZEROES, 3 * BLOCK, BLOCK, CommandFlag.NO_HOLE)
    reply = await client.do(Command.BLOCK_STATUS, 0, SIZE)
    rest = SIZE - 4 * BLOCK
    assert reply.extents == {
        1: [(BLOCK, 3), (2 * BLOCK, 0), (BLOCK, 2), (rest, 3)],
        2: [(BLOCK, 0), (3 * BLOCK, 1), (rest, 0)],
    }
    reply = await client.do(Command.BLOCK_STATUS, BLOCK + 7, SIZE // 2, CommandFlag.REQ_ONE)
    assert reply.extents == {1: [(2 * BLOCK - 7, 0)], 2: [(2 * BLOCK - 7, 1)]}
    assert (await client.do(Command.BLOCK_STATUS, 0, 0)).error == Errno.EINVAL


async def test_25_extents_are_limited(pool, serve, connect):
    """proto.md, "NBD_REPLY_TYPE_BLOCK_STATUS": a reply may cover less than was asked."""
    await serve(limits=Limits(max_extents=3))
    client = await connect()
    await client.go("disk", STRUCTURED, CONTEXTS)
    for block in range(0, 10, 2):
        await client.write(block * BLOCK, b"x")
    reply = await client.do(Command.BLOCK_STATUS, 0, SIZE)
    assert reply.extents[1] == [(BLOCK, 0), (BLOCK, 3), (BLOCK, 0)]


async def test_26_replies_may_overtake(pool, client):
    """proto.md, "Ordering of messages and writes"; cookies are opaque."""
    volume = pool.volumes["disk"]
    await client.go()
    volume.space.clear()
    held = client.start(Command.WRITE, 0, payload=b"late")
    assert await client.read(0, 4) == bytes(4)
    volume.space.set()
    assert (await client.reply(held)).error == 0
    assert await client.read(0, 4) == b"late"


async def test_27_cache_reaches_the_store_in_steps(pool, client):
    """proto.md, "NBD_CMD_CACHE"."""
    await client.go()
    assert (await client.do(Command.CACHE, 0, SIZE)).error == 0
    assert pool.volumes["disk"].calls == [f"cache {32 << 20}"] * 2


async def test_29_nodelay_is_set(serve, connect):
    """proto.md, "TCP_NODELAY": both sides SHOULD set it."""
    server = await serve(listen=["127.0.0.1:0"])
    client = await connect(server.addresses[0])
    await client.go()
    (connection,) = server._connections
    sock = connection._channel.sock
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# --- Extended headers: "Extended headers" in extension-ext-header ---------------------------------


async def test_extended_effects_have_64_bits(pool, serve, connect):
    pool.create("huge", 1 << 45)
    pool.volumes["huge"].trim = pool.volumes["huge"].cache  # which counts, and does nothing
    await serve()
    client = await connect()
    await client.go("huge", EXTENDED)
    assert (await client.do(Command.TRIM, 0, 1 << 45)).error == 0
    assert pool.volumes["huge"].calls == [f"cache {1 << 45}"]


# --- TLS that is off ------------------------------------------------------------------------------


async def test_tls_that_is_off_never_asks_for_tls(pool, client):
    """proto.md, "NOTLS": ERR_TLS_REQD MUST NOT be sent."""
    pool.volumes["disk"].properties["allow"] = ["somebody"]
    assert await client.last(Option.STARTTLS) == OptionReply.ERR_POLICY
    assert (await client.try_go("disk")).reply == OptionReply.ERR_POLICY
    assert [a.reply for a in await client.ask(Option.LIST)] == [OptionReply.ACK]
