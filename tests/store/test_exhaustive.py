"""Every short sequence of operations, crashed at every moment: a part of what exhaustive.py can do.

CI does all of length 1, one in 12 of length 2 and one in 800 of length 3; `make soak` the rest.
"""

from __future__ import annotations

import pytest

from nbdstore.store.durability import Committer
from tests.figures import Tell
from tests.store.exhaustive import Explorer, choices
from tests.store.recoveries import Parts
from tests.store.short_plays import Sequence
from tests.store.short_sequences import ALL, makes_sense, sequences

SHARES = {1: 1, 2: 12, 3: 800}
"""Of the sequences of each length, one in so many."""


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    """One for all, which recovers equal images once."""
    return Explorer()


@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize(("length", "share"), SHARES.items())
def test_no_crash_loses_what_was_promised(
    explorer: Explorer, tell: Tell, length: int, share: int, part: int
) -> None:
    before = explorer.figures.copy()
    for base, sequence in sequences(length, (0, share))[part::10]:
        explorer.explore(base, sequence)
    tell("exhaustive", explorer.figures - before)


def test_a_fault_is_told_with_the_sequence_that_replays_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def commit(_self: Committer, _volume: object) -> None:
        pass

    monkeypatch.setattr(Committer, "commit", commit)  # a flush that returns at once
    with pytest.raises(AssertionError) as caught:
        for base, sequence in sequences(1):
            Explorer().explore(base, sequence)
    notes = "".join(caught.value.__notes__)
    assert "crash at event" in notes
    assert "--only fresh:fua" in notes


def test_up_to_four_writes_are_lost_in_every_combination() -> None:
    for n in range(8):
        writes: list[tuple[str, Parts]] = [
            ("data" if i % 2 else "journal", [(("data", 16 * i + j), b"x") for j in range(16)])
            for i in range(n)
        ]
        found = [[*map(len, parts)] for _, parts in choices(writes)]
        whole = [lengths for lengths in found if all(length == 16 for length in lengths)]
        torn = [lengths for lengths in found if 8 in lengths]
        assert len(torn) == 4 * n  # two halves of each, with the rest there or lost
        if n <= 4:
            assert len(whole) == 2**n
        else:
            assert [] in whole and [16] * n in whole and [16] in whole and [16] * (n - 1) in whole


def test_sequences_make_sense_and_shares_are_all_of_them() -> None:
    assert not makes_sense("used", ("create",)) and makes_sense("used", ("delete", "create"))
    assert not makes_sense("used", ("shrink", "across"))
    whole = sequences(2)
    shares: list[tuple[str, Sequence]] = [s for i in range(3) for s in sequences(2, (i, 3))]
    assert sorted(shares) == sorted(whole)
    assert {name for _, sequence in whole for name in sequence} == ALL.keys()


def test_sequences_are_chosen_by_what_is_in_them() -> None:
    chosen = sequences(2, having=("shrink", "receive"))
    assert chosen == [s for s in sequences(2) if {"shrink", "receive"} & {*s[1]}]
    assert {"shrink", "receive"} <= {name for _, sequence in chosen for name in sequence}


def test_no_sequence_is_tried_twice() -> None:
    for length in (1, 2, 3):
        assert len(sequences(length)) == len({*sequences(length)})
