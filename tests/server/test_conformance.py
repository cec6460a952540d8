"""The rules of NBD that implementers get wrong, each as one case against the server.

Where a rule comes from stands in its docstring: a section of proto.md (of
github.com/NetworkBlockDevice/nbd, or of its branch extension-ext-header), or the program that got
it wrong. Bytes are written by hand where a well-behaved client could not send them.
"""

from __future__ import annotations

import socket
import struct

import pytest

from nbdstore.errors import Corruption, NotFast
from nbdstore.protocol.agreement import ReplyMode
from nbdstore.protocol.client import build_info, build_meta_context, build_option
from nbdstore.protocol.constants import (
    ClientFlag,
    Command,
    CommandFlag,
    Errno,
    Option,
    OptionReply,
    TransmissionFlag,
)
from nbdstore.server import Limits
from tests.server.conftest import SIZE
from tests.server.loop import until
from tests.server.memory_pool import BLOCK

SIMPLE, STRUCTURED, EXTENDED = ReplyMode
CONTEXTS = ("base:allocation", "qemu:allocation-depth")
FAST_NO_HOLE = CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO
U32 = struct.Struct(">I")


# --- Handshake -----------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"\xff" * 100, U32.pack(1 << 31) + b"disk\0\0"])
async def test_01_data_of_refused_options_is_consumed(client, data):
    """proto.md, "Option haggling"; nbd-server lost its place after GO + ERR_POLICY until 2024."""
    assert await client.last(Option.GO, data) == OptionReply.ERR_INVALID
    assert await client.last(12345, data) == OptionReply.ERR_UNSUP
    assert (await client.go("disk")).size == SIZE


@pytest.mark.parametrize(
    "data",
    [
        U32.pack(5) + b"disk\0\0",
        U32.pack(4) + b"disk\0\1",
        U32.pack(4) + b"disk\0\0\0",
        U32.pack(5) + b"di\0sk\0\0",
        U32.pack(2) + b"\xc3\x28\0\0",
        U32.pack(4097) + b"x" * 4097 + b"\0\0",
    ],
)
async def test_02_names_and_lengths_must_agree(client, data):
    """proto.md, "NBD_OPT_INFO"; nbd-server before 3.24 had remote overflows there."""
    assert await client.last(Option.INFO, data) == OptionReply.ERR_INVALID


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
async def test_03_export_info_comes_unasked(client, option):
    """proto.md, "NBD_INFO_EXPORT"; qemu never asks for it. And no zero padding after GO."""
    *infos, ack = await client.ask(option, build_info("disk"))
    assert [len(info.data) for info in infos] == [12]
    assert ack.reply == OptionReply.ACK
    assert client.handshake.unread() == b""


async def test_04_info_and_go_tell_the_same(client):
    """proto.md, "NBD_OPT_GO"; nbd-server told size 0 to INFO."""
    data = build_info("disk", [0, 1, 2, 3])
    assert [a.data for a in await client.ask(Option.INFO, data)] == [
        a.data for a in await client.ask(Option.GO, data)
    ]


@pytest.mark.parametrize(("flags", "padding"), [(1, 124), (3, 0)])
async def test_05_export_name_is_padded_unless_refused(serve, connect, flags, padding):
    """proto.md, "NBD_OPT_EXPORT_NAME"."""
    await serve()
    client = await connect(flags=flags)
    client.send(build_option(Option.EXPORT_NAME, b"disk"))
    client.begin(SIMPLE)
    expected = client.start(Command.WRITE, 0, payload=b"x")
    assert len(await client.reader.readexactly(10 + padding)) == 10 + padding
    assert (await client.reply(expected)).error == 0


async def test_06_single_bytes_may_be_asked_for(client):
    """proto.md, "Block size constraints": a client that did not ask for them may do as it likes."""
    await client.go()
    await client.write(4095, b"ab")
    assert await client.read(4094, 4) == b"\0ab\0"


async def test_07_contexts_of_another_export_are_void(pool, client):
    """proto.md, "NBD_OPT_SET_META_CONTEXT"."""
    pool.create("other", SIZE)
    await client.ask(Option.STRUCTURED_REPLY)
    await client.ask(Option.SET_META_CONTEXT, build_meta_context("other", CONTEXTS))
    await client.try_go("disk")
    client.begin(STRUCTURED)
    assert (await client.do(Command.BLOCK_STATUS, 0, 512)).error == Errno.EINVAL


@pytest.mark.parametrize("mode", ReplyMode)
async def test_08_flags_fit_the_reply_mode(client, mode):
    """proto.md, "Transmission flags": HAS_FLAGS always, SEND_DF only with structured replies."""
    flags = (await client.go("disk", mode, CONTEXTS if mode is not SIMPLE else ())).flags
    assert flags & TransmissionFlag.HAS_FLAGS
    assert bool(flags & TransmissionFlag.SEND_DF) is (mode is not SIMPLE)
    assert bool(flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD) is (mode is EXTENDED)
    if not flags & TransmissionFlag.SEND_DF:
        assert (await client.do(Command.READ, 0, 1, CommandFlag.DF)).error == Errno.EINVAL


