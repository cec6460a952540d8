"""Flattening: writing anew what a clone shares, so that all it holds is its own.

Owns the walk over one volume; what clients write meanwhile is its own already, and stays.  It can
be stopped at any moment: what was done is done, and another call goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from nbdstore.errors import StoreError
from nbdstore.store import layout
from nbdstore.store.layout import I64
from nbdstore.store.volume import Volume
from nbdstore.store.writing import Hold, Wait

_SLICE_LEAVES: Final = 16  # 16 MiB at 4 KiB blocks


async def own_everything(volume: Volume, progress: Callable[[int], None]) -> None:
    """Return with all blocks the volume's own, and all nodes when the next checkpoint is done.

    Arguments:
        progress: called with bytes of the volume that were gone through since the last call.

    Raises:
        NoSpace: the pool was full for longer than the options allow.
        Corruption, ReadFailed, WriteFailed, PoolFailed: of the disk.
    """
    leaf = 0
    while leaf < volume.map.n_leaves:
        stop = min(leaf + _SLICE_LEAVES, volume.map.n_leaves)
        if volume.map.states[leaf:stop].any():
            await _own_blocks(volume, leaf, stop)
            await _own_leaves(volume, leaf, stop)
            if volume.services.memory.wants_checkpoint:
                await volume.services.checkpointer.join()
        progress((stop - leaf) * volume.map.fanout * volume.block_size)
        leaf = stop
        await volume.core.host.sleep(0)


async def _own_blocks(volume: Volume, first: int, last: int) -> None:
    """Write those blocks of leaves `[first, last)` anew that are not the volume's own."""
    hold = Hold(volume)
    try:
        while True:
            start = first << volume.map.leaf_shift
            stop = min(last << volume.map.leaf_shift, volume.map.n_blocks)
            if start >= stop:  # it was shrunk
                return
            await volume.load(start, stop)
            if stop > volume.map.n_blocks:
                continue
            foreign = _foreign(volume, start, stop)
            if not len(foreign):
                return
            wait = await _rewrite(volume, foreign)
            if wait is not None:
                await volume.writing.wait_for(wait, hold, start, stop)
    finally:
        hold.end()


def _foreign(volume: Volume, start: int, stop: int) -> I64:
    """Those of blocks `[start, stop)` that hold data of older snapshots, ascending."""
    found = volume.map.locations(start, stop)
    own = layout.holds_slot_of_after(found, volume.kept_epoch)
    foreign: I64 = np.flatnonzero(layout.holds_slot(found) & ~own) + start
    return foreign


async def _rewrite(volume: Volume, blocks: I64) -> Wait | None:
    """Write `blocks` as they are, those that somebody changes meanwhile left out."""
    before = volume.map.entries[blocks, 0]
    size, contents = volume.block_size, list[memoryview]()
    end = volume.size
    for start, stop in layout.runs(blocks):
        offset = int(blocks[start]) * size
        length = min((stop - start) * size, end - offset)
        try:
            data = memoryview(b"".join(map(bytes, await volume.read(offset, length))))
        except StoreError:
            if volume.size >= end:  # it is not since it was shrunk that this cannot be read
                raise
        if volume.size < end:  # it was shrunk: the caller looks again at what is there
            return None
        contents += [data[at : at + size] for at in range(0, length, size)]
    volume.check_there()
    # What lies where it lay, no one else has written: a snapshot keeps that.
    same = volume.map.entries[blocks, 0] == before
    writes = [
        (block * size, data)
        for block, data, is_same in zip(blocks.tolist(), contents, same.tolist(), strict=True)
        if is_same
    ]
    # A volume may end within a block, which then is merged with what it holds.
    last, data = blocks.tolist()[-1], contents[-1]
    old = {last: (int(before[-1]), bytes(data).ljust(size, b"\0"))} if len(data) < size else {}
    return volume.writing.attempt(writes, old) if writes else None


async def _own_leaves(volume: Volume, first: int, last: int) -> None:
    """Have the next checkpoint write the nodes of leaves `[first, last)` that are not own."""
    shift = volume.map.leaf_shift
    await volume.load(first << shift, min(last << shift, volume.map.n_blocks))
    blocks = volume.map  # no await from here on
    blocks.touch(np.arange(first, min(last, blocks.n_leaves)))
