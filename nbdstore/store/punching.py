"""Giving freed space back to the host's filesystem.

Owns the choice of what to punch and when; what is free is slots.py's.

Only whole chunks of 1 MiB that are free are punched: holes of single blocks would break the data
file into millions of extents.  Some free space that the host has allocated already is kept, since
writing into it is several times faster than making the file hold more.  What is free in the live
bitmap is so durably (see slots.py), so that no crash can bring a punched block back into use.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from nbdstore.store.core import Core

CHUNK_BYTES: Final = 1 << 20
KEEP_BYTES: Final = 256 << 20
KEEP_SHARE: Final = 20  # of what is used
_PAUSE_S: Final = 5.0  # a pass looks at the whole bitmap, 0.2 ms a region
_LONG_PAUSE_S: Final = 60.0  # after a pass that found nothing to punch


class Puncher:
    """Punches the chunks of one pool's data file."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._able = True
        self._next_at = 0.0

    async def work(self) -> None:
        """Punch if more free space is allocated on the host than is worth keeping.

        Called often; does something now and then.
        """
        now = time.monotonic()
        if not self._able or now < self._next_at:
            return
        excess = self._excess()
        if excess <= 0:
            self._next_at = now + _PAUSE_S
            return
        left = excess
        # The last regions first: allocation goes on in the first ones.
        for region in reversed(range(self._core.slots.n_used_regions)):
            left -= self._punch_region(region, left)
            if left <= 0 or not self._able:
                break
            await asyncio.sleep(0)
        self._next_at = time.monotonic() + (_PAUSE_S if left < excess else _LONG_PAUSE_S)

    def _excess(self) -> int:
        """Bytes that the host has allocated for free slots, beyond what is kept."""
        slots, size = self._core.slots, self._core.block_size
        used = (slots.n_slots - slots.n_free) * size
        return self._core.data.allocated - used - max(KEEP_BYTES, used // KEEP_SHARE)

    def _punch_region(self, region: int, wanted: int) -> int:
        """Punch free chunks of `region`, `wanted` bytes if there are that many; return how many.

        There is no await between the look at the bitmap and the last punch.
        """
        core = self._core
        size = core.block_size
        chunk = CHUNK_BYTES // size
        before = core.data.allocated
        given = 0
        for start, stop in core.slots.free_runs(chunk, region):
            first, last = -(-start // chunk) * chunk, stop // chunk * chunk
            if first < last:
                if not core.data.punch(first * size, (last - first) * size):
                    self._able = False
                    return 0
                given = before - core.data.allocated
            if given >= wanted:
                break
        return given
