"""The server under test, as cases see it: connections to it, and what it offers.

What it offers is found out once, before the first case, by asking politely; the cases then ask
the rest. One object serves one case: it closes the case's connections, and holds its deadline.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.conformance.connection import Connection, Deadline
from tests.conformance.handshake import (
    DEFAULT_FLAGS,
    BlockSizes,
    Client,
    Export,
    parse_block_sizes,
    parse_context,
    parse_export,
    parse_server,
)
from tests.conformance.outcome import Broken, Skip, Violation
from tests.conformance.session import Session
from tests.conformance.target import Target
from tests.conformance.wire import (
    BASE_ALLOCATION,
    MAX_PAYLOAD,
    Flag,
    Info,
    Mode,
    Option,
    Rep,
    context_data,
    info_data,
)

UNKNOWN_OPTION = 0x4E4F4E45
"""An option that no version of NBD has."""


@dataclass
class Facts:
    """What a server says of itself and of the export.

    Arguments:
        export: as told in a simple session.
        modes: the families of replies it has.
        has_info: whether INFO and GO work.
        block_sizes: None if it tells none.
        contexts: the metadata contexts it lists for the export.
        exports: the names it lists.
        starttls: its answer to STARTTLS on a plain connection.
        wants_tls: its answer to INFO on a plain connection was ERR_TLS_REQD.
        wants_tls_for_all: so were those to options that only FORCEDTLS refuses.
    """

    export: Export = field(default_factory=lambda: Export(0, Flag(0)))
    modes: tuple[Mode, ...] = (Mode.SIMPLE,)
    has_info: bool = False
    block_sizes: BlockSizes | None = None
    contexts: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()
    starttls: int = 0
    wants_tls: bool = False
    wants_tls_for_all: bool = False

    @property
    def minimum_block(self) -> int:
        return self.block_sizes.minimum if self.block_sizes else 1

    @property
    def max_payload(self) -> int:
        return self.block_sizes.maximum if self.block_sizes else MAX_PAYLOAD


@dataclass(frozen=True)
class Settings:
    """What a person asked for.

    Arguments:
        timeout_s: how long a case may wait for the server.
        slow_timeout_s: how long a slow case may.
        unreadable: ``(offset, length)`` of a range of the export that cannot be read, if there is
            one.
    """

    timeout_s: float = 10.0
    slow_timeout_s: float = 60.0
    unreadable: tuple[int, int] | None = None


class Server:
    """The server under test, for the time of one case.

    Arguments:
        target: where it is.
        settings: see Settings.
        facts: what is known of it.
        deadline: for all that the case does.
    """

    def __init__(
        self, target: Target, settings: Settings, facts: Facts, deadline: Deadline
    ) -> None:
        self.target = target
        self.settings = settings
        self.facts = facts
        self.deadline = deadline
        self._connections: list[Connection] = []

    def close(self) -> None:
        """Close all connections of the case."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    # --- Connecting --------------------------------------------------------------------------

    def dial(self) -> Connection:
        """Connect, and nothing more."""
        connection = Connection(self.target, self.deadline)
        self._connections.append(connection)
        return connection

    def plain(self, flags: int = DEFAULT_FLAGS) -> Client:
        """Connect and say hello; no TLS, whatever the URI asks for."""
        client = Client(self.dial())
        client.receive_hello()
        client.send_flags(flags)
        return client

    def connect(self, flags: int = DEFAULT_FLAGS) -> Client:
        """Connect and say hello; under TLS if the URI asks for it."""
        client = self.plain(flags)
        if self.target.tls:
            self.start_tls(client)
        return client

    def start_tls(self, client: Client, context: ssl.SSLContext | None = None) -> None:
        """Do STARTTLS and what follows."""
        reply = client.final(Option.STARTTLS)
        if reply.kind != Rep.ACK:
            raise Violation(f"STARTTLS is answered {reply.name}")
        try:
            client.connection.start_tls(context)
        except OSError as error:
            raise Broken(f"TLS fails: {error}") from None

    def session(
        self,
        mode: Mode = Mode.SIMPLE,
        contexts: Sequence[str] = (),
        export: str | None = None,
    ) -> Session:
        """Connect and negotiate until the transmission phase; Skip if the mode is not offered."""
        name = self.target.export if export is None else export
        client = self.connect()
        if not client.negotiate(mode):
            raise Skip(f"no {mode.value} replies")
        ids = client.set_contexts(name, contexts) if contexts else {}
        return Session(client.connection, mode, client.go(name), ids)

    def must_serve_others(self) -> None:
        """Broken unless somebody else is served as if nothing had happened."""
        session = self.session()
        if session.export.size >= 512:
            session.must_be_in_sync()

    # --- What the case is about ---------------------------------------------------------------

    @property
    def name(self) -> str:
        """The export's name."""
        return self.target.export

    @property
    def size(self) -> int:
        return self.facts.export.size

    @property
    def unit(self) -> int:
        """Bytes that requests can be multiples of without asking for more than usual."""
        return max(512, self.facts.minimum_block)

    def has(self, flag: Flag) -> bool:
        return bool(self.facts.export.flags & flag)

    def need(self, flag: Flag) -> None:
        """Skip unless the export has a transmission flag."""
        if not self.has(flag):
            raise Skip(f"{flag.name} is not offered")

    def need_writable(self) -> None:
        if self.has(Flag.READ_ONLY):
            raise Skip("the export is read-only")

    def need_size(self, n_bytes: int) -> None:
        if self.size < n_bytes:
            raise Skip(f"the export is smaller than {n_bytes} bytes")

    def need_info(self) -> None:
        if not self.facts.has_info:
            raise Skip("INFO and GO are not offered")

    def need_mode(self, *modes: Mode) -> None:
        """Skip unless one of the modes is offered."""
        if not set(modes) & set(self.facts.modes):
            raise Skip(f"no {' or '.join(mode.value for mode in modes)} replies")

    def need_allocation(self) -> None:
        if BASE_ALLOCATION not in self.facts.contexts:
            raise Skip("no base:allocation")

    def need_single_bytes(self) -> None:
        if self.facts.minimum_block > 1:
            raise Skip(f"the minimum block size is {self.facts.minimum_block}")

    def status_mode(self) -> Mode:
        """The simplest mode with block status; Skip if there is none."""
        self.need_allocation()
        return next(mode for mode in self.facts.modes if mode is not Mode.SIMPLE)


