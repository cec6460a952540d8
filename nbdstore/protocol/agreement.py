"""What the option phase is about: what a server offers, and what the two sides agree on.

Plain values that the handshake fills in and the transmission phase reads; they know neither
bytes nor sockets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from nbdstore.protocol.constants import MAX_PAYLOAD, OptionReply, TransmissionFlag


class TlsMode(Enum):
    """Which of the server's TLS modes is in force (proto.md, "TLS versions" and what follows)."""

    OFF = "off"
    """NOTLS: STARTTLS is refused."""

    OPTIONAL = "optional"
    """SELECTIVETLS: some exports want TLS, the others do without."""

    REQUIRED = "required"
    """FORCEDTLS: nothing but STARTTLS and ABORT works before TLS."""


class ReplyMode(Enum):
    """The family of replies (and requests) that the transmission phase uses."""

    SIMPLE = "simple"
    STRUCTURED = "structured"
    EXTENDED = "extended"


@dataclass(frozen=True)
class MetaContext:
    """A metadata context that can be asked with BLOCK_STATUS.

    Arguments:
        id: what stands for it in requests and replies, among the contexts of its export.
        label: namespace, colon, and name.
    """

    id: int
    label: str


BASE_ALLOCATION = MetaContext(1, "base:allocation")

ALLOCATION_DEPTH = MetaContext(2, "qemu:allocation-depth")
"""qemu, docs/interop/nbd.rst: 0 = not allocated, 1 = in this layer, 2 = in the layer below, ..."""

CONTEXTS = (BASE_ALLOCATION, ALLOCATION_DEPTH)
"""Those that every export has."""

DIRTY_BITMAP = "qemu:dirty-bitmap:"
"""Followed by a name; the same document: bit 0 = it has changed since that time."""


@dataclass(frozen=True)
class Offer:
    """One export as a client may see it.

    Arguments:
        name: the export's canonical name.
        size: bytes.
        flags: what the export can do; the handshake adds what depends on the client (SEND_DF,
            BLOCK_STATUS_PAYLOAD).
        description: a person's words, may be empty.
        contexts: the metadata contexts that it has.
        minimum_block, preferred_block, maximum_payload: bytes (proto.md, "Block size
            constraints").
    """

    name: str
    size: int
    flags: TransmissionFlag
    description: str = ""
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_payload: int = MAX_PAYLOAD
    contexts: tuple[MetaContext, ...] = CONTEXTS


class Catalog(Protocol):
    """The exports that one client may see, asked anew for every option."""

    def offers(self) -> Iterable[Offer]:
        """List what this client may see."""

    def find(self, name: str) -> Offer:
        """Look up an export, ``""`` being the default one.

        Errors:
            OptionRefused: ERR_UNKNOWN, ERR_POLICY, ERR_TLS_REQD (if TLS would help) or
                ERR_SHUTDOWN, with a reason for a person.
        """


class OptionRefused(Exception):
    """An option is answered with an error; the handshake goes on.

    Never leaves the handshake, so it is none of nbdstore.errors.

    Arguments:
        reply: the error reply.
        message: the reason, a sentence with its full stop.
    """

    def __init__(self, reply: OptionReply, message: str) -> None:
        self.reply = reply
        super().__init__(message)


@dataclass(frozen=True)
class Agreement:
    """How a handshake ended that led to the transmission phase.

    Arguments:
        offer: the export, as the catalog gave it.
        flags: the transmission flags that were sent.
        mode: family of requests and replies.
        contexts: metadata contexts that BLOCK_STATUS answers, in the order of their ids.
    """

    offer: Offer
    flags: TransmissionFlag
    mode: ReplyMode
    contexts: tuple[MetaContext, ...] = ()
