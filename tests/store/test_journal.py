"""The journal ring: what is appended is read back, whatever lies around it."""

from __future__ import annotations

import random
import struct
import uuid
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdstore.errors import ReadFailed
from nbdstore.store.host import Buffer, Disk, File
from nbdstore.store.journal import ALIGNMENT, HEADER_SIZE, Journal, Reader, Record, format_ring
from nbdstore.store.layout import JOURNAL_PAGE
from tests.store.memory_file import MemoryFile

SIZE = 64 << 10
POOL = uuid.UUID(int=0xABCDEF << 100 | 5)
SEQ = 1  # of the first record


class Ring:
    """A journal with both its ends, on a file in memory."""

    def __init__(self, size: int = SIZE, *, at: int = 0) -> None:
        self.memory = MemoryFile("journal")
        format_ring(cast(File, self.memory), size)
        self.journal = Journal(cast(File, self.memory), size, POOL, seq=0, tail=at, head=at)
        self.journal.seq = self.journal.durable_seq = SEQ - 1  # as in a new pool
        self.size = size
        self.start, self.first_seq = at, SEQ

    def append(self, *payloads: bytes) -> int:
        assert self.journal.room_for(sum(map(len, payloads)))
        return self.journal.append(*payloads)

    def sync(self) -> None:
        """Seal, and count all as durable."""
        self.journal.seal()
        self.journal.durable_seq = self.journal.seq

    def release(self) -> None:
        """What a checkpoint of this moment does."""
        self.start, self.first_seq = self.journal.head, self.journal.seq + 1
        self.journal.release(self.journal.head)

    @property
    def reader(self) -> Reader:
        return Reader(cast(File, self.memory), self.size, POOL)

    def read(self) -> list[Record]:
        return list(self.reader.records(self.start, self.first_seq))

    def payloads(self) -> list[bytes]:
        return [bytes(record.payload) for record in self.read()]

    def damaged(self) -> Record | None:
        """Whether the end of the log is damage: a record that says so."""
        found = self.read()
        end, seq = (found[-1].end, found[-1].seq) if found else (self.start, self.first_seq - 1)
        return self.reader.damage_after(end, seq + 1)


def test_a_new_ring_is_full_of_zeros_and_holds_no_record() -> None:
    ring = Ring()
    assert ring.memory.raw == bytes(SIZE)
    assert ring.read() == []
    assert ring.damaged() is None


def test_records_come_back_in_order_with_their_numbers() -> None:
    ring = Ring()
    assert [ring.append(b"one"), ring.append(b"two", b"two"), ring.append(b"")] == [1, 2, 3]
    assert [(r.seq, bytes(r.payload)) for r in ring.read()] == [
        (1, b"one"),
        (2, b"twotwo"),
        (3, b""),
    ]


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 4000, 4096, 30_000])
def test_records_begin_at_multiples_of_64(length: int) -> None:
    ring = Ring()
    ring.append(bytes(length))
    ring.append(b"next")
    first, second = ring.read()
    assert first.end == second.offset
    assert second.offset % ALIGNMENT == 0
    assert second.offset - (HEADER_SIZE + length) < ALIGNMENT


def test_after_a_seal_the_next_record_begins_a_page() -> None:
    ring = Ring()
    ring.append(b"a")
    ring.append(b"b")
    ring.journal.seal()
    ring.append(b"c")
    assert [r.offset for r in ring.read()] == [0, 128, JOURNAL_PAGE]
    ring.journal.seal()
    ring.journal.seal()
    ring.append(b"d")
    assert ring.read()[-1].offset == 2 * JOURNAL_PAGE


def test_what_a_seal_covers_is_never_written_again() -> None:
    ring = Ring()
    rng = random.Random(1)
    for _ in range(40):
        ring.append(rng.randbytes(rng.randrange(300)))
        ring.journal.seal()
        sealed = bytes(ring.memory.raw[: ring.journal.head])
        if not ring.journal.room_for(300):
            break
        ring.append(rng.randbytes(rng.randrange(300)))
        assert ring.memory.raw[: len(sealed)] == sealed


def test_a_seal_tells_what_the_newest_record_says_of_durability() -> None:
    ring = Ring()
    ring.append(b"a")
    assert ring.journal.seal() == 0
    ring.journal.durable_seq = 1
    assert ring.journal.seal() == 0  # no record says it yet
    ring.append(b"b")
    assert ring.journal.seal() == 1
    assert [r.durable_seq for r in ring.read()] == [0, 1]


def test_a_record_never_wraps_but_begins_the_next_lap() -> None:
    ring = Ring(at=SIZE * 5 - 640)
    ring.append(b"fits", bytes(100))
    ring.append(bytes(1000))
    first, second = ring.read()
    assert (first.offset, second.offset) == (SIZE * 5 - 640, SIZE * 5)
    ring.append(b"after")
    assert len(ring.read()) == 3


