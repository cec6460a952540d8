"""Extended headers: 64-bit lengths, payloads that are announced, filters of contexts."""

from __future__ import annotations

from tests.conformance.case import MAY, MUST, SHOULD, case
from tests.conformance.outcome import Skip, require
from tests.conformance.server import Server
from tests.conformance.session import Session
from tests.conformance.wire import (
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    MAX_PAYLOAD,
    U32,
    U64,
    Cmd,
    CmdFlag,
    Errno,
    Flag,
    Mode,
    Option,
    Rep,
)

BRANCH = "extension-ext-header"


def begin(server: Server, contexts: bool = False) -> Session:
    server.need_mode(Mode.EXTENDED)
    return server.session(Mode.EXTENDED, server.facts.contexts if contexts else ())


@case(
    "extended-offered",
    MAY,
    "extended headers are offered",
    source=f'{BRANCH}, "NBD_OPT_EXTENDED_HEADERS"',
)
def offered(server: Server) -> None:
    server.need_mode(Mode.EXTENDED)


@case(
    "extended-after-structured",
    MUST,
    "extended headers take precedence over structured replies",
    source=f'{BRANCH}, "NBD_OPT_EXTENDED_HEADERS"',
    rules=(15,),
)
def after_structured(server: Server) -> None:
    server.need_mode(Mode.EXTENDED)
    client = server.connect()
    client.negotiate(Mode.STRUCTURED)
    require(client.negotiate(Mode.EXTENDED), "they are refused after STRUCTURED_REPLY")
    Session(client.connection, Mode.EXTENDED, client.go(server.name), {}).must_be_in_sync()


@case(
    "extended-before-structured",
    SHOULD,
    "STRUCTURED_REPLY after extended headers is refused with ERR_EXT_HEADER_REQD",
    source=f'{BRANCH}, "NBD_OPT_STRUCTURED_REPLY"',
)
def before_structured(server: Server) -> None:
    server.need_mode(Mode.EXTENDED)
    client = server.connect()
    client.negotiate(Mode.EXTENDED)
    reply = client.final(Option.STRUCTURED_REPLY)
    Session(client.connection, Mode.EXTENDED, client.go(server.name), {}).must_be_in_sync()
    require(reply.kind == Rep.ERR_EXT_HEADER_REQD, f"it is answered {reply.name}")


@case(
    "extended-twice",
    SHOULD,
    "asked for twice, extended headers are refused, and stay on",
    source=f'{BRANCH}, "NBD_OPT_EXTENDED_HEADERS"',
)
def twice(server: Server) -> None:
    server.need_mode(Mode.EXTENDED)
    client = server.connect()
    client.negotiate(Mode.EXTENDED)
    again = client.final(Option.EXTENDED_HEADERS)
    Session(client.connection, Mode.EXTENDED, client.go(server.name), {}).must_be_in_sync()
    require(again.is_error, f"the second time is answered {again.name}")


@case(
    "extended-data",
    MUST,
    "EXTENDED_HEADERS with data is refused, or unknown; the data is consumed",
    source=f'{BRANCH}, "NBD_OPT_EXTENDED_HEADERS"',
    rules=(1,),
)
def with_data(server: Server) -> None:
    client = server.connect()
    reply = client.final(Option.EXTENDED_HEADERS, b"data")
    require(reply.is_error, f"it is answered {reply.name}")
    client.go(server.name)


@case(
    "extended-export-name",
    MUST,
    "EXPORT_NAME after extended headers ends the connection",
    source=f'{BRANCH}, "NBD_OPT_EXPORT_NAME"',
)
def export_name(server: Server) -> None:
    server.need_mode(Mode.EXTENDED)
    client = server.connect()
    client.negotiate(Mode.EXTENDED)
    client.send(Option.EXPORT_NAME, server.name.encode())
    client.connection.must_close("EXPORT_NAME with extended headers")


@case(
    "extended-old-request",
    MUST,
    "a request with a header of 28 bytes ends the connection",
    source=f'{BRANCH}, "Request message"',
    rules=(29,),
)
def old_requests(server: Server) -> None:
    extended = begin(server)
    old = Session(extended.connection, Mode.SIMPLE, extended.export, {})
    _, request = old.build(Cmd.READ, 0, 512)
    extended.connection.send(request + bytes(4))
    extended.connection.must_close("a compact request")


@case(
    "extended-payload-unexpected",
    MUST,
    "a payload that a command does not have is read past, and answered EINVAL",
    source=f'{BRANCH}, "NBD_CMD_FLAG_PAYLOAD_LEN"',
    rules=(19, 28),
)
def unexpected_payload(server: Server) -> None:
    session = begin(server)
    for command in (Cmd.READ, Cmd.FLUSH, Cmd.CACHE, Cmd.BLOCK_STATUS, 4711):
        reply = session.do(command, 0, payload=bytes(512))
        require(reply.error == Errno.EINVAL, f"command {command} is answered {reply.outcome}")
        session.must_be_in_sync()


