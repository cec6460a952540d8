"""Each call of the disk fails once, at each moment of a play that does everything."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.figures import Tell
from tests.store.fault_sweep import FAULTS, PLAY, Failing, n_calls, run_fault, run_seed


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("lasting", [False, True])
def test_a_failed_call_loses_nothing_that_was_promised(
    tell: Tell, kind: str, lasting: bool
) -> None:
    """Every sync, read and opening, every third write; where they fail for good, every seventh."""
    operation, error = FAULTS[kind]
    n = n_calls("used", PLAY, operation)
    assert n
    figures: Counter[str] = Counter()
    moments = range(0, n, 7 if lasting else 3 if operation == "write" else 1)
    for at in moments:
        failing = Failing(operation, error, at, 1 << 60 if lasting else at + 1)
        try:
            figures += run_fault("used", PLAY, failing)
        except BaseException as caught:
            caught.add_note(f"call {at} of {n}")
            raise
    assert figures["faults survived"] == len(moments)
    if kind == "sync: error":
        assert figures["pools failed"] == figures["faults survived"]
    tell("faults", figures)


@pytest.mark.parametrize("seed", range(40))
def test_faults_of_chance(tell: Tell, seed: int) -> None:
    tell("faults", run_seed(seed))
