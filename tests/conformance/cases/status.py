"""BLOCK_STATUS: extents cover the request in order, per context, and tell no lies."""

from __future__ import annotations

from collections.abc import Iterator

from tests.conformance.case import MUST, SHOULD, case
from tests.conformance.outcome import Skip, require
from tests.conformance.server import Server
from tests.conformance.session import Reply, Session
from tests.conformance.wire import BASE_ALLOCATION, Cmd, CmdFlag, Errno, Mode, State

MAX_EXTENTS = 1 << 20
COMPARED_BYTES = 16 << 20


def begin(server: Server, mode: Mode) -> Session:
    """Begin a session with all contexts that the server lists, base:allocation among them."""
    if mode is Mode.SIMPLE:
        raise Skip("simple replies cannot carry it")
    server.need_allocation()
    return server.session(mode, server.facts.contexts)


def most_of(session: Session, server: Server) -> int:
    """How much a request may ask about: 32 bits of it unless headers are extended."""
    size = session.export.size // server.unit * server.unit
    if session.mode is Mode.EXTENDED:
        return size
    return min(size, (1 << 32) - max(4096, server.unit))


def asked(session: Session, offset: int, length: int, flags: int = 0) -> Reply:
    reply = session.do(Cmd.BLOCK_STATUS, offset, length, flags=flags)
    require(not reply.error, f"{length} bytes at {offset} are answered {reply.outcome}")
    ids = set(session.contexts.values())
    require(reply.extents.keys() == ids, f"contexts {set(reply.extents)} are told, not {ids}")
    return reply


def allocation(session: Session, limit: int) -> Iterator[tuple[int, int, int]]:
    """Walk the export by base:allocation: (start, stop, status)."""
    number, start = session.contexts[BASE_ALLOCATION], 0
    while start < limit:
        for length, status in asked(session, start, limit - start).extents[number]:
            yield start, min(limit, start + length), status
            start += length


@case(
    "status",
    MUST,
    "every selected context is told once, from the offset on",
    source='proto.md, "NBD_REPLY_TYPE_BLOCK_STATUS"',
    rules=(25,),
    each_mode=True,
)
def every_context(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    length = min(most_of(session, server), 1 << 20)
    asked(session, 0, length)
    asked(session, 0, server.unit)
    end = session.export.size // server.unit * server.unit
    asked(session, end - server.unit, server.unit)


@case(
    "status-all",
    MUST,
    "the whole export, or 4 GiB of it, can be asked about at once",
    source='proto.md, "NBD_CMD_BLOCK_STATUS"; CVE-2025-47711, CVE-2025-47712 (nbdkit)',
    rules=(25,),
    each_mode=True,
)
def whole_export(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    reply = asked(session, 0, most_of(session, server))
    for extents in reply.extents.values():
        require(len(extents) <= MAX_EXTENTS, f"{len(extents)} extents in one chunk")
    session.must_be_in_sync()


@case(
    "status-one",
    MUST,
    "REQ_ONE is answered by one extent per context, not longer than the request",
    source='proto.md, "NBD_CMD_FLAG_REQ_ONE"',
    rules=(25,),
    each_mode=True,
)
def one_extent(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    for length in (server.unit, most_of(session, server)):
        asked(session, 0, length, CmdFlag.REQ_ONE)


@case(
    "status-within-export",
    MUST,
    "no extent ends beyond the export",
    source='proto.md, "NBD_REPLY_TYPE_BLOCK_STATUS"',
    rules=(25,),
    each_mode=True,
)
def extents_end_with_the_export(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    size = session.export.size
    start = max(0, size // server.unit - 4) * server.unit
    reply = asked(session, start, size // server.unit * server.unit - start)
    for extents in reply.extents.values():
        stop = start + sum(length for length, _ in extents)
        require(stop <= size, f"the last extent ends at {stop}, the export at {size}")


@case(
    "status-merged",
    SHOULD,
    "neighbouring extents have different status",
    source='proto.md, "NBD_CMD_BLOCK_STATUS"',
    rules=(25,),
    each_mode=True,
)
def merged_extents(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    for extents in asked(session, 0, most_of(session, server)).extents.values():
        twins = [i for i in range(1, len(extents)) if extents[i][1] == extents[i - 1][1]]
        require(not twins, f"extents {twins[:5]} have the status of the one before")


@case(
    "status-known-bits",
    SHOULD,
    "base:allocation has no bits but HOLE and ZERO",
    source='proto.md, "Metadata contexts"',
    rules=(25,),
    each_mode=True,
)
def known_status(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    extents = asked(session, 0, most_of(session, server)).extents
    known = State.HOLE | State.ZERO
    odd = [status for _, status in extents[session.contexts[BASE_ALLOCATION]] if status & ~known]
    require(not odd, f"the status {odd[:1]}")


@case(
    "status-truth",
    MUST,
    "what is told to be zero reads as zeroes",
    source='proto.md, "Metadata contexts"',
    rules=(25,),
    each_mode=True,
)
def zeroes_are_zero(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    limit = min(session.export.size, COMPARED_BYTES) // server.unit * server.unit
    for start, stop, status in allocation(session, limit):
        if not status & State.ZERO:
            continue
        for offset in range(start, stop, 1 << 20):
            data = session.read(offset, min(stop - offset, 1 << 20))
            require(not data.strip(b"\0"), f"data in the zeroes from {start} to {stop}")


@case(
    "status-beyond-end",
    SHOULD,
    "BLOCK_STATUS beyond the end is answered EINVAL",
    source='proto.md, "NBD_CMD_BLOCK_STATUS"',
    rules=(25, 9),
    each_mode=True,
)
def beyond_the_end(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    end = session.export.size // server.unit * server.unit
    for offset in (end, 1 << 63):
        reply = session.do(Cmd.BLOCK_STATUS, offset, 2 * server.unit)
        require(reply.error == Errno.EINVAL, f"at {offset} it is answered {reply.outcome}")
    session.must_be_in_sync()


@case(
    "status-empty",
    SHOULD,
    "BLOCK_STATUS of no bytes does not end the connection",
    source='proto.md, "NBD_CMD_BLOCK_STATUS"',
    rules=(20, 25),
    each_mode=True,
)
def no_bytes(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    reply = session.do(Cmd.BLOCK_STATUS, 0, 0)
    require(reply.error == Errno.EINVAL, f"it is answered {reply.outcome}")
    session.must_be_in_sync()


@case(
    "status-aligned",
    SHOULD,
    "extents begin and end at multiples of the minimum block",
    source='proto.md, "NBD_CMD_BLOCK_STATUS" (a MUST before 2025-06)',
    rules=(25,),
    each_mode=True,
)
def aligned_extents(server: Server, mode: Mode) -> None:
    session = begin(server, mode)
    minimum = max(1, server.facts.minimum_block)
    for extents in asked(session, 0, most_of(session, server)).extents.values():
        odd = [length for length, _ in extents[:-1] if length % minimum]
        require(not odd, f"extents of {odd[:3]} bytes")
