"""Metadata contexts: LIST_META_CONTEXT, SET_META_CONTEXT, and what is selected in the end."""

from __future__ import annotations

from tests.conformance.case import MUST, SHOULD, case
from tests.conformance.cases.handshake import NO_SUCH_EXPORT
from tests.conformance.handshake import Client, parse_context
from tests.conformance.outcome import Skip, require
from tests.conformance.server import Server
from tests.conformance.session import Session
from tests.conformance.wire import (
    BASE_ALLOCATION,
    Cmd,
    Errno,
    Mode,
    Option,
    Rep,
    context_data,
)


def prepared(server: Server) -> Client:
    """Connect, with a family of replies that can carry block status."""
    mode = server.status_mode()
    client = server.connect()
    client.negotiate(mode)
    return client


def listed(client: Client, name: str, *queries: str) -> list[tuple[str, int]]:
    replies = client.ask(Option.LIST_META_CONTEXT, context_data(name, queries))
    require(not replies[-1].is_error, f"LIST {queries} is answered {replies[-1].name}")
    return [parse_context(reply) for reply in replies[:-1]]


def selected(client: Client, name: str, *queries: str) -> list[tuple[str, int]]:
    replies = client.ask(Option.SET_META_CONTEXT, context_data(name, queries))
    require(not replies[-1].is_error, f"SET {queries} is answered {replies[-1].name}")
    return [parse_context(reply) for reply in replies[:-1]]


def begin(server: Server, client: Client) -> Session:
    return Session(client.connection, server.status_mode(), client.go(server.name), {})


def must_be_void(session: Session) -> None:
    """No context may be in force."""
    reply = session.do(Cmd.BLOCK_STATUS, 0, 512)
    require(reply.error, "BLOCK_STATUS is answered with extents")
    session.must_be_in_sync()


@case(
    "context-needs-chunks",
    SHOULD,
    "SET_META_CONTEXT without structured replies or extended headers is refused with ERR_INVALID",
    source='proto.md, "NBD_OPT_SET_META_CONTEXT"',
)
def needs_structured_replies(server: Server) -> None:
    server.need_allocation()
    client = server.connect()
    data = context_data(server.name, [BASE_ALLOCATION])
    reply = client.final(Option.SET_META_CONTEXT, data)
    require(reply.kind == Rep.ERR_INVALID, f"it is answered {reply.name}")
    client.go(server.name)


@case(
    "context-list",
    MUST,
    "LIST_META_CONTEXT tells all contexts without a query, and those of a namespace for base:",
    source='proto.md, "NBD_OPT_LIST_META_CONTEXT"',
)
def listing(server: Server) -> None:
    client = prepared(server)
    everything = [name for name, _ in listed(client, server.name)]
    require(BASE_ALLOCATION in everything, f"without a query: {everything}")
    for query in ("base:", BASE_ALLOCATION):
        names = [name for name, _ in listed(client, server.name, query)]
        require(names == [BASE_ALLOCATION], f"{query} finds {names}")


@case(
    "context-list-ids",
    SHOULD,
    "the ids in a listing are 0",
    source='proto.md, "NBD_OPT_LIST_META_CONTEXT"',
)
def listed_ids(server: Server) -> None:
    ids = {number for _, number in listed(prepared(server), server.name)}
    require(ids <= {0}, f"the ids are {ids}")


@case(
    "context-unknown",
    MUST,
    "contexts and namespaces that nobody knows are left out, without an error",
    source='proto.md, "Metadata querying"',
)
def unknown_contexts(server: Server) -> None:
    client = prepared(server)
    queries = ("x-nobody:nothing", "base:nothing", "nothing:", "x-nobody:")
    for query in queries:
        require(listed(client, server.name, query) == [], f"LIST {query} finds something")
        require(selected(client, server.name, query) == [], f"SET {query} selects something")
    found = selected(client, server.name, *queries, BASE_ALLOCATION)
    require([name for name, _ in found] == [BASE_ALLOCATION], f"among others: {found}")


@case(
    "context-set-wildcard",
    MUST,
    "a namespace alone selects nothing",
    source='proto.md, "NBD_OPT_SET_META_CONTEXT"',
)
def wildcards_select_nothing(server: Server) -> None:
    require(selected(prepared(server), server.name, "base:") == [], "base: selects something")


@case(
    "context-set",
    MUST,
    "every context that is listed can be selected, all with different ids",
    source='proto.md, "NBD_OPT_SET_META_CONTEXT"',
)
def selecting(server: Server) -> None:
    client = prepared(server)
    found = selected(client, server.name, *server.facts.contexts)
    require(
        sorted(name for name, _ in found) == sorted(server.facts.contexts),
        f"{found} of {server.facts.contexts}",
    )
    require(len({number for _, number in found}) == len(found), f"ids twice: {found}")


@case(
    "context-set-none",
    MUST,
    "without a query nothing is selected, and what was is no more",
    source='proto.md, "NBD_OPT_SET_META_CONTEXT"',
)
def selecting_nothing(server: Server) -> None:
    client = prepared(server)
    selected(client, server.name, BASE_ALLOCATION)
    require(selected(client, server.name) == [], "something is selected")
    must_be_void(begin(server, client))


@case(
    "context-set-failed",
    MUST,
    "a SET_META_CONTEXT that is refused drops what was selected before",
    source='proto.md, "NBD_OPT_SET_META_CONTEXT"',
    rules=(7,),
)
def refused_selection(server: Server) -> None:
    client = prepared(server)
    selected(client, server.name, BASE_ALLOCATION)
    reply = client.final(Option.SET_META_CONTEXT, b"\0")
    require(reply.is_error, f"one byte of data is answered {reply.name}")
    must_be_void(begin(server, client))


@case(
    "context-unknown-export",
    MUST,
    "contexts of an export that does not exist are refused",
    source='proto.md, "NBD_OPT_SET_META_CONTEXT"',
)
def contexts_of_unknown_export(server: Server) -> None:
    client = prepared(server)
    reply = client.final(Option.SET_META_CONTEXT, context_data(NO_SUCH_EXPORT, [BASE_ALLOCATION]))
    if reply.kind == Rep.ACK:
        raise Skip("any name is an export")
    require(reply.kind != Rep.ERR_TLS_REQD, "it is answered ERR_TLS_REQD")
    client.go(server.name)


@case(
    "context-other-export",
    MUST,
    "contexts that were selected for another export are void",
    source='proto.md, "NBD_OPT_SET_META_CONTEXT"',
    rules=(7,),
)
def contexts_of_another_export(server: Server) -> None:
    for name in (*server.facts.exports, NO_SUCH_EXPORT):
        client = prepared(server)
        if name == server.name or not client.set_contexts(name, [BASE_ALLOCATION]):
            continue
        must_be_void(begin(server, client))
        return
    raise Skip("there is no other export")


@case(
    "status-unselected",
    SHOULD,
    "BLOCK_STATUS without a context selected is answered EINVAL",
    source='proto.md, "Metadata querying"',
    rules=(7, 25),
    each_mode=True,
)
def status_without_context(server: Server, mode: Mode) -> None:
    session = server.session(mode)
    reply = session.do(Cmd.BLOCK_STATUS, 0, 512)
    require(reply.error == Errno.EINVAL, f"it is answered {reply.outcome}")
    session.must_be_in_sync()
