"""Leases: who may attach a volume read-write now, as it stands with the volume and on the wire.

Owns both forms; who grants a lease, and what ends one, is the business of others. A volume's
properties hold, durably::

    lease         {"holder": text, "epoch": n, "token": text, "since": ISO 8601}, or null
    lease_epoch   the highest epoch that was ever granted; stays when a lease ends

Epochs count up for ever, so that one which was refused once is refused always. A client shows its
lease in the name of the export that it asks for::

    NAME,lease=EPOCH-TOKEN      a volume's name has no comma

The token is what only the holder was told: whoever lists leases, or guesses the next epoch, cannot
attach with that. Holders are text that a person understands, such as the name of a host.
"""

from __future__ import annotations

import dataclasses
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from nbdstore.errors import InvalidArgument

MAX_HOLDER: Final = 255
"""Characters."""

_TOKEN_BYTES: Final = 16
_CLAIM: Final = re.compile(r"lease=([0-9]{1,18})-([0-9a-f]{1,64})")


@dataclass(frozen=True)
class Claim:
    """What a client says of its lease."""

    epoch: int
    token: str


@dataclass(frozen=True)
class Lease:
    """A lease that is held.

    Arguments:
        holder: who holds it, for people.
        epoch: number of this lease among all that its volume ever had.
        token: what the holder shows.
        since: when it was granted, ISO 8601.
    """

    holder: str
    epoch: int
    token: str
    since: str

    def admits(self, claim: Claim) -> bool:
        """Whether a claim is to this very lease; takes the same time for every wrong token."""
        return claim.epoch == self.epoch and hmac.compare_digest(claim.token, self.token)

    def export(self, volume: str) -> str:
        """The name under which its holder attaches the volume of that name."""
        return f"{volume},lease={self.epoch}-{self.token}"

    def __str__(self) -> str:
        return f"'{self.holder}' since {self.since} (epoch {self.epoch})"


def current(properties: Mapping[str, Any]) -> Lease | None:
    """Read the lease that a volume's properties hold."""
    found = properties.get("lease")
    return Lease(**found) if found else None


def grant(properties: Mapping[str, Any], holder: str, since: str) -> tuple[Lease, dict[str, Any]]:
    """Make the next lease of a volume; return it, and the properties that record it.

    Raises:
        InvalidArgument: nobody can be called `holder`.
    """
    check_holder(holder)
    epoch = properties.get("lease_epoch", 0) + 1
    lease = Lease(holder, epoch, secrets.token_hex(_TOKEN_BYTES), since)
    return lease, {"lease": dataclasses.asdict(lease), "lease_epoch": epoch}


def ended() -> dict[str, Any]:
    """Return the properties that record that nobody holds a lease."""
    return {"lease": None}


def check_holder(holder: str) -> None:
    """Refuse what cannot be a holder's name (InvalidArgument)."""
    if not holder or not holder.isprintable() or len(holder) > MAX_HOLDER:
        raise InvalidArgument(
            f"{holder[:60]!r} cannot be the holder of a lease: give 1 to {MAX_HOLDER} printable "
            "characters, such as the name of the host"
        )


def split_export(name: str) -> tuple[str, Claim | None]:
    """Split an export's name into the volume's, and the claim to a lease if there is one.

    What is no well-formed claim stays in the name, which then is that of no volume.
    """
    volume, comma, rest = name.partition(",")
    match = _CLAIM.fullmatch(rest) if comma else None
    return (volume, Claim(int(match[1]), match[2])) if match else (name, None)
