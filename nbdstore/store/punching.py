"""Giving freed space back to the host's filesystem.

Owns the choice of what to punch and when; what is free is slots.py's.

Only whole chunks of 1 MiB that are free are punched: holes of single blocks would break the data
file into millions of extents.  Some free space that the host has allocated already is kept, since
writing into it is several times faster than making the file hold more.  What is free in the live
bitmap is so durably (see slots.py), so that no crash can bring a punched block back into use.
"""

from __future__ import annotations

import asyncio
from typing import Final

import numpy as np

from nbdstore.store.core import Core

CHUNK_BYTES: Final = 1 << 20
KEEP_BYTES: Final = 256 << 20
KEEP_SHARE: Final = 20  # of what is used
_PUNCHES_PER_TURN: Final = 64


class Puncher:
    """Punches the chunks of one pool's data file."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._able = True
        self._seen_free = -1
        self._punched: np.ndarray[tuple[int], np.dtype[np.bool_]] = np.zeros(0, np.bool_)

    async def work(self) -> None:
        """Punch if more free space is allocated on the host than is worth keeping."""
        core = self._core
        slots = core.slots
        if not self._able or slots.n_free == self._seen_free:
            return
        self._seen_free = slots.n_free
        used = (slots.n_slots - slots.n_free) * core.block_size
        excess = core.data.allocated - used - max(KEEP_BYTES, used // KEEP_SHARE)
        if excess <= 0:
            return
        for region in range(slots.n_used_regions - 1, -1, -1):
            excess = await self._punch_region(region, excess)
            if excess <= 0 or not self._able:
                return

    async def _punch_region(self, region: int, excess: int) -> int:
        """Punch free chunks of `region` until `excess` is given back; return what is left."""
        core, slots = self._core, self._core.slots
        size = core.block_size
        chunk = CHUNK_BYTES // size
        n_done = 0
        for start, stop in slots.free_runs(chunk, region):
            first, last = -(-start // chunk) * chunk, stop // chunk * chunk
            if first >= last:
                continue
            # Between the look at the bitmap and the punch there is no await.
            before = core.data.allocated
            if not core.data.punch(first * size, (last - first) * size):
                self._able = False
                return 0
            excess -= before - core.data.allocated
            n_done += 1
            if excess <= 0:
                return excess
            if n_done % _PUNCHES_PER_TURN == 0:
                await asyncio.sleep(0)
                return excess  # the runs may have changed: look again at the next turn
        return excess
