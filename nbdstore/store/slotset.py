"""A set of slots that may be very large: one bit for each slot of the pool.

Owns the bits; memory is used only where there are some, so a set of a few slots costs next to
nothing, and one of all slots of a TiB 32 MiB.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nbdstore.store.layout import I64, U8, Bools
from nbdstore.store.lazyarray import LazyArray
from nbdstore.store.slots import Slots, bits_set, set_bits


class SlotSet:
    """Slots of one pool, in the regions of its free map."""

    def __init__(self, slots: Slots) -> None:
        self._region_slots = slots.region_slots
        self._bitmap: U8 = LazyArray((slots.n_regions * slots.region_slots // 8,), np.uint8).array
        self._is_used: Bools = LazyArray((slots.n_regions,), np.bool_).array

    def add(self, slots: I64) -> None:
        """Add `slots`, int64; those that are in the set stay."""
        set_bits(self._bitmap, slots)
        self._is_used[slots // self._region_slots] = True

    def __len__(self) -> int:
        return sum(int(np.bitwise_count(bits).sum()) for _, bits in self._regions())

    def __iter__(self) -> Iterator[I64]:
        """The slots of one region of the free map after another, ascending."""
        for region, bits in self._regions():
            yield bits_set(bits) + region * self._region_slots

    def _regions(self) -> Iterator[tuple[int, U8]]:
        n_bytes = self._region_slots // 8
        for region in np.flatnonzero(self._is_used).tolist():
            yield region, self._bitmap[region * n_bytes : (region + 1) * n_bytes]
