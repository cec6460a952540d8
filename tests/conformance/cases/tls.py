"""STARTTLS: what is forgotten, who asks for it, and how it ends.

What a server's mode is, it shows by itself: NOTLS refuses STARTTLS; FORCEDTLS answers everything
else with ERR_TLS_REQD; SELECTIVETLS is the rest (proto.md, "Server-side requirements").
"""

from __future__ import annotations

import ssl
import warnings

from tests.conformance.case import MUST, SHOULD, case
from tests.conformance.cases.handshake import NO_SUCH_EXPORT
from tests.conformance.outcome import Broken, Closed, Skip, Violation, require
from tests.conformance.server import UNKNOWN_OPTION, Server
from tests.conformance.session import Session
from tests.conformance.wire import (
    BASE_ALLOCATION,
    Cmd,
    Flag,
    Mode,
    Option,
    Rep,
    context_data,
    info_data,
    option,
)


def need_tls(server: Server) -> None:
    if not server.target.tls:
        raise Skip("not an nbds:// URI")


def need_forced(server: Server) -> None:
    need_tls(server)
    if not server.facts.wants_tls_for_all:
        raise Skip("the server does without TLS, too")


def need_selective(server: Server) -> None:
    need_tls(server)
    if server.facts.wants_tls_for_all:
        raise Skip("the server does nothing without TLS")


@case(
    "tls-off",
    MUST,
    "a server without TLS refuses STARTTLS, again and again, and never asks for TLS",
    source='proto.md, "NOTLS mode"',
    rules=(12, 14),
)
def without_tls(server: Server) -> None:
    if server.facts.starttls == Rep.ACK:
        raise Skip("the server has TLS")
    client = server.plain()
    for _ in range(2):
        reply = client.final(Option.STARTTLS)
        require(
            reply.kind in (Rep.ERR_POLICY, Rep.ERR_UNSUP, Rep.ERR_PLATFORM),
            f"STARTTLS is answered {reply.name}",
        )
    for number, data in plain_options(server):
        reply = client.final(number, data)
        require(reply.kind != Rep.ERR_TLS_REQD, f"option {number} is answered {reply.name}")


def plain_options(server: Server) -> list[tuple[int, bytes]]:
    """Options that end nothing."""
    return [
        (Option.LIST, b""),
        (Option.INFO, info_data(server.name)),
        (Option.INFO, info_data(NO_SUCH_EXPORT)),
        (Option.STRUCTURED_REPLY, b""),
        (Option.LIST_META_CONTEXT, context_data(server.name)),
        (Option.SET_META_CONTEXT, context_data(server.name, [BASE_ALLOCATION])),
        (UNKNOWN_OPTION, b"data"),
    ]


@case(
    "tls-data",
    MUST,
    "STARTTLS with data is refused, the data consumed",
    source='proto.md, "NBD_OPT_STARTTLS"',
    rules=(1, 11),
)
def starttls_with_data(server: Server) -> None:
    client = server.plain()
    reply = client.final(Option.STARTTLS, b"data")
    require(reply.is_error, f"it is answered {reply.name}")
    reply = client.final(UNKNOWN_OPTION)
    require(reply.is_error, f"an unknown option is answered {reply.name}")


@case(
    "tls-twice",
    MUST,
    "STARTTLS under TLS is refused with ERR_INVALID",
    source='proto.md, "FORCEDTLS mode"',
    rules=(12,),
)
def starttls_twice(server: Server) -> None:
    need_tls(server)
    client = server.connect()
    reply = client.final(Option.STARTTLS)
    require(reply.kind == Rep.ERR_INVALID, f"it is answered {reply.name}")
    client.go(server.name)


@case(
    "tls-forgets",
    MUST,
    "what was agreed before STARTTLS is forgotten",
    source="CVE-2021-3716 (nbdkit)",
    rules=(11,),
)
def starttls_forgets(server: Server) -> None:
    need_tls(server)
    client = server.plain()
    client.final(Option.STRUCTURED_REPLY)
    client.final(Option.SET_META_CONTEXT, context_data(server.name, [BASE_ALLOCATION]))
    server.start_tls(client)
    export = client.go(server.name)
    require(not export.flags & Flag.SEND_DF, "structured replies are still on")
    Session(client.connection, Mode.SIMPLE, export, {}).must_be_in_sync()


@case(
    "tls-injected",
    MUST,
    "plaintext behind STARTTLS is not answered under TLS",
    source="CVE-2021-3716 (nbdkit); STARTTLS injection in SMTP (CVE-2011-0411)",
    rules=(11,),
)
def injected_plaintext(server: Server) -> None:
    need_tls(server)
    client = server.plain()
    connection = client.connection
    connection.send(option(Option.STARTTLS) + option(Option.LIST))
    try:
        reply = client.reply()
    except Closed:
        return
    if reply.kind != Rep.ACK:
        return
    try:
        connection.start_tls()
        quiet = connection.is_quiet(0.3)
    except (OSError, Broken, AssertionError):
        return  # no TLS came of it
    if not quiet:
        connection.must_close("plaintext behind STARTTLS")


