"""One thing at a time for each volume; what takes long goes on and is waited for again."""

from __future__ import annotations

import threading

import pytest

from nbdstore.docker_plugin.turns import Turns
from nbdstore.errors import Busy, NotFound

LONG_S = 60.0


def test_what_it_returns_and_raises() -> None:
    turns = Turns()
    assert turns.take("db", "counting", lambda: 3, patience_s=LONG_S) == 3

    def fail() -> None:
        raise NotFound("none")

    with pytest.raises(NotFound):
        turns.take("db", "failing", fail, patience_s=LONG_S)
    assert turns.take("db", "counting", lambda: 4, patience_s=LONG_S) == 4


def test_the_same_work_is_waited_for_and_not_done_twice() -> None:
    turns, began, may_end, calls = Turns(), threading.Event(), threading.Event(), []

    def work() -> str:
        calls.append(1)
        began.set()
        assert may_end.wait(LONG_S)
        return "done"

    for _ in range(2):
        with pytest.raises(Busy, match=r"mounting volume db is under way for \d+ s and goes on"):
            turns.take("db", "mounting", work, patience_s=0)
    # Something else waits for its turn, and another volume's work does not.
    with pytest.raises(Busy, match="mounting volume db"):
        turns.take("db", "removing", lambda: None, patience_s=0)
    assert turns.take("other", "mounting", lambda: "other", patience_s=LONG_S) == "other"
    assert began.wait(LONG_S)
    assert calls == [1]
    may_end.set()
    assert turns.take("db", "mounting", work, patience_s=LONG_S) == "done"
    assert turns.take("db", "removing", lambda: "removed", patience_s=LONG_S) == "removed"
