"""What a volume holds or has been through that no client wrote: a full map, and snapshots.

By the store itself, of this checkout, while nobody serves the pool.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from nbdstore.store import Pool, Volume
from nbdstore.store.host import Buffer, File

WRITES_BETWEEN: Final = 64
_PIECE_BYTES: Final = 4 << 20


class _Sparse:
    """The data file of a new pool: zeros that nothing was written before or behind stay holes."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._end = file.size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        end = offset + sum(map(len, buffers))
        if offset < self._end or any(np.frombuffer(buffer, np.uint8).any() for buffer in buffers):
            self._file.pwritev(buffers, offset)
        else:
            self._file.truncate(end)
        self._end = max(self._end, end)


def map_whole(directory: Path, name: str) -> None:
    """Map every block of a volume, in order, to a slot of zeros.

    Map, checksums and journal are as after writing it in full, and it reads as zeros; only the
    host stores nothing, so that a volume larger than its disk can be opened.
    """
    asyncio.run(_map_whole(directory, name))


async def _map_whole(directory: Path, name: str) -> None:
    pool = await Pool.open(directory)
    try:
        pool._core.data = _Sparse(pool._core.data)
        volume = pool.volumes[name]
        for offset in range(0, volume.size, _PIECE_BYTES):
            await volume.write(offset, bytes(min(_PIECE_BYTES, volume.size - offset)))
            await asyncio.sleep(0)  # let checkpoints and syncs run
    finally:
        await pool.close()


def keep_snapshots(directory: Path, name: str, n_snapshots: int) -> None:
    """Take snapshots of a volume, and overwrite some blocks at random after each."""
    asyncio.run(_keep(directory, name, n_snapshots))


async def _keep(directory: Path, name: str, n_snapshots: int) -> None:
    pool = await Pool.open(directory)
    try:
        volume = pool.volumes[name]
        chance = random.Random(n_snapshots)
        for number in range(n_snapshots):
            await pool.create_snapshots([(volume, f"s{number}")])
            await _overwrite(volume, chance)
    finally:
        await pool.close()


async def _overwrite(volume: Volume, chance: random.Random) -> None:
    size = volume.block_size
    for _ in range(WRITES_BETWEEN):
        block = chance.randrange(volume.size // size)
        await volume.write(block * size, chance.randbytes(size))
