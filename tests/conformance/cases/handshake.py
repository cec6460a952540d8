"""Hello, client flags, EXPORT_NAME."""

from __future__ import annotations

from tests.conformance.case import MUST, SHOULD, case
from tests.conformance.handshake import DEFAULT_FLAGS, Client
from tests.conformance.outcome import Closed, Skip, Violation, require
from tests.conformance.server import Server
from tests.conformance.session import Session
from tests.conformance.wire import HandshakeFlag, Mode, Option

NO_SUCH_EXPORT = "there is no export of this name, is there?"


@case(
    "hello",
    MUST,
    "the hello is that of newstyle, with known flags only",
    source='proto.md, "Handshake flags"',
)
def hello(server: Server) -> None:
    flags = Client(server.dial()).receive_hello()
    require(not flags & ~DEFAULT_FLAGS, f"the handshake flags are {flags:#x}")


@case(
    "hello-fixed",
    SHOULD,
    "fixed newstyle and NO_ZEROES are offered",
    source='proto.md, "Handshake flags"',
)
def hello_fixed(server: Server) -> None:
    flags = Client(server.dial()).receive_hello()
    require(flags == DEFAULT_FLAGS, f"the handshake flags are {flags:#x}")


@case(
    "client-flags-unknown",
    MUST,
    "client flags that nobody knows end the connection",
    source='proto.md, "Client flags"',
)
def unknown_client_flags(server: Server) -> None:
    for flags in (1 << 2, 1 << 31, 0xFFFFFFFF):
        client = server.plain(flags | DEFAULT_FLAGS)
        try:
            client.send(Option.LIST)
        except Closed:
            continue
        client.connection.must_close(f"the client flags {flags:#x}")


@case(
    "client-flags-old",
    SHOULD,
    "a client without fixed newstyle gets EXPORT_NAME, or is closed; never an option reply",
    source='proto.md, "Client flags" (servers MAY honour it all the same)',
)
def old_client(server: Server) -> None:
    client = server.plain(0)
    client.send(Option.LIST)
    why = "an option other than EXPORT_NAME from a non-fixed client"
    client.connection.must_close(why, within_s=2)


def choose_by_name(server: Server, flags: int) -> None:
    """Choose the export by EXPORT_NAME; what follows its answer must be a reply."""
    client = server.connect(flags)
    if client.client_flags & ~client.handshake_flags:
        raise Skip("NO_ZEROES is not offered")
    session = Session(client.connection, Mode.SIMPLE, client.export_name(server.name), {})
    require(session.export.size == server.size, f"the size is {session.export.size} here")
    session.must_be_in_sync()


@case(
    "export-name-padded",
    MUST,
    "EXPORT_NAME's answer ends in 124 zero bytes",
    source='proto.md, "NBD_OPT_EXPORT_NAME"',
    rules=(5,),
)
def export_name_padded(server: Server) -> None:
    choose_by_name(server, HandshakeFlag.FIXED_NEWSTYLE)


@case(
    "export-name-unpadded",
    MUST,
    "EXPORT_NAME's answer has no zero bytes for a client that refused them",
    source='proto.md, "NBD_OPT_EXPORT_NAME"',
    rules=(5,),
)
def export_name_unpadded(server: Server) -> None:
    choose_by_name(server, DEFAULT_FLAGS)


@case(
    "export-name-after-options",
    MUST,
    "EXPORT_NAME works behind other options, with what they agreed on",
    source='proto.md, "Fixed newstyle negotiation"',
    rules=(5,),
)
def export_name_after_options(server: Server) -> None:
    server.need_mode(Mode.STRUCTURED)
    client = server.connect()
    client.ask(Option.LIST)
    client.negotiate(Mode.STRUCTURED)
    export = client.export_name(server.name)
    Session(client.connection, Mode.STRUCTURED, export, {}).must_be_in_sync()


@case(
    "export-name-unknown",
    MUST,
    "EXPORT_NAME of what does not exist ends the connection without an answer",
    source='proto.md, "NBD_OPT_EXPORT_NAME"',
)
def export_name_unknown(server: Server) -> None:
    client = server.connect()
    try:
        client.export_name(NO_SUCH_EXPORT)
    except Closed:
        return
    if server.connect().go(NO_SUCH_EXPORT):
        raise Skip("any name is an export")
    raise Violation("it is answered, although GO refuses the name")


@case(
    "abort",
    MUST,
    "ABORT is acknowledged",
    source='proto.md, "NBD_OPT_ABORT"',
)
def abort(server: Server) -> None:
    replies = server.connect().ask(Option.ABORT)
    require([reply.name for reply in replies] == ["ACK"], f"it is answered {replies[-1].name}")


@case(
    "abort-closes",
    SHOULD,
    "the connection ends after ABORT",
    source='proto.md, "Termination of the session during option haggling"',
)
def abort_closes(server: Server) -> None:
    client = server.connect()
    client.ask(Option.ABORT)
    client.connection.must_close("ABORT")


@case(
    "abort-and-leave",
    SHOULD,
    "a client that sends ABORT and leaves at once harms nobody",
    source='proto.md, "NBD_OPT_ABORT"',
)
def abort_and_leave(server: Server) -> None:
    for _ in range(5):
        client = server.connect()
        client.send(Option.ABORT)
        client.connection.close()
    server.must_serve_others()
