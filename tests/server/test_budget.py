"""The budget alone: shares, the common part, and the line of those who wait for it."""

from __future__ import annotations

import pytest

from nbdstore.server.budget import Account, Budget

SHARE, COMMON = 10, 50


@pytest.fixture
def budget() -> Budget:
    """Room for 5 connections: a share of 10 for each, and 50 for all."""
    return Budget(100, 5)


def opened(budget: Budget, woken: list[str] | None = None, name: str = "") -> Account:
    return budget.open(lambda: woken.append(name) if woken is not None else None)


def test_a_share_is_there_whatever_others_do(budget):
    greedy, modest = opened(budget), opened(budget)
    greedy.set(SHARE + COMMON)
    assert not greedy.fits(1)
    assert modest.fits(SHARE)
    assert not modest.fits(SHARE + 1)
    assert modest.room() == SHARE
    modest.set(4)
    assert modest.room() == SHARE - 4
    assert modest.fits(SHARE - 4)
    assert modest.fits(0)
    assert greedy.fits(0), "what weighs nothing always fits: a trim in a full pool"


def test_the_common_part_is_for_what_goes_beyond_a_share(budget):
    first, second = opened(budget), opened(budget)
    first.set(SHARE + 20)
    assert budget.free_for_all == 30
    assert second.fits(SHARE + 30)
    assert not second.fits(SHARE + 31)
    first.set(SHARE)
    assert budget.free_for_all == COMMON


def test_all_together_hold_no_more_than_the_total(budget):
    accounts = [opened(budget) for _ in range(5)]
    for account in accounts * 10:
        if account.fits(7):
            account.set(account.held + 7)
    assert 95 <= sum(account.held for account in accounts) <= 100


def test_a_request_beyond_everything_begins_when_nobody_uses_the_common_part(budget):
    large, other = opened(budget), opened(budget)
    assert large.fits(1000)
    other.set(SHARE)
    assert large.fits(1000)
    other.set(SHARE + 1)
    assert not large.fits(1000)


def test_those_who_wait_are_served_in_their_order(budget):
    woken: list[str] = []
    holder, large, small = opened(budget), opened(budget, woken, "l"), opened(budget, woken, "s")
    holder.set(SHARE + 40)
    assert not large.fits(SHARE + 30)
    large.wait()
    assert budget.free_for_all == 0
    assert not small.fits(SHARE + 5), "it would fit, but another has come earlier"
    assert small.room() == SHARE
    small.wait()
    holder.set(SHARE + 30)
    assert woken == ["l"]
    assert not large.fits(SHARE + 30)
    holder.set(SHARE + 20)
    assert woken == ["l", "l"]
    assert large.fits(SHARE + 30)
    large.set(SHARE + 30)
    large.stop_waiting()
    assert woken[-1] == "s"
    small.stop_waiting()
    assert budget.free_for_all == 0
    large.set(0)
    assert budget.free_for_all == 30


def test_who_leaves_gives_everything_back_and_its_place_too(budget):
    woken: list[str] = []
    holder, gone, next_one = opened(budget), opened(budget, woken, "g"), opened(budget, woken, "n")
    holder.set(SHARE + COMMON)
    gone.set(5)
    gone.wait()
    next_one.wait()
    gone.close()
    assert woken == ["n"]
    holder.close()
    assert woken == ["n", "n"]
    next_one.close()
    assert budget.free_for_all == budget.common_free == COMMON


def test_waiting_twice_keeps_the_place(budget):
    first, second = opened(budget), opened(budget)
    first.wait()
    second.wait()
    first.wait()
    assert budget.is_first(first)
    first.stop_waiting()
    first.stop_waiting()
    assert budget.is_first(second)
