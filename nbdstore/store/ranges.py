"""Changes of ranges of any length: trim and write_zeroes.

Owns these; their cost goes with the leaves of the map that hold something, not with blocks
(extents.py).  Long ranges are done in slices, each a journal record of its own, with the event
loop let in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from nbdstore.store import layout, records
from nbdstore.store.blockmap import HOLE, KIND, UNIFORM
from nbdstore.store.records import Op
from nbdstore.store.writing import Hold

if TYPE_CHECKING:
    from nbdstore.store.volume import Volume

_RECORD_BYTES: Final = 64
_MANY_FREED: Final = (
    1 << 18
)  # slots: what holds up the event loop for 20 ms when it is usable again


class Ranges:
    """The range operations of one volume."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._core = volume.core
        self._size = volume.block_size
        self._shift = self._size.bit_length() - 1
        self._contents = volume.contents

    # -- trim and write_zeroes --------------------------------------------------------------

    async def trim(self, offset: int, length: int) -> None:
        """See Volume.trim."""
        start = -(-offset // self._size)
        end = offset + length
        stop = self._volume.map.n_blocks if end == self._volume.size else end // self._size
        if start < stop:
            await self.clear(start, stop)

    async def write_zeroes(self, offset: int, length: int, *, no_hole: bool) -> None:
        """See Volume.write_zeroes."""
        end = offset + length
        start = -(-offset // self._size)
        stop = self._volume.map.n_blocks if end == self._volume.size else end // self._size
        if start >= stop:
            return await self._zero_part(offset, length, no_hole)
        if offset < start * self._size:
            await self._zero_part(offset, start * self._size - offset, no_hole)
        if stop * self._size < end:
            await self._zero_part(stop * self._size, end - stop * self._size, no_hole)
        if no_hole:
            await self._provision(start, stop)
        else:
            await self.clear(start, stop)

    async def _zero_part(self, offset: int, length: int, no_hole: bool) -> None:
        """Zero less than two blocks by merging; nothing to do where they hold nothing."""
        while length:
            part = min(length, self._size - offset % self._size)
            block = offset >> self._shift
            await self._volume.load(block, block + 1)
            self._volume.check_range(offset, part)
            location = int(self._volume.map.locations(block, block + 1)[0])
            if location & layout.SLOT_MASK not in (layout.HOLE, layout.PROVISIONED):
                await self._volume.writing.write(offset, bytes(part))
            elif location == layout.HOLE and no_hole:
                await self._provision(block, block + 1)
            offset += part
            length -= part

    async def clear(self, start: int, stop: int, *, emptying: bool = False) -> None:
        """Make holes of blocks `[start, stop)`; `emptying` a deleted volume is no mistake."""
        while start < stop:
            end = self._contents.stretch(start, stop)
            await self._wait_for_journal()
            while not self._change(start, end, Op.CLEAR, emptying=emptying):
                await self._volume.load(start, end)
                await self._wait_for_journal()  # others may have taken what room there was
            if self._core.slots.n_quarantined > _MANY_FREED:
                await self._volume.services.committer.settle()
            start = end
            if start < stop:
                await self._core.host.sleep(0)

    async def _provision(self, start: int, stop: int) -> None:
        """Make blocks `[start, stop)` read as zeros, with space set aside."""
        async for part in self._contents.slices(start, stop):
            if part.uniform == UNIFORM:
                continue
            hold = Hold(self._volume)
            try:
                await self._wait_for_journal()
                while not self._try_to_provision(part.start, part.stop):
                    if len(self._volume.map.missing(part.start, part.stop)):
                        await self._volume.load(part.start, part.stop)
                    else:
                        await hold.wait_for_slots()
                    await self._wait_for_journal()
            finally:
                hold.end()

    def _try_to_provision(self, start: int, stop: int) -> bool:
        """Do one slice; False, having done nothing, if a leaf is not in memory or space lacks.

        Only what holds nothing needs space: data gives up a slot for it, and the rest has it.
        """
        if len(self._volume.map.missing(start, stop)):
            return False
        uniform = self._contents.next_slice(start, stop)
        if uniform.uniform == HOLE and uniform.stop >= stop:
            n_holes = stop - start
        else:
            locations = self._volume.map.locations(start, stop)
            n_holes = int(np.count_nonzero((locations == 0) | layout.is_lost(locations)))
        return self._core.may_set_aside(n_holes) and self._change(start, stop, Op.PROVISION)

    async def _wait_for_journal(self) -> None:
        """Return with room for a record in the journal, and no await after that."""
        hold = Hold(self._volume)
        try:
            while not self._core.journal.room_for(_RECORD_BYTES):
                await hold.wait_for_journal()
        finally:
            hold.end()

    def _change(self, start: int, stop: int, op: Op, *, emptying: bool = False) -> bool:
        """Journal and do one slice; False, having done nothing, if a leaf is not in memory."""
        volume = self._volume
        if not emptying:
            volume.check_range(start << self._shift, 0)
        stop = min(stop, volume.map.n_blocks)
        if len(volume.map.missing(start, stop)):
            return False
        if change_needed(volume, start, stop, op):
            seq = self._core.append(records.range_group(op, volume.id, [(start, stop)]))
            volume.last_seq = seq
            apply_range(volume, start, stop, op, seq)
        return True


def change_needed(volume: Volume, start: int, stop: int, op: Op) -> bool:
    """Tell whether CLEAR or PROVISION of blocks `[start, stop)` would change anything."""
    first, last = volume.map.leaf_range(start, stop)
    wanted = HOLE if op is Op.CLEAR else UNIFORM
    return bool((volume.map.states[first:last] & KIND != wanted).any())


def apply_range(volume: Volume, start: int, stop: int, op: Op, seq: int) -> None:
    """Switch the map of blocks `[start, stop)`, none STORED, as record `seq` says.

    Recovery does the same with the same record.
    """
    blocks = volume.map
    fanout, shift = blocks.fanout, blocks.leaf_shift
    first_whole = -(-start // fanout)
    last_whole = stop // fanout if stop != blocks.n_blocks else blocks.n_leaves
    if first_whole > last_whole:  # both ends lie within one leaf
        _apply_part(volume, start, stop, op, seq)
        return
    if start < first_whole << shift:
        _apply_part(volume, start, min(first_whole << shift, stop), op, seq)
    if last_whole << shift < stop:
        _apply_part(volume, last_whole << shift, stop, op, seq)
    _apply_leaves(volume, first_whole, last_whole, op, seq)


def _apply_part(volume: Volume, start: int, stop: int, op: Op, seq: int) -> None:
    """Change blocks within one leaf, entry by entry."""
    blocks = volume.map
    blocks.make_writable(np.array([start], np.int64))
    old = blocks.entries[start:stop, 0].copy()
    blocks.entries[start:stop, 1] = 0
    if op is Op.CLEAR:
        blocks.entries[start:stop, 0] = 0
        volume.release(old, seq)
    else:
        blocks.entries[start:stop, 0] = layout.pack_location(layout.PROVISIONED, volume.info.epoch)
        volume.release(old, seq, n_provisioned=stop - start)


def _apply_leaves(volume: Volume, first: int, last: int, op: Op, seq: int) -> None:
    """Change leaves `[first, last)` as a whole; uniform ones cost nothing each."""
    blocks = volume.map
    wanted = HOLE if op is Op.CLEAR else UNIFORM
    kinds = blocks.states[first:last] & KIND
    leaves = np.flatnonzero(kinds != wanted) + first
    if not len(leaves):
        return
    n_after = 0 if op is Op.CLEAR else _blocks_in(volume, leaves)
    resident = leaves[(kinds[leaves - first] != HOLE) & (kinds[leaves - first] != UNIFORM)]
    uniform = leaves[kinds[leaves - first] == UNIFORM]
    old = blocks.entries.reshape(-1, blocks.fanout, 2)[resident, :, 0].reshape(-1)
    volume.release(old, seq, n_provisioned=n_after)
    n_promised = _blocks_in(volume, uniform)
    volume.info.n_provisioned -= n_promised
    volume.core.slots.n_set_aside -= n_promised
    if op is Op.CLEAR:
        blocks.set_hole(leaves)
    else:
        blocks.set_provisioned(leaves, volume.info.epoch)


def _blocks_in(volume: Volume, leaves: np.ndarray[tuple[int], np.dtype[np.int64]]) -> int:
    """How many blocks `leaves` have; the volume's last leaf may be short."""
    if not len(leaves):
        return 0
    blocks = volume.map
    beyond = blocks.n_leaves * blocks.fanout - blocks.n_blocks
    has_last = int(leaves[-1]) == blocks.n_leaves - 1
    return len(leaves) * blocks.fanout - (beyond if has_last else 0)
