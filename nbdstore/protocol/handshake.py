"""The server's side of the handshake, as a state machine: bytes in, bytes out.

Fixed newstyle negotiation (proto.md, "Handshake phase") from the server's hello to the first byte
of the transmission phase. Knows nothing of sockets, time or TLS itself: whoever drives it sends
what `data_to_send` returns, and starts TLS when the phase says so.

    phase           what moves it on
    -------------   ---------------------------------------------------------------
    CLIENT_FLAGS    4 bytes of client flags
    OPTIONS         GO or EXPORT_NAME -> TRANSMISSION; STARTTLS -> STARTTLS;
                    ABORT, or what can only be answered by closing -> CLOSED
    STARTTLS        `tls_established` -> OPTIONS, with everything agreed before forgotten
    TRANSMISSION    the end: `agreement` tells what was agreed, `unread` what came after it
    CLOSED          the end: close the connection, `reason` is for the log

`advance` handles one option and returns, so that the driver can send its replies before the next
one is looked at: a client that sends a thousand LISTs at once cannot make the server hold a
thousand lists.

Three faults are told apart: an option that is refused gets an error reply and the handshake goes
on; what has no reply (EXPORT_NAME) closes; and a stream without meaning raises ProtocolError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from nbdstore.errors import ProtocolError
from nbdstore.protocol.agreement import (
    Agreement,
    Catalog,
    MetaContext,
    Offer,
    OptionRefused,
    ReplyMode,
    TlsMode,
)
from nbdstore.protocol.constants import (
    CLIENT_FLAGS,
    EXPORT_NAME_PADDING,
    EXPORT_NAME_REPLY,
    HELLO,
    INIT_PASSWD,
    OPTION,
    OPTION_MAGIC,
    ClientFlag,
    HandshakeFlag,
    Option,
    OptionReply,
    TransmissionFlag,
)
from nbdstore.protocol.contexts import list_contexts, set_contexts
from nbdstore.protocol.options import (
    build_context,
    build_error,
    build_infos,
    build_reply,
    build_server,
    invalid,
    parse_info,
    parse_meta_context,
    parse_string,
)

# An int, since ~ of an IntFlag knows no bits but its members.
KNOWN_CLIENT_FLAGS = int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)


class Phase(Enum):
    """Where a handshake stands; the module's docstring tells what moves it on."""

    CLIENT_FLAGS = "client flags"
    OPTIONS = "options"
    STARTTLS = "starttls"
    TRANSMISSION = "transmission"
    CLOSED = "closed"


@dataclass(frozen=True)
class HandshakeLimits:
    """What a client may make the server read before it has chosen an export.

    Arguments:
        max_options: options per connection. ``qemu-nbd --list`` sends two per export.
        max_option_length: bytes of data in one option; a longer one is read past, not kept,
            and refused with ERR_TOO_BIG.
        max_option_bytes: bytes of data in all options together; beyond, the stream is dropped.
    """

    max_options: int = 64
    max_option_length: int = 64 << 10
    max_option_bytes: int = 1 << 20


