"""A server's handshake to talk to: a catalog of exports, and ways to deliver bytes.

Every case is delivered whole, byte by byte, and with the start of something else behind it: a
state machine must not care how a stream is cut.
"""

from __future__ import annotations

from collections.abc import Sequence

from nbdstore.protocol.agreement import Offer, OptionRefused
from nbdstore.protocol.client import ClientHandshake, OptionAnswer
from nbdstore.protocol.constants import ClientFlag, OptionReply, TransmissionFlag
from nbdstore.protocol.handshake import Handshake, Phase

FLAGS = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_FAST_ZERO
    | TransmissionFlag.CAN_MULTI_CONN
    | TransmissionFlag.SEND_CACHE
)
SIZE = 1 << 30
DISK = Offer("disk", SIZE, FLAGS, description="a disk")
TRAILING = b"IHAVEOP"
"""The start of an option: never an option."""

DELIVERIES = ("whole", "byte by byte", "with more behind")


class Shelf:
    """A catalog: ``disk`` is the default, ``secret`` wants TLS, ``barred`` is not allowed."""

    def __init__(self, *offers: Offer) -> None:
        self.shown = {offer.name: offer for offer in offers or (DISK,)}
        self.n_lookups = 0

    def offers(self) -> Sequence[Offer]:
        return list(self.shown.values())

    def find(self, name: str) -> Offer:
        self.n_lookups += 1
        if name == "secret":
            raise OptionRefused(OptionReply.ERR_TLS_REQD, "Use TLS.")
        if name == "barred":
            raise OptionRefused(OptionReply.ERR_POLICY, "Not for you.")
        offer = self.shown.get(name or "disk")
        if offer is None:
            raise OptionRefused(OptionReply.ERR_UNKNOWN, f"There is no {name!r}.")
        return offer


def deliver(handshake: Handshake, data: bytes, how: str = "whole") -> bytes:
    """Give bytes to a handshake one of the ways of DELIVERIES; return what it sends."""
    pieces = [data[i : i + 1] for i in range(len(data))] if how == "byte by byte" else [data]
    if how == "with more behind":
        pieces.append(TRAILING)
    sent = b"".join(handshake.data_to_send())
    for piece in pieces:
        handshake.receive(piece)
        while handshake.advance():
            sent += b"".join(handshake.data_to_send())
        sent += b"".join(handshake.data_to_send())
    return sent


def started(
    handshake: Handshake, flags: int = ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES
) -> Handshake:
    """Take a handshake past the hello and the client flags."""
    client = ClientHandshake(flags)
    client.receive(b"".join(handshake.data_to_send()))
    hello = client.hello()
    assert hello is not None
    assert deliver(handshake, hello) == b""
    assert handshake.phase is Phase.OPTIONS
    return handshake


def answers(sent: bytes) -> list[OptionAnswer]:
    """Parse option replies; nothing may be left over."""
    client = ClientHandshake()
    client.receive(sent)
    found = []
    while answer := client.answer():
        found.append(answer)
    assert client.unread() == b""
    return found


def ask(handshake: Handshake, data: bytes, how: str = "whole") -> list[OptionAnswer]:
    """Send options; return the answers."""
    return answers(deliver(handshake, data, how))
