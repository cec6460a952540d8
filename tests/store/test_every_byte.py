"""Any byte of any file of a pool, damaged: detected, and judged in every structure there is."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import xxhash

from nbdstore.errors import Corruption
from nbdstore.store import superblock
from nbdstore.store.journal import Reader
from tests.figures import Tell
from tests.store.damage import BYTE_KINDS, byte_case, judge, large_case, page_cases
from tests.store.simulated_disk import SimulatedDisk
from tests.store.subjects import Region, Subject, damaged, open_and_look, subjects

SUPERBLOCK_FIELDS = [
    *(0, 8, 12, 16, 20, 24, 40, 48, 52, 60, 68, 76, 84, 92, 100, 108, 116, 124, 132, 140, 148),
    156,
    superblock.COPY_SIZE - 8,
]
RECORD_FIELDS = [0, 8, 16, 24, 32, 36, 56]


def of_kind(subject: Subject, *kinds: str) -> list[Region]:
    return [region for region in subject.regions if region.kind in kinds]


# -- detection: every bit, at the lowest layer ---------------------------------------------------


def test_every_byte_is_in_exactly_one_region() -> None:
    for subject in subjects().values():
        for name, image in subject.files.items():
            edges = sorted((r.start, r.stop) for r in subject.regions if r.file == name)
            assert edges[0][0] == 0 and edges[-1][1] == len(image)
            assert all(a[1] == b[0] for a, b in itertools.pairwise(edges))


def test_the_subjects_hold_every_structure() -> None:
    kinds = {region.kind for subject in subjects().values() for region in subject.regions}
    journal = {"journal mark", "journal header", "journal payload", "dead journal"}
    trees = {"leaf", "node", "catalogue", "catalogue node", "free map", "free map node"}
    assert kinds == journal | trees | {"superblock", "data", "data since", "dead slot"}


def test_every_flipped_bit_of_a_superblock_is_detected() -> None:
    raw = bytearray(subjects()["killed"].files["super"][: superblock.COPY_SIZE])
    for offset in range(len(raw)):
        for bit in range(8):
            raw[offset] ^= 1 << bit
            with pytest.raises(Corruption):
                superblock.decode(bytes(raw), "here")
            raw[offset] ^= 1 << bit


def test_every_flipped_bit_of_a_live_record_is_detected() -> None:
    """But for the padding behind the payload, which says nothing."""
    subject = subjects()["killed"]
    current = superblock.decode(subject.files["super"][: superblock.COPY_SIZE], "super")
    disk = SimulatedDisk(subject.files)
    reader = Reader(disk.open("journal"), current.journal_size, current.uuid)
    image = disk.images["journal"]
    n_bits = 0
    records = list(reader.records(current.journal_offset, current.journal_seq))
    # A reader reads ahead, and would not see what changes meanwhile.
    reader._read = lambda length, place: bytes(image[place : place + length])  # type: ignore[method-assign]
    for record in records:
        for offset in range(record.offset, record.offset + 64 + len(record.payload)):
            bits = range(8) if offset < record.offset + 64 else [offset % 8]
            for bit in bits:
                image[offset] ^= 1 << bit
                assert reader._parse(record.offset) is None, f"bit {bit} of byte {offset}"
                image[offset] ^= 1 << bit
                n_bits += 1
    assert n_bits > 50_000


@pytest.mark.parametrize("name", ["closed", "killed", "repaired"])
def test_every_flipped_byte_of_a_live_block_is_detected(name: str) -> None:
    """Each block is pointed to with its checksum, which no block with one bit changed has."""
    subject = subjects()[name]
    for region in subject.regions:
        if region.file != "data" or region.kind == "dead slot":
            continue
        block = bytearray(subject.files["data"][region.start : region.stop])
        checksum = xxhash.xxh3_64_intdigest(block)
        for offset in range(len(block)):
            block[offset] ^= 1 << offset % 8
            assert xxhash.xxh3_64_intdigest(block) != checksum
            block[offset] ^= 1 << offset % 8


def test_what_nothing_needs_may_hold_anything() -> None:
    for subject in subjects().values():
        images = damaged(subject)
        rng = random.Random(1)
        for region in of_kind(subject, "dead slot", "dead journal"):
            raw = rng.randbytes(region.stop - region.start)
            images[region.file][region.start : region.stop] = raw
        expected = subject.history[-1]
        assert open_and_look(SimulatedDisk(images)) == expected


# -- judgement: every structure, in every way ----------------------------------------------------


def offsets_in(region: Region, rng: random.Random) -> list[int]:
    """Where to damage a region: at the bounds of its fields, and anywhere."""
    size = region.stop - region.start
    if region.kind == "superblock":
        fields = SUPERBLOCK_FIELDS
    elif region.kind == "journal header":
        fields = RECORD_FIELDS
    elif region.kind.startswith("journal"):
        fields = [0, size - 1]
    else:
        fields = [rng.choice((0, 8, 16, size - 1))]
    return [region.start + offset for offset in {*fields, rng.randrange(size)}]


def stratified(name: str) -> list[tuple[str, str, str, int]]:
    """Cases in every live region of a subject, their kinds taking turns."""
    rng = random.Random(name)
    places = [
        (name, region.file, offset)
        for region in subjects()[name].regions
        if not region.kind.startswith("dead")
        for offset in offsets_in(region, rng)
    ]
    rng.shuffle(places)
    return [(BYTE_KINDS[n % len(BYTE_KINDS)], *place) for n, place in enumerate(places)]


@pytest.mark.parametrize(
    ("name", "part", "n_parts"),
    [("closed", 0, 1), ("repaired", 0, 1), *(("killed", part, 3) for part in range(3))],
)
def test_a_damaged_byte_is_harmless_or_reported_and_never_believed(
    tell: Tell, name: str, part: int, n_parts: int
) -> None:
    outcomes = Counter(judge(byte_case(*case)) for case in stratified(name)[part::n_parts])
    assert {"harmless", "lost", "repaired"} <= outcomes.keys(), outcomes
    tell("damage", {"cases": outcomes.total(), **outcomes})


def test_an_unreadable_page_costs_what_is_in_it_and_is_reported(tell: Tell) -> None:
    cases = [*page_cases()]
    of_journal = [case for case in cases if case.file == "journal"]
    chosen = [case for case in cases if case.file != "journal"]
    chosen += random.Random(1).sample(of_journal, 30)
    outcomes = Counter(judge(case) for case in chosen)
    assert {"harmless", "lost", "repaired"} <= outcomes.keys(), outcomes
    tell("damage", {"cases": outcomes.total(), **outcomes})


@pytest.mark.parametrize("first", range(0, 120, 40))
def test_larger_damage_is_harmless_or_reported_and_never_believed(tell: Tell, first: int) -> None:
    seeds = range(first, first + 40)
    outcomes = Counter(judge(large_case(random.Random(seed))) for seed in seeds)
    assert {"harmless", "lost", "repaired"} <= outcomes.keys(), outcomes
    tell("damage", {"cases": outcomes.total(), **outcomes})
