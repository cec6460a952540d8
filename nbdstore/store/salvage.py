"""Salvage: reading what is intact of a pool, however damaged, without writing a byte of it.

Owns a pool that is open for reading only, and the copying of what can be read.  Opening does what
recovery does, in memory, and goes on where recovery gives up: without what a damaged journal has
lost, and without what is below a damaged node of a map.  What is lost is an error to read, never
zeros and never older data, with one exception that is told: if the journal is damaged, all volumes
are as they were before the damaged record.  Volumes in the trash are as intact as others: each is
called ``NAME~ID``, which no other volume can be, by the id that `nbdstore trash` tells.

It needs one whole superblock and one whole copy of the catalogue: nothing else says which blocks
are whose.  The directory may be read-only; a pool that is being served is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from xxhash import xxh3_64_intdigest

from nbdstore.errors import Corruption, NotFound, ReadFailed, WriteFailed
from nbdstore.store import layout, recovery
from nbdstore.store.blockmap import KIND, RESIDENT, UNIFORM
from nbdstore.store.core import PoolOptions
from nbdstore.store.host import Buffer, File, Host
from nbdstore.store.image import Image
from nbdstore.store.layout import I64
from nbdstore.store.local_host import LOCAL
from nbdstore.store.mapmemory import load_now
from nbdstore.store.registry import Registry
from nbdstore.store.snapshot import Snapshot
from nbdstore.store.volume import Volume

_PIECE_BYTES: Final = 1 << 20  # read at once, and the most that is yielded at once


@dataclass(frozen=True)
class Intact:
    """Data of a volume that stands at byte `offset`."""

    offset: int
    data: memoryview


@dataclass(frozen=True)
class Lost:
    """Bytes `[start, stop)` of a volume that cannot be read, and why."""

    start: int
    stop: int
    reason: str


class SalvagedPool:
    """A pool that is open for reading only.

    Attributes:
        volumes: by name, those in the trash as ``NAME~ID``; reading what is lost of them, or of
            their snapshots, raises Corruption or ReadFailed, writing WriteFailed.
        images: the same, and snapshots as ``VOLUME@NAME``.
        faults: what is wrong with the pool as far as opening, and reading since, has found; by
            what they say.
        journal_damaged: the volumes are as they were before the damage to the journal.
        dropped: volumes without unsynced writes that a crash took, as after any recovery.
    """

    def __init__(self, directory: Path, *, host: Host = LOCAL) -> None:
        """Open the pool in `directory`.

        Raises:
            PoolLocked: it is being served.
            PoolFormatError: there is none, or of a format not known here.
            Corruption, ReadFailed: no superblock, or no copy of the catalogue, is whole.
        """
        self.directory = directory
        self.faults: dict[str, Corruption | ReadFailed] = {}
        self._newest_fault = ""
        self.journal_damaged = False
        self._disk = host.disk(directory, read_only=True)
        try:
            self._disk.lock()
            opened = self._open(host)
        except BaseException:
            self._disk.close()
            raise
        self._core = opened.services.core
        self._core.data = _Overlaid(self._core.data, opened.inline, self._core.block_size)
        self.volumes = {**opened.registry.by_name, **_out_of_trash(opened.registry)}
        self.images: dict[str, Image] = {**self.volumes}
        for volume in self.volumes.values():
            self.images |= {found.name: found for found in volume.snapshots.values()}
        for volume in opened.registry.by_id.values():
            volume.durable_seq = volume.last_seq  # a flush has nothing to do
        self.faults |= {_told(fault): fault for fault in opened.report.spare_faults}
        self.dropped = [opened.registry.by_id[n].name for n in opened.report.dropped]

    def _open(self, host: Host) -> recovery.Opened:
        damage = recovery.OnDamages(self._journal_damaged, self._add, lambda _fault: None)
        return recovery.open_parts(host, self._disk, PoolOptions(), damage=damage)

    def _journal_damaged(self, fault: Corruption | ReadFailed) -> None:
        self._add(fault)
        self.journal_damaged = True

    def _add(self, fault: Corruption | ReadFailed) -> None:
        self._newest_fault = _told(fault)
        self.faults[self._newest_fault] = fault

    def close(self) -> None:
        """Let go of the pool."""
        self._disk.close()

    def choose(self, names: Sequence[str]) -> None:
        """Keep the volumes and snapshots called `names` alone; of a snapshot, its volume is kept.

        Raises:
            NotFound: there is no such one.
        """
        for name in names:
            if name not in self.images:
                what = "snapshot" if "@" in name else "volume"
                raise NotFound(f"there is no {what} {name!r} in pool {self.directory}")
        self.images = {name: self.images[name] for name in names}
        kept = {name.partition("@")[0] for name in names}
        self.volumes = {name: volume for name, volume in self.volumes.items() if name in kept}

    # -- copying ----------------------------------------------------------------------------

    def contents(self, volume: Image) -> Iterator[Intact | Lost]:
        """Yield what `volume` holds, in ascending order; the rest is zeros."""
        if isinstance(volume, Snapshot) and not volume.is_open:
            volume.open_now()
        last: Lost | None = None
        for part in self._parts(volume):
            if isinstance(part, Lost) and last is not None and last.stop == part.start:
                last = Lost(last.start, part.stop, last.reason)
                continue
            if last is not None:
                yield last
            last = part if isinstance(part, Lost) else None
            if last is None:
                yield part
        if last is not None:
            yield last

    def _parts(self, volume: Image) -> Iterator[Intact | Lost]:
        blocks = volume.map
        for first, last, is_lost in blocks.leaves_in_use():
            start = first << blocks.leaf_shift
            stop = min(last << blocks.leaf_shift, blocks.n_blocks)
            if is_lost:
                yield self._lost(volume, start, stop, "below a damaged node of its map")
            elif blocks.state_bytes[first] & KIND != UNIFORM:
                yield from self._leaf(volume, start, stop)

    def _leaf(self, volume: Image, start: int, stop: int) -> Iterator[Intact | Lost]:
        """Yield what blocks `[start, stop)`, of one leaf, hold."""
        blocks = volume.map
        leaf = start >> blocks.leaf_shift
        self._newest_fault = ""
        load_now(self._core, blocks, start, start + 1, volume.name)
        reason = self._newest_fault or "the way to it was damaged"
        locations = blocks.locations(start, stop)
        lost, held = layout.is_lost(locations), layout.holds_slot(locations)
        kinds = lost * 1 + held * 2
        edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), stop - start]
        for first, end in itertools.pairwise(edges):
            if lost[first]:
                yield self._lost(volume, start + first, start + end, reason)
            elif held[first]:
                yield from self._data(volume, start + first, layout.slots_of(locations[first:end]))
        if blocks.state_bytes[leaf] == RESIDENT:
            blocks.evict_leaf(leaf)

    def _lost(self, volume: Image, start: int, stop: int, reason: str) -> Lost:
        size = volume.block_size
        return Lost(start * size, min(stop * size, volume.size), reason)

    def _data(self, volume: Image, start: int, slots: I64) -> Iterator[Intact | Lost]:
        """Yield blocks from `start` on, which lie in `slots`: runs of intact ones, and others."""
        size = volume.block_size
        for first, stop in _pieces(layout.runs(slots), _PIECE_BYTES // size):
            raw = self._read(int(slots[first]) * size, (stop - first) * size)
            at = first
            for index in range(first, stop):
                block = start + index
                checksum = volume.map.words[2 * block + 1]
                view = raw[(index - first) * size :][:size]
                if len(view) == size and xxh3_64_intdigest(view) == checksum:
                    continue
                yield from self._intact(volume, start + at, raw[(at - first) * size :], index - at)
                yield self._again(volume, block, int(slots[index]))
                at = index + 1
            yield from self._intact(volume, start + at, raw[(at - first) * size :], stop - at)

    def _read(self, offset: int, length: int) -> memoryview:
        """Read a run; of one that cannot be read nothing, so that each block is tried."""
        try:
            return memoryview(self._core.data.pread(length, offset))
        except ReadFailed:
            return memoryview(b"")

    def _intact(
        self, volume: Image, block: int, raw: memoryview, n_blocks: int
    ) -> Iterator[Intact]:
        if n_blocks:
            offset = block * volume.block_size
            yield Intact(offset, raw[: min(n_blocks * volume.block_size, volume.size - offset)])

    def _again(self, volume: Image, block: int, slot: int) -> Intact | Lost:
        """Read one block by itself, past the page cache."""
        what = f"{volume.kind} {volume.name} at byte {block * volume.block_size}"
        try:
            raw = self._core.reread_block(slot, volume.map.words[2 * block + 1], what)
        except (Corruption, ReadFailed) as error:
            return self._lost(volume, block, block + 1, _told(error))
        return next(self._intact(volume, block, memoryview(raw), 1))


def _out_of_trash(registry: Registry) -> dict[str, Volume]:
    """Return the volumes in the trash, each under a name of its own from now on."""
    found = {}
    for volume in registry.by_id.values():
        if volume.info.trashed and not volume.info.deleted:
            volume.info.name = f"{volume.info.name}~{volume.id}"
            found[volume.info.name] = volume
    return found


def _told(error: Corruption | ReadFailed) -> str:
    """What is wrong, without the advice, which would be the same of each."""
    return error.fault if isinstance(error, Corruption) else str(error)


def _pieces(runs: list[tuple[int, int]], most: int) -> Iterator[tuple[int, int]]:
    """Cut runs `[start, stop)` into such of at most `most`."""
    for start, stop in runs:
        for at in range(start, stop, most):
            yield at, min(at + most, stop)


class _Overlaid:
    """The file ``data`` for reading, with the blocks whose only copy may be in the journal.

    Arguments:
        inline: blocks by slot.
    """

    def __init__(self, file: File, inline: dict[int, memoryview], block_size: int) -> None:
        self.name = file.name
        self._file = file
        self._inline = inline
        self._slots = np.sort(np.fromiter(inline, np.int64))
        self._block_size = block_size

    @property
    def size(self) -> int:
        return self._file.size

    @property
    def allocated(self) -> int:
        return self._file.allocated

    def pread(self, length: int, offset: int) -> bytes:
        return self._read(self._file.pread, length, offset)

    def pread_direct(self, length: int, offset: int) -> bytes:
        return self._read(self._file.pread_direct, length, offset)

    def _read(self, pread: Callable[[int, int], bytes], length: int, offset: int) -> bytes:
        size = self._block_size
        first, last = np.searchsorted(self._slots, [offset // size, -(-(offset + length) // size)])
        if first == last:
            return pread(length, offset)
        try:
            raw = pread(length, offset)
        except ReadFailed:
            if (last - first) * size < length:
                raise
            raw = b""  # the journal has all of it
        buffer = bytearray(raw.ljust(length, b"\0"))
        end = len(raw)
        for slot in self._slots[first:last].tolist():
            at = slot * size - offset
            buffer[at : at + size] = self._inline[slot]
            end = max(end, at + size)
        return bytes(buffer[:end])

    def preadv(self, buffer: Buffer, offset: int) -> int:
        view = memoryview(buffer)
        found = self.pread(len(view), offset)
        view[: len(found)] = found
        return len(found)

    def preadv_cached(self, buffer: Buffer, offset: int) -> int:
        return -1

    def preadv_cached_all(
        self, parts: Sequence[Sequence[Buffer]], offsets: Sequence[int], length: int
    ) -> bool:
        return False

    def will_need(self, offset: int, length: int) -> None:
        self._file.will_need(offset, length)

    def held(self, offset: int, length: int) -> list[tuple[int, int]]:
        return self._file.held(offset, length)

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        raise _refusal()

    def fdatasync(self) -> None:
        raise _refusal()

    def punch(self, offset: int, length: int) -> bool:
        raise _refusal()

    def truncate(self, size: int) -> None:
        raise _refusal()


def _refusal() -> WriteFailed:
    return WriteFailed("the pool is open for salvage: nothing may be written")
