"""A set of slots that may be very large: one bit for each slot of the pool.

Owns the bits; memory is used only where there are some, so a set of a few slots costs next to
nothing, and one of all slots of a TiB 32 MiB.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nbdstore.store.layout import I64, U8
from nbdstore.store.lazyarray import LazyArray
from nbdstore.store.slots import Slots, bits_set, set_bits


class SlotSet:
    """Slots of one pool, in the regions of its free map."""

    def __init__(self, slots: Slots) -> None:
        self._region_slots = slots.region_slots
        self._bitmap: U8 = LazyArray((slots.n_regions * slots.region_slots // 8,), np.uint8).array
        self._regions: set[int] = set()

    def add(self, slots: I64) -> None:
        """Add `slots`, int64; those that are in the set stay."""
        if len(slots):
            set_bits(self._bitmap, slots)
            self._regions.update(np.unique(slots // self._region_slots).tolist())

    def __iter__(self) -> Iterator[I64]:
        """The slots of one region of the free map after another, ascending."""
        for region in sorted(self._regions):
            start, stop = (n * self._region_slots // 8 for n in (region, region + 1))
            yield bits_set(self._bitmap[start:stop]) + region * self._region_slots