def test_a_record_may_end_exactly_with_the_lap() -> None:
    ring = Ring(at=SIZE - 2 * ALIGNMENT)
    ring.append(bytes(ALIGNMENT))
    ring.append(b"next")
    assert [r.offset for r in ring.read()] == [SIZE - 2 * ALIGNMENT, SIZE]


def test_there_is_room_for_what_fits_and_not_for_more() -> None:
    ring = Ring()
    most = SIZE - HEADER_SIZE - JOURNAL_PAGE
    assert ring.journal.room_for(most)
    assert not ring.journal.room_for(most + 1)
    assert not ring.journal.room_for(most, spare=1)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1 << 32))
def test_a_ring_is_filled_without_touching_what_is_needed(seed: int) -> None:
    """Over many laps: append, seal, release; all since the last release comes back."""
    rng = random.Random(seed)
    ring = Ring()
    expected: list[bytes] = []
    for _ in range(150):
        payload = rng.randbytes(rng.choice((0, 10, 200, 5000, 20_000)))
        if not ring.journal.room_for(len(payload)):
            assert ring.journal.used > SIZE - 2 * (len(payload) + HEADER_SIZE + JOURNAL_PAGE)
            ring.release()
            expected = []
            continue
        ring.append(payload)
        expected.append(payload)
        if rng.random() < 0.3:
            ring.sync()
        assert ring.journal.used <= SIZE
    assert ring.payloads() == expected
    assert ring.damaged() is None


def test_stale_records_of_an_older_lap_are_not_taken_for_new_ones() -> None:
    ring = Ring()
    while ring.journal.room_for(700):  # 12 records a page
        ring.append(b"old" * 200)
    ring.release()
    for expected in range(1, 10):
        ring.append(b"new" * 200)
        assert ring.payloads() == [b"new" * 200] * expected
        assert ring.damaged() is None


def test_records_of_another_pool_are_not_ours() -> None:
    ring = Ring()
    ring.append(b"ours")
    stranger = Reader(cast(File, ring.memory), SIZE, uuid.UUID(int=0xFEDC << 112))
    assert list(stranger.records(0, 1)) == []


# -- what a crash leaves -----------------------------------------------------------------------


@pytest.mark.parametrize("lost", range(0, 1152, 128))
def test_a_torn_record_ends_the_log(lost: int) -> None:
    ring = Ring()
    ring.append(b"whole")
    at = ring.journal.head
    ring.append(b"x" * 1000)
    ring.append(b"beyond")
    end = min(at + lost + 128, at + HEADER_SIZE + 1000)
    ring.memory.raw[at + lost : end] = bytes(end - at - lost)
    assert ring.payloads() == [b"whole"]
    assert ring.damaged() is None


def test_every_flipped_byte_ends_the_log() -> None:
    ring = Ring()
    ring.append(b"payload")
    whole = bytes(ring.memory.raw)
    for index in range(HEADER_SIZE + 7):
        ring.memory.raw[:] = whole
        ring.memory.raw[index] ^= 0x10
        assert ring.read() == [], index


def test_a_length_beyond_the_ring_is_no_record() -> None:
    ring = Ring()
    ring.append(b"payload")
    struct.pack_into("<I", ring.memory.raw, 32, 0xFFFFFFFF)
    assert ring.read() == []


def test_a_missing_record_that_was_durable_is_damage() -> None:
    ring = Ring()
    ring.append(b"one")
    at = ring.journal.head
    ring.append(b"two")
    ring.sync()
    ring.append(b"three")
    ring.memory.raw[at + 10] ^= 1
    assert ring.payloads() == [b"one"]
    witness = ring.damaged()
    assert witness is not None
    assert (witness.seq, witness.durable_seq) == (3, 2)


def test_a_missing_record_that_nobody_knows_of_is_the_end() -> None:
    ring = Ring()
    ring.append(b"one")
    ring.sync()
    at = ring.journal.head
    ring.append(b"two")
    ring.append(b"three")
    ring.memory.raw[at + 10] ^= 1
    assert ring.payloads() == [b"one"]
    assert ring.damaged() is None


def test_damage_is_seen_over_the_end_of_the_lap() -> None:
    ring = Ring(at=3 * SIZE - 8192)
    ring.append(b"one")
    at = ring.journal.head
    ring.append(b"two")
    ring.sync()
    ring.append(bytes(7000))  # on the next lap
    ring.append(b"four")
    ring.memory.raw[at % SIZE] ^= 1
    assert ring.payloads() == [b"one"]
    assert ring.damaged() is not None


def test_the_first_record_missing_is_damage_too() -> None:
    ring = Ring()
    ring.append(b"one")
    ring.sync()
    ring.append(b"two")
    ring.memory.raw[0] ^= 1
    assert ring.read() == []
    assert ring.damaged() is not None


# -- opening again -----------------------------------------------------------------------------


