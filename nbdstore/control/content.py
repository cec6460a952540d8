"""A volume's content as pieces: read with its holes left out, written with zeros made holes.

Knows one volume at a time; who may do this, and when, is decided in `operations`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from nbdstore.control.contracts import VolumeLike
from nbdstore.control.stream import PIECE_BYTES, Piece
from nbdstore.errors import Busy, StoreError

EXTENTS_PER_CALL = 1024
"""Extents asked for at a time, so that the map of a TiB is never held as objects."""


async def read_pieces(volume: VolumeLike) -> AsyncIterator[Piece]:
    """Yield the volume's data in ascending order, at most PIECE_BYTES at once.

    The size is that of the start; Busy if the volume shrinks meanwhile. Writes that happen while
    this runs may or may not be seen: a live volume is not one moment in time.
    """
    offset, size = 0, volume.size
    try:
        while offset < size:
            for extent in await volume.extents(offset, size - offset, max_extents=EXTENTS_PER_CALL):
                stop = offset + extent.length
                if extent.kind.name == "DATA":
                    async for piece in _read_range(volume, offset, stop):
                        yield piece
                offset = stop
    except StoreError as error:
        if volume.size >= size:
            raise
        raise Busy(f"volume '{volume.name}' was shrunk while it was read: read it again") from error


async def _read_range(volume: VolumeLike, start: int, stop: int) -> AsyncIterator[Piece]:
    for offset in range(start, stop, PIECE_BYTES):
        length = min(PIECE_BYTES, stop - offset)
        position = offset
        for segment in await volume.read(offset, length):
            if isinstance(segment, int):
                position += segment
                continue
            yield Piece(position, segment)
            position += len(segment)


async def write_pieces(volume: VolumeLike, pieces: AsyncIterator[Piece], *, erase: bool) -> None:
    """Write the pieces; with `erase` the gaps between them, up to the end, become holes.

    Pieces ascend and lie within the volume. Not durable before the volume is flushed.
    """
    position = 0
    async for piece in pieces:
        if erase and piece.offset > position:
            await volume.write_zeroes(position, piece.offset - position)
        await volume.write(piece.offset, piece.data)
        position = piece.offset + len(piece.data)
    if erase and position < volume.size:
        await volume.write_zeroes(position, volume.size - position)