@contextlib.contextmanager
def testing(
    target: Target, settings: Settings, facts: Facts, *, slow: bool = False
) -> Iterator[Server]:
    """Yield a server whose connections are closed, and whose time is up, at the end."""
    deadline = Deadline(settings.slow_timeout_s if slow else settings.timeout_s)
    server = Server(target, settings, facts, deadline)
    try:
        yield server
    finally:
        server.close()


# --- Finding out what it offers ------------------------------------------------------------------


def find_facts(target: Target, settings: Settings) -> Facts:
    """Ask a server politely what it offers.

    Errors:
        Violation, Skip: it cannot be talked to at all; the text says why.
    """
    facts = Facts()
    with testing(target, settings, facts) as server:
        _ask_about_tls(server, facts)
        _ask_about_export(server, facts)
        facts.modes = tuple(mode for mode in Mode if server.connect().negotiate(mode))
        _ask_about_contexts(server, facts)
        facts.export = server.session().export
    return facts


def _ask_about_tls(server: Server, facts: Facts) -> None:
    client = server.plain()
    facts.starttls = client.final(Option.STARTTLS).kind
    client = server.plain()
    info, context = info_data(server.name), context_data(server.name)
    facts.wants_tls = client.final(Option.INFO, info).kind == Rep.ERR_TLS_REQD
    lists = (client.final(Option.LIST), client.final(Option.LIST_META_CONTEXT, context))
    facts.wants_tls_for_all = all(reply.kind == Rep.ERR_TLS_REQD for reply in lists)
    if facts.wants_tls and not server.target.tls:
        raise Violation("the export wants TLS: use nbds:// and, if needed, --tls-ca")


def _ask_about_export(server: Server, facts: Facts) -> None:
    client = server.connect()
    replies = client.ask(Option.INFO, info_data(server.name, [Info.EXPORT, Info.BLOCK_SIZE]))
    facts.has_info = replies[-1].kind == Rep.ACK
    if facts.has_info:
        facts.export = parse_export(replies)
        facts.block_sizes = parse_block_sizes(replies)
    elif replies[-1].kind != Rep.ERR_UNSUP:
        raise Violation(f"INFO {server.name!r} is answered {replies[-1].name}")
    listed = client.ask(Option.LIST)
    facts.exports = tuple(parse_server(reply) for reply in listed[:-1])


def _ask_about_contexts(server: Server, facts: Facts) -> None:
    client = server.connect()
    modes = [mode for mode in facts.modes if mode is not Mode.SIMPLE]
    if not modes:
        return
    client.negotiate(modes[0])
    replies = client.ask(Option.LIST_META_CONTEXT, context_data(server.name))
    if not replies[-1].is_error:
        facts.contexts = tuple(parse_context(reply)[0] for reply in replies[:-1])
