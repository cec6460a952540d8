"""Whose turn it is."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from nbdstore.agent.attachments import Attachments, AtWork
from nbdstore.agent.records import Records
from nbdstore.errors import NotFound


@pytest.fixture
def attachments(tmp_path: Path) -> Attachments:
    return Attachments(Records.open(tmp_path / "state"))


def test_one_at_a_time_for_each_volume(attachments: Attachments) -> None:
    with attachments.turn("db", "formatting"):
        with attachments.turn("web", "mounting"):
            pass
        refused = pytest.raises(AtWork, match="formatting of volume db has been under way for 0 s")
        with refused, attachments.turn("db", "detaching", patience_s=0.0):
            raise AssertionError
    with attachments.turn("db", "detaching", patience_s=0.0):
        pass


def test_who_comes_meanwhile_waits_a_little(attachments: Attachments) -> None:
    entered, order = threading.Event(), []

    def work() -> None:
        with attachments.turn("db", "tending"):
            entered.set()
            order.append("first")

    with attachments.turn("db", "mounting"):
        thread = threading.Thread(target=work)
        thread.start()
        assert not entered.is_set()
        order.append("zeroth")
    thread.join()
    assert order == ["zeroth", "first"]


def test_a_failure_ends_the_turn(attachments: Attachments) -> None:
    with pytest.raises(ZeroDivisionError), attachments.turn("db", "mounting"):
        raise ZeroDivisionError
    with attachments.turn("db", "detaching", patience_s=0.0):
        pass


def test_what_is_not_attached_is_not_found(attachments: Attachments) -> None:
    assert attachments.get("db") is None
    with pytest.raises(NotFound, match="volume db is not attached here"):
        attachments.find("db")