@case(
    "extended-write-unannounced",
    SHOULD,
    "WRITE without PAYLOAD_LEN is answered EINVAL, or ends the connection",
    source=f'{BRANCH}, "NBD_CMD_FLAG_PAYLOAD_LEN"',
    rules=(19,),
    writes=True,
)
def write_without_flag(server: Server) -> None:
    server.need_writable()
    session = begin(server)
    before = session.read(0, 512)
    cookie, _ = session.build(Cmd.WRITE, 0, payload=b"x" * 512)
    header = EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, 0, Cmd.WRITE, cookie, 0, 512)
    session.connection.send(header + b"x" * 512)
    reply = session.reply(cookie)
    require(reply.error == Errno.EINVAL, f"it is answered {reply.outcome}")
    require(session.read(0, 512) == before, "it was written")


@case(
    "extended-64-bits",
    MUST,
    "the whole of an export above 4 GiB can be asked about or cached in one request",
    source=f'{BRANCH}, "Request message"',
    rules=(25,),
)
def effects_of_64_bits(server: Server) -> None:
    session = begin(server, contexts=True)
    server.need_size((1 << 32) + 1)
    if not session.contexts:
        raise Skip("no metadata contexts")
    length = session.export.size // server.unit * server.unit
    reply = session.do(Cmd.BLOCK_STATUS, 0, length)
    allowed = (0, Errno.EOVERFLOW, Errno.EINVAL)
    require(reply.error in allowed, f"it is answered {reply.outcome}")
    session.must_be_in_sync()


@case(
    "extended-lengths",
    SHOULD,
    "READs of lengths near 2^32 and 2^64 are answered, not taken modulo anything",
    source=f'{BRANCH}, "Request message"',
    rules=(9, 20),
)
def enormous_lengths(server: Server) -> None:
    session = begin(server)
    for length in ((1 << 32) + 512, (1 << 63) + 512, (1 << 64) - 512):
        reply = session.do(Cmd.READ, 0, length)
        require(reply.error, f"READ of {length} bytes claims success")
    session.must_be_in_sync()


@case(
    "extended-write-huge",
    MUST,
    "a WRITE that announces 2^63 bytes does not succeed, and harms nobody",
    source=f'{BRANCH}, "NBD_CMD_FLAG_PAYLOAD_LEN"',
    rules=(9, 19),
    writes=True,
)
def huge_payload(server: Server) -> None:
    session = begin(server)
    values = (EXTENDED_REQUEST_MAGIC, CmdFlag.PAYLOAD_LEN, Cmd.WRITE, 1, 0, 1 << 63)
    session.connection.send(EXTENDED_REQUEST.pack(*values) + bytes(4096))
    server.must_serve_others()
    if not session.connection.is_quiet(0.05):
        session.connection.must_close("a WRITE of 2^63 bytes", allow_data=True)


@case(
    "extended-filter",
    MUST,
    "a payload of BLOCK_STATUS chooses among the contexts",
    source=f'{BRANCH}, "NBD_FLAG_BLOCK_STATUS_PAYLOAD"',
    rules=(25,),
)
def filters(server: Server) -> None:
    session = begin(server, contexts=True)
    if not session.export.flags & Flag.BLOCK_STATUS_PAYLOAD:
        raise Skip("BLOCK_STATUS_PAYLOAD is not offered")
    length = min(server.size // server.unit * server.unit, MAX_PAYLOAD)
    for number in session.contexts.values():
        reply = session.do(Cmd.BLOCK_STATUS, 0, length, payload=U64.pack(length) + U32.pack(number))
        require(set(reply.extents) == {number}, f"asked for {number}: {reply.extents.keys()}")
    session.must_be_in_sync()


@case(
    "extended-filter-wrong",
    SHOULD,
    "a filter with unknown ids, ids twice, or a length that lies is answered EINVAL",
    source=f'{BRANCH}, "NBD_FLAG_BLOCK_STATUS_PAYLOAD"',
    rules=(25, 19),
)
def wrong_filters(server: Server) -> None:
    session = begin(server, contexts=True)
    if not session.export.flags & Flag.BLOCK_STATUS_PAYLOAD:
        raise Skip("BLOCK_STATUS_PAYLOAD is not offered")
    known = next(iter(session.contexts.values()))
    unknown = max(session.contexts.values()) + 1
    for ids in ((unknown,), (known, known), (known, unknown)):
        payload = U64.pack(512) + b"".join(U32.pack(number) for number in ids)
        reply = session.do(Cmd.BLOCK_STATUS, 0, 512, payload=payload)
        require(reply.error == Errno.EINVAL, f"the ids {ids} are answered {reply.outcome}")
    for payload in (b"", bytes(7), U64.pack(512) + b"\0\0\0"):
        reply = session.do(Cmd.BLOCK_STATUS, 0, 512, payload=payload)
        require(reply.error == Errno.EINVAL, f"{len(payload)} bytes are answered {reply.outcome}")
    session.must_be_in_sync()


@case(
    "extended-filter-offered",
    SHOULD,
    "BLOCK_STATUS_PAYLOAD is offered only with a context selected",
    source=f'{BRANCH}, "NBD_FLAG_BLOCK_STATUS_PAYLOAD"',
    rules=(8,),
)
def filters_need_contexts(server: Server) -> None:
    flags = begin(server).export.flags
    require(not flags & Flag.BLOCK_STATUS_PAYLOAD, "it is offered without contexts")
