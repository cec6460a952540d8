"""The journal: a ring of sealed records, and what of it is durable.

Owns the file ``journal``: where records go, how they are sealed and found again.  What a record
says is records.py's.

Format: the file is a ring of `size` bytes, written full of zeros when the pool is made (a sync
into recycled space costs half of one into space that the filesystem must still map).  Offsets
count on over the laps; byte offset o lies at ``o % size``.  A record starts at a multiple of 64
and does not wrap: where it does not fit before the ring's end, it starts at the next lap.  After
every sync the next record starts at a multiple of 4096, so that nothing durable is ever rewritten.
A record is a header of 64 bytes and the payload, padded to 64:

=====  ===========  =======================================================================
bytes  field        meaning
=====  ===========  =======================================================================
8      magic        ``NBDSJRNL``
8      pool         first 8 bytes of the pool's uuid
8      seq          counts records, from 1, without a gap
8      durable_seq  all records up to this one, and the data they map, were durable when
                     this record was written
4      length       of the payload in bytes, without padding
20     zero
8      checksum     xxh3_64 of the 56 bytes before and the payload
=====  ===========  =======================================================================

Reading back, the record after one that ends at e starts at e rounded up to 64, or to 4096, or at
the next lap.  Where none of these holds the next seq, the log ends - unless a valid record with a
higher seq, which says that the missing one was durable, lies further on: that is damage.

Vouching: only a later record tells a damaged one from one that never got to the disk.  So after
each sync that made more records durable, an empty record is written that says so; it costs no
sync of its own.  After the server is killed, damage to any record that a flush covered is found.
After a loss of power, that of the last few seconds may be taken for unsynced ones: the empty
record gets to the disk with the next sync, which is never longer away than the sync interval.
Likewise an older copy of the whole file: one from before the last checkpoint lacks its mark
(superblock.py); a younger one cannot be told from a loss of power.
"""

from __future__ import annotations

import contextlib
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import xxhash

from nbdstore.errors import ReadFailed
from nbdstore.store.host import Buffer, Disk, File
from nbdstore.store.layout import JOURNAL_PAGE

MAGIC: Final = b"NBDSJRNL"
ALIGNMENT: Final = 64
_HEADER: Final = struct.Struct("<8sQQQI20x")
_CHECKSUM: Final = struct.Struct("<Q")
HEADER_SIZE: Final = _HEADER.size + _CHECKSUM.size
assert HEADER_SIZE == ALIGNMENT
_PADDING: Final = bytes(ALIGNMENT)
_SCAN_BYTES: Final = 1 << 20  # what a processor's cache holds: 8 MiB at a time take twice as long
_WINDOW_BYTES: Final = 1 << 20
_WIPE_BYTES: Final = 1 << 20


def align(offset: int, to: int) -> int:
    """Round `offset` up to a multiple of `to`."""
    return offset + -offset % to


@dataclass(frozen=True)
class Record:
    """A valid record: its place `[offset, end)`, sequence numbers and payload."""

    offset: int
    end: int
    seq: int
    durable_seq: int
    payload: memoryview


