"""What the bytes of a pool mean: files, numbers and the location word.

Owns every number of the on-disk format that more than one module needs; does no I/O.

A pool is a directory::

    lock           held (flock) by the one process that serves the pool; holds its pid
    super          the superblock, 4 KiB, twice                       (superblock.py)
    journal        a ring of records, written full of zeros when made (journal.py, records.py)
    data           slots of one block each, sparse; slot s is at byte s * block_size
    control.sock   the control API of the server that holds the pool  (not the store's)

Everything but the first three files lies in slots of ``data``: the blocks of volumes, the nodes
of their maps, the free map and the catalogue of volumes.  A pointer to a slot is an **entry** of
two little-endian u64: a **location** and the xxh3_64 checksum of the whole block it points to, so
a damaged block cannot vouch for itself.  A location packs

    bits 63..40   birth epoch: the volume's epoch when the block was written (24 bits)
    bits 39..0    slot; 0 = HOLE (slot 0 is never handed out), all ones = PROVISIONED,
                  all ones but the last = LOST

HOLE reads as zeros and holds no space.  PROVISIONED reads as zeros and has space set aside: a
later write to it finds a slot whatever else fills the pool.  LOST holds no space and cannot be
read until it is written or made a hole: repair puts it where the way to the data was damaged.  A
HOLE's location is the word 0, LOST's the slot alone; a PROVISIONED location carries its birth
epoch; the checksum of all three is 0.  In a node above the leaves they mean that of everything
below, up to the volume's end; when the volume grows, LOST grows with it as far as a node reaches.

Versions: FORMAT_VERSION changes only if nothing older could even say what it sees.  Everything
else is a feature flag: a pool with an unknown bit in ``incompatible`` is not opened, one with an
unknown bit in ``readonly_compatible`` is opened for reading only, ``compatible`` bits are ignored
by those who do not know them.

===============  ===============================================================================
incompatible
bit 0            SNAPSHOTS: there may be snapshots, clones and volumes in the trash, so that not
                 every slot that a volume gives up is free.  Every pool that a version which knows
                 them has opened for writing has it.
===============  ===============================================================================
"""

from __future__ import annotations

import functools
from typing import Final

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]
SlotSequence = I64 | list[int] | range
"""Slots in the form that suits how many they are, and how they lie."""

FORMAT_VERSION: Final = 1
FEATURES_COMPATIBLE: Final = 0
FEATURES_READONLY_COMPATIBLE: Final = 0
SNAPSHOTS: Final = 1
FEATURES_INCOMPATIBLE: Final = SNAPSHOTS

MIN_BLOCK_SIZE: Final = 4096  # a leaf of the map is then a page of memory, evicted by itself
MAX_BLOCK_SIZE: Final = 65536
ENTRY_SIZE: Final = 16

SLOT_BITS: Final = 40
SLOT_MASK: Final = (1 << SLOT_BITS) - 1
MAX_EPOCH: Final = (1 << 24) - 1
HOLE: Final = 0
PROVISIONED: Final = SLOT_MASK
LOST: Final = SLOT_MASK - 1
MAX_SLOTS: Final = SLOT_MASK - 1

NP_SLOT_MASK: Final = np.uint64(SLOT_MASK)
NP_SLOT_BITS: Final = np.uint64(SLOT_BITS)
_NP_LOST: Final = np.uint64(LOST)

MIN_CAPACITY: Final = 16 << 20
MIN_JOURNAL_SIZE: Final = 1 << 20
MAX_JOURNAL_SIZE: Final = 64 << 30
DEFAULT_JOURNAL_SIZE: Final = 128 << 20

SECTOR: Final = 512
MAX_VOLUME_SIZE: Final = 256 << 40  # 1 TiB of address space for the map at 4 KiB blocks

JOURNAL_PAGE: Final = 4096  # what a sync has covered is never rewritten within one of these


@functools.lru_cache(8)  # few: those of 32 MiB take 1 MiB, and clients choose the lengths
def _cuts(length: int, size: int) -> list[slice]:
    return [slice(at, at + size) for at in range(0, length, size)]


def split(data: memoryview, size: int) -> list[memoryview]:
    """Cut `data` into blocks of `size` bytes; 0.1 us for each, half of what a loop takes."""
    return [*map(data.__getitem__, _cuts(len(data), size))]


def checksums(data: memoryview, size: int) -> list[int]:
    """Return the checksum of each block of `size` bytes; 0.2 us for each of 4 KiB."""
    return [xxh3_64_intdigest(data[cut]) for cut in _cuts(len(data), size)]


def slots_of(locations: U64) -> I64:
    """Return the slots of `locations` (uint64, any shape) as int64, fit for indexing."""
    return (locations & NP_SLOT_MASK).view(np.int64)


def pack_location(slot: int, epoch: int) -> int:
    """Return the location of `slot` born in `epoch`."""
    return epoch << SLOT_BITS | slot


def holds_slot(locations: U64) -> Bools:
    """Tell for each location whether it names a slot: it is not HOLE, PROVISIONED or LOST."""
    slots = locations & NP_SLOT_MASK
    held: Bools = (slots != 0) & (slots < _NP_LOST)
    return held


def holds_slot_of_after(locations: U64, epoch: int) -> Bools:
    """Tell for each location whether it names a slot, and was born after `epoch`."""
    held: Bools = holds_slot(locations) & (locations >> NP_SLOT_BITS > np.uint64(epoch))
    return held


def is_provisioned(locations: U64) -> Bools:
    """Tell for each location whether it is PROVISIONED, of whatever epoch."""
    found: Bools = (locations & NP_SLOT_MASK) == NP_SLOT_MASK
    return found


def runs_of_few(slots: list[int]) -> list[tuple[int, int]]:
    """Like :func:`runs`, of so few slots that an array would cost more than it saves."""
    found: list[tuple[int, int]] = []
    start = 0
    for at in range(1, len(slots) + 1):
        if at == len(slots) or slots[at] != slots[at - 1] + 1:
            found.append((start, at))
            start = at
    return found


def is_lost(locations: U64) -> Bools:
    """Tell for each location whether it is LOST."""
    found: Bools = (locations & NP_SLOT_MASK) == _NP_LOST
    return found


@functools.cache
def lost_node(block_size: int) -> bytes:
    """The bytes of a node all whose entries are LOST: what a LOST pointer points to."""
    return np.array([[LOST, 0]] * (block_size // ENTRY_SIZE), "<u8").tobytes()


def runs(slots: I64) -> list[tuple[int, int]]:
    """Return the runs `[start, stop)` of indices over which `slots` counts up by one."""
    n = len(slots)
    if n == 0:
        return []
    joined = slots[1:] - slots[:-1] == 1
    if np.count_nonzero(joined) == n - 1:
        return [(0, n)]
    cuts = (np.flatnonzero(~joined) + 1).tolist()
    return list(zip([0, *cuts], [*cuts, n], strict=True))
