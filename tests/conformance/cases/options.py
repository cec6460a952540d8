"""Options in general: staying in sync whatever is refused, and limits."""

from __future__ import annotations

from tests.conformance.case import MUST, SHOULD, case
from tests.conformance.cases.handshake import NO_SUCH_EXPORT
from tests.conformance.handshake import Client, check_string, parse_server
from tests.conformance.outcome import Closed, Skip, Violation, require
from tests.conformance.server import UNKNOWN_OPTION, Server
from tests.conformance.wire import (
    U32,
    Option,
    Rep,
    context_data,
    counted,
    info_data,
)

MANY_OPTIONS, OPTIONS_AT_ONCE = 5000, 50


def must_go_on(client: Client, server: Server) -> None:
    """The next option must be understood as it should be."""
    if server.facts.has_info:
        reply = client.final(Option.INFO, info_data(server.name))
        require(reply.kind == Rep.ACK, f"INFO afterwards is answered {reply.name}")
    else:
        client.ask(Option.LIST)


@case(
    "option-unknown",
    MUST,
    "unknown options are refused as such, with any data, and the next one works",
    source='proto.md, "Option types" (baseline)',
    rules=(1,),
)
def unknown_options(server: Server) -> None:
    client = server.connect()
    for number in (0, UNKNOWN_OPTION, 1 << 31, 0xFFFFFFFF):
        for data in (b"", b"x", b"IHAVEOPT" * 100):
            reply = client.final(number, data)
            require(
                reply.kind == Rep.ERR_UNSUP,
                f"option {number:#x} with {len(data)} bytes is answered {reply.name}",
            )
    must_go_on(client, server)


@case(
    "option-withdrawn",
    MUST,
    "PEEK_EXPORT is refused: it was withdrawn",
    source='proto.md, "NBD_OPT_PEEK_EXPORT"',
    rules=(1,),
)
def withdrawn_option(server: Server) -> None:
    client = server.connect()
    reply = client.final(Option.PEEK_EXPORT, b"disk")
    require(reply.kind == Rep.ERR_UNSUP, f"it is answered {reply.name}")
    must_go_on(client, server)


@case(
    "option-bytewise",
    MUST,
    "options may arrive one byte at a time",
    source="TCP is a stream",
    rules=(1,),
)
def bytewise_options(server: Server) -> None:
    client = server.connect()
    data = info_data(server.name)
    client.connection.send_bytewise(b"IHAVEOPT" + U32.pack(UNKNOWN_OPTION) + U32.pack(4) + b"data")
    require(client.replies(UNKNOWN_OPTION)[-1].is_error, "an unknown option is accepted")
    client.connection.send_bytewise(
        b"IHAVEOPT" + U32.pack(Option.INFO) + U32.pack(len(data)) + data
    )
    client.replies(Option.INFO)
    must_go_on(client, server)


LYING_NAMES = (
    ("no data at all", b""),
    ("less data than a length needs", b"\0\0\0"),
    ("a name longer than the data", U32.pack(1 << 31) + b"disk\0\0"),
    ("a name that leaves no room for the number of infos", counted(b"disk")),
    ("more infos than there are", counted(b"") + b"\0\2\0\0"),
    ("fewer infos than there are", counted(b"") + b"\0\0\0\0"),
    ("a length of 2^32 - 1", U32.pack(0xFFFFFFFF) + b"disk\0\0"),
)


@case(
    "info-lying-lengths",
    MUST,
    "INFO and GO with lengths that lie are refused, consumed, and the next option works",
    source='proto.md, "NBD_OPT_INFO"; nbd-server lost its place there until 2024',
    rules=(1, 2),
)
def lying_lengths(server: Server) -> None:
    server.need_info()
    client = server.connect()
    for number in (Option.INFO, Option.GO):
        for what, data in LYING_NAMES:
            reply = client.final(number, data)
            require(reply.is_error, f"{number.name} with {what} is answered {reply.name}")
            must_go_on(client, server)


