"""Which free slots come next when the host's filesystem has no space, and what it is asked."""

from __future__ import annotations

import numpy as np

from nbdstore.store.slots import Slots
from tests.store.test_slots import BLOCK, REGION, array, take


def test_slots_that_the_host_has_space_for_come_next_when_it_has_no_more() -> None:
    slots = Slots(3 * REGION, BLOCK)
    take(slots, 3 * REGION - 1)
    free = [*range(5, 9), *range(REGION + 10, REGION + 90), *range(2 * REGION + 3, 2 * REGION + 5)]
    slots.give_back(array(*free))
    asked: list[tuple[int, int]] = []

    def held(offset: int, length: int) -> list[tuple[int, int]]:
        asked.append((offset, length))
        known = ((6, 8), (REGION + 50, REGION + 52), (REGION + 60, REGION + 61))
        inside = [(a * BLOCK, b * BLOCK) for a, b in known if offset <= a * BLOCK < offset + length]
        return [(a + 1, b) if a == (REGION + 50) * BLOCK else (a, b) for a, b in inside]

    slots.begin_anew(held)
    assert sorted(asked) == [(n * REGION * BLOCK, REGION * BLOCK) for n in range(3)]
    first = [6, 7, REGION + 51, REGION + 60]  # half of a block is none
    assert take(slots, 4) == first
    assert sorted(take(slots, len(free) - 4)) == sorted({*free} - {*first})
    slots.begin_anew(held)
    assert slots.allocate(1, 0) is None


def test_a_host_with_space_for_much_is_asked_for_no_more_than_a_region() -> None:
    slots = Slots(5 * REGION, BLOCK)
    take(slots, 5 * REGION - 1)
    slots.give_back(np.arange(1, 5 * REGION))
    asked: list[int] = []

    def held(offset: int, length: int) -> list[tuple[int, int]]:
        asked.append(offset)
        return [(offset, offset + length // 2)]

    slots.begin_anew(held)
    assert len(asked) == 2
    assert len(take(slots, 3 * REGION)) == 3 * REGION


def test_a_full_host_is_asked_again_only_about_regions_where_a_slot_was_freed() -> None:
    """However it was freed: a write that failed halfway has space for its first slots."""
    slots = Slots(4 * REGION, BLOCK)
    take(slots, 4 * REGION - 1)
    slots.give_back(array(*(n * REGION + 7 for n in range(4))))
    has_space: set[int] = set()
    asked: list[int] = []

    def held(offset: int, _length: int) -> list[tuple[int, int]]:
        region = offset // BLOCK // REGION
        asked.append(region)
        inside = sorted(slot for slot in has_space if slot // REGION == region)
        return [(slot * BLOCK, (slot + 1) * BLOCK) for slot in inside]

    def asked_now() -> list[int]:
        asked.clear()
        slots.begin_anew(held)
        return sorted(asked)

    assert asked_now() == [0, 1, 2, 3]
    assert asked_now() == []
    refused = take(slots, 1)
    slots.give_back(array(*refused))
    assert asked_now() == [refused[0] // REGION]
    assert asked_now() == []
    slots.free_later(array(REGION + 20), 1)
    slots.free_later(np.arange(2 * REGION + 20, 2 * REGION + 60), 2)
    has_space |= {REGION + 20, 2 * REGION + 30, 3 * REGION + 7}
    assert asked_now() == []  # none is free yet
    slots.release(1)
    assert asked_now() == [1]
    slots.release(2)
    assert asked_now() == [1, 2]
    assert take(slots, 2) == [REGION + 20, 2 * REGION + 30]
    assert asked_now() == [1, 2]  # what was found is used up
    assert asked_now() == []
    slots.correct(array(), array(3 * REGION + 9, 3 * REGION + 10))
    assert asked_now() == [3]
    assert take(slots, 1) == [3 * REGION + 7]


def test_a_full_host_is_asked_about_slots_that_a_larger_pool_has_more() -> None:
    slots = Slots(REGION // 2, BLOCK)
    take(slots, REGION // 2 - 2)
    asked: list[int] = []

    def held(offset: int, _length: int) -> list[tuple[int, int]]:
        asked.append(offset)
        return []

    slots.begin_anew(held)
    slots.begin_anew(held)
    slots.grow(REGION)
    slots.begin_anew(held)
    assert asked == [0, 0]
