"""The power-loss tests can fail: a store or a disk that breaks a rule is found out.

Each case takes one rule away that durability hangs on; some seed must notice, or one moment.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest import mock

import pytest

from nbdstore.errors import StoreError
from nbdstore.store import Pool
from nbdstore.store.blockmap import BlockMap
from nbdstore.store.checkpoint import Checkpointer
from nbdstore.store.core import Core
from nbdstore.store.durability import INLINE_BYTES, Committer
from nbdstore.store.journal import Journal
from nbdstore.store.recovery import _Replay
from nbdstore.store.slots import FrozenBitmap, Slots
from nbdstore.store.writing import Writing
from tests.figures import Tell
from tests.store import test_power_loss
from tests.store.power_loss import Course, run_seed
from tests.store.simulated_disk import NAMES, SimulatedDisk, SimulatedFile
from tests.store.workload import Settings

N_SEEDS = 150


def the_disk_lies_about(name: str) -> AbstractContextManager[Any]:
    """A sync of one file does nothing, but says that all went well."""
    real = SimulatedDisk.offload

    async def offload(self: SimulatedDisk, call: Any, *args: Any) -> Any:
        owner = getattr(call, "__self__", None)
        if isinstance(owner, SimulatedFile) and owner.name == name and call == owner.fdatasync:
            return await self.pause()
        return await real(self, call, *args)

    return mock.patch.object(SimulatedDisk, "offload", offload)


def freed_slots_are_used_at_once() -> AbstractContextManager[Any]:
    real = Slots.free_later

    def free_later(self: Slots, slots: Any, seq: int) -> None:
        real(self, slots, seq)
        if self._on_replay_free is None:
            self._readers, readers = {}, self._readers
            self.release(seq)
            self._readers = readers

    return mock.patch.object(Slots, "free_later", free_later)


def freed_slots_are_used_before_a_record_says_so() -> AbstractContextManager[Any]:
    real = Committer._advance

    def advance(self: Committer, seq: int, carried: int) -> None:
        real(self, seq, carried)
        self.raise_horizon(self._core.journal.durable_seq)

    return mock.patch.object(Committer, "_advance", advance)


def readers_pin_nothing() -> AbstractContextManager[Any]:
    return mock.patch.multiple(Slots, pin=lambda *_: None, unpin=lambda *_: None)


def data_of_other_volumes_counts_as_durable() -> AbstractContextManager[Any]:
    def advance(self: Committer, seq: int, carried: int) -> None:
        self._core.journal.durable_seq = max(self._core.journal.durable_seq, seq)
        self.raise_horizon(carried)

    return mock.patch.object(Committer, "_advance", advance)


def durable_pages_of_the_journal_are_written_again() -> AbstractContextManager[Any]:
    return mock.patch.object(Journal, "seal", lambda self: self.carried_durable_seq)


def records_are_not_verified() -> AbstractContextManager[Any]:
    return mock.patch.object(_Replay, "_find_dropped", lambda _self: None)


def a_checkpoint_writes_what_is_there_now() -> AbstractContextManager[Any]:
    return mock.patch.object(BlockMap, "frozen_leaf", lambda self, leaf: self._frozen_now(leaf))


def a_checkpoint_frees_before_it_is_durable() -> AbstractContextManager[Any]:
    real = Checkpointer._replace

    def replace(self: Checkpointer, locations: Any, kept_epoch: int) -> None:
        n_before = len(self._replaced)
        real(self, locations, kept_epoch)
        for slots in self._replaced[n_before:]:
            self._core.slots.free_later(slots, 0)
        del self._replaced[n_before:]
        self._core.slots.release(0)

    return mock.patch.object(Checkpointer, "_replace", replace)


def recovery_uses_what_it_may_need_again() -> AbstractContextManager[Any]:
    real = Slots.end_replay

    def end_replay(self: Slots, seq: int) -> None:
        self._replay_freed = []
        real(self, seq)

    return mock.patch.object(Slots, "end_replay", end_replay)


def a_flush_returns_at_once() -> AbstractContextManager[Any]:
    async def commit(self: Committer, _volume: Any) -> None:
        self._core.check_alive()

    return mock.patch.object(Committer, "commit", commit)


def a_flush_shares_the_round_that_runs() -> AbstractContextManager[Any]:
    real = Committer._round

    async def round_(self: Committer) -> None:
        if self._task is None:
            await real(self)
        else:
            await asyncio.wait([self._task])

    async def commit(self: Committer, volume: Any) -> None:
        self._core.check_alive()
        self._waiting[volume] = None
        await round_(self)

    return mock.patch.object(Committer, "commit", commit)


def a_small_flush_leaves_its_data_out() -> AbstractContextManager[Any]:
    def write_inline(self: Committer, waiting: Any) -> bool:
        return sum(v.unsynced.n_bytes for v in waiting) <= INLINE_BYTES

    return mock.patch.object(Committer, "_write_inline", write_inline)


def a_trim_is_not_journalled() -> AbstractContextManager[Any]:
    return mock.patch("nbdstore.store.ranges.records.range_group", lambda *_: b"")


def what_is_freed_stays_used_in_a_checkpoint() -> AbstractContextManager[Any]:
    return mock.patch.object(FrozenBitmap, "clear", lambda _self, _slots: None)


def numbers_of_lost_records_are_given_again() -> AbstractContextManager[Any]:
    real = Journal.__init__

    def init(self: Journal, *args: Any, seq: int, **places: Any) -> None:
        real(self, *args, seq=seq, **places)
        self.seq = seq

    return mock.patch.object(Journal, "__init__", init)


def a_former_life_of_a_slot_is_brought_back() -> AbstractContextManager[Any]:
    return mock.patch.object(_Replay, "_forget_inline", lambda _self, _slots: None)


def a_merge_does_not_look_again() -> AbstractContextManager[Any]:
    real = Writing._current

    def current(self: Writing, block: int, pending: Any, old: Any) -> Any:
        if block not in pending and block in old:
            return bytearray(old[block][1])
        return real(self, block, pending, old)

    return mock.patch.object(Writing, "_current", current)


def a_failed_sync_is_tried_again() -> AbstractContextManager[Any]:
    patches = contextlib.ExitStack()
    patches.enter_context(mock.patch.object(Core, "fail", lambda _self, _why: None))
    forgotten = property(lambda _self: False, lambda _self, _failed: None)
    patches.enter_context(mock.patch.object(SimulatedFile, "sync_failed", forgotten, create=True))
    return patches


def a_superblock_is_written_before_what_it_points_to() -> AbstractContextManager[Any]:
    real = Checkpointer._sync

    async def sync(_self: Checkpointer, _frozen: Any) -> None:
        pass

    async def flip(self: Checkpointer, new: Any) -> None:
        await real_flip(self, new)
        await real(self, mock.Mock(mark=0))

    real_flip = Checkpointer._flip
    patches = contextlib.ExitStack()
    patches.enter_context(mock.patch.object(Checkpointer, "_sync", sync))
    patches.enter_context(mock.patch.object(Checkpointer, "_flip", flip))
    return patches


def recovery_builds_on_the_page_cache_of(name: str) -> AbstractContextManager[Any]:
    real = SimulatedFile.pread_direct

    def pread_direct(self: SimulatedFile, length: int, offset: int) -> bytes:
        return (self.pread if self.name == name else partial(real, self))(length, offset)

    return mock.patch.object(SimulatedFile, "pread_direct", pread_direct)


def recovery_builds_on_a_superblock_that_is_not_durable() -> AbstractContextManager[Any]:
    real = Pool._finish_recovery

    async def finish(self: Pool, opened: Any) -> None:
        opened.super_file = mock.Mock()
        await real(self, opened)

    return mock.patch.object(Pool, "_finish_recovery", finish)


BROKEN: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "the disk lies about data": lambda: the_disk_lies_about("data"),
    "the disk lies about the journal": lambda: the_disk_lies_about("journal"),
    "the disk lies about the superblock": lambda: the_disk_lies_about("super"),
} | {
    rule.__name__: rule
    for rule in (
        freed_slots_are_used_at_once,
        freed_slots_are_used_before_a_record_says_so,
        readers_pin_nothing,
        data_of_other_volumes_counts_as_durable,
        durable_pages_of_the_journal_are_written_again,
        records_are_not_verified,
        a_checkpoint_writes_what_is_there_now,
        a_checkpoint_frees_before_it_is_durable,
        recovery_uses_what_it_may_need_again,
        a_flush_returns_at_once,
        a_flush_shares_the_round_that_runs,
        a_small_flush_leaves_its_data_out,
        a_trim_is_not_journalled,
        what_is_freed_stays_used_in_a_checkpoint,
        numbers_of_lost_records_are_given_again,
        a_former_life_of_a_slot_is_brought_back,
        a_merge_does_not_look_again,
        a_failed_sync_is_tried_again,
        a_superblock_is_written_before_what_it_points_to,
    )
}


FOUND_BY_A_MOMENT: dict[str, Callable[[], None]] = {
    numbers_of_lost_records_are_given_again.__name__: (
        test_power_loss.test_records_beyond_one_that_was_lost_never_follow_a_new_one
    ),
}
"""Where seeds that notice are rare, so that any change of the store might leave none of them."""

NEEDS_A_FAILED_SYNC = {"a_failed_sync_is_tried_again"}


def course(seed: int, rule: str) -> Course:
    """Small volumes that are written again and again, so that slots and records soon are, too."""
    settings = Settings(
        n_steps=25,
        max_size=1 << 18,
        large=0.3,
        administration=False,
        patience=(1000.0, 0.2, 1.0)[seed % 3],
    )
    trouble = "broken" if rule in NEEDS_A_FAILED_SYNC else ""
    return Course(settings, n_generations=1, n_crashes=12, trouble=trouble)


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_found_out(tell: Tell, rule: str) -> None:
    with BROKEN[rule](), pytest.raises((AssertionError, StoreError)):
        if rule in FOUND_BY_A_MOMENT:
            FOUND_BY_A_MOMENT[rule]()
        else:
            for seed in range(N_SEEDS):
                run_seed(seed, course(seed, rule))
    tell("power-loss", {"broken rules found out": 1})


def test_a_superblock_that_is_not_durable_is_found_to_be_built_on() -> None:
    """By one moment; seeds that have it are rare."""
    with recovery_builds_on_a_superblock_that_is_not_durable(), pytest.raises(StoreError):
        test_power_loss.test_a_superblock_that_a_killed_process_left_unsynced_is_made_durable_first()


@pytest.mark.parametrize("file", NAMES)
def test_a_page_cache_is_found_to_be_built_on(file: str) -> None:
    """By one play for each file; seeds that have it are rare."""
    rule = recovery_builds_on_the_page_cache_of(file)
    with rule, pytest.raises((AssertionError, StoreError)):
        test_power_loss.test_what_only_the_page_cache_has_is_not_built_upon(file)
