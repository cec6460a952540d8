"""Giving freed space back to the host's filesystem.

Owns the choice of what to punch and when; what is free is slots.py's.

Only whole chunks of 1 MiB that are free are punched: holes of single blocks would break the data
file into millions of extents.  Writing into space that the host has allocated already is several
times faster than making the file hold more, so some is kept, and what goes back is only what was
left unused over a whole while: a volume that is overwritten again and again frees and takes
gigabytes all the time.  When the host's filesystem is nearly full there is no such wait.

What is free in the live bitmap is so durably (see slots.py), so that no crash can bring a punched
block back into use.
"""

from __future__ import annotations

from typing import Final

from nbdstore.errors import StoreError
from nbdstore.store.core import Core, log

CHUNK_BYTES: Final = 1 << 20
KEEP_BYTES: Final = 256 << 20
KEEP_SHARE: Final = 20  # of what is used
WHILE_S: Final = 60.0
_SCARCE_BYTES: Final = 1 << 30
_SCARCE_S: Final = 5.0  # a pass looks at the whole bitmap, 0.2 ms a region


class Puncher:
    """Punches the chunks of one pool's data file."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._able = True
        self._while_began = core.host.monotonic()
        self._least: int | None = None

    async def work(self) -> None:
        """Punch if more free space is allocated on the host than is worth keeping.

        Called often; does something now and then.
        """
        if not self._able:
            return
        excess = self._excess()
        self._least = excess if self._least is None else min(self._least, excess)
        now = self._core.host.monotonic()
        scarce = self._core.host_full or self._core.disk.free_bytes() < _SCARCE_BYTES
        if now - self._while_began < (_SCARCE_S if scarce else WHILE_S):
            return
        wanted, self._while_began, self._least = self._least, now, None
        try:
            await self._punch(wanted)
        except StoreError as error:
            log.warning("freed space is not given back to the host now: %s", error)

    async def _punch(self, wanted: int) -> None:
        """Punch chunks all over the file, `wanted` bytes if there are that many."""
        # The last regions first: allocation goes on in the first ones.
        for region in reversed(range(self._core.slots.n_used_regions)):
            if wanted <= 0 or not self._able:
                return
            wanted -= self._punch_region(region, wanted)
            await self._core.host.sleep(0)

    def _excess(self) -> int:
        """Bytes that the host has allocated for free slots, beyond what is kept."""
        slots, size = self._core.slots, self._core.block_size
        used = (slots.n_slots - slots.n_free) * size
        kept = 0 if self._core.host_full else max(KEEP_BYTES, used // KEEP_SHARE)
        return self._core.data.allocated - used - kept

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
            last = min(last, first + -(-(wanted - given) // CHUNK_BYTES) * chunk)
            if first < last:
                if not core.data.punch(first * size, (last - first) * size):
                    self._able = False
                    return 0
                given = before - core.data.allocated
            if given >= wanted:
                break
        return given
