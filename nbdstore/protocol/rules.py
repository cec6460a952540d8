"""What a request may ask, once and for all at the edge: everything behind it may assert.

Owns the table of proto.md, "Request types" and "Error values": which commands and flags an
agreement allows, and which error each fault gets. Knows nothing of how requests arrive.
"""

from __future__ import annotations

from nbdstore.protocol.agreement import Agreement, ReplyMode
from nbdstore.protocol.constants import Command, CommandFlag, Errno, TransmissionFlag

ALLOWED = 0
"""Verdict: perform the request."""

NOTHING_TO_DO = -1
"""Verdict: a request of no bytes; acknowledge it. proto.md leaves it unspecified, but libnbd can
send it, and it must not end a connection."""

WRITING = frozenset({Command.WRITE, Command.TRIM, Command.WRITE_ZEROES})

ENDS_IN_ENOSPC = frozenset({Command.WRITE, Command.WRITE_ZEROES})
"""Beyond the end these get ENOSPC, all others EINVAL (proto.md, "Error values")."""


class Rules:
    """The requests that one agreement allows.

    Arguments:
        agreement: what the handshake ended in.
    """

    def __init__(self, agreement: Agreement) -> None:
        self.mode = agreement.mode
        self.size = agreement.offer.size
        self.max_payload = agreement.offer.maximum_payload
        self.read_only = bool(agreement.flags & TransmissionFlag.READ_ONLY)
        self.context_ids = frozenset(context.id for context in agreement.contexts)
        self.misaligned = agreement.offer.minimum_block - 1
        """Bits that neither an offset nor a length may have."""

        self._flags = allowed_flags(agreement)

    def judge(self, command: int, flags: int, offset: int, length: int) -> int:
        """Give the verdict on one request: ALLOWED, NOTHING_TO_DO, or the error it gets.

        ``length`` is the effect's, not the payload's. Read-only comes before the range, as in
        nbdkit and nbd-server; DISC is always allowed.
        """
        if self.read_only and command in WRITING:
            return Errno.EPERM
        if command not in self._flags or flags & ~self._flags[command]:
            return Errno.EINVAL
        if command == Command.DISC:
            return ALLOWED
        if command == Command.FLUSH:
            # Offset and length are reserved and MUST be zero (proto.md, "NBD_CMD_FLUSH").
            return Errno.EINVAL if offset or length else ALLOWED
        if offset + length > self.size:
            return Errno.ENOSPC if command in ENDS_IN_ENOSPC else Errno.EINVAL
        if (offset | length) & self.misaligned:
            return Errno.EINVAL
        if command == Command.BLOCK_STATUS:
            return ALLOWED if length and self.context_ids else Errno.EINVAL
        if command in (Command.READ, Command.WRITE) and length > self.max_payload:
            return self._too_long(command)
        return ALLOWED if length else NOTHING_TO_DO

    def _too_long(self, command: int) -> int:
        """Refuse more payload than was advertised.

        EOVERFLOW is for reads that a structured reply could have split ("NBD_CMD_READ").
        """
        if command == Command.READ and self.mode is not ReplyMode.SIMPLE:
            return Errno.EOVERFLOW
        return Errno.EINVAL


def allowed_flags(agreement: Agreement) -> dict[int, int]:
    """Tabulate which commands are allowed, and with which flags.

    FUA must be accepted on every command once SEND_FUA is advertised; CACHE may come although
    it is not advertised (proto.md, "Request types").
    """
    offered = agreement.flags
    fua = CommandFlag.FUA if offered & TransmissionFlag.SEND_FUA else 0
    payload = CommandFlag.PAYLOAD_LEN if agreement.mode is ReplyMode.EXTENDED else 0
    allowed: dict[int, int] = {
        Command.READ: fua | (CommandFlag.DF if offered & TransmissionFlag.SEND_DF else 0),
        Command.WRITE: fua | payload,
        Command.DISC: 0xFFFF,
        Command.CACHE: fua,
        Command.BLOCK_STATUS: fua | CommandFlag.REQ_ONE,
    }
    if offered & TransmissionFlag.BLOCK_STATUS_PAYLOAD:
        allowed[Command.BLOCK_STATUS] |= CommandFlag.PAYLOAD_LEN
    if offered & TransmissionFlag.SEND_FLUSH:
        allowed[Command.FLUSH] = fua
    if offered & TransmissionFlag.SEND_TRIM:
        allowed[Command.TRIM] = fua
    if offered & TransmissionFlag.SEND_WRITE_ZEROES:
        fast = CommandFlag.FAST_ZERO if offered & TransmissionFlag.SEND_FAST_ZERO else 0
        allowed[Command.WRITE_ZEROES] = fua | CommandFlag.NO_HOLE | fast
    # Plain ints: operators of IntFlag take a microsecond each.
    return {int(command): int(flags) for command, flags in allowed.items()}
