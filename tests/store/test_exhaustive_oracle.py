"""The enumeration can fail: a store, or a control API, that breaks a rule is found out.

Each case takes one rule away, and plays a sequence that hangs on it, as `--only` does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest

from nbdstore.control.scrub import _Scrub
from nbdstore.control.usage import Usage
from nbdstore.store.administration import Administration
from nbdstore.store.durability import Committer
from nbdstore.store.records import Op, range_group
from nbdstore.store.trash import Trash
from tests.control.test_backup_power_loss import (
    a_volume_can_be_used_before_it_has_its_snapshot,
    giving_up_does_not_roll_back,
    the_volume_is_sent_instead_of_its_snapshot,
    what_came_is_noted_before_it_is_written,
    what_is_given_up_goes_on_where_it_broke_off,
)
from tests.figures import Tell
from tests.store.exhaustive import Explorer

MAP = bytes([Op.MAP])
"""How a group begins that says where blocks lie."""


def a_change_is_acknowledged_before_it_is_durable() -> AbstractContextManager[Any]:
    real = Administration.change

    async def change(self: Administration, *args: Any) -> None:
        with mock.patch.object(Committer, "commit_all", mock.AsyncMock()):
            await real(self, *args)

    return mock.patch.object(Administration, "change", change)


def what_is_written_beside_a_resize_is_not_journalled() -> AbstractContextManager[Any]:
    real = Administration._resize

    async def resize(self: Administration, *args: Any) -> None:
        append = self._core.append

        def leaving_out(*groups: bytes) -> int:
            nothing = range_group(Op.CLEAR, args[0].id, [])
            return append(*(nothing if group[:1] == MAP else group for group in groups))

        with mock.patch.object(self._core, "append", leaving_out):
            await real(self, *args)

    return mock.patch.object(Administration, "_resize", resize)


def what_is_to_be_kept_with_a_volume_is_not() -> AbstractContextManager[Any]:
    return mock.patch.object(Usage, "set", mock.AsyncMock())


def a_scrub_begins_anew_each_time() -> AbstractContextManager[Any]:
    return mock.patch.object(_Scrub, "_resume", lambda _self: None)


def the_time_in_the_trash_is_never_up() -> AbstractContextManager[Any]:
    return mock.patch.object(Trash, "empty_in_time", lambda _self: None)


FOUND_BY: dict[Callable[[], AbstractContextManager[Any]], tuple[str, ...]] = {
    a_change_is_acknowledged_before_it_is_durable: (
        *("used:rename", "used:enlarge", "used:limit", "used:lease", "used:lease,break"),
        *("used:scrub", "used:trash,expire", "used:shrink-beside", "used:grow-beside"),
    ),
    what_is_to_be_kept_with_a_volume_is_not: ("used:limit", "used:lease", "used:scrub"),
    a_scrub_begins_anew_each_time: ("used:scrub-part,scrub",),
    the_time_in_the_trash_is_never_up: ("snapped:trash,expire",),
    what_is_written_beside_a_resize_is_not_journalled: ("used:shrink-beside", "used:grow-beside"),
    the_volume_is_sent_instead_of_its_snapshot: ("snapped:send",),
    what_came_is_noted_before_it_is_written: ("fresh:receive",),
    a_volume_can_be_used_before_it_has_its_snapshot: ("fresh:receive",),
    giving_up_does_not_roll_back: ("used:receive,receive-part,abort",),
    what_is_given_up_goes_on_where_it_broke_off: ("used:receive,receive-part,abort",),
}
CASES = {
    f"{rule.__name__}: {told}": (rule, told) for rule, plays in FOUND_BY.items() for told in plays
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_rule_is_found_out(tell: Tell, case: str) -> None:
    rule, told = CASES[case]
    base, _, names = told.partition(":")
    with rule(), pytest.raises(AssertionError):
        Explorer().explore(base, tuple(names.split(",")))
    tell("exhaustive", {"broken rules found out": 1})
