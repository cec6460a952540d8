"""Whatever is done to a pool, it holds what a few bytearrays do: see state_machine.py."""

from __future__ import annotations

import pytest

from nbdstore.store import Volume
from tests.figures import Tell
from tests.store.state_machine import run_seed


@pytest.mark.parametrize("seed", range(3))
def test_a_pool_holds_what_bytearrays_hold(tell: Tell, seed: int) -> None:
    tell("state-machine", run_seed(seed, max_examples=8, steps=40))


def test_a_trim_that_reaches_too_far_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Volume.trim

    async def trim(self: Volume, offset: int, length: int) -> None:
        await real(self, offset, min(length + self.block_size, self.size - offset))

    monkeypatch.setattr(Volume, "trim", trim)
    with pytest.raises(AssertionError):
        for seed in range(20):
            run_seed(seed, shrink=False)
