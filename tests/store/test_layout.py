"""The location word, and runs of slots."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstore.store import layout

LOCATIONS = [  # slot, epoch, holds a slot, is provisioned
    (0, 0, False, False),
    (1, 0, True, False),
    (1, 1, True, False),
    (layout.MAX_SLOTS - 1, layout.MAX_EPOCH, True, False),
    (layout.LOST, 0, False, False),
    (layout.PROVISIONED, 1, False, True),
    (layout.PROVISIONED, layout.MAX_EPOCH, False, True),
    (0, 7, False, False),
]


@pytest.mark.parametrize(("slot", "epoch", "holds", "provisioned"), LOCATIONS)
def test_a_location_says_slot_and_epoch(
    slot: int, epoch: int, holds: bool, provisioned: bool
) -> None:
    location = layout.pack_location(slot, epoch)
    word = np.array([location], np.uint64)
    assert layout.slots_of(word).tolist() == [slot]
    assert location >> layout.SLOT_BITS == epoch
    assert layout.holds_slot(word).tolist() == [holds]
    assert layout.is_provisioned(word).tolist() == [provisioned]


def test_untouched_memory_reads_as_holes() -> None:
    assert layout.HOLE == 0
    assert not layout.holds_slot(np.zeros(3, np.uint64)).any()


def test_slots_are_fit_for_indexing() -> None:
    assert layout.slots_of(np.zeros(1, np.uint64)).dtype == np.int64


RUNS = [
    ([], []),
    ([5], [(0, 1)]),
    ([5, 6, 7], [(0, 3)]),
    ([5, 7], [(0, 1), (1, 2)]),
    ([7, 6, 5], [(0, 1), (1, 2), (2, 3)]),
    ([5, 7, 6, 8], [(0, 1), (1, 2), (2, 3), (3, 4)]),  # first and last would fit one run
    ([1, 2, 3, 9, 10, 4], [(0, 3), (3, 5), (5, 6)]),
]


@pytest.mark.parametrize(("slots", "expected"), RUNS)
def test_runs_are_found(slots: list[int], expected: list[tuple[int, int]]) -> None:
    assert layout.runs(np.array(slots, np.int64)) == expected


@given(st.lists(st.integers(0, 30), unique=True))
def test_runs_cover_all_slots_and_are_as_long_as_can_be(slots: list[int]) -> None:
    runs = layout.runs(np.array(slots, np.int64))
    assert [i for start, stop in runs for i in range(start, stop)] == list(range(len(slots)))
    for start, stop in runs:
        assert slots[start:stop] == list(range(slots[start], slots[start] + stop - start))
        assert stop == len(slots) or slots[stop] != slots[stop - 1] + 1
