"""When the event loop may sleep, and when it stays awake for the next request."""

from __future__ import annotations

import asyncio

from nbdstore.server.wakefulness import MISSES, SKIPPED_REPLIES, TURNS, Wakefulness


async def turns_awake(wakefulness: Wakefulness) -> int:
    """How many turns it asks for until the loop may sleep."""
    n = 0
    while wakefulness.is_awake:
        await asyncio.sleep(0)
        n += 1
        assert n <= TURNS
    return n


async def test_a_reply_keeps_the_loop_awake_for_a_while() -> None:
    wakefulness = Wakefulness()
    assert not wakefulness.is_awake
    wakefulness.replied()
    assert await turns_awake(wakefulness) == TURNS


async def test_replies_that_follow_each_other_make_one_longer_while() -> None:
    wakefulness = Wakefulness()
    for _ in range(10):
        wakefulness.replied()
        wakefulness.replied()
        await asyncio.sleep(0)
        assert wakefulness.is_awake
    assert await turns_awake(wakefulness) == TURNS - 1


async def test_after_some_whiles_in_vain_the_loop_sleeps_for_many_replies() -> None:
    wakefulness = Wakefulness()
    for _ in range(MISSES):
        wakefulness.replied()
        assert await turns_awake(wakefulness) == TURNS
    for round_ in range(2):
        for _ in range(SKIPPED_REPLIES - 1):
            wakefulness.replied()
            assert not wakefulness.is_awake, round_
        wakefulness.replied()
        assert await turns_awake(wakefulness) == TURNS


async def test_a_client_that_is_quick_again_is_waited_for_again() -> None:
    wakefulness = Wakefulness()
    for _ in range(MISSES):
        wakefulness.replied()
        await turns_awake(wakefulness)
    for _ in range(SKIPPED_REPLIES):
        wakefulness.replied()
    wakefulness.replied()  # while it is awake
    await turns_awake(wakefulness)
    wakefulness.replied()
    assert wakefulness.is_awake
    await turns_awake(wakefulness)


async def test_others_have_their_turn_while_the_loop_is_awake() -> None:
    wakefulness = Wakefulness()
    wakefulness.replied()
    others: list[int] = []
    for number in range(TURNS // 2):
        asyncio.get_running_loop().call_soon(others.append, number)
        await asyncio.sleep(0)
    assert wakefulness.is_awake
    assert others == list(range(TURNS // 2))
    await turns_awake(wakefulness)