@case(
    "info-lying-lengths-error",
    SHOULD,
    "INFO with lengths that lie is answered ERR_INVALID",
    source='proto.md, "NBD_REP_ERR_INVALID"',
    rules=(2,),
)
def lying_lengths_error(server: Server) -> None:
    server.need_info()
    client = server.connect()
    for what, data in LYING_NAMES:
        reply = client.final(Option.INFO, data)
        require(reply.kind == Rep.ERR_INVALID, f"{what} is answered {reply.name}")


@case(
    "name-no-string",
    SHOULD,
    "names with a NUL, not in UTF-8, or of more than 4096 bytes are refused",
    source='proto.md, "Conventions"; nbd-server before 3.24 overflowed',
    rules=(2,),
)
def names_that_are_no_strings(server: Server) -> None:
    server.need_info()
    client = server.connect()
    name = server.name.encode()
    for what, raw in (
        ("a name with a NUL", name + b"\0"),
        ("a name that is no UTF-8", name + b"\xc3\x28"),
        ("a name of 4097 bytes", b"x" * 4097),
    ):
        reply = client.final(Option.INFO, counted(raw) + b"\0\0")
        require(reply.is_error, f"{what} is answered {reply.name}")
        must_go_on(client, server)


@case(
    "error-strings",
    MUST,
    "the messages of errors are strings, even if what they are about is none",
    source='proto.md, "Conventions"',
    rules=(2,),
)
def error_messages_are_strings(server: Server) -> None:
    client = server.connect()
    for raw in (
        b"no such export",
        b"\xc3\x28",
        b"a\0b",
        "\N{SNOWMAN}".encode() * 1000,
        b"x" * 5000,
    ):
        for number, data in (
            (Option.INFO, counted(raw) + b"\0\0"),
            (Option.LIST, raw),
            (UNKNOWN_OPTION, raw),
        ):
            reply = client.final(number, data)
            if reply.is_error:
                check_string(reply.data, f"the message of {reply.name}")


@case(
    "context-lying-lengths",
    MUST,
    "LIST_ and SET_META_CONTEXT with lengths that lie are refused and consumed",
    source='proto.md, "NBD_OPT_SET_META_CONTEXT"',
    rules=(1, 2),
)
def lying_context_lengths(server: Server) -> None:
    server.need_allocation()
    client = server.connect()
    client.negotiate(server.status_mode())
    name = counted(server.name.encode())
    for number in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
        for what, data in (
            ("no data", b""),
            ("no number of queries", name),
            ("a name longer than the data", U32.pack(1 << 30) + b"disk" + U32.pack(0)),
            ("more queries than there are", name + U32.pack(2) + counted(b"base:")),
            ("2^32 - 1 queries", name + U32.pack(0xFFFFFFFF)),
            ("a query longer than the data", name + U32.pack(1) + U32.pack(1 << 30) + b"base:"),
        ):
            reply = client.final(number, data)
            require(reply.is_error, f"{number.name} with {what} is answered {reply.name}")
            must_go_on(client, server)


@case(
    "list",
    MUST,
    "LIST is answered by well-formed names and an ACK, or refused",
    source='proto.md, "NBD_OPT_LIST"',
)
def list_exports(server: Server) -> None:
    replies = server.connect().ask(Option.LIST)
    if replies[-1].is_error:
        raise Skip(f"LIST is answered {replies[-1].name}")
    for reply in replies[:-1]:
        parse_server(reply)


@case(
    "list-data",
    MUST,
    "LIST with data is refused with ERR_INVALID, the data consumed",
    source='proto.md, "NBD_REP_ERR_INVALID"',
    rules=(1,),
)
def list_with_data(server: Server) -> None:
    client = server.connect()
    reply = client.final(Option.LIST, b"IHAVEOPT" * 3)
    if reply.kind in (Rep.ERR_POLICY, Rep.ERR_UNSUP):
        raise Skip(f"LIST is answered {reply.name}")
    require(reply.kind == Rep.ERR_INVALID, f"it is answered {reply.name}")
    must_go_on(client, server)