class Handshake:
    """One handshake.

    Arguments:
        catalog: the exports this client may see.
        tls: the server's mode; stays the same for the life of a connection (proto.md, "TLS").
        limits: see HandshakeLimits.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        tls: TlsMode = TlsMode.OFF,
        limits: HandshakeLimits | None = None,
    ) -> None:
        self.phase = Phase.CLIENT_FLAGS
        self.agreement: Agreement | None = None
        self.reason = ""
        self._catalog = catalog
        self._tls = tls
        self._tls_established = False
        self._limits = limits or HandshakeLimits()
        self._n_options = 0
        self._n_option_bytes = 0
        self._client_flags = ClientFlag(0)
        self._received = bytearray()
        self._skipping: tuple[int, int] | None = None
        offered = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        self._replies = [HELLO.pack(INIT_PASSWD, OPTION_MAGIC, offered)]
        self._forget()

    def _forget(self) -> None:
        """Start with nothing agreed; also what STARTTLS does (proto.md, "NBD_OPT_STARTTLS")."""
        self._mode = ReplyMode.SIMPLE
        self._contexts: tuple[MetaContext, ...] = ()
        self._contexts_export: str | None = None

    # --- Driving it --------------------------------------------------------------------------

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes from the client; `advance` looks at them."""
        self._received += data

    def advance(self) -> bool:
        """Take one step that the received bytes allow; False if it needs more bytes.

        Errors:
            ProtocolError: the stream has no meaning, or a limit is passed: drop the client.
        """
        if self.phase is Phase.CLIENT_FLAGS:
            return self._take_client_flags()
        if self.phase is Phase.OPTIONS:
            return self._skip() if self._skipping else self._take_option()
        return False

    def data_to_send(self) -> list[bytes]:
        """Take the replies made since the last call.

        Each must be sent by a write of its own: nbd-client reads the fields of a reply by reads
        that take short ones for whole.
        """
        replies, self._replies = self._replies, []
        return replies

    def tls_established(self) -> None:
        """Go on after the TLS handshake that STARTTLS asked for."""
        assert self.phase is Phase.STARTTLS
        self._tls_established = True
        self.phase = Phase.OPTIONS

    def unread(self) -> bytes:
        """Bytes that came behind GO or EXPORT_NAME: the first requests."""
        return bytes(self._received)

    # --- Taking what has arrived -------------------------------------------------------------

    def _take_client_flags(self) -> bool:
        if len(self._received) < CLIENT_FLAGS.size:
            return False
        (flags,) = CLIENT_FLAGS.unpack_from(self._received)
        del self._received[: CLIENT_FLAGS.size]
        if flags & ~KNOWN_CLIENT_FLAGS:
            # proto.md, "Client flags": the server MUST close on flags it did not offer.
            raise ProtocolError(f"client flags {flags:#x} contain some that were not offered")
        self._client_flags = ClientFlag(flags)
        self.phase = Phase.OPTIONS
        return True

    def _take_option(self) -> bool:
        if len(self._received) < OPTION.size:
            return False
        magic, option, length = OPTION.unpack_from(self._received)
        if magic != OPTION_MAGIC:
            raise ProtocolError(f"an option starts with {magic:#x} instead of IHAVEOPT")
        too_long = length > self._limits.max_option_length
        if not too_long and len(self._received) < OPTION.size + length:
            return False
        self._count_option(length)
        del self._received[: OPTION.size]
        if too_long:
            self._skipping = (option, length)
            return True
        data = bytes(self._received[:length])
        del self._received[:length]
        self._handle(option, data)
        return True

    def _count_option(self, length: int) -> None:
        self._n_options += 1
        self._n_option_bytes += length
        if self._n_options > self._limits.max_options:
            raise ProtocolError(f"more than {self._limits.max_options} options")
        if self._n_option_bytes > self._limits.max_option_bytes:
            raise ProtocolError(f"more than {self._limits.max_option_bytes} bytes of options")

    def _skip(self) -> bool:
        """Read past the data of an option that is too long, then refuse it."""
        assert self._skipping
        option, left = self._skipping
        skipped = min(left, len(self._received))
        del self._received[:skipped]
        if skipped < left:
            self._skipping = (option, left - skipped)
            return False
        self._skipping = None
        self._handle(option, None)
        return True

    # --- Handling one option -----------------------------------------------------------------

    def _handle(self, option: int, data: bytes | None) -> None:
        """Answer one option; ``data`` is None if it was too long to keep."""
        if not self._client_flags & ClientFlag.FIXED_NEWSTYLE and option != Option.EXPORT_NAME:
            # Option replies exist in fixed newstyle only.
            raise ProtocolError(f"option {option} from a client without fixed newstyle")
        try:
            self._check_tls(option)
            handler = self._HANDLERS.get(option)
            if handler is None:
                raise OptionRefused(OptionReply.ERR_UNSUP, f"Option {option} is not supported.")
            if data is None:
                if option == Option.SET_META_CONTEXT:
                    self._forget_contexts()
                limit = self._limits.max_option_length
                raise OptionRefused(
                    OptionReply.ERR_TOO_BIG, f"Options may have {limit} bytes of data."
                )
            handler(self, option, data)
        except OptionRefused as refusal:
            if option == Option.EXPORT_NAME:
                # proto.md, "NBD_OPT_EXPORT_NAME": there is no error reply to it.
                self._close(f"export refused: {refusal}")
            else:
                self._replies.append(build_error(option, refusal.reply, str(refusal)))

    def _check_tls(self, option: int) -> None:
        """Refuse everything else before TLS, unknown options included (proto.md, "FORCEDTLS")."""
        if self._tls is not TlsMode.REQUIRED or self._tls_established:
            return
        if option not in (Option.STARTTLS, Option.ABORT):
            raise OptionRefused(
                OptionReply.ERR_TLS_REQD, "This server requires TLS: send STARTTLS first."
            )

    def _reply(self, option: int, reply: OptionReply, data: bytes = b"") -> None:
        self._replies.append(build_reply(option, reply, data))

    def _close(self, reason: str) -> None:
        self.phase = Phase.CLOSED
        self.reason = reason

    def _abort(self, option: int, data: bytes) -> None:
        self._reply(option, OptionReply.ACK)
        self._close("the client aborted the handshake")

    def _list(self, option: int, data: bytes) -> None:
        refuse_data(data)
        for offer in self._catalog.offers():
            self._reply(option, OptionReply.SERVER, build_server(offer))
        self._reply(option, OptionReply.ACK)

    def _starttls(self, option: int, data: bytes) -> None:
        refuse_data(data)
        if self._tls is TlsMode.OFF:
            raise OptionRefused(OptionReply.ERR_POLICY, "TLS is switched off on this server.")
        if self._tls_established:
            raise invalid("TLS is on already.")
        if self._received:
            # Plaintext that was sent ahead could be taken for something said under TLS
            # (the class of faults of CVE-2021-3716 and of STARTTLS in SMTP).
            raise ProtocolError("plaintext follows STARTTLS without waiting for its reply")
        self._reply(option, OptionReply.ACK)
        self._forget()
        self.phase = Phase.STARTTLS

    def _structured_reply(self, option: int, data: bytes) -> None:
        refuse_data(data)
        if self._mode is ReplyMode.EXTENDED:
            raise OptionRefused(
                OptionReply.ERR_EXT_HEADER_REQD, "Extended headers are on and include it."
            )
        if self._mode is ReplyMode.STRUCTURED:
            raise invalid("Structured replies are on already.")
        self._mode = ReplyMode.STRUCTURED
        self._reply(option, OptionReply.ACK)

    def _extended_headers(self, option: int, data: bytes) -> None:
        refuse_data(data)
        if self._mode is ReplyMode.EXTENDED:
            raise invalid("Extended headers are on already.")
        self._mode = ReplyMode.EXTENDED
        self._reply(option, OptionReply.ACK)

    def _list_meta_context(self, option: int, data: bytes) -> None:
        name, queries = parse_meta_context(data)
        for context in list_contexts(self._find(name).contexts, queries):
            # The ids of a listing mean nothing and SHOULD be 0.
            self._reply(option, OptionReply.META_CONTEXT, build_context(0, context))
        self._reply(option, OptionReply.ACK)

    def _set_meta_context(self, option: int, data: bytes) -> None:
        self._forget_contexts()
        if self._mode is ReplyMode.SIMPLE:
            raise invalid("Metadata contexts need structured replies or extended headers.")
        name, queries = parse_meta_context(data)
        self._contexts = set_contexts(self._find(name).contexts, queries)
        self._contexts_export = name
        for context in self._contexts:
            self._reply(option, OptionReply.META_CONTEXT, build_context(context.id, context))
        self._reply(option, OptionReply.ACK)

    def _forget_contexts(self) -> None:
        """Even a failing SET replaces what was set (proto.md, "NBD_OPT_SET_META_CONTEXT")."""
        self._contexts, self._contexts_export = (), None

    def _find(self, name: str) -> Offer:
        """Look up an export for an option that must not answer ERR_TLS_REQD.

        proto.md, "SELECTIVETLS": only INFO and GO may.
        """
        try:
            return self._catalog.find(name)
        except OptionRefused as refusal:
            if refusal.reply is OptionReply.ERR_TLS_REQD:
                raise OptionRefused(OptionReply.ERR_POLICY, str(refusal)) from None
            raise

    def _info(self, option: int, data: bytes) -> None:
        name, asked = parse_info(data)
        offer = self._catalog.find(name)
        agreement = self._agree(name, offer)
        for info in build_infos(offer, agreement.flags, asked):
            self._reply(option, OptionReply.INFO, info)
        self._reply(option, OptionReply.ACK)
        if option == Option.GO:
            self.agreement = agreement
            self.phase = Phase.TRANSMISSION

    def _export_name(self, option: int, data: bytes) -> None:
        if self._mode is ReplyMode.EXTENDED:
            raise invalid("EXPORT_NAME is forbidden with extended headers; use GO.")
        name = parse_string(data, "export name")
        offer = self._catalog.find(name)
        self.agreement = self._agree(name, offer)
        reply = EXPORT_NAME_REPLY.pack(offer.size, self.agreement.flags)
        if not self._client_flags & ClientFlag.NO_ZEROES:
            reply += EXPORT_NAME_PADDING
        self._replies.append(reply)
        self.phase = Phase.TRANSMISSION

    def _agree(self, name: str, offer: Offer) -> Agreement:
        """Say what would be agreed if the client chose this export now.

        Contexts that were set for another name are void (proto.md, "NBD_OPT_SET_META_CONTEXT").
        """
        contexts = self._contexts if self._contexts_export == name else ()
        flags = offer.flags | TransmissionFlag.HAS_FLAGS
        if self._mode is not ReplyMode.SIMPLE:
            flags |= TransmissionFlag.SEND_DF
        if self._mode is ReplyMode.EXTENDED and contexts:
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return Agreement(offer, flags, self._mode, contexts)

    _HANDLERS: ClassVar[dict[int, Callable[[Handshake, int, bytes], None]]] = {
        Option.EXPORT_NAME: _export_name,
        Option.ABORT: _abort,
        Option.LIST: _list,
        Option.STARTTLS: _starttls,
        Option.INFO: _info,
        Option.GO: _info,
        Option.STRUCTURED_REPLY: _structured_reply,
        Option.LIST_META_CONTEXT: _list_meta_context,
        Option.SET_META_CONTEXT: _set_meta_context,
        Option.EXTENDED_HEADERS: _extended_headers,
    }


def refuse_data(data: bytes) -> None:
    """Refuse data of an option that has none; it was consumed all the same."""
    if data:
        raise invalid(f"The option takes no data, and has {len(data)} bytes.")
