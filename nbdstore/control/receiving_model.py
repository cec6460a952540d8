"""What the control API says of receiving; see `model`."""

from __future__ import annotations

import dataclasses

from nbdstore.control.model import Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReceivingInfo(Record):
    """A volume that is half received.

    snapshot: ``VOLUME@NAME`` where it was sent. position: bytes that are here, of size.
    running: it is received right now. token: what the sender needs to go on from here.
    """

    volume: str
    snapshot: str
    uuid: str
    base: str | None
    size: int
    position: int
    running: bool
    token: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReceivedInfo(Record):
    """A stream that was received: `snapshot` is what came of it.

    data, zeros: bytes in the stream. resumed_at: where it went on; 0 = it is from the beginning.
    """

    volume: str
    snapshot: str
    uuid: str
    base: str | None
    size: int
    data: int
    zeros: int
    resumed_at: int
