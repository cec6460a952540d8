"""WRITE, TRIM, WRITE_ZEROES, FUA, and how they are refused. All of these cases write."""

from __future__ import annotations

from tests.conformance.case import MAY, MUST, SHOULD, case
from tests.conformance.outcome import Skip, require
from tests.conformance.server import Server
from tests.conformance.session import Session
from tests.conformance.wire import (
    BASE_ALLOCATION,
    MAX_PAYLOAD,
    Cmd,
    CmdFlag,
    Errno,
    Flag,
    Mode,
    State,
)

AREA_BYTES = 256 << 10
"""What a case overwrites at most, at the beginning of the export, unless it says so."""


def pattern(length: int, seed: int = 0) -> bytes:
    """Bytes that repeat after 251: no two blocks of them are equal."""
    period = bytes((seed + i) % 251 + 1 for i in range(251))
    return (period * (length // 251 + 1))[:length]


def begin(server: Server, mode: Mode) -> Session:
    """Begin a session on an export that can be written, with known content in its area."""
    server.need_writable()
    server.need_size(AREA_BYTES)
    session = server.session(mode)
    session.write(0, pattern(AREA_BYTES))
    return session


def beyond(server: Server) -> int:
    return server.size // server.unit * server.unit


@case(
    "write",
    MUST,
    "what is written reads back, and nothing beside it changes",
    source='proto.md, "NBD_CMD_WRITE"',
    writes=True,
    each_mode=True,
)
def writes(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    expected = bytearray(pattern(AREA_BYTES))
    unit = server.unit
    for index, n_units in ((1, 1), (4, 3), (9, 17), (30, 64)):
        start, length = index * unit, n_units * unit
        if start + length > AREA_BYTES:
            continue
        expected[start : start + length] = pattern(length, index)
        session.write(start, pattern(length, index))
    require(session.read(0, AREA_BYTES) == expected, "the export reads otherwise")


@case(
    "write-odd",
    MUST,
    "single bytes can be written if the minimum block is 1",
    source='proto.md, "Block size constraints"',
    rules=(6, 24),
    writes=True,
    each_mode=True,
)
def odd_writes(server: Server, mode: Mode) -> None:
    server.need_single_bytes()
    session = begin(server, mode)
    expected = bytearray(pattern(AREA_BYTES))
    for start, length in ((0, 1), (511, 2), (4095, 4098), (12345, 6789), (65535, 1)):
        expected[start : start + length] = pattern(length, 100)
        session.write(start, pattern(length, 100))
    require(session.read(0, AREA_BYTES) == expected, "the export reads otherwise")


@case(
    "write-bytewise",
    MUST,
    "a payload may arrive in pieces, with the next request right behind it",
    source="TCP is a stream",
    writes=True,
    each_mode=True,
)
def writes_in_pieces(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    data = pattern(server.unit, 7)
    cookie, write = session.build(Cmd.WRITE, 0, payload=data)
    second, read = session.build(Cmd.READ, AREA_BYTES - server.unit, server.unit)
    stream = write + read
    for cut in (1, 5, 27, 28, 33, 100, 101):
        session.connection.send(stream[:cut])
        stream = stream[cut:]
    session.connection.send(stream)
    wrote, got = session.replies([cookie, second])
    require(not wrote.error and not got.error, f"{wrote.outcome}, {got.outcome}")
    require(session.read(0, server.unit) == data, "the export reads otherwise")


@case(
    "write-last-byte",
    MUST,
    "the export can be written to its end",
    source='proto.md, "NBD_CMD_WRITE"',
    writes=True,
    each_mode=True,
)
def writes_to_the_end(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    minimum = server.facts.minimum_block
    start = session.export.size // minimum * minimum - minimum
    data = pattern(minimum, 77)
    session.write(start, data)
    require(session.read(start, minimum) == data, "the end reads otherwise")


@case(
    "write-beyond-end",
    SHOULD,
    "WRITE and WRITE_ZEROES beyond the end are answered ENOSPC, TRIM EINVAL",
    source='proto.md, "Error values"',
    rules=(9, 19),
    writes=True,
    each_mode=True,
)
def writes_beyond_the_end(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    top = (1 << 64) - server.unit
    for offset in (beyond(server), 1 << 63, top):
        asked: list[tuple[int, Errno, bytes | None, Flag]] = [
            (Cmd.WRITE, Errno.ENOSPC, bytes(2 * server.unit), Flag.HAS_FLAGS),
            (Cmd.WRITE_ZEROES, Errno.ENOSPC, None, Flag.SEND_WRITE_ZEROES),
            (Cmd.TRIM, Errno.EINVAL, None, Flag.SEND_TRIM),
        ]
        for command, error, payload, flag in asked:
            if not server.has(flag):
                continue
            reply = session.do(command, offset, 2 * server.unit, payload=payload)
            require(
                reply.error == error,
                f"{Cmd(command).name} at {offset} is answered {reply.outcome}",
            )
    session.must_be_in_sync()


@case(
    "write-across-end",
    MUST,
    "a WRITE that begins inside and ends outside fails, and nothing reads as written",
    source='proto.md, "NBD_CMD_WRITE"',
    rules=(19,),
    writes=True,
    each_mode=True,
)
def write_across_the_end(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    unit = server.unit
    last = beyond(server) - unit
    session.write(last, pattern(unit, 3))
    reply = session.do(Cmd.WRITE, last, payload=b"\xee" * 4 * unit)
    require(reply.error, "it claims success")
    require(session.read(last, unit) == pattern(unit, 3), "the inner part was written")


@case(
    "write-refused-consumed",
    MUST,
    "the payload of a refused WRITE is read past, up to 32 MiB",
    source='proto.md, "NBD_CMD_WRITE", "Block size constraints"',
    rules=(19,),
    writes=True,
    each_mode=True,
)
def refused_payloads(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    for length in (server.unit, 100 * server.unit, 1 << 20, MAX_PAYLOAD):
        reply = session.do(Cmd.WRITE, beyond(server), payload=bytes(length))
        require(reply.error, f"WRITE of {length} bytes beyond the end claims success")
        session.must_be_in_sync()


@case(
    "write-flags",
    SHOULD,
    "WRITE with unknown flags is answered EINVAL, its payload read past",
    source='proto.md, "Error values"',
    rules=(19,),
    writes=True,
    each_mode=True,
)
def write_with_flags(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    unit = server.unit
    for flags in (CmdFlag.NO_HOLE, CmdFlag.DF, CmdFlag.REQ_ONE, 1 << 15):
        reply = session.do(Cmd.WRITE, 0, payload=b"\xdd" * unit, flags=flags)
        session.must_be_in_sync()
        require(reply.error == Errno.EINVAL, f"with {flags:#x} it is answered {reply.outcome}")
    require(session.read(0, unit) == pattern(unit), "it was written all the same")


@case(
    "write-large",
    SHOULD,
    "a WRITE above the told maximum, but of no more than 32 MiB, does not end the connection",
    source='proto.md, "Block size constraints"',
    rules=(19, 20),
    writes=True,
    each_mode=True,
)
def large_writes(server: Server, mode: Mode) -> None:
    server.need_size(2 * MAX_PAYLOAD)
    session = begin(server, mode)
    session.do(Cmd.WRITE, 0, payload=pattern(MAX_PAYLOAD))
    session.must_be_in_sync()


@case(
    "write-empty",
    SHOULD,
    "writes, trims and zeroes of no bytes do not end the connection",
    source='proto.md, "NBD_CMD_WRITE" (unspecified); libnbd can send them',
    rules=(20,),
    writes=True,
    each_mode=True,
)
def empty_writes(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    session.do(Cmd.WRITE, 0, payload=b"")
    session.do(Cmd.TRIM, 0, 0)
    session.do(Cmd.WRITE_ZEROES, 0, 0)
    require(session.read(0, server.unit) == pattern(server.unit), "something was written")


@case(
    "fua",
    MUST,
    "FUA is accepted on WRITE, TRIM and WRITE_ZEROES, and they do what they do without it",
    source='proto.md, "NBD_CMD_FLAG_FUA"',
    rules=(23,),
    writes=True,
    each_mode=True,
)
def forced_unit_access(server: Server, mode: Mode) -> None:
    server.need(Flag.SEND_FUA)
    session = begin(server, mode)
    unit = server.unit
    session.write(0, b"\xaa" * unit, flags=CmdFlag.FUA)
    require(session.read(0, unit) == b"\xaa" * unit, "the export reads otherwise")
    if server.has(Flag.SEND_WRITE_ZEROES):
        reply = session.do(Cmd.WRITE_ZEROES, 0, unit, flags=CmdFlag.FUA)
        require(not reply.error, f"WRITE_ZEROES is answered {reply.outcome}")
        require(session.read(0, unit) == bytes(unit), "it is not zero")
    if server.has(Flag.SEND_TRIM):
        reply = session.do(Cmd.TRIM, 0, unit, flags=CmdFlag.FUA)
        require(not reply.error, f"TRIM is answered {reply.outcome}")


@case(
    "fua-unoffered",
    SHOULD,
    "FUA is answered EINVAL where SEND_FUA is not offered",
    source='proto.md, "Error values"',
    rules=(23,),
    writes=True,
)
def fua_unoffered(server: Server) -> None:
    if server.has(Flag.SEND_FUA):
        raise Skip("SEND_FUA is offered")
    session = begin(server, Mode.SIMPLE)
    reply = session.do(Cmd.WRITE, 0, payload=bytes(server.unit), flags=CmdFlag.FUA)
    require(reply.error == Errno.EINVAL, f"it is answered {reply.outcome}")


@case(
    "trim",
    MUST,
    "TRIM is accepted, and nothing outside of its range changes",
    source='proto.md, "NBD_CMD_TRIM"',
    rules=(24,),
    writes=True,
    each_mode=True,
)
def trimming(server: Server, mode: Mode) -> None:
    server.need(Flag.SEND_TRIM)
    session = begin(server, mode)
    odd = 1 if server.facts.minimum_block == 1 else 0
    start, length = 8192 + odd, 65536 + 5 * odd
    reply = session.do(Cmd.TRIM, start, length)
    require(not reply.error, f"it is answered {reply.outcome}")
    expected, found = pattern(AREA_BYTES), session.read(0, AREA_BYTES)
    require(found[:start] == expected[:start], "what is before the range has changed")
    require(found[start + length :] == expected[start + length :], "what is behind it has")


@case(
    "trim-zero",
    MAY,
    "a trimmed range reads as it was, or as zeroes",
    source='proto.md, "NBD_CMD_TRIM" (unspecified)',
    rules=(24,),
    writes=True,
    each_mode=True,
)
def trimmed_ranges(server: Server, mode: Mode) -> None:
    server.need(Flag.SEND_TRIM)
    session = begin(server, mode)
    session.do(Cmd.TRIM, 0, AREA_BYTES)
    found, expected = session.read(0, AREA_BYTES), pattern(AREA_BYTES)
    odd = [i for i, byte in enumerate(found) if byte not in (0, expected[i])]
    require(not odd, f"byte {odd[:1]} is neither")


@case(
    "unoffered",
    SHOULD,
    "TRIM, WRITE_ZEROES and FLUSH are answered EINVAL where they are not offered",
    source='proto.md, "Transmission flags", "Error values"',
    rules=(28,),
    writes=True,
    each_mode=True,
)
def unoffered_commands(server: Server, mode: Mode) -> None:
    session = server.session(mode)
    for command, flag in (
        (Cmd.TRIM, Flag.SEND_TRIM),
        (Cmd.WRITE_ZEROES, Flag.SEND_WRITE_ZEROES),
        (Cmd.FLUSH, Flag.SEND_FLUSH),
    ):
        if server.has(flag) or server.has(Flag.READ_ONLY):
            continue
        length = 0 if command == Cmd.FLUSH else server.unit
        reply = session.do(command, 0, length)
        require(reply.error == Errno.EINVAL, f"{command.name} is answered {reply.outcome}")


@case(
    "zero",
    MUST,
    "WRITE_ZEROES zeroes its range exactly, whatever its alignment",
    source='proto.md, "NBD_CMD_WRITE_ZEROES"',
    rules=(24,),
    writes=True,
    each_mode=True,
)
def zeroing(server: Server, mode: Mode) -> None:
    server.need(Flag.SEND_WRITE_ZEROES)
    session = begin(server, mode)
    expected = bytearray(pattern(AREA_BYTES))
    unit = server.unit
    ranges = [(unit, unit), (8 * unit, 100 * unit)]
    if server.facts.minimum_block == 1:
        ranges += [(5, 2), (4000, 200), (100_001, 20_002)]
    for start, length in ranges:
        if start + length > AREA_BYTES:
            continue
        for flags in (0, CmdFlag.NO_HOLE):
            reply = session.do(Cmd.WRITE_ZEROES, start, length, flags=flags)
            require(not reply.error, f"flags {flags:#x}: it is answered {reply.outcome}")
        expected[start : start + length] = bytes(length)
    require(session.read(0, AREA_BYTES) == expected, "the export reads otherwise")


@case(
    "zero-whole",
    MUST,
    "zeroes of more than the maximum payload do not end the connection",
    source='proto.md, "Block size constraints"',
    rules=(20, 24),
    writes=True,
    each_mode=True,
)
def zeroing_much(server: Server, mode: Mode) -> None:
    server.need(Flag.SEND_WRITE_ZEROES)
    session = begin(server, mode)
    length = min(beyond(server), 1 << 30)
    reply = session.do(Cmd.WRITE_ZEROES, 0, length)
    allowed = (0, Errno.EINVAL, Errno.EOVERFLOW)
    require(reply.error in allowed, f"{length} bytes are answered {reply.outcome}")
    if not reply.error:
        require(not session.read(0, AREA_BYTES).strip(b"\0"), "they are not zero")


@case(
    "zero-no-hole",
    MUST,
    "a range zeroed with NO_HOLE is not told to be a hole",
    source='proto.md, "NBD_CMD_FLAG_NO_HOLE", "Metadata contexts"',
    rules=(24, 25),
    writes=True,
    each_mode=True,
)
def zeroing_without_holes(server: Server, mode: Mode) -> None:
    server.need(Flag.SEND_WRITE_ZEROES)
    server.need_allocation()
    if mode is Mode.SIMPLE:
        raise Skip("simple replies cannot carry block status")
    begin(server, mode)
    session = server.session(mode, [BASE_ALLOCATION])
    reply = session.do(Cmd.WRITE_ZEROES, 0, 65536, flags=CmdFlag.NO_HOLE)
    require(not reply.error, f"it is answered {reply.outcome}")
    (extents,) = session.do(Cmd.BLOCK_STATUS, 0, 65536).extents.values()
    require(not any(status & State.HOLE for _, status in extents), f"its extents are {extents}")


@case(
    "zero-fast",
    MUST,
    "FAST_ZERO zeroes, or is answered ENOTSUP and changes nothing",
    source='proto.md, "NBD_CMD_FLAG_FAST_ZERO"',
    rules=(24,),
    writes=True,
    each_mode=True,
)
def zeroing_fast(server: Server, mode: Mode) -> None:
    server.need(Flag.SEND_FAST_ZERO)
    session = begin(server, mode)
    for flags in (CmdFlag.FAST_ZERO, CmdFlag.FAST_ZERO | CmdFlag.NO_HOLE):
        session.write(0, pattern(AREA_BYTES))
        reply = session.do(Cmd.WRITE_ZEROES, 0, AREA_BYTES, flags=flags)
        require(reply.error in (0, Errno.ENOTSUP), f"it is answered {reply.outcome}")
        expected = pattern(AREA_BYTES) if reply.error else bytes(AREA_BYTES)
        require(session.read(0, AREA_BYTES) == expected, f"{reply.outcome}, and reads otherwise")


@case(
    "zero-fast-unoffered",
    SHOULD,
    "FAST_ZERO is answered EINVAL where SEND_FAST_ZERO is not offered",
    source='proto.md, "NBD_CMD_FLAG_FAST_ZERO"',
    rules=(24,),
    writes=True,
)
def fast_zero_unoffered(server: Server) -> None:
    server.need(Flag.SEND_WRITE_ZEROES)
    if server.has(Flag.SEND_FAST_ZERO):
        raise Skip("SEND_FAST_ZERO is offered")
    session = begin(server, Mode.SIMPLE)
    reply = session.do(Cmd.WRITE_ZEROES, 0, server.unit, flags=CmdFlag.FAST_ZERO)
    require(reply.error == Errno.EINVAL, f"it is answered {reply.outcome}")


@case(
    "read-mixed",
    MUST,
    "a READ across data and holes has each byte once, with DF, too",
    source='proto.md, "NBD_CMD_READ"',
    rules=(18,),
    writes=True,
    each_mode=True,
)
def reads_across_holes(server: Server, mode: Mode) -> None:
    server.need(Flag.SEND_WRITE_ZEROES)
    session = begin(server, mode)
    expected = bytearray(pattern(AREA_BYTES))
    step = max(8192, 2 * server.unit)
    for start in range(0, AREA_BYTES - step, 2 * step):
        session.do(Cmd.WRITE_ZEROES, start, step)
        expected[start : start + step] = bytes(step)
    for start, stop in ((0, AREA_BYTES), (step, AREA_BYTES), (server.unit, AREA_BYTES - step)):
        require(session.read(start, stop - start) == expected[start:stop], f"from {start}")
    if session.export.flags & Flag.SEND_DF:
        reply = session.do(Cmd.READ, server.unit, 65536, flags=CmdFlag.DF)
        require(reply.data == bytes(expected[server.unit : server.unit + 65536]), "with DF")


@case(
    "status-written",
    MUST,
    "what was written is not told to be zero or a hole",
    source='proto.md, "Metadata contexts"',
    rules=(25,),
    writes=True,
    each_mode=True,
)
def status_of_what_was_written(server: Server, mode: Mode) -> None:
    server.need_allocation()
    if mode is Mode.SIMPLE:
        raise Skip("simple replies cannot carry block status")
    begin(server, mode)
    session = server.session(mode, [BASE_ALLOCATION])
    reply = session.do(Cmd.BLOCK_STATUS, 0, AREA_BYTES)
    (extents,) = reply.extents.values()
    require(not any(status & State.ZERO for _, status in extents), f"its extents are {extents}")


@case(
    "read-only",
    SHOULD,
    "whatever writes is answered EPERM on a read-only export, the range notwithstanding",
    source='proto.md, "Error values"',
    rules=(19,),
    writes=True,
    each_mode=True,
)
def read_only_exports(server: Server, mode: Mode) -> None:
    server.need(Flag.READ_ONLY)
    session = server.session(mode)
    before = session.read(0, server.unit)
    for offset in (0, beyond(server)):
        reply = session.do(Cmd.WRITE, offset, payload=b"\xcc" * server.unit)
        require(reply.error == Errno.EPERM, f"WRITE at {offset} is answered {reply.outcome}")
        for command in (Cmd.TRIM, Cmd.WRITE_ZEROES):
            reply = session.do(command, offset, server.unit)
            require(
                reply.error == Errno.EPERM,
                f"{command.name} at {offset} is answered {reply.outcome}",
            )
    require(session.read(0, server.unit) == before, "it was written")


@case(
    "read-only-refuses",
    MUST,
    "nothing that writes succeeds on a read-only export",
    source='proto.md, "NBD_FLAG_READ_ONLY"',
    rules=(19,),
    writes=True,
    each_mode=True,
)
def read_only_exports_refuse(server: Server, mode: Mode) -> None:
    server.need(Flag.READ_ONLY)
    session = server.session(mode)
    asked: list[tuple[int, bytes | None]] = [(Cmd.WRITE, bytes(server.unit))]
    asked += [(Cmd.TRIM, None), (Cmd.WRITE_ZEROES, None)]
    for command, payload in asked:
        reply = session.do(command, 0, server.unit, payload=payload)
        require(reply.error, f"{Cmd(command).name} claims success")
    session.must_be_in_sync()
