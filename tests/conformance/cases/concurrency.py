"""Many requests at once, and several connections to one export."""

from __future__ import annotations

import random

from tests.conformance.case import MUST, case
from tests.conformance.cases.writing import AREA_BYTES, begin, pattern
from tests.conformance.outcome import require
from tests.conformance.server import Server
from tests.conformance.wire import Cmd, CmdFlag, Flag, Mode

N_REQUESTS = 128
"""What Linux has in flight on one connection."""


@case(
    "many-reads",
    MUST,
    f"{N_REQUESTS} READs in flight are each answered once, in any order",
    source='proto.md, "Ordering of messages and writes"',
    rules=(26,),
    each_mode=True,
)
def many_reads(server: Server, mode: Mode) -> None:
    server.need_size(AREA_BYTES)
    session = server.session(mode)
    whole, unit = session.read(0, AREA_BYTES), server.unit
    starts = [index * unit % (AREA_BYTES - 3 * unit) for index in range(N_REQUESTS)]
    cookies = [session.start(Cmd.READ, start, 3 * unit) for start in starts]
    for start, reply in zip(starts, session.replies(cookies), strict=True):
        require(reply.data == whole[start : start + 3 * unit], f"READ at {start} differs")
    session.must_be_in_sync()


@case(
    "many-writes",
    MUST,
    f"{N_REQUESTS} WRITEs in flight all take effect, side by side",
    source='proto.md, "Ordering of messages and writes"',
    rules=(26,),
    writes=True,
    each_mode=True,
)
def many_writes(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    length = AREA_BYTES // N_REQUESTS // server.facts.minimum_block * server.facts.minimum_block
    if not length:
        length = server.facts.minimum_block
    n_writes = AREA_BYTES // length
    order = random.Random(1).sample(range(n_writes), n_writes)
    cookies = [
        session.start(Cmd.WRITE, index * length, payload=pattern(length, index)) for index in order
    ]
    for reply in session.replies(cookies):
        require(not reply.error, f"WRITE is answered {reply.outcome}")
    expected = b"".join(pattern(length, index) for index in range(n_writes))
    require(session.read(0, len(expected)) == expected, "the export reads otherwise")


@case(
    "writes-in-one-block",
    MUST,
    "small WRITEs in flight beside each other in one block do not undo each other",
    source='proto.md, "Ordering of messages and writes"; reading, merging and writing a block',
    rules=(24, 26),
    writes=True,
    each_mode=True,
)
def writes_in_one_block(server: Server, mode: Mode) -> None:
    server.need_single_bytes()
    first = begin(server, mode)
    sessions = [first]
    if server.has(Flag.CAN_MULTI_CONN):
        sessions += [server.session(mode) for _ in range(2)]
    n_bytes = 64
    started = []
    for index in range(16384 // n_bytes):
        session = sessions[index % len(sessions)]
        payload = bytes([index % 255 + 1]) * n_bytes
        started.append((session, session.start(Cmd.WRITE, index * n_bytes, payload=payload)))
    for session, cookie in started:
        require(not session.reply(cookie).error, "WRITE is refused")
    expected = b"".join(bytes([i % 255 + 1]) * n_bytes for i in range(16384 // n_bytes))
    require(first.read(0, 16384) == expected, "a WRITE was undone")


@case(
    "mixed-work",
    MUST,
    "requests of all kinds in flight at once are each answered once",
    source='proto.md, "Ordering of messages and writes"',
    rules=(26,),
    writes=True,
    each_mode=True,
)
def mixed_work(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    commands = [(Cmd.READ, True), (Cmd.WRITE, True), (Cmd.FLUSH, server.has(Flag.SEND_FLUSH))]
    commands += [
        (Cmd.TRIM, server.has(Flag.SEND_TRIM)),
        (Cmd.WRITE_ZEROES, server.has(Flag.SEND_WRITE_ZEROES)),
        (Cmd.CACHE, server.has(Flag.SEND_CACHE)),
    ]
    usable = [command for command, offered in commands if offered]
    chance, cookies = random.Random(2), []
    for _ in range(N_REQUESTS):
        command = chance.choice(usable)
        offset = chance.randrange(AREA_BYTES // server.unit) * server.unit
        payload = pattern(server.unit) if command == Cmd.WRITE else None
        if command == Cmd.FLUSH:
            cookies.append(session.start(command))
        else:
            cookies.append(session.start(command, offset, server.unit, payload=payload))
    for reply in session.replies(cookies):
        require(not reply.error, f"{Cmd(reply.command).name} is answered {reply.outcome}")
    session.must_be_in_sync()


@case(
    "multi-conn-visible",
    MUST,
    "with CAN_MULTI_CONN, what one connection has written others read",
    source='proto.md, "NBD_FLAG_CAN_MULTI_CONN"',
    rules=(22,),
    writes=True,
    each_mode=True,
)
def visible_everywhere(server: Server, mode: Mode) -> None:
    server.need(Flag.CAN_MULTI_CONN)
    first, second = begin(server, mode), server.session(mode)
    unit = server.unit
    for index in range(20):
        data = pattern(unit, index)
        first.write(index * unit, data)
        require(second.read(index * unit, unit) == data, "the other connection reads otherwise")


@case(
    "multi-conn-flush",
    MUST,
    "with CAN_MULTI_CONN, FLUSH and FUA work on any connection, and what they cover is seen",
    source='proto.md, "NBD_FLAG_CAN_MULTI_CONN"',
    rules=(22, 23),
    writes=True,
    each_mode=True,
)
def flushed_everywhere(server: Server, mode: Mode) -> None:
    server.need(Flag.CAN_MULTI_CONN)
    server.need(Flag.SEND_FLUSH)
    first, second, third = begin(server, mode), server.session(mode), server.session(mode)
    unit = server.unit
    first.write(0, pattern(unit, 1))
    reply = second.do(Cmd.FLUSH)
    require(not reply.error, f"FLUSH on another connection is answered {reply.outcome}")
    if server.has(Flag.SEND_FUA):
        second.write(unit, pattern(unit, 2), flags=CmdFlag.FUA)
        require(third.read(unit, unit) == pattern(unit, 2), "a FUA write is not seen")
    require(third.read(0, unit) == pattern(unit, 1), "a flushed write is not seen")


@case(
    "multi-conn-survives",
    MUST,
    "what was written and answered is there after the connection is gone",
    source='proto.md, "NBD_CMD_WRITE"',
    rules=(22,),
    writes=True,
)
def written_survives_the_connection(server: Server) -> None:
    session = begin(server, Mode.SIMPLE)
    session.write(0, pattern(server.unit, 9))
    session.connection.close()
    found = server.session().read(0, server.unit)
    require(found == pattern(server.unit, 9), "it is not there")