@case(
    "tls-required",
    MUST,
    "before TLS all options are answered ERR_TLS_REQD, unknown ones included",
    source='proto.md, "FORCEDTLS mode"',
    rules=(12,),
)
def everything_waits_for_tls(server: Server) -> None:
    need_forced(server)
    client = server.plain()
    for number, data in plain_options(server):
        reply = client.final(number, data)
        require(reply.kind == Rep.ERR_TLS_REQD, f"option {number} is answered {reply.name}")
    reply = client.final(Option.GO, info_data(server.name))
    require(reply.kind == Rep.ERR_TLS_REQD, f"GO is answered {reply.name}")
    server.start_tls(client)
    client.go(server.name)


@case(
    "tls-required-export-name",
    MUST,
    "before TLS, EXPORT_NAME ends the connection",
    source='proto.md, "FORCEDTLS mode"',
    rules=(12,),
)
def export_name_waits_for_tls(server: Server) -> None:
    need_tls(server)
    if not server.facts.wants_tls:
        raise Skip("the export does without TLS, too")
    client = server.plain()
    client.send(Option.EXPORT_NAME, server.name.encode())
    client.connection.must_close("EXPORT_NAME of an export that wants TLS")


@case(
    "tls-asked-under-tls",
    MUST,
    "under TLS nothing is answered ERR_TLS_REQD",
    source='proto.md, "FORCEDTLS mode"',
    rules=(12,),
)
def nothing_asks_for_tls_under_tls(server: Server) -> None:
    need_tls(server)
    client = server.connect()
    for number, data in plain_options(server):
        reply = client.final(number, data)
        require(reply.kind != Rep.ERR_TLS_REQD, f"option {number} is answered {reply.name}")


@case(
    "tls-optional",
    SHOULD,
    "where TLS is optional, only INFO and GO are ever answered ERR_TLS_REQD",
    source='proto.md, "SELECTIVETLS mode"',
    rules=(13,),
)
def only_info_and_go_ask(server: Server) -> None:
    need_selective(server)
    client = server.plain()
    for number, data in plain_options(server):
        reply = client.final(number, data)
        if number != Option.INFO:
            require(reply.kind != Rep.ERR_TLS_REQD, f"option {number} is answered {reply.name}")


@case(
    "tls-1.2",
    MUST,
    "TLS 1.2 is spoken",
    source='proto.md, "TLS versions"; nbd-client speaks nothing newer',
    rules=(14,),
)
def tls_1_2(server: Server) -> None:
    need_tls(server)
    context = server.target.tls_files.context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    client = server.plain()
    server.start_tls(client, context)
    client.go(server.name)


@case(
    "tls-old",
    SHOULD,
    "TLS 1.1 and older are not spoken",
    source='proto.md, "TLS versions"',
    rules=(14,),
)
def old_tls(server: Server) -> None:
    need_tls(server)
    context = server.target.tls_files.context()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")  # or this client would not speak it itself
    except (ValueError, ssl.SSLError):
        raise Skip("Python's OpenSSL cannot speak it") from None
    client = server.plain()
    reply = client.final(Option.STARTTLS)
    require(reply.kind == Rep.ACK, f"STARTTLS is answered {reply.name}")
    try:
        client.connection.start_tls(context)
    except OSError:
        return
    raise Violation(f"{client.connection.sock.version()} is spoken")  # type: ignore[attr-defined]


@case(
    "tls-failed",
    MUST,
    "a TLS handshake that makes no sense ends the connection",
    source='proto.md, "FORCEDTLS mode"',
    rules=(14,),
)
def failed_tls(server: Server) -> None:
    need_tls(server)
    client = server.plain()
    reply = client.final(Option.STARTTLS)
    require(reply.kind == Rep.ACK, f"STARTTLS is answered {reply.name}")
    client.connection.send(b"this is no ClientHello " * 20)
    client.connection.must_close("a failed TLS handshake", allow_data=True)  # an alert
    server.must_serve_others()


@case(
    "tls-goodbye",
    SHOULD,
    "DISC under TLS is followed by close_notify, then the end",
    source='proto.md, "Terminating the transmission phase"',
    rules=(14, 21),
)
def tls_goodbye(server: Server) -> None:
    need_tls(server)
    session = server.session()
    session.start(Cmd.DISC)
    session.connection.must_close("DISC")
    require(session.connection.ended_properly, "the connection is cut without close_notify")