def reopened(ring: Ring) -> Ring:
    """The ring after a crash, continued as recovery does."""
    found = ring.read()
    end, seq = (found[-1].end, found[-1].seq) if found else (ring.start, ring.first_seq - 1)
    again = Ring(at=end + -end % JOURNAL_PAGE)
    again.memory.raw[:] = ring.memory.raw
    again.journal = Journal(
        cast(File, again.memory), SIZE, POOL, seq=seq, tail=again.start, head=again.start
    )
    again.first_seq = again.journal.seq + 1
    return again


def test_whole_records_behind_a_torn_one_never_follow_new_ones() -> None:
    ring = Ring()
    for number in range(15):
        ring.append(b"%d" % number)
        ring.journal.seal()
    ring.memory.raw[JOURNAL_PAGE * 5] ^= 1
    again = reopened(ring)
    assert again.read() == []
    for number in range(15):
        again.append(b"new %d" % number)
        again.journal.seal()
        assert again.payloads() == [b"new %d" % n for n in range(number + 1)]
        assert again.damaged() is None


async def test_a_sync_is_one_fdatasync() -> None:
    class Direct:
        async def offload(self, call: object) -> None:
            call()  # type: ignore[operator]

    ring = Ring()
    ring.append(b"x")
    await ring.journal.sync(cast(Disk, Direct()))
    assert (ring.memory.n_syncs, ring.journal.n_syncs) == (1, 1)


# -- going on without a checkpoint ---------------------------------------------------------------


def test_going_on_without_a_checkpoint_wipes_what_could_seem_to_follow() -> None:
    ring = Ring()
    for number in range(12):
        ring.append(b"%d" % number)
        ring.journal.seal()
    ring.memory.raw[JOURNAL_PAGE * 5 + 3] ^= 1  # record 6; 7 to 12 are whole
    assert len(ring.read()) == 5
    ring.journal = Journal(
        cast(File, ring.memory), SIZE, POOL, seq=5, tail=0, head=5 * JOURNAL_PAGE
    )
    ring.journal.begin_without_checkpoint()
    assert ring.append(b"new") == 6
    assert ring.payloads() == [b"0", b"1", b"2", b"3", b"4", b"new"]
    assert ring.damaged() is None
    assert ring.memory.n_syncs == 1


def test_pages_that_cannot_be_read_are_told_and_hide_no_other_record() -> None:
    ring = Ring()
    offsets = []
    for number in range(6):
        offsets.append(ring.journal.head)
        ring.append(bytes([number]) * 100)
        ring.sync()

    class HalfReadable(MemoryFile):
        def pread(self, length: int, offset: int) -> bytes:
            if offset < offsets[2] + 64 and offset + length > offsets[2]:
                raise ReadFailed("journal: Input/output error")
            return super().pread(length, offset)

    file = cast(File, HalfReadable("journal", bytes(ring.memory.raw)))
    with pytest.raises(ReadFailed):
        list(Reader(file, SIZE, POOL).records(0, SEQ))
    told: list[ReadFailed] = []
    reader = Reader(file, SIZE, POOL, told.append)
    assert [record.seq for record in reader.records(0, SEQ)] == [1, 2]
    assert told
    witness = reader.damage_after(offsets[2], 3)
    assert witness is not None and witness.seq == 4


@pytest.mark.parametrize("n_cached", [0, 4 * JOURNAL_PAGE, SIZE])
def test_a_witness_is_found_however_much_of_the_ring_is_in_the_page_cache(n_cached: int) -> None:
    ring = Ring()
    for number in range(6):
        ring.append(bytes([number]) * 100)
        ring.sync()
    ring.memory.raw[3 * JOURNAL_PAGE] ^= 1  # record 4
    ring.memory.cached = bytes(ring.memory.raw[:n_cached])
    witness = ring.damaged()
    assert witness is not None and witness.seq == 5


def test_a_witness_that_never_got_to_the_disk_vouches_for_nothing() -> None:
    ring = Ring()
    for number in range(6):
        ring.append(bytes([number]) * 100)
        ring.sync()
    ring.memory.cached = bytes(ring.memory.raw)
    ring.memory.raw[3 * JOURNAL_PAGE :] = bytes(SIZE - 3 * JOURNAL_PAGE)  # the sync has failed
    assert len(ring.read()) == 3
    assert ring.damaged() is None


def test_a_page_that_the_cache_cannot_give_is_read_from_the_disk() -> None:
    class Poisoned(MemoryFile):
        def preadv_cached(self, buffer: Buffer, offset: int) -> int:
            raise ReadFailed("journal: Input/output error")

    ring = Ring()
    for number in range(3):
        ring.append(bytes([number]) * 100)
        ring.sync()
    ring.memory.raw[JOURNAL_PAGE] ^= 1
    ring.memory = Poisoned("journal", bytes(ring.memory.raw))
    witness = ring.damaged()
    assert witness is not None and witness.seq == 3
