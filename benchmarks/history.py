"""A volume with a past: snapshots, with writes between them.

By the store itself, of this checkout, while nobody serves the pool.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Final

from nbdstore.store import Pool, Volume

WRITES_BETWEEN: Final = 64


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
