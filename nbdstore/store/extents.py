"""What a range of an image holds, of any length.

Owns the slicing of long ranges.  The cost goes with the leaves of the map that hold something, not
with blocks: a stretch of untouched leaves is one numpy expression, whatever its length.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from nbdstore.store import layout
from nbdstore.store.blockmap import HOLE, KIND, UNIFORM

if TYPE_CHECKING:
    from nbdstore.store.image import Image

_SLICE_LEAVES: Final = 64  # with entries to look at: 16384 of them, about 1 ms
_SCAN_LEAVES: Final = 1 << 18  # of one uniform kind: 256 GiB at 4 KiB blocks, about 1 ms


class ExtentKind(enum.Enum):
    """What a stretch of a volume is."""

    HOLE = "hole"
    ZERO = "zero"
    DATA = "data"


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of `length` bytes of one kind."""

    length: int
    kind: ExtentKind


_KINDS: Final = (ExtentKind.HOLE, ExtentKind.ZERO, ExtentKind.DATA)


@dataclass(frozen=True, slots=True)
class Slice:
    """Blocks `[start, stop)`: `uniform` says that whole leaves are HOLE or UNIFORM; else None."""

    start: int
    stop: int
    uniform: int | None


class Extents:
    """What the ranges of one image hold."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._shift = image.block_size.bit_length() - 1

    def next_slice(self, start: int, stop: int) -> Slice:
        """Return the first slice of blocks `[start, stop)`; StoreError beyond the end."""
        blocks = self._image.map
        self._check(start, stop)
        shift, fanout = blocks.leaf_shift, blocks.fanout
        leaf = start >> shift
        last = min(((stop - 1) >> shift) + 1, leaf + _SCAN_LEAVES)
        kinds = blocks.states[leaf:last] & KIND
        kind = int(kinds[0])
        whole = start % fanout == 0 and (start + fanout <= stop or stop == blocks.n_blocks)
        if kind in (HOLE, UNIFORM) and whole:
            other = np.flatnonzero(kinds != kind)
            n = int(other[0]) if len(other) else len(kinds)
            end = (leaf + n) << shift
            if end > stop and stop != blocks.n_blocks:
                end = (leaf + n - 1) << shift  # the last leaf belongs to the range only in part
            return Slice(start, min(end, stop), kind)
        plain = (kinds == HOLE) | (kinds == UNIFORM)
        plain[0] = False
        cut = np.flatnonzero(plain[:_SLICE_LEAVES])
        n = int(cut[0]) if len(cut) else min(len(kinds), _SLICE_LEAVES)
        return Slice(start, min((leaf + n) << shift, stop), None)

    def stretch(self, start: int, stop: int) -> int:
        """Return where the first part of blocks `[start, stop)` ends that one change may cover.

        It holds at most as many leaves with entries as a slice, however far apart, and any number
        of others.

        Raises:
            StoreError: `stop` is beyond the end.
        """
        blocks = self._image.map
        self._check(start, stop)
        leaf = start >> blocks.leaf_shift
        last = min(((stop - 1) >> blocks.leaf_shift) + 1, leaf + _SCAN_LEAVES)
        kinds = blocks.states[leaf:last] & KIND
        with_entries = np.flatnonzero((kinds != HOLE) & (kinds != UNIFORM))
        if len(with_entries) > _SLICE_LEAVES:
            last = leaf + int(with_entries[_SLICE_LEAVES])
        return min(last << blocks.leaf_shift, stop)

    async def slices(self, start: int, stop: int) -> AsyncIterator[Slice]:
        """Yield the slices of blocks `[start, stop)`, with their leaves in memory."""
        while start < stop:
            part = self.next_slice(start, stop)
            if part.uniform is None:
                await self._image.load(part.start, part.stop)
                self._check(part.start, part.stop)
            yield part
            start = part.stop
            if start < stop:
                await self._image.core.host.sleep(0)

    def _check(self, start: int, stop: int) -> None:
        """Raise StoreError if the image was shrunk below block `stop`."""
        if stop > self._image.map.n_blocks:
            raise self._image.beyond_end(start << self._shift, (stop - start) << self._shift)

    async def extents(self, offset: int, length: int, max_extents: int) -> list[Extent]:
        """See Image.extents."""
        if not length:
            return []
        end = offset + length
        found: list[list[int]] = []  # [kind, first byte, last byte + 1]
        start, stop = offset >> self._shift, ((end - 1) >> self._shift) + 1
        async for part in self.slices(start, stop):
            self._image.check_there()  # or it is being emptied, and its holes are none
            for kind, first, last in self._kinds_of(part):
                low, high = max(first << self._shift, offset), min(last << self._shift, end)
                if found and found[-1][0] == kind:
                    found[-1][2] = high
                else:
                    found.append([kind, low, high])
            if len(found) > max_extents:
                break
        return [Extent(high - low, _KINDS[kind]) for kind, low, high in found[:max_extents]]

    def _kinds_of(self, part: Slice) -> list[tuple[int, int, int]]:
        """The stretches (kind, start, stop) in blocks of one slice, as indices of _KINDS."""
        if part.uniform is not None:
            return [(0 if part.uniform == HOLE else 1, part.start, part.stop)]
        locations = self._image.map.locations(part.start, part.stop)
        data = layout.holds_slot(locations) | layout.is_lost(locations)  # to be told by reading it
        kinds = data * 2 + layout.is_provisioned(locations)
        cuts = (np.flatnonzero(np.diff(kinds)) + 1).tolist()
        edges = [0, *cuts, len(kinds)]
        return [
            (int(kinds[a]), part.start + a, part.start + b) for a, b in itertools.pairwise(edges)
        ]