@pytest.mark.parametrize("mode", ReplyMode)
async def test_09_no_offset_is_too_large_to_be_refused(client, mode):
    """Offsets and lengths up to 2^64 - 1: libnbd's CVE-2023-5215 was about their sign."""
    await client.go("disk", mode)
    for offset in (SIZE, 1 << 63, (1 << 64) - 1):
        assert (await client.do(Command.READ, offset, 1)).error == Errno.EINVAL


async def test_10_limits_hold_before_an_export_is_chosen(serve, connect):
    """qemu's CVE-2024-7409: a client that says nothing, for ever."""
    await serve(limits=Limits(handshake_timeout_s=0.05))
    assert await (await connect()).closed()
    assert await (await connect(flags=None)).receive_or_end()  # the hello


async def test_10_options_come_in_any_order_and_number_up_to_a_limit(client):
    """nbdkit's CVE-2019-14851: INFO, LIST and GO in any order."""
    for _ in range(10):
        assert await client.last(Option.INFO, build_info("disk")) == OptionReply.ACK
        assert await client.last(Option.LIST) == OptionReply.ACK
        assert await client.last(Option.GO, build_info("none")) == OptionReply.ERR_UNKNOWN
    for _ in range(100):
        client.send(build_option(Option.LIST))
    with pytest.raises((AssertionError, ConnectionError)):
        while True:
            await client.answer()


# 11 to 14 are about TLS: see test_tls.py.


