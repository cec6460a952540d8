"""Any byte of any file flipped, zeroed, swapped, copied elsewhere or cut off."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.store.random_damage import run_seed


@pytest.mark.parametrize("first", range(0, 160, 40))
def test_damage_is_harmless_or_reported_and_never_believed(first: int) -> None:
    outcomes = Counter(run_seed(seed) for seed in range(first, first + 40))
    assert len(outcomes) >= 3, "the damage is not as varied as it should be"
