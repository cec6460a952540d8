"""Clients that mean no good, or are broken: what they do must harm nobody else."""

from __future__ import annotations

import random

from tests.conformance.case import MUST, SHOULD, case
from tests.conformance.outcome import Closed, Violation, require
from tests.conformance.server import Server
from tests.conformance.wire import REQUEST, REQUEST_MAGIC, Cmd, Mode, Option, info_data, option


@case(
    "garbage",
    MUST,
    "random bytes in any phase harm nobody",
    source="robustness",
    rules=(10, 29),
)
def garbage(server: Server) -> None:
    chance = random.Random(4711)
    for phase in range(3):
        for _ in range(5):
            connection = server.dial() if phase == 0 else server.connect().connection
            if phase == 2:
                connection = server.session().connection
            try:
                connection.send(b"\xff" + chance.randbytes(3000))
            except Closed:
                continue
    server.must_serve_others()


@case(
    "leave-anywhere",
    MUST,
    "clients that leave in the middle of anything harm nobody",
    source="robustness",
    rules=(10,),
)
def leaving_anywhere(server: Server) -> None:
    client = server.connect()
    go = option(Option.GO, info_data(server.name))
    for cut in (1, 8, 12, 16, 18, len(go) - 1, len(go)):
        client = server.connect()
        client.connection.send(go[:cut])
        client.connection.close()
    for cut in (1, 4, 27, 28):
        session = server.session()
        _, request = session.build(Cmd.READ, 0, server.unit)
        session.connection.send(request[:cut])
        session.connection.close()
    server.must_serve_others()


@case(
    "leave-with-requests",
    MUST,
    "a client that leaves with requests in flight harms nobody",
    source="robustness",
    rules=(21,),
    each_mode=True,
)
def leaving_with_requests(server: Server, mode: Mode) -> None:
    for _ in range(3):
        session = server.session(mode)
        length = min(server.size, 1 << 20) // server.unit * server.unit
        for _ in range(32):
            session.start(Cmd.READ, 0, length)
        session.connection.close()
    server.must_serve_others()


@case(
    "half-closed",
    SHOULD,
    "a client that sends no more still gets its replies",
    source="shutdown(2); scripts that pipe requests into a socket",
)
def half_closed(server: Server) -> None:
    session = server.session()
    if server.target.tls:
        session.must_be_in_sync()  # TLS has no half-closed connections
        return
    length = min(server.size, 256 << 10) // server.unit * server.unit
    built = [session.build(Cmd.READ, 0, length) for _ in range(20)]
    session.connection.send(b"".join(request for _, request in built))
    session.connection.finish_sending()
    try:
        replies = session.replies([cookie for cookie, _ in built])
    except Closed:
        raise Violation("replies to requests in flight are cut off") from None
    for reply in replies:
        require(not reply.error, f"READ is answered {reply.outcome}")


@case(
    "never-reads",
    MUST,
    "a client that never reads its replies keeps nobody from being served",
    source="robustness",
    rules=(10,),
    each_mode=True,
)
def never_reading(server: Server, mode: Mode) -> None:
    session = server.session(mode)
    length = min(server.size, 1 << 20) // server.unit * server.unit
    requests = b"".join(session.build(Cmd.READ, 0, length)[1] for _ in range(2000))
    session.connection.send_some(requests, timeout_s=0.2)
    for _ in range(3):
        server.must_serve_others()
    session.connection.close()
    server.must_serve_others()


@case(
    "write-without-data",
    MUST,
    "WRITEs that announce 32 MiB and send none keep nobody from being served",
    source="robustness",
    rules=(19,),
    writes=True,
)
def writes_without_data(server: Server) -> None:
    server.need_writable()
    for _ in range(20):
        session = server.session()
        header = REQUEST.pack(REQUEST_MAGIC, 0, Cmd.WRITE, 1, 0, 32 << 20)
        session.connection.send(header + bytes(10))
    server.must_serve_others()


@case(
    "write-4g",
    MUST,
    "a WRITE that announces 4 GiB does not succeed, and harms nobody",
    source='proto.md, "Block size constraints"',
    rules=(19,),
    writes=True,
)
def enormous_write(server: Server) -> None:
    session = server.session()
    header = REQUEST.pack(REQUEST_MAGIC, 0, Cmd.WRITE, 1, 0, 0xFFFFFFFF)
    try:
        session.connection.send(header + bytes(1 << 16))
    except Closed:
        return
    server.must_serve_others()
    if not session.connection.is_quiet(0.05):
        session.connection.must_close("a WRITE of 4 GiB", allow_data=True)


@case(
    "errors-many",
    MUST,
    "a thousand requests that are refused, sent at once, are all answered",
    source="robustness",
    rules=(26,),
    each_mode=True,
)
def many_errors(server: Server, mode: Mode) -> None:
    session = server.session(mode)
    built = [session.build(Cmd.READ, 1 << 62, server.unit) for _ in range(1000)]
    session.connection.send(b"".join(request for _, request in built))
    for reply in session.replies([cookie for cookie, _ in built]):
        require(reply.error, "READ at 2^62 claims success")
    session.must_be_in_sync()
