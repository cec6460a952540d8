"""Who gets a slot, and when a freed one may be used again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nbdstore.store.layout import I64
from nbdstore.store.slots import (
    FrozenBitmap,
    Slots,
    bits_set,
    clear_bits,
    set_bits,
    set_run,
    test_bits,
)

BLOCK = 4096
REGION = BLOCK * 8

test_bits.__test__ = False  # type: ignore[attr-defined]  # a function of the store


def array(*slots: int) -> I64:
    return np.array(slots, np.int64)


def take(slots: Slots, n: int, floor: int = 0) -> list[int]:
    found = slots.allocate(n, floor)
    assert found is not None
    return found.tolist()


def used(slots: Slots) -> set[int]:
    """All slots that are not free, those beyond the capacity left out."""
    raw = b"".join(slots.bitmap_block(region) for region in range(slots.n_regions))
    found = bits_set(np.frombuffer(raw, np.uint8))
    return set(found[found < slots.n_slots].tolist())


# -- bitmaps -----------------------------------------------------------------------------------


def test_bits_are_set_cleared_tested_and_listed() -> None:
    bitmap = np.zeros(4, np.uint8)
    set_bits(bitmap, array(0, 7, 8, 31))
    assert bits_set(bitmap).tolist() == [0, 7, 8, 31]
    clear_bits(bitmap, array(7, 31))
    assert test_bits(bitmap, array(0, 7, 8, 31)).tolist() == [True, False, True, False]
    assert bitmap.tolist() == [1, 1, 0, 0]


# -- allocation ----------------------------------------------------------------------------------


def test_the_bits_of_a_run_are_set_and_no_others() -> None:
    for start in range(20):
        for stop in range(start + 1, 40):
            bitmap = np.zeros(5, np.uint8)
            set_run(bitmap, start, stop)
            assert bits_set(bitmap).tolist() == list(range(start, stop))


@pytest.mark.parametrize("n_slots", [1000, REGION, REGION + 1, 3 * REGION - 5])
def test_every_slot_but_the_first_is_given_out_once(n_slots: int) -> None:
    slots = Slots(n_slots, BLOCK)
    assert slots.n_free == n_slots - 1
    assert sorted(take(slots, n_slots - 1)) == list(range(1, n_slots))
    assert slots.n_free == 0
    assert slots.allocate(1, 0) is None


def test_a_new_pool_gives_one_run() -> None:
    assert take(Slots(1000, BLOCK), 20) == list(range(1, 21))


def test_a_large_request_begins_at_a_boundary_and_small_ones_get_what_it_left_out() -> None:
    slots = Slots(1000, BLOCK)
    assert take(slots, 96) == list(range(32, 128))
    assert slots.allocate_few(3, 0) == [1, 2, 3]
    assert slots.allocate_run(33, 0) == 128
    assert slots.allocate_run(32, 0) == 192
    assert slots.allocate_few(4, 0) == [4, 5, 6, 7]
    assert take(slots, 10) == list(range(8, 18))
    assert take(slots, 31) == list(range(18, 32)) + list(range(161, 178))
    assert take(slots, 20) == list(range(224, 244))
    assert used(slots) == {*range(178), *range(192, 244)}


def test_what_was_left_out_is_given_out_before_another_region_is_begun() -> None:
    slots = Slots(2 * REGION, BLOCK)
    assert max(take(slots, REGION - 32)) == REGION - 1
    assert take(slots, 31) == list(range(1, 32))
    assert slots.n_used_regions == 1


def test_a_large_request_takes_scattered_slots_as_they_come() -> None:
    slots = Slots(200, BLOCK)
    take(slots, 199)
    free = [*range(1, 40), *range(41, 90), *range(100, 140)]
    slots.give_back(array(*free))
    assert take(slots, 64) == free[:64]  # from 32 on, only 8 are free in a row
    assert take(slots, 32) == free[64:96]


def test_what_was_left_out_is_forgotten_with_the_window() -> None:
    slots = Slots(1000, BLOCK)
    take(slots, 32)
    slots.forget_window()
    assert take(slots, 20) == list(range(1, 21))
    assert slots.allocate_few(2, 0) == [21, 22]


def test_a_run_is_given_out_if_the_next_slots_are_one() -> None:
    slots = Slots(1000, BLOCK)
    assert slots.allocate_run(10, 0) == 0  # where to look is not known before the first request
    assert take(slots, 5) == [1, 2, 3, 4, 5]
    assert slots.allocate_run(10, 0) == 6
    assert slots.allocate_run(985, 0) == 0
    assert slots.allocate_run(983, 2) == 0
    assert slots.allocate_run(983, 1) == 16
    assert slots.n_free == 1
    assert used(slots) == set(range(999))
    assert take(slots, 1) == [999]
    slots.give_back(array(3, 4, 6, 7))
    assert take(slots, 1) == [3]
    assert slots.allocate_run(3, 0) == 0
    assert take(slots, 3) == [4, 6, 7]


def test_a_run_does_not_leave_its_region() -> None:
    slots = Slots(2 * REGION, BLOCK)
    take(slots, 2 * REGION - 1)
    slots.give_back(np.arange(REGION - 10, REGION + 10))
    slots.begin_anew(lambda offset, length: [(offset, offset + length)])
    assert slots.allocate_run(20, 0) == 0
    assert slots.allocate_run(10, 0) == REGION - 10
    assert slots.allocate_run(10, 0) == REGION
    assert slots.n_free == 0


def test_the_floor_stays_free() -> None:
    slots = Slots(100, BLOCK)
    assert slots.allocate(50, 50) is None
    assert len(take(slots, 49, 50)) == 49
    assert slots.allocate(1, 50) is None
    assert len(take(slots, 1, 49)) == 1


def test_given_back_slots_are_free_at_once() -> None:
    slots = Slots(100, BLOCK)
    slots.give_back(array(*take(slots, 99)))
    assert slots.n_free == 99
    assert sorted(take(slots, 99)) == list(range(1, 100))


def test_a_fresh_region_is_begun_only_when_no_used_one_is_an_eighth_free() -> None:
    slots = Slots(4 * REGION, BLOCK)
    taken = take(slots, REGION - 1)
    assert max(taken) < REGION
    assert slots.n_used_regions == 1
    take(slots, 1)
    assert slots.n_used_regions == 2
    take(slots, REGION - 1)
    slots.give_back(array(*taken[: REGION // 4]))
    assert set(take(slots, REGION // 4)) == set(taken[: REGION // 4])
    assert slots.n_used_regions == 2


def test_the_emptiest_used_region_is_taken_first() -> None:
    slots = Slots(2 * REGION, BLOCK)
    take(slots, 2 * REGION - 1)
    slots.give_back(np.arange(1, 100))
    slots.give_back(np.arange(REGION, REGION + 200))
    assert take(slots, 200) == list(range(REGION, REGION + 200))
    assert sorted(take(slots, 99)) == list(range(1, 100))


def test_a_request_may_span_regions() -> None:
    slots = Slots(3 * REGION, BLOCK)
    assert len(set(take(slots, 2 * REGION))) == 2 * REGION


# -- quarantine ----------------------------------------------------------------------------------


def test_a_freed_slot_is_not_given_out_before_its_record_is_durable() -> None:
    slots = Slots(100, BLOCK)
    taken = take(slots, 99)
    slots.free_later(array(*taken[:10]), 5)
    assert slots.n_quarantined == 10
    assert slots.release(4) == 0
    assert slots.allocate(1, 0) is None
    assert slots.release(5) == 10
    assert slots.n_quarantined == 0
    assert sorted(take(slots, 10)) == sorted(taken[:10])


def test_slots_leave_the_quarantine_in_the_order_of_their_records() -> None:
    slots = Slots(100, BLOCK)
    taken = take(slots, 99)
    for seq in range(1, 6):
        slots.free_later(array(taken[seq]), seq)
    assert slots.release(3) == 3
    assert sorted(take(slots, 3)) == sorted(taken[1:4])
    assert slots.allocate(1, 0) is None


def test_a_reader_keeps_what_is_freed_after_it_began() -> None:
    slots = Slots(100, BLOCK)
    taken = take(slots, 99)
    slots.free_later(array(taken[0]), 3)
    with slots.pinned(3):
        slots.free_later(array(taken[1]), 4)
        with slots.pinned(4):
            assert slots.release(10) == 1  # of record 3: no reader can have planned with it
        assert slots.release(10) == 0
    assert slots.release(10) == 1


def test_readers_of_one_moment_are_counted() -> None:
    slots = Slots(100, BLOCK)
    taken = take(slots, 99)
    with slots.pinned(1):
        with slots.pinned(1):
            slots.free_later(array(taken[0]), 2)
        assert slots.release(5) == 0
    assert slots.release(5) == 1


# -- growing -------------------------------------------------------------------------------------

GROWTH = [
    (100, 100),
    (100, 101),
    (100, REGION),
    (100, REGION + 1),
    (REGION, REGION + 1),
    (REGION - 1, 5 * REGION - 7),
]


@pytest.mark.parametrize(("before", "after"), GROWTH)
def test_growing_adds_free_slots_and_nothing_else(before: int, after: int) -> None:
    slots = Slots(before, BLOCK)
    taken = take(slots, before // 2)
    slots.grow(after)
    assert slots.n_free == after - 1 - len(taken)
    assert used(slots) == {0, *taken}
    assert sorted([*taken, *take(slots, slots.n_free)]) == list(range(1, after))


# -- checkpoints ---------------------------------------------------------------------------------


def frozen_used(frozen: FrozenBitmap, stored: dict[int, bytes]) -> set[int]:
    """What the file says after a checkpoint that wrote `frozen` over `stored`."""
    stored.update({region: bits.tobytes() for region, bits in frozen.blocks.items()})
    found: set[int] = set()
    for region, raw in stored.items():
        found |= set((bits_set(np.frombuffer(raw, np.uint8)) + region * REGION).tolist())
    return found


def test_the_frozen_map_is_that_of_its_moment() -> None:
    slots = Slots(2 * REGION, BLOCK)
    before = take(slots, 10)
    frozen = slots.freeze()
    take(slots, REGION)  # reaches into the second region
    slots.give_back(array(*before[:5]))
    assert frozen_used(frozen, {}) == {0, *before}
    slots.thaw(written=True)


def test_quarantined_slots_count_as_free_in_the_frozen_map() -> None:
    slots = Slots(100, BLOCK)
    taken = take(slots, 9)
    slots.freeze()
    slots.thaw(written=True)
    slots.free_later(array(*taken[:4]), 7)
    frozen = slots.freeze()
    inside = {s for s in frozen_used(frozen, {}) if s < 100}
    assert inside == {0, *taken[4:]}


def test_what_a_checkpoint_sets_and_clears_goes_to_its_own_map_only() -> None:
    slots = Slots(3 * REGION, BLOCK)
    first = take(slots, 5)
    frozen = slots.freeze()
    nodes = array(*take(slots, 3), REGION + 5)
    frozen.set(nodes)
    frozen.clear(array(first[0]))
    assert frozen_used(frozen, {}) == {0, *first[1:], *nodes.tolist()}
    assert slots.is_used(array(first[0])).all()
    assert not slots.is_used(array(REGION + 5)).any()


def test_a_set_in_a_region_that_changed_since_uses_what_it_was() -> None:
    slots = Slots(2 * REGION, BLOCK)
    take(slots, REGION)  # the second region is begun
    slots.freeze()
    slots.thaw(written=True)
    frozen = slots.freeze()  # nothing is dirty
    assert not frozen.blocks
    before = used(slots)
    later = take(slots, 10)
    frozen.set(array(REGION + 100))
    assert frozen_used(frozen, {}) == {s for s in before if s >= REGION} | {REGION + 100}
    assert not set(later) & frozen_used(frozen, {})


def test_only_changed_regions_are_dirty() -> None:
    slots = Slots(3 * REGION, BLOCK)
    assert set(slots.freeze().blocks) == {0}
    slots.thaw(written=True)
    assert set(slots.freeze().blocks) == set()
    slots.thaw(written=True)
    take(slots, 1)
    assert set(slots.freeze().blocks) == {0}
    slots.thaw(written=False)
    assert set(slots.freeze().blocks) == {0}  # it was not written


# -- opening -------------------------------------------------------------------------------------


def reopened(slots: Slots) -> Slots:
    """A new process loads what a checkpoint of now would write."""
    again = Slots(slots.n_slots, BLOCK)
    frozen = slots.freeze()
    slots.thaw(written=False)
    for region, bits in frozen.blocks.items():
        again.load(region, bits.tobytes())
    again.begin_replay(lambda _slots: None)
    again.end_replay(9)
    return again


def test_a_loaded_map_is_the_stored_one() -> None:
    slots = Slots(2 * REGION + 11, BLOCK)
    taken = take(slots, REGION + 500)
    again = reopened(slots)
    assert used(again) == {0, *taken}
    assert again.n_free == slots.n_free
    assert again.n_used_regions == 2
    assert sorted([*taken, *take(again, again.n_free)]) == list(range(1, slots.n_slots))


@pytest.mark.parametrize("n_slots", [100, REGION, REGION + 100, 2 * REGION])
def test_a_loaded_empty_pool_begins_with_its_first_region(n_slots: int) -> None:
    again = reopened(Slots(n_slots, BLOCK))
    assert again.n_used_regions == 1
    assert take(again, 5) == [1, 2, 3, 4, 5]


def test_replayed_frees_are_quarantined_until_recovery_is_durable() -> None:
    slots = reopened(Slots(100, BLOCK))
    freed: list[int] = []
    slots.begin_replay(lambda found: freed.extend(found.tolist()))
    slots.replay_used(array(5, 6, 7))
    slots.free_later(array(5, 6), 3)
    slots.replay_used(array(6))  # used again by a later record
    slots.end_replay(9)
    assert freed == [5, 6]
    assert slots.n_quarantined == 1
    assert used(slots) == {0, 5, 6, 7}
    assert slots.release(8) == 0
    assert slots.release(9) == 1
    assert used(slots) == {0, 6, 7}


@pytest.mark.parametrize("few", [False, True])
def test_a_check_corrects_lost_and_leaked_slots(few: bool) -> None:
    slots = Slots(100, BLOCK)
    taken = take(slots, 9)
    if few:
        slots.free_few_later(taken[:2], 3)
    else:
        slots.free_later(array(*taken[:2]), 3)
    slots.correct(lost=array(50, taken[0]), leaked=array(taken[5]))
    bitmap = slots.without_quarantine()
    expected = {0, 50, *taken} - {taken[1], taken[5]}
    assert {s for s in bits_set(bitmap).tolist() if s < 100} == expected
    assert slots.n_quarantined == 1
    assert slots.n_free == 100 - len(expected) - 1


# -- free runs -----------------------------------------------------------------------------------


def test_free_runs_are_those_long_enough() -> None:
    slots = Slots(2 * REGION, BLOCK)
    take(slots, 2 * REGION - 1)
    slots.give_back(np.arange(10, 20))
    slots.give_back(np.arange(30, 35))
    slots.give_back(np.arange(REGION - 8, REGION + 16))
    assert slots.free_runs(8, 0) == [(10, 20), (REGION - 8, REGION)]
    assert slots.free_runs(1, 0) == [(10, 20), (30, 35), (REGION - 8, REGION)]
    assert slots.free_runs(16, 1) == [(REGION, REGION + 16)]
    assert slots.free_runs(17, 1) == []


# -- against a model -----------------------------------------------------------------------------


class SlotsAgainstSets(RuleBasedStateMachine):
    """All of it at random, against Python sets."""

    def __init__(self) -> None:
        super().__init__()
        self.in_use: set[int] = set()
        self.quarantine: list[tuple[int, set[int]]] = []
        self.stored: dict[int, bytes] = {}
        self.at_freeze: set[int] | None = None
        self.frozen: FrozenBitmap | None = None
        self.seq = 0
        self.pins: list[tuple[int, object]] = []

    @initialize(n_slots=st.sampled_from([50, 300, REGION + 40]))
    def make(self, n_slots: int) -> None:
        self.slots = Slots(n_slots, BLOCK)

    def _allocate(self, n: int, floor: int, way: str) -> Sequence[int] | I64 | None:
        if way == "run":
            first = self.slots.allocate_run(n, floor)
            if first:
                return range(first, first + n)
        return (self.slots.allocate_few if way == "few" else self.slots.allocate)(n, floor)

    @rule(
        n=st.integers(1, 60),
        floor=st.sampled_from([0, 10]),
        way=st.sampled_from(["many", "few", "run"]),
    )
    def allocate(self, n: int, floor: int, way: str) -> None:
        found = self._allocate(n, floor, way)
        held = len(self.in_use) + sum(len(s) for _, s in self.quarantine)
        if found is None:
            assert self.slots.n_slots - 1 - held - n < floor
            return
        new = {*map(int, found)}
        assert len(new) == n
        assert not new & self.in_use
        assert not any(new & freed for _, freed in self.quarantine)
        assert 0 not in new and max(new) < self.slots.n_slots
        self.in_use |= new

    def _some(self, data: st.DataObject) -> set[int]:
        return set(data.draw(st.lists(st.sampled_from(sorted(self.in_use)), max_size=20)))

    @precondition(lambda self: self.in_use)
    @rule(data=st.data(), few=st.booleans())
    def free(self, data: st.DataObject, few: bool) -> None:
        self.seq += 1
        freed = self._some(data)
        if few:
            self.slots.free_few_later(sorted(freed), self.seq)
        else:
            self.slots.free_later(array(*sorted(freed)), self.seq)
        self.in_use -= freed
        self.quarantine.append((self.seq, freed))

    @precondition(lambda self: self.in_use)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        found = self._some(data)
        self.slots.give_back(array(*sorted(found)))
        self.in_use -= found

    @rule()
    def pin(self) -> None:
        pin = self.slots.pinned(self.seq)
        pin.__enter__()
        self.pins.append((self.seq, pin))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        _, pin = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
        pin.__exit__(None, None, None)  # type: ignore[attr-defined]

    @rule(back=st.integers(0, 5))
    def release(self, back: int) -> None:
        horizon = max(0, self.seq - back)
        limit = min([horizon, *(seq for seq, _ in self.pins)])
        expected = sum(len(s) for seq, s in self.quarantine if seq <= limit)
        assert self.slots.release(horizon) == expected
        self.quarantine = [(seq, s) for seq, s in self.quarantine if seq > limit]

    @precondition(lambda self: self.frozen is None)
    @rule()
    def freeze(self) -> None:
        self.frozen = self.slots.freeze()
        self.at_freeze = set(self.in_use)

    @precondition(lambda self: self.frozen is not None)
    @rule(written=st.booleans())
    def thaw(self, written: bool) -> None:
        assert self.frozen is not None and self.at_freeze is not None
        n_slots = self.slots.n_slots
        if written:
            found = {s for s in frozen_used(self.frozen, self.stored) if s < n_slots}
            assert found - {0} == self.at_freeze
        self.slots.thaw(written=written)
        self.frozen = self.at_freeze = None

    @precondition(lambda self: self.frozen is None)  # the pool grows between checkpoints
    @rule(by=st.sampled_from([0, 1, 100, REGION]))
    def grow(self, by: int) -> None:
        if self.slots.n_slots + by < 5 * REGION:
            self.slots.grow(self.slots.n_slots + by)

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "slots"):
            return
        n_held = sum(len(s) for _, s in self.quarantine)
        assert self.slots.n_quarantined == n_held
        assert self.slots.n_free == self.slots.n_slots - 1 - len(self.in_use) - n_held


TestSlotsAgainstSets = SlotsAgainstSets.TestCase
TestSlotsAgainstSets.settings = settings(deadline=None, max_examples=40, stateful_step_count=40)
