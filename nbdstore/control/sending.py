"""The sending half of backups: what a snapshot holds, or what has changed, as a stream.

Knows one pool's images; the bytes are `backup_stream`'s, how they travel is the caller's affair.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack
from typing import Any, Final, NamedTuple

from nbdstore.control.backup_stream import BackupWriter, Begin, Data, Part, Zeros
from nbdstore.control.contracts import ChangeLike, PoolLike, SnapshotLike
from nbdstore.control.stream import Buffer
from nbdstore.errors import NbdstoreError

PIECE_BYTES: Final = 1 << 20
"""Bytes in one frame at most: large enough that per-frame costs vanish."""
_BATCH_BYTES: Final = 4 << 20  # read at once, so that scattered blocks do not wait for each other
_BATCH_PIECES: Final = 64


async def stream(
    pool: PoolLike,
    snapshot: Any,
    base: Any | None,
    start: int = 0,
    *,
    writer: BackupWriter | None = None,
) -> AsyncGenerator[list[Buffer], None]:
    """Yield a backup stream of `snapshot`, some frames at a time.

    While this runs neither can be deleted. A failure ends the stream as FAILED, and is raised then.

    Arguments:
        base: the snapshot that the receiver has, None if it has none.
        start: bytes of the volume that the receiver has of this snapshot already.
        writer: for who wants to see how far it is, or to end the stream when it goes on no more.
    """
    writer = writer or BackupWriter()
    with ExitStack() as users:
        for image in (snapshot, *([] if base is None else [base])):
            users.enter_context(image.in_use())
        yield writer.begin(_begin(snapshot, base, start))
        try:
            async for parts in _parts(pool, snapshot, base, start):
                yield [buffer for part in parts for buffer in writer.part(part)]
        except NbdstoreError as error:
            yield writer.failed(error)
            raise
        yield writer.end()


def _begin(snapshot: Any, base: Any | None, start: int) -> Begin:
    status = snapshot.status()
    volume, _, name = snapshot.name.partition("@")
    return Begin(
        volume=volume,
        snapshot=name,
        uuid=status["uuid"],
        size=snapshot.size,
        created=status["created"],
        base=base.status()["uuid"] if base else None,
        base_name=base.name if base else None,
        base_size=base.size if base else None,
        start=start,
    )


async def _parts(
    pool: PoolLike, snapshot: Any, base: Any | None, start: int
) -> AsyncIterator[list[Part]]:
    """Yield what differs from `start` on, ascending, as many parts as were read at once."""
    batch: list[_Piece] = []
    n_bytes = 0
    async for piece in _pieces(pool.changes(base, snapshot, offset=start)):
        batch.append(piece)
        n_bytes += piece.length if piece.is_data else 0
        if n_bytes >= _BATCH_BYTES or len(batch) >= _BATCH_PIECES:
            yield await _read_all(snapshot, batch)
            batch, n_bytes = [], 0
    if batch:
        yield await _read_all(snapshot, batch)


class _Piece(NamedTuple):
    """A change, or a piece of one that fits a frame."""

    offset: int
    length: int
    is_data: bool


async def _pieces(changes: AsyncIterator[ChangeLike]) -> AsyncIterator[_Piece]:
    async for change in changes:
        stop = change.offset + change.length
        step = PIECE_BYTES if change.is_data else change.length
        for offset in range(change.offset, stop, step):
            yield _Piece(offset, min(step, stop - offset), change.is_data)


async def _read_all(snapshot: SnapshotLike, batch: list[_Piece]) -> list[Part]:
    await asyncio.sleep(0)  # what lies in the page cache is read without waiting: let others in
    found = await asyncio.gather(*(_read(snapshot, piece) for piece in batch))
    return [part for parts in found for part in parts]


async def _read(snapshot: SnapshotLike, piece: _Piece) -> list[Part]:
    """Return what a piece holds: data, its buffers not joined, and zeros."""
    if not piece.is_data:
        return [Zeros(piece.offset, piece.length)]
    parts: list[Part] = []
    buffers: list[Buffer] = []
    begin = at = piece.offset
    segments = snapshot.read_now(piece.offset, piece.length)
    if segments is None:
        segments = await snapshot.read(piece.offset, piece.length)
    for segment in segments:
        if not isinstance(segment, int):
            buffers.append(segment)
            at += len(segment)
            continue
        if buffers:
            parts.append(Data(begin, buffers))
        parts.append(Zeros(at, segment))
        begin = at = at + segment
        buffers = []
    if buffers:
        parts.append(Data(begin, buffers))
    return parts
