"""The commands that may have to wait: one coroutine each.

What the store does at once is answered by the session itself; everything else comes here. Owns
the translation of the store's answers and errors into those of NBD, and knows nothing of
connections.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence

from nbdstore.errors import (
    Corruption,
    NoSpace,
    NotFast,
    NotFound,
    ReadFailed,
    StoreError,
    WriteFailed,
)
from nbdstore.protocol.agreement import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    DIRTY_BITMAP,
    MetaContext,
)
from nbdstore.protocol.constants import (
    EXTENDED_EXTENT,
    U32,
    Allocation,
    Command,
    CommandFlag,
    Errno,
)
from nbdstore.protocol.replies import Buffer, Extents, SimpleReplies
from nbdstore.protocol.transmission import Request
from nbdstore.store import Extent, ExtentKind, Image, Snapshot, changes

log = logging.getLogger(__name__)

DIRTY = 1
"""Status of ``qemu:dirty-bitmap:`` (qemu, docs/interop/nbd.rst): bit 0, it has changed."""

VERDICTS: dict[int, str] = {
    Errno.EPERM: "The export is read-only.",
    Errno.EINVAL: "The request makes no sense here: its command, its flags or its range.",
    Errno.ENOSPC: "The range ends beyond the export.",
    Errno.EOVERFLOW: "The read is longer than the maximum payload.",
}
"""What the rules say of a request that is refused without asking the store."""

_ROUND_SHARES: dict[int, int] = {
    Command.BLOCK_STATUS: 1,  # 20 ms for 4096 extents
    Command.CACHE: 1,  # 3 ms for a step of 32 MiB in pieces
    Command.TRIM: 32,
    Command.WRITE_ZEROES: 32,
}
"""How many of these commands make up a round; they send little, but keep the loop busy."""

CACHE_BYTES = 32 << 20
"""A CACHE is done in steps of this much, since it may ask for the whole export."""


class Target:
    """What requests are for, and how they are answered.

    Arguments:
        volume: the export's volume, or snapshot.
        replies: the family of replies that was agreed on.
        contexts: the metadata contexts that were agreed on.
        since: the snapshots that the dirty bitmaps among these are about, by label.
        max_extents: extents in one reply, per context.
        errors: counts the error replies by their number.
    """

    def __init__(
        self,
        volume: Image,
        replies: SimpleReplies,
        contexts: Sequence[MetaContext],
        since: Mapping[str, Snapshot],
        max_extents: int,
        errors: Counter[int],
    ) -> None:
        self.volume = volume
        self.replies = replies
        self.contexts = contexts
        self.since = since
        self.max_extents = max_extents
        self.max_status_bytes = max_extents * EXTENDED_EXTENT.size * len(contexts)
        self._errors = errors
        self._reported: set[type[Exception]] = set()

    def weigh(self, request: Request) -> int:
        """Bytes that a request makes the server hold until its reply is sent."""
        if request[0] in (Command.READ, Command.WRITE):
            return request[4]
        return self.max_status_bytes if request[0] == Command.BLOCK_STATUS else 0

    def settle(self, request: Request, out: list[Buffer]) -> int:
        """Answer a request that the rules have settled: an error, or nothing to do."""
        command, _, cookie, offset, _, _, verdict = request
        if verdict > 0:
            self._errors[verdict] += 1
            return self.replies.error(out, cookie, offset, verdict, VERDICTS[verdict])
        if command == Command.READ:
            return self.replies.read(out, cookie, offset, 0, ())
        return self.replies.done(out, cookie, offset)

    def fail(self, request: Request, error: Exception, out: list[Buffer]) -> int:
        """Answer a request that the store could not serve; log the first of each kind."""
        command, _, cookie, offset, length, _, _ = request
        level = logging.DEBUG if type(error) in self._reported else logging.WARNING
        self._reported.add(type(error))
        name = Command(command).name
        log.log(level, "%s: %s of %d at %d: %s", self.volume.name, name, length, offset, error)
        number, text = translate(error)
        self._errors[number] += 1
        return self.replies.error(out, cookie, offset, number, text)


def round_cost(command: int, weight: int, max_round_bytes: int) -> int:
    """Bytes that a request counts as in the bound of a round; `weight` if it is by its bytes."""
    share = _ROUND_SHARES.get(command)
    return weight if share is None else max_round_bytes // share


async def perform(target: Target, request: Request, out: list[Buffer]) -> int:
    """Perform one request, append its reply, and return the reply's length in bytes.

    A store's error becomes an error reply here; anything else is a bug and passes.
    """
    try:
        return await _COMMANDS[request[0]](target, request, out)
    except (StoreError, NotFound) as error:
        return target.fail(request, error, out)


async def _read(target: Target, request: Request, out: list[Buffer]) -> int:
    _, flags, cookie, offset, length, _, _ = request
    segments = await target.volume.read(offset, length)
    whole = bool(flags & CommandFlag.DF)
    return target.replies.read(out, cookie, offset, length, segments, whole)


async def _write(target: Target, request: Request, out: list[Buffer]) -> int:
    _, flags, cookie, offset, _, payload, _ = request
    assert payload is not None
    if not target.volume.write_now([(offset, payload)]):
        await target.volume.write(offset, payload)
    if flags & CommandFlag.FUA:
        await target.volume.flush()
    return target.replies.done(out, cookie, offset)


async def _flush(target: Target, request: Request, out: list[Buffer]) -> int:
    await target.volume.flush()
    return target.replies.done(out, request[2], request[3])


async def _trim(target: Target, request: Request, out: list[Buffer]) -> int:
    _, flags, cookie, offset, length, _, _ = request
    await target.volume.trim(offset, length)
    if flags & CommandFlag.FUA:
        await target.volume.flush()
    return target.replies.done(out, cookie, offset)


async def _write_zeroes(target: Target, request: Request, out: list[Buffer]) -> int:
    """Zero a range: an operation on the map, which waits only for space that NO_HOLE wants.

    The one place that answers ENOTSUP, since only FAST_ZERO allows it (proto.md, "Error values").
    """
    _, flags, cookie, offset, length, _, _ = request
    no_hole, fast = bool(flags & CommandFlag.NO_HOLE), bool(flags & CommandFlag.FAST_ZERO)
    try:
        await target.volume.write_zeroes(offset, length, no_hole=no_hole, fast=fast)
    except NotFast:
        text = "The pool has no space for these zeroes at once."
        return target.replies.error(out, cookie, offset, Errno.ENOTSUP, text)
    if flags & CommandFlag.FUA:
        await target.volume.flush()
    return target.replies.done(out, cookie, offset)


async def _cache(target: Target, request: Request, out: list[Buffer]) -> int:
    _, _, cookie, offset, length, _, _ = request
    for start in range(offset, offset + length, CACHE_BYTES):
        await asyncio.sleep(0)  # the store may do a step without waiting, and others want a turn
        await target.volume.cache(start, min(CACHE_BYTES, offset + length - start))
    return target.replies.done(out, cookie, offset)


async def _block_status(target: Target, request: Request, out: list[Buffer]) -> int:
    _, flags, cookie, offset, length, payload, _ = request
    # REQ_ONE: one extent, not longer than the request; the first of a listing is that.
    max_extents = 1 if flags & CommandFlag.REQ_ONE else target.max_extents
    contexts = target.contexts
    if payload is not None:
        chosen = {context_id for (context_id,) in U32.iter_unpack(payload)}
        contexts = [context for context in contexts if context.id in chosen]
    status: list[tuple[MetaContext, Extents]] = []
    extents: Sequence[Extent] = ()
    for context in contexts:
        if context.label.startswith(DIRTY_BITMAP):
            since = target.since[context.label]
            status.append((context, await dirty(target.volume, since, offset, length, max_extents)))
            continue
        extents = extents or await target.volume.extents(offset, length, max_extents=max_extents)
        status.append((context, describe(context, extents)))
    return target.replies.block_status(out, cookie, offset, status)


# --- Translations --------------------------------------------------------------------------------

_STATUS: dict[MetaContext, dict[ExtentKind, int]] = {
    # A hole has no space promised to it, so a write to it may fail with ENOSPC, which is just
    # what HOLE says; ZERO alone is provisioned (proto.md, "Metadata contexts").
    BASE_ALLOCATION: {
        ExtentKind.HOLE: Allocation.HOLE | Allocation.ZERO,
        ExtentKind.ZERO: Allocation.ZERO,
        ExtentKind.DATA: 0,
    },
    ALLOCATION_DEPTH: {ExtentKind.HOLE: 0, ExtentKind.ZERO: 1, ExtentKind.DATA: 1},
}


def describe(context: MetaContext, extents: Sequence[Extent]) -> Extents:
    """Tell extents in the words of one metadata context, equal neighbours merged."""
    status_of = _STATUS[context]
    merged: list[tuple[int, int]] = []
    for extent in extents:
        status = status_of[extent.kind]
        if merged and merged[-1][1] == status:
            merged[-1] = (merged[-1][0] + extent.length, status)
        else:
            merged.append((extent.length, status))
    return merged


async def dirty(
    volume: Image, since: Snapshot, offset: int, length: int, max_extents: int
) -> Extents:
    """Tell what has changed in a range since a snapshot, in at most `max_extents` extents."""
    found: list[tuple[int, int]] = []
    at = offset
    async for change in changes(since, volume, offset, length):
        if change.offset > at:
            found.append((change.offset - at, 0))
        if found and found[-1][1] == DIRTY:
            found[-1] = (found[-1][0] + change.length, DIRTY)
        else:
            found.append((change.length, DIRTY))
        at = change.offset + change.length
        if len(found) > max_extents:
            return found[:max_extents]
    if at < offset + length:
        found.append((offset + length - at, 0))
    return found[:max_extents]


_ERRORS: tuple[tuple[type[Exception], Errno, str], ...] = (
    (NoSpace, Errno.ENOSPC, "The pool is full."),
    (NotFound, Errno.ESHUTDOWN, "The volume, or the snapshot, was deleted."),
    (Corruption, Errno.EIO, "A block is damaged; see the server's log."),
    (ReadFailed, Errno.EIO, "The disk under the pool failed to read; see the server's log."),
    (WriteFailed, Errno.EIO, "The disk under the pool failed to write; see the server's log."),
    (Exception, Errno.EIO, "The pool failed; see the server's log."),
)
"""Clients get no paths of the server: the error itself is for its log."""


def translate(error: Exception) -> tuple[Errno, str]:
    """Find the NBD error for a store's error, and a text for a person."""
    return next((number, text) for kind, number, text in _ERRORS if isinstance(error, kind))


_COMMANDS: dict[int, Callable[[Target, Request, list[Buffer]], Awaitable[int]]] = {
    Command.READ: _read,
    Command.WRITE: _write,
    Command.FLUSH: _flush,
    Command.TRIM: _trim,
    Command.WRITE_ZEROES: _write_zeroes,
    Command.CACHE: _cache,
    Command.BLOCK_STATUS: _block_status,
}
