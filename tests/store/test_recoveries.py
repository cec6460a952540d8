"""Images that are recovered once for many, and those that are not."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.store.exhaustive import Explorer
from tests.store.recoveries import UNITS, Changes, Recoveries, image_of
from tests.store.short_plays import Sequence, base_of
from tests.store.short_states import BLOCK, Found
from tests.store.simulated_disk import SimulatedDisk


class _Compared(Recoveries):
    """Recovers some of the images anyway that differ in what is never read, and compares."""

    n_compared = 0

    def recover(self, base: str, changes: Changes) -> Found:
        before = self.figures.copy()
        found = super().recover(base, changes)
        is_distinct = self.figures["distinct images"] > before["distinct images"]
        if is_distinct and self.figures["recoveries"] == before["recoveries"]:
            self.n_compared += 1
            if self.n_compared % 3 == 0:
                assert found == Recoveries(Counter()).recover(base, changes)
        return found


@pytest.mark.parametrize(
    ("base", "sequence"),
    [
        ("fresh", ("large", "checkpoint")),
        ("used", ("across", "checkpoint")),
        ("used", ("trim", "kill")),
        ("snapped", ("fua", "rollback")),
    ],
)
def test_what_is_not_recovered_again_would_have_come_to_the_same(
    base: str, sequence: Sequence
) -> None:
    explorer = Explorer()
    explorer._recoveries = compared = _Compared(explorer.figures)
    explorer.explore(base, sequence)
    assert compared.n_compared >= 3


def test_a_page_matters_if_something_points_to_it() -> None:
    base = base_of("used")[0]["data"]
    recoveries = Recoveries(Counter())
    assert recoveries.recover("used", {}) == base_of("used")[1]
    free = [n for n in range(1, len(base) // BLOCK) if not any(base[n * BLOCK :][:BLOCK])]
    per_block = BLOCK // UNITS["data"]
    garbage = random.Random(1).randbytes(UNITS["data"])
    matters = []
    for block in range(1, len(base) // BLOCK):
        try:
            found = recoveries.recover("used", {("data", block * per_block + 3): garbage})
        except AssertionError:
            matters.append(block)
        else:
            assert found == base_of("used")[1]
    assert matters and not set(free) & set(matters)
    figures = recoveries.figures
    assert figures["distinct images"] == len(base) // BLOCK
    assert 1 + len(matters) <= figures["recoveries"] < figures["distinct images"]


def test_an_image_is_the_pool_with_its_changes() -> None:
    changes = {("journal", 5): b"j" * 64, ("data", 2): b"d" * 512}
    image = image_of("fresh", changes)
    fresh = SimulatedDisk(base_of("fresh")[0]).images
    assert image.keys() == fresh.keys()
    assert image["journal"][320:384] == b"j" * 64 and image["data"][1024:1536] == b"d" * 512
    image["journal"][320:384] = fresh["journal"][320:384]
    image["data"][1024:1536] = fresh["data"][1024:1536]
    assert image == fresh