class Journal:
    """The writing end of the ring.

    Attributes:
        found_seq: the last record that was there when the pool was opened.
        seq: the last record written (to the page cache).
        durable_seq: all records up to it, with the data they map, are durable; goes into headers.
        content_seq: the last record written that is not empty; 0 = none yet.
        carried_durable_seq: what the newest record tells to be durable.
        tail: offset from which recovery would start: what lies before may be overwritten.
        head: offset where the next record goes.
        n_syncs: syncs so far.
    """

    def __init__(
        self, file: File, size: int, pool: uuid.UUID, *, seq: int, tail: int, head: int
    ) -> None:
        self._file = file
        self.size = size
        self._pool = pool_tag(pool)
        # A record that was torn may be followed by whole ones; none of them may ever seem to
        # follow a new one.  A lap holds fewer records than this step.
        self.found_seq = seq
        self._found_head = head
        self.seq = seq + size // ALIGNMENT + 1
        # Nothing, as long as that step is nowhere but in memory: a crash could make a claim of
        # this process look like one about records that never were.
        self.durable_seq = 0
        self.carried_durable_seq = 0
        self.content_seq = 0
        self._empty_end = -1
        self.tail = tail
        self.head = head
        self.n_syncs = 0

    @property
    def used(self) -> int:
        """Bytes between tail and head."""
        return self.head - self.tail

    @property
    def may_vouch(self) -> bool:
        """An empty record would tell of something durable that no record tells of yet, and fits."""
        told = self.carried_durable_seq
        return told < self.content_seq and told < self.durable_seq and self.room_for(0)

    def room_for(self, payload_bytes: int, spare: int = 0) -> bool:
        """Tell whether a record of `payload_bytes` fits, leaving `spare` bytes of the ring."""
        start = self._place(align(HEADER_SIZE + payload_bytes, ALIGNMENT))
        return start + HEADER_SIZE + payload_bytes + spare + JOURNAL_PAGE <= self.tail + self.size

    def append(self, *groups: bytes) -> int:
        """Write one record of `groups` to the page cache and return its seq.

        The caller has made sure of the room.

        Raises:
            WriteFailed: the pool must stop: what the ring holds now is not known.
        """
        payload = groups[0] if len(groups) == 1 else b"".join(groups)
        length = len(payload)
        seq = self.seq + 1
        record = self._seal_record(seq, payload)
        offset = self._place(len(record))
        self._file.pwritev([record], offset % self.size)
        self.seq = seq
        self.head = offset + len(record)
        self.carried_durable_seq = self.durable_seq
        if length:
            self.content_seq = seq
        else:
            self._empty_end = self.head
        return seq

    def _seal_record(self, seq: int, payload: bytes) -> bytes:
        """Put a record together: 0.3 us, and 0.6 with a block in it.

        Two copies by one call each cost a third of a buffer that is filled piece by piece.
        """
        header = _HEADER.pack(MAGIC, self._pool, seq, self.durable_seq, len(payload))
        checksum = _CHECKSUM.pack(xxhash.xxh3_64_intdigest(header + payload))
        return b"".join((header, checksum, payload, _PADDING[: -len(payload) % ALIGNMENT]))

    @property
    def ends_empty(self) -> bool:
        """The newest record is empty, and the next one will follow it at once."""
        return self._empty_end == self.head

    def seal(self) -> int:
        """Before a sync: keep what it will cover from being rewritten.

        Returns the durable_seq that the newest record carries: once this sync is done, recovery
        is sure to learn of it.
        """
        self.head = align(self.head, JOURNAL_PAGE)
        return self.carried_durable_seq

    async def sync(self, disk: Disk) -> None:
        """Make everything up to the seal durable (fdatasync(2))."""
        self.n_syncs += 1
        await disk.offload(self._file.fdatasync)

    def sync_in_place(self) -> None:
        """Like :meth:`sync`, without letting anybody else do anything meanwhile."""
        self.n_syncs += 1
        self._file.fdatasync()

    def make_whole(self, unreadable: Iterable[int]) -> None:
        """Write zeros where the file was cut off, and to the pages that begin at `unreadable`.

        What cannot be read is lost already; a disk puts a new sector in the place of a bad one
        when that is written.
        """
        format_ring(self._file, self.size, self._file.size)
        for start in unreadable:
            self._file.pwritev([bytes(min(JOURNAL_PAGE, self.size - start))], start)

    def begin_without_checkpoint(self) -> None:
        """After recovery, where no checkpoint can be written: go on behind the last record.

        Instead of stepping over the numbers of records that may lie beyond it, wipe them.  The
        data that the records found map must be durable by now.
        """
        self.seq = self.durable_seq = self.found_seq
        # The last page of the lap holds no record but the mark before the tail, which stays; the
        # mark of the checkpoint that failed goes.
        self.head = self._found_head
        start, stop = self.head, self.tail + self.size - JOURNAL_PAGE
        while start < stop:
            place = start % self.size
            n = min(stop - start, self.size - place, _WIPE_BYTES)
            self._file.pwritev([bytes(n)], place)
            start += n
        self._file.fdatasync()

    def release(self, tail: int) -> None:
        """Let the ring overwrite what lies before `tail`: a checkpoint has made it dispensable."""
        assert self.tail <= tail <= self.head
        self.tail = tail

    def _place(self, total: int) -> int:
        """Where a record of `total` bytes goes: at the head, or on the next lap."""
        left = self.size - self.head % self.size
        return self.head if total <= left else self.head + left


def pool_tag(pool: uuid.UUID) -> int:
    """The first 8 bytes of the pool's uuid, as they stand in every record."""
    return int.from_bytes(pool.bytes[:8], "little")


def _checksum(record: memoryview, length: int) -> int:
    digest = xxhash.xxh3_64(record[: _HEADER.size])
    digest.update(record[HEADER_SIZE : HEADER_SIZE + length])
    return digest.intdigest()


def format_ring(file: File, size: int, start: int = 0) -> None:
    """Write zeros to `[start, size)` of a ring; the caller syncs."""
    zeros = bytes(_WIPE_BYTES)
    for offset in range(start, size, len(zeros)):
        file.pwritev([zeros[: min(len(zeros), size - offset)]], offset)


