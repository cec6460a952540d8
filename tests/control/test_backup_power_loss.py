"""Backups survive what may happen to both ends; and the tests of that can fail.

Each broken rule is a mistake that a change could bring; some seed must notice.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest

from nbdstore.control import receiving, sending
from nbdstore.control.backup_stream import BackupReader, Begin, Part, ResumeToken, Zeros
from nbdstore.control.receiving import Receiving, _Reception
from nbdstore.control.usage import Usage
from nbdstore.errors import NbdstoreError
from tests.control.backup_power_loss import run_seed
from tests.figures import Tell

N_SEEDS = 60


@pytest.mark.parametrize("first", range(0, 18, 6))
def test_there_is_all_of_a_snapshot_or_what_can_be_gone_on_with(tell: Tell, first: int) -> None:
    figures: Counter[str] = Counter()
    for seed in range(first, first + 6):
        figures.update(run_seed(seed))
    assert figures["resumed"] and figures["senders that died"]
    tell("backups", figures)


# -- the receiver --------------------------------------------------------------------------------


def what_came_is_noted_before_it_is_written() -> AbstractContextManager[Any]:
    real = _Reception._write

    async def write(self: _Reception, part: Part) -> int:
        before, self._position = self._position, max(self._position, part.stop)
        await self._save()
        self._position = before
        return await real(self, part)

    return mock.patch.object(_Reception, "_write", write)


def a_volume_can_be_used_before_it_has_its_snapshot() -> AbstractContextManager[Any]:
    real = _Reception.complete

    async def complete(self: _Reception, begin: Begin) -> None:
        await receiving._unmark(self._usage, self.volume)
        await real(self, begin)

    return mock.patch.object(_Reception, "complete", complete)


def any_base_will_do() -> AbstractContextManager[Any]:
    return mock.patch.object(
        Receiving, "_base", lambda _self, volume, _uuid, _name: [*volume.snapshots.values()][-1]
    )


def a_volume_that_has_changed_will_do() -> AbstractContextManager[Any]:
    return mock.patch.object(Receiving, "_require_unchanged", mock.AsyncMock())


def another_stream_goes_on_with_what_came() -> AbstractContextManager[Any]:
    return mock.patch.object(receiving, "_check_goes_on", lambda *_: None)


def giving_up_does_not_roll_back() -> AbstractContextManager[Any]:
    real = Receiving.abort

    async def abort(self: Receiving, name: str) -> None:
        with mock.patch.object(type(self._pool), "rollback", mock.AsyncMock()):
            await real(self, name)

    return mock.patch.object(Receiving, "abort", abort)


def what_is_given_up_goes_on_where_it_broke_off() -> AbstractContextManager[Any]:
    real_abort, real_set = Receiving.abort, Usage.set

    async def abort(self: Receiving, name: str) -> None:
        async def set_(usage: Usage, volume: Any, **properties: Any) -> None:
            if not properties.get("receiving"):
                await real_set(usage, volume, **properties)

        with mock.patch.object(Usage, "set", set_):
            await real_abort(self, name)

    return mock.patch.object(Receiving, "abort", abort)


def zeros_are_left_out() -> AbstractContextManager[Any]:
    real = _Reception._write

    async def write(self: _Reception, part: Part) -> int:
        return 0 if isinstance(part, Zeros) else await real(self, part)

    return mock.patch.object(_Reception, "_write", write)


def a_snapshot_gets_a_uuid_of_its_own() -> AbstractContextManager[Any]:
    real = _Reception.complete

    async def complete(self: _Reception, begin: Begin) -> None:
        await real(self, dataclasses.replace(begin, uuid=begin.uuid[::-1]))

    return mock.patch.object(_Reception, "complete", complete)


# -- the stream ----------------------------------------------------------------------------------


def a_stream_without_its_end_is_whole() -> AbstractContextManager[Any]:
    return mock.patch.object(BackupReader, "end", lambda self: self.begin)


def damage_is_not_looked_for() -> AbstractContextManager[Any]:
    real = BackupReader._next_frame

    def next_frame(self: BackupReader) -> Any:
        expected = int.from_bytes(self._buffer[16:24], "big")
        with mock.patch("nbdstore.control.backup_stream._chained", lambda *_: expected):
            return real(self)

    return mock.patch.object(BackupReader, "_next_frame", next_frame)


# -- the sender ----------------------------------------------------------------------------------


def a_token_goes_too_far() -> AbstractContextManager[Any]:
    real = ResumeToken.decode

    def decode(text: str) -> ResumeToken:
        found = real(text)
        return dataclasses.replace(found, start=found.start + 4096 if found.start else 0)

    return mock.patch.object(ResumeToken, "decode", decode)


def the_volume_is_sent_instead_of_its_snapshot() -> AbstractContextManager[Any]:
    real = sending._read

    async def read(snapshot: Any, piece: Any) -> Any:
        return await real(snapshot.volume, piece)

    return mock.patch.object(sending, "_read", read)


RULES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    rule.__name__: rule
    for rule in (
        what_came_is_noted_before_it_is_written,
        a_volume_can_be_used_before_it_has_its_snapshot,
        any_base_will_do,
        a_volume_that_has_changed_will_do,
        another_stream_goes_on_with_what_came,
        giving_up_does_not_roll_back,
        what_is_given_up_goes_on_where_it_broke_off,
        zeros_are_left_out,
        a_snapshot_gets_a_uuid_of_its_own,
        a_stream_without_its_end_is_whole,
        damage_is_not_looked_for,
        a_token_goes_too_far,
        the_volume_is_sent_instead_of_its_snapshot,
    )
}


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_is_found_out(tell: Tell, rule: str) -> None:
    with RULES[rule](), pytest.raises((AssertionError, NbdstoreError)):
        for seed in range(N_SEEDS):
            run_seed(seed)
    tell("backups", {"broken rules found out": 1})
