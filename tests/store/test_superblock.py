"""The superblock: written twice, and no damaged byte goes unnoticed."""

from __future__ import annotations

import dataclasses
import struct
import uuid
from typing import Any, cast

import pytest
import xxhash

from nbdstore.errors import Corruption, PoolFormatError, ReadFailed
from nbdstore.store import superblock
from nbdstore.store.host import File
from nbdstore.store.superblock import COPY_SIZE, Superblock
from tests.store.memory_file import MemoryFile

FIRST = Superblock(
    uuid=uuid.UUID(int=0x0123456789ABCDEF0123456789ABCDEF),
    generation=7,
    block_size=4096,
    n_slots=(1 << 40) - 2,
    journal_size=128 << 20,
    journal_offset=(1 << 63) + 64,
    journal_seq=1 << 50,
    catalogue=((1 << 64) - 1, 1),
    catalogue_bytes=12345,
    free_map=(2, (1 << 64) - 1),
    created=1_700_000_000,
)


def sealed(raw: bytes) -> bytes:
    """`raw` with a checksum that fits."""
    body = raw[: COPY_SIZE - 8]
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


def with_field(offset: int, value: int) -> bytes:
    raw = bytearray(FIRST.encode())
    struct.pack_into("<I", raw, offset, value)
    return sealed(raw)


def file_of(*copies: bytes) -> tuple[MemoryFile, File]:
    memory = MemoryFile("super", b"".join(copies))
    return memory, cast(File, memory)


def test_what_is_written_is_read() -> None:
    assert len(FIRST.encode()) == COPY_SIZE
    assert superblock.decode(FIRST.encode(), "here") == FIRST


def test_every_flipped_byte_is_found() -> None:
    raw = FIRST.encode()
    for index in range(COPY_SIZE):
        damaged = bytearray(raw)
        damaged[index] ^= 1 << index % 8
        with pytest.raises(Corruption):
            superblock.decode(bytes(damaged), "here")


@pytest.mark.parametrize("length", [0, 7, 8, 100, COPY_SIZE - 1])
def test_a_short_copy_is_corruption(length: int) -> None:
    with pytest.raises(Corruption):
        superblock.decode(FIRST.encode()[:length], "here")


@pytest.mark.parametrize("version", [0, 2, 1 << 31])
def test_another_format_version_is_refused(version: int) -> None:
    with pytest.raises(PoolFormatError, match=f"format version {version}"):
        superblock.decode(with_field(8, version), "here")


def test_an_unknown_incompatible_feature_is_refused_by_name_of_its_bit() -> None:
    with pytest.raises(PoolFormatError, match="0x400"):
        superblock.decode(with_field(20, 0x400), "here")


@pytest.mark.parametrize("offset", [12, 16])
def test_features_that_do_not_hinder_reading_are_kept(offset: int) -> None:
    found = superblock.decode(with_field(offset, 0x80), "here")
    assert 0x80 in (found.compatible, found.readonly_compatible)
    assert superblock.decode(found.encode(), "here") == found


def test_either_copy_is_written_by_itself() -> None:
    memory, file = file_of(bytes(2 * COPY_SIZE))
    superblock.write(file, FIRST, 1)
    assert memory.raw[:COPY_SIZE] == bytes(COPY_SIZE)
    superblock.write(file, FIRST.next(), 0)
    assert memory.raw == FIRST.next().encode() + FIRST.encode()


@pytest.mark.parametrize("copy", [0, 1])
def test_the_newest_generation_is_taken_wherever_it_stands(copy: int) -> None:
    copies = [FIRST.encode(), FIRST.encode()]
    copies[copy] = FIRST.next(journal_seq=9).encode()
    _, file = file_of(*copies)
    assert superblock.read(file) == superblock.Found(FIRST.next(journal_seq=9), copy, [])


@pytest.mark.parametrize("copy", [0, 1])
def test_the_whole_copy_is_taken_when_the_other_is_damaged(copy: int) -> None:
    memory, file = file_of(FIRST.encode(), FIRST.encode())
    memory.raw[copy * COPY_SIZE + 100] ^= 1
    found = superblock.read(file)
    assert (found.newest, found.copy) == (FIRST, 1 - copy)
    assert [fault.where for fault in found.faults] == [f"super, copy {copy}"]


def test_two_damaged_copies_are_corruption() -> None:
    memory, file = file_of(FIRST.encode(), FIRST.encode())
    memory.raw[100] ^= 1
    memory.raw[COPY_SIZE + 100] ^= 1
    with pytest.raises(Corruption, match="super, copy 0"):
        superblock.read(file)


@pytest.mark.parametrize("length", [0, 5, COPY_SIZE, COPY_SIZE + 5])
def test_a_truncated_file_is_taken_as_far_as_it_goes(length: int) -> None:
    _, file = file_of((FIRST.next().encode() + FIRST.encode())[:length])
    if length < COPY_SIZE:
        with pytest.raises(Corruption):
            superblock.read(file)
    else:
        assert superblock.read(file).newest == FIRST.next()


def test_a_copy_that_cannot_be_read_leaves_the_other() -> None:
    class HalfReadable(MemoryFile):
        def pread(self, length: int, offset: int) -> bytes:
            if offset:
                return super().pread(length, offset)
            raise ReadFailed("super: Input/output error while reading at byte 0")

    file = HalfReadable("super", FIRST.next().encode() + FIRST.encode())
    found = superblock.read(cast(File, file))
    assert (found.newest, found.copy) == (FIRST, 1)
    assert len(found.faults) == 1


def test_every_field_is_stored() -> None:
    for field in dataclasses.fields(Superblock):
        value: Any = getattr(FIRST, field.name)
        if field.name in ("format_version", "incompatible"):
            continue  # other values are refused
        if isinstance(value, tuple):
            other: Any = (value[0] ^ 1, value[1] ^ 1)
        elif isinstance(value, int):
            other = value + 1
        else:
            other = uuid.UUID(int=1)
        changed = dataclasses.replace(FIRST, **{field.name: other})
        assert superblock.decode(changed.encode(), "here") == changed, field.name
