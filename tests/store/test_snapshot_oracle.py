"""The oracle of snapshots can fail: a store that breaks one of their rules is found out.

As test_oracle.py, for what snapshots.py and checkpoint.py promise.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import numpy as np
import pytest

from nbdstore.errors import StoreError
from nbdstore.store import snapshots
from nbdstore.store.blockmap import BlockMap
from nbdstore.store.checkpoint import Checkpointer, Frozen
from nbdstore.store.differences import blocks_alone
from nbdstore.store.layout import I64
from nbdstore.store.snapshots import _Cut, _Removal
from tests.figures import Tell
from tests.store.power_loss import Course, run_seed
from tests.store.workload import Settings

N_SEEDS = 150


def what_is_overwritten_while_a_snapshot_is_made_is_freed() -> AbstractContextManager[Any]:
    real = _Cut.end

    def end(self: _Cut, *, made: bool) -> None:
        real(self, made=made)
        for undecided in self._undecided if made else ():
            snapshots._free(self._services.core, undecided)

    return mock.patch.object(_Cut, "end", end)


def what_is_overwritten_while_a_snapshot_is_not_made_is_forgotten() -> AbstractContextManager[Any]:
    return mock.patch.object(snapshots, "_free", lambda _core, _undecided: None)


def a_volume_stays_in_the_epoch_of_its_snapshot() -> AbstractContextManager[Any]:
    real = _Cut.begin

    def begin(self: _Cut, frozen: Frozen) -> None:
        real(self, frozen)
        for volume, _ in self._wanted:
            volume.info.epoch -= 1

    return mock.patch.object(_Cut, "begin", begin)


def what_a_snapshot_holds_is_not_kept() -> AbstractContextManager[Any]:
    real = _Cut.begin

    def begin(self: _Cut, frozen: Frozen) -> None:
        before = [volume.kept_epoch for volume, _ in self._wanted]
        real(self, frozen)
        for (volume, _), kept_epoch in zip(self._wanted, before, strict=True):
            volume.kept_epoch = kept_epoch

    return mock.patch.object(_Cut, "begin", begin)


def a_checkpoint_frees_the_nodes_of_snapshots() -> AbstractContextManager[Any]:
    real = Checkpointer._replace

    def replace(self: Checkpointer, locations: Any, kept_epoch: int) -> None:
        real(self, locations, 0)

    return mock.patch.object(Checkpointer, "_replace", replace)


def a_snapshot_holds_what_came_later() -> AbstractContextManager[Any]:
    return mock.patch.object(BlockMap, "frozen_leaf", lambda self, leaf: self._frozen_now(leaf))


def a_deletion_frees_what_its_heir_holds() -> AbstractContextManager[Any]:
    def alone(snapshot: Any, _heirs: Any) -> AsyncIterator[I64]:
        return blocks_alone(snapshot, [])

    return mock.patch.object(snapshots, "blocks_alone", alone)


def a_deletion_does_not_see_what_is_given_up_meanwhile() -> AbstractContextManager[Any]:
    return mock.patch.object(_Removal, "_given_up", lambda _self, _locations: None)


def a_deletion_leaves_the_nodes() -> AbstractContextManager[Any]:
    async def nothing(*_: Any) -> None:
        pass

    return mock.patch.object(snapshots, "find_dead_nodes", nothing)


def a_deletion_frees_before_it_is_durable() -> AbstractContextManager[Any]:
    real = _Removal.complete

    async def complete(self: _Removal, frozen: Frozen) -> None:
        await real(self, frozen)
        slots = self._services.core.slots
        for dead in self._dead:
            slots.give_back(dead)
        frozen.dead = mock.MagicMock()
        frozen.dead.__iter__.side_effect = lambda: iter([np.empty(0, np.int64)])

    return mock.patch.object(_Removal, "complete", complete)


RULES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    rule.__name__: rule
    for rule in (
        what_is_overwritten_while_a_snapshot_is_made_is_freed,
        what_is_overwritten_while_a_snapshot_is_not_made_is_forgotten,
        a_volume_stays_in_the_epoch_of_its_snapshot,
        what_a_snapshot_holds_is_not_kept,
        a_checkpoint_frees_the_nodes_of_snapshots,
        a_snapshot_holds_what_came_later,
        a_deletion_frees_what_its_heir_holds,
        a_deletion_does_not_see_what_is_given_up_meanwhile,
        a_deletion_leaves_the_nodes,
        a_deletion_frees_before_it_is_durable,
    )
}


def course(seed: int) -> Course:
    """Small volumes that are written again and again, and snapshots of them."""
    settings = Settings(
        n_steps=25,
        max_size=1 << 18,
        large=0.3,
        administration=False,
        snapshots=True,
        patience=(1000.0, 0.2, 1.0)[seed % 3],
    )
    return Course(settings, n_generations=2, n_crashes=6, trouble="full" if seed % 4 == 3 else "")


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_is_found_out(tell: Tell, rule: str) -> None:
    with RULES[rule](), pytest.raises((AssertionError, StoreError)):
        for seed in range(N_SEEDS):
            run_seed(seed, course(seed))
    tell("power-loss", {"broken rules found out": 1})


@pytest.mark.parametrize("seed", range(6))
def test_without_a_broken_rule_nothing_is_found(tell: Tell, seed: int) -> None:
    tell("power-loss", run_seed(seed, course(seed)))