# --- Transmission --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
async def test_15_reads_are_answered_structured_even_if_refused(client, mode):
    """proto.md, "Structured reply chunk message"; the strict client raises otherwise."""
    await client.go("disk", mode)
    assert (await client.do(Command.READ, SIZE, 1)).chunks
    assert (await client.do(Command.READ, 0, 1, CommandFlag.NO_HOLE)).error == Errno.EINVAL


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


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
async def test_18_chunks_cover_every_byte_once(client, mode):
    """proto.md, "NBD_CMD_READ"; the strict client counts."""
    await client.go("disk", mode)
    whole = bytearray(41 * BLOCK)
    for start in range(0, 40 * BLOCK, 2 * BLOCK):
        whole[start : start + BLOCK] = bytes([start // BLOCK + 1]) * BLOCK
        await client.write(start, whole[start : start + BLOCK])
    data = await client.read(1000, 40 * BLOCK)
    assert data == whole[1000 : 1000 + 40 * BLOCK]


@pytest.mark.parametrize("mode", ReplyMode)
async def test_19_refused_writes_are_consumed(client, mode):
    """proto.md, "NBD_CMD_WRITE": up to 32 MiB is no attack, even above the advertised maximum."""
    await client.go("disk", mode)
    for length in (100, 5 << 20, 32 << 20):
        reply = await client.do(Command.WRITE, SIZE - 99, payload=bytes(length))
        assert reply.error == Errno.ENOSPC
    reply = await client.do(Command.WRITE, 0, payload=bytes((32 << 20) + 1))
    assert reply.error == Errno.EINVAL
    assert await client.read(0, 1) == b"\0"


@pytest.mark.parametrize("mode", ReplyMode)
async def test_20_long_and_empty_requests_do_not_end_the_connection(client, mode):
    """proto.md, "Block size constraints"; libnbd sends empty requests in its loose mode."""
    await client.go("disk", mode)
    expected = Errno.EINVAL if mode is SIMPLE else Errno.EOVERFLOW
    assert (await client.do(Command.READ, 0, (32 << 20) + 1)).error == expected
    for command in (Command.READ, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES):
        assert (await client.do(command, 5, 0)).error == 0
    assert (await client.do(Command.WRITE, 5, payload=b"")).error == 0
    assert len(await client.read(0, 32 << 20)) == 32 << 20


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


async def test_22_every_connection_sees_what_any_has_written(pool, serve, connect):
    """proto.md, "NBD_FLAG_CAN_MULTI_CONN"."""
    await serve()
    first, second = await connect(), await connect()
    assert (await first.go()).flags & TransmissionFlag.CAN_MULTI_CONN
    await second.go()
    await first.write(100, b"seen")
    assert await second.read(100, 4) == b"seen"
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


async def test_24_zeroing_is_exact_and_trimming_shrinks(pool, client):
    """proto.md, "NBD_CMD_WRITE_ZEROES", "NBD_CMD_TRIM"; NO_HOLE must reach the store."""
    await client.go()
    await client.write(0, b"x" * 4 * BLOCK)
    assert (await client.do(Command.TRIM, 1, 2 * BLOCK)).error == 0
    assert (await client.read(0, 3 * BLOCK)).count(b"x") == 2 * BLOCK
    assert (await client.do(Command.WRITE_ZEROES, 5, 2)).error == 0
    assert await client.read(4, 4) == b"x\0\0x"
    assert (await client.do(Command.WRITE_ZEROES, 0, BLOCK, FAST_NO_HOLE)).error == 0
    assert pool.volumes["disk"].calls[-1] == "write_zeroes no_hole=True"


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


async def test_25_a_filter_chooses_contexts(client):
    """extension-ext-header, "NBD_FLAG_BLOCK_STATUS_PAYLOAD"."""
    await client.go("disk", EXTENDED, CONTEXTS)
    cookie, data = client.transmission.filtered_block_status(0, SIZE, [2])
    client.send(data)
    assert (await client.reply(cookie)).extents == {2: [(SIZE, 0)]}
    for ids in ([], [2, 2], [7]):
        cookie, data = client.transmission.filtered_block_status(0, SIZE, ids)
        client.send(data)
        assert (await client.reply(cookie)).error == Errno.EINVAL


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


@pytest.mark.parametrize("mode", ReplyMode)
async def test_27_cache(pool, client, mode):
    """proto.md, "NBD_CMD_CACHE": unknown flags are refused."""
    await client.go("disk", mode)
    assert (await client.do(Command.CACHE, 0, SIZE)).error == 0
    assert pool.volumes["disk"].calls == [f"cache {32 << 20}"] * 2
    assert (await client.do(Command.CACHE, 0, 1, CommandFlag.NO_HOLE)).error == Errno.EINVAL


async def test_28_unknown_commands_consume_nothing(client):
    """proto.md, "Request message": only WRITE has a payload; go-nbd waits for one."""
    await client.go()
    assert (await client.do(4711, 0, 1 << 20)).error == Errno.EINVAL
    assert await client.read(0, 1) == b"\0"


@pytest.mark.parametrize("mode", ReplyMode)
async def test_29_unknown_magic_drops_the_client(client, mode):
    """proto.md, "Request message"."""
    await client.go("disk", mode)
    client.send(b"\0" * 64)
    assert await client.closed()


async def test_29_nodelay_is_set(serve, connect):
    """proto.md, "TCP_NODELAY": both sides SHOULD set it."""
    server = await serve(listen=["127.0.0.1:0"])
    client = await connect(server.addresses[0])
    await client.go()
    (connection,) = server._connections
    sock = connection._channel.sock
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# --- Extended headers: "Extended headers" in extension-ext-header ---------------------------------


async def test_extended_payload_that_nobody_expects_is_consumed(client):
    await client.go("disk", EXTENDED)
    for command in (Command.READ, Command.TRIM, Command.FLUSH, Command.BLOCK_STATUS):
        assert (await client.do(command, 0, 512, 0, bytes(512))).error == Errno.EINVAL
    assert await client.read(0, 1) == b"\0"


async def test_extended_effects_have_64_bits(pool, serve, connect):
    pool.create("huge", 1 << 45)
    pool.volumes["huge"].trim = pool.volumes["huge"].cache  # which counts, and does nothing
    await serve()
    client = await connect()
    await client.go("huge", EXTENDED)
    assert (await client.do(Command.TRIM, 0, 1 << 45)).error == 0
    assert pool.volumes["huge"].calls == [f"cache {1 << 45}"]


# --- Error table: "Error values" -----------------------------------------------------------------


@pytest.mark.parametrize("command", [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES])
async def test_read_only_exports_refuse_before_they_look_at_the_range(serve, connect, command):
    await serve(read_only=True)
    client = await connect()
    flags = (await client.go()).flags
    assert flags & TransmissionFlag.READ_ONLY
    assert not flags & TransmissionFlag.SEND_TRIM
    payload = b"x" if command == Command.WRITE else None
    assert (await client.do(command, SIZE, 1, 0, payload)).error == Errno.EPERM
    assert await client.read(0, 1) == b"\0"


async def test_old_clients_get_no_option_replies(serve, connect):
    """proto.md, "Client flags": without fixed newstyle there is only EXPORT_NAME."""
    await serve()
    client = await connect(flags=ClientFlag(0))
    client.send(build_option(Option.LIST))
    assert await client.closed()


async def test_tls_that_is_off_never_asks_for_tls(pool, client):
    """proto.md, "NOTLS": ERR_TLS_REQD MUST NOT be sent."""
    pool.volumes["disk"].properties["allow"] = ["somebody"]
    assert await client.last(Option.STARTTLS) == OptionReply.ERR_POLICY
    assert (await client.try_go("disk")).reply == OptionReply.ERR_POLICY
    assert [a.reply for a in await client.ask(Option.LIST)] == [OptionReply.ACK]