@case(
    "structured-data",
    MUST,
    "STRUCTURED_REPLY with data is refused, the data consumed",
    source='proto.md, "NBD_OPT_STRUCTURED_REPLY"',
    rules=(1,),
)
def structured_with_data(server: Server) -> None:
    client = server.connect()
    reply = client.final(Option.STRUCTURED_REPLY, b"x" * 12)
    require(reply.is_error, f"it is answered {reply.name}")
    must_go_on(client, server)


@case(
    "options-any-order",
    MUST,
    "INFO, LIST and refused GOs come in any order, and the export can still be chosen",
    source="CVE-2019-14851 (nbdkit)",
    rules=(10,),
)
def options_in_any_order(server: Server) -> None:
    server.need_info()
    client = server.connect()
    for _ in range(3):
        client.ask(Option.INFO, info_data(server.name))
        client.ask(Option.LIST)
        client.ask(Option.INFO, info_data(NO_SUCH_EXPORT))
        client.ask(Option.LIST_META_CONTEXT, context_data(server.name))
        client.ask(Option.INFO, info_data(server.name, [0, 1, 2, 3]))
    require(client.go(server.name).size == server.size, "GO tells another size")


@case(
    "options-bounded",
    SHOULD,
    f"a client that sends {MANY_OPTIONS} options is stopped before the end",
    source="nbdkit's bound of 32 options; CVE-2024-7409 (qemu)",
    rules=(10,),
)
def options_are_bounded(server: Server) -> None:
    client = server.connect()
    try:
        for _ in range(0, MANY_OPTIONS, OPTIONS_AT_ONCE):
            for _ in range(OPTIONS_AT_ONCE):
                client.send(UNKNOWN_OPTION)
            for _ in range(OPTIONS_AT_ONCE):
                if client.replies(UNKNOWN_OPTION)[-1].kind != Rep.ERR_UNSUP:
                    return
    except Closed:
        server.must_serve_others()
        return
    raise Violation(f"{MANY_OPTIONS} options are all answered")


@case(
    "option-huge",
    MUST,
    "an option that announces 4 GiB of data is not answered with success, and harms nobody",
    source='proto.md, "Termination of the session during option haggling"',
    rules=(10,),
)
def huge_option(server: Server) -> None:
    for number in (UNKNOWN_OPTION, Option.GO, Option.LIST):
        client = server.connect()
        try:
            client.send(number, bytes(1 << 16), length=0xFFFFFFFF)
        except Closed:
            continue
        server.must_serve_others()
        if not client.connection.is_quiet(0.05):
            replied = client.connection.must_close("an option of 4 GiB", allow_data=True)
            require(replied[12:16] != U32.pack(Rep.ACK), "success before the option is there")
    server.must_serve_others()


@case(
    "option-bad-magic",
    SHOULD,
    "what does not begin like an option ends the connection",
    source='proto.md, "Newstyle negotiation"',
    rules=(10,),
)
def bad_option_magic(server: Server) -> None:
    client = server.connect()
    client.connection.send(b"GET / HTTP/1.1\r\n\r\n" + bytes(64))
    client.connection.must_close("an option that does not begin with IHAVEOPT", allow_data=True)
    server.must_serve_others()


@case(
    "handshake-idle",
    MUST,
    "twenty clients that say nothing keep nobody from being served",
    source="CVE-2024-7409 (qemu)",
    rules=(10,),
)
def idle_clients(server: Server) -> None:
    for _ in range(10):
        server.dial()
        server.plain()
    server.must_serve_others()


@case(
    "handshake-deadline",
    SHOULD,
    "a client that says nothing is closed after a while",
    source="CVE-2024-7409 (qemu, which waits 10 s)",
    rules=(10,),
    slow=True,
)
def handshake_deadline(server: Server) -> None:
    silent, client = server.dial(), server.plain()
    client.connection.must_close("a handshake that does not go on")
    silent.must_close("a handshake that does not begin", allow_data=True)