class Reader:
    """The reading end: the records from a known place on, in order.

    It reads records past the page cache, where some may be that a failed sync has kept from the
    disk for good, and which therefore nothing may be built on.

    Arguments:
        on_unreadable: whom to tell of pages that the disk cannot read; None = raise.

    Attributes:
        unreadable: where in the file such pages begin.
    """

    def __init__(
        self,
        file: File,
        size: int,
        pool: uuid.UUID,
        on_unreadable: Callable[[ReadFailed], None] | None = None,
    ) -> None:
        self._file = file
        self._on_unreadable = on_unreadable
        self.unreadable: set[int] = set()
        self._size = size
        self._pool = pool_tag(pool)
        self._window = b""
        self._window_at = 0

    def records(self, offset: int, seq: int) -> Iterator[Record]:
        """Yield the valid records from `offset` on, the first of which has `seq`."""
        while (record := self._find(offset, seq)) is not None:
            yield record
            offset, seq = record.end, seq + 1

    def has_mark(self, end: int, seq: int) -> bool:
        """Tell whether record `seq`, an empty one, ends at offset `end`."""
        record = self._parse(end - HEADER_SIZE)
        return record is not None and (record.seq, record.end) == (seq, end)

    def damage_after(self, offset: int, seq: int) -> Record | None:
        """Return a valid record that says that the missing record `seq` had been durable.

        Arguments:
            offset: where the log ended; the lap from there on is searched.
            seq: the first record that was not found.
        """
        for at in self._claims(offset, seq):
            record = self._parse(at)
            if record is not None:
                return record
        return None

    def _find(self, offset: int, seq: int) -> Record | None:
        lap_end = offset + -offset % self._size
        for at in dict.fromkeys((offset, align(offset, JOURNAL_PAGE), lap_end)):
            record = self._parse(at)
            if record is not None and record.seq == seq:
                return record
        return None

    def _parse(self, offset: int) -> Record | None:
        """Return the record at `offset`, or None if there is no valid one."""
        place = offset % self._size
        raw = self._read(HEADER_SIZE, place)
        if len(raw) < HEADER_SIZE or not raw.startswith(MAGIC):
            return None
        _, pool, seq, durable_seq, length = _HEADER.unpack_from(raw)
        if pool != self._pool or length > self._size - place - HEADER_SIZE:
            return None
        whole = memoryview(self._read(HEADER_SIZE + length, place))
        (expected,) = _CHECKSUM.unpack_from(whole, _HEADER.size)
        if len(whole) < HEADER_SIZE + length or _checksum(whole, length) != expected:
            return None
        end = offset + align(HEADER_SIZE + length, ALIGNMENT)
        return Record(offset, end, seq, durable_seq, whole[HEADER_SIZE:])

    def _claims(self, offset: int, seq: int) -> Iterator[int]:
        """Yield the offsets, one lap from `offset` on, of what seems to vouch for record `seq`.

        A lap of 128 MiB can hold a million records, so one numpy expression looks at a MiB of them.

        What is in the page cache is taken from there, since 128 MiB are 10 ms then, not 100: no
        claim that the disk has is missed by that.  The cache differs from the disk where a write
        has not got there, and what that one is to overwrite is older than the tail, and so vouches
        for nothing after it.  A claim that only the cache has is none: who looks at it closely
        does so past the cache.
        """
        magic = np.frombuffer(MAGIC, "<u8")[0]
        start = align(offset, ALIGNMENT)
        at = start
        while at < start + self._size:
            raw = self._read_any(min(_SCAN_BYTES, self._size - at % self._size), at % self._size)
            whole = len(raw) - len(raw) % ALIGNMENT
            if not whole:
                return
            rows = np.frombuffer(raw, "<u8", whole // 8).reshape(-1, ALIGNMENT // 8)
            records = np.flatnonzero(rows[:, 0] == magic)
            _, pools, seqs, durable_seqs = rows[records, :4].T
            claims = (
                (pools == np.uint64(self._pool))
                & (seqs > np.uint64(seq))
                & (durable_seqs >= np.uint64(seq))
            )
            for index in records[claims].tolist():
                yield at + index * ALIGNMENT
            at += whole

    def _read_any(self, length: int, place: int) -> Buffer:
        """Read a part of the file, from the page cache if all of it is there."""
        buffer = bytearray(length)
        with contextlib.suppress(ReadFailed):  # who reads past the cache knows what to make of it
            if self._file.preadv_cached(buffer, place) == length:
                return buffer
        return self._read(length, place)

    def _read(self, length: int, place: int) -> bytes:
        """Read a part of the file, through a window of whole pages."""
        start, stop = place - place % JOURNAL_PAGE, align(place + length, JOURNAL_PAGE)
        if start < self._window_at or stop > self._window_at + len(self._window):
            self._window = self._read_pages(max(stop - start, _WINDOW_BYTES), start)
            self._window_at = start
        return self._window[place - self._window_at : place - self._window_at + length]

    def _read_pages(self, length: int, start: int) -> bytes:
        """Read; tell of what cannot be read, if somebody wants to know, and make zeros of it."""
        try:
            return self._file.pread_direct(length, start)
        except ReadFailed as error:
            if self._on_unreadable is None:
                raise
            if length <= JOURNAL_PAGE:
                self._on_unreadable(error)
                self.unreadable.add(start)
                return bytes(length)
        half = align(length // 2, JOURNAL_PAGE)
        return self._read_pages(half, start) + self._read_pages(length - half, start + half)
