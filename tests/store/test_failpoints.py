"""Failpoints: at each place that the store names, the world stops in every way."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from nbdstore.store import Pool
from nbdstore.store.host import Failpoint
from tests.figures import Tell
from tests.store.crashes import KILLED, LAZY, Crash, crash_images, killed_at
from tests.store.fault_sweep import PLAY
from tests.store.power_loss import assert_clean
from tests.store.short_plays import OPERATIONS, OPTIONS, Play, base_of, look, run
from tests.store.short_states import Found, Known, judge
from tests.store.simulated_disk import PLACE, Reached, SimulatedDisk

AT_CREATION = (Failpoint.POOL_FILES_WRITTEN, Failpoint.POOL_NAMED)
"""Those are crashed at by test_formatting.py."""


@functools.cache
def played() -> Play:
    """A play that does everything."""
    images, holding = base_of("used")
    play = Play(SimulatedDisk(images), holding)

    async def main() -> None:
        play.note()
        await play.open()
        for number, name in enumerate(PLAY):
            play.number = number
            await OPERATIONS[name](play)

    run(main())
    return play


def known_at(play: Play, at: int) -> Known:
    return next(known for moment, known in reversed(play.moments) if moment <= at)


async def look_at(disk: SimulatedDisk) -> Found:
    return await look(await Pool.open(PLACE, OPTIONS, host=disk.host))


def moments_of(place: Failpoint) -> list[int]:
    """After how many events the play came to `place`: the first, the last, some between."""
    found = [i + 1 for i, e in enumerate(played().disk.events) if e == Reached(place)]
    return sorted({*found[:3], *found[-3:], *found[:: max(1, len(found) // 5)]})


def crashes(seed: int) -> Iterator[Crash]:
    yield LAZY
    yield KILLED
    for number in range(4):
        yield Crash.random(random.Random(seed + number))


@pytest.mark.parametrize("place", [p for p in Failpoint if p not in AT_CREATION])
def test_the_power_fails_at_every_failpoint(tell: Tell, place: Failpoint) -> None:
    play, n_crashes = played(), 0
    moments = moments_of(place)
    assert moments, f"the play never comes to {place!r}: make it do so"
    for at in moments:
        for number, crash in enumerate(crashes(at)):
            images = crash_images(play.disk, at, crash, random.Random(number))
            assert_clean(images)
            judge(run(look_at(SimulatedDisk(images))), known_at(play, at), killed=crash is KILLED)
            n_crashes += 1
    tell("failpoints", {"failpoints": 1, "crashes": n_crashes})


@pytest.mark.parametrize("place", [p for p in Failpoint if p not in AT_CREATION])
def test_the_process_dies_at_every_failpoint_and_then_the_power_fails(
    tell: Tell, place: Failpoint
) -> None:
    play, figures = played(), Counter[str]()
    for at in moments_of(place)[-2:]:
        disk = killed_at(play.disk, at)
        found = run(look_at(disk))
        judge(found, known_at(play, at), killed=True)
        for moment in range(0, len(disk.events) + 1, 3):
            images = crash_images(disk, moment, Crash.random(random.Random(moment)), disk.random)
            judge(run(look_at(SimulatedDisk(images))), known_at(play, at), killed=False)
            figures["crashes of the recovery"] += 1
        assert (
            run(look_at(SimulatedDisk(crash_images(disk, len(disk.events), LAZY, disk.random))))
            == found
        )
        figures["kills"] += 1
    tell("failpoints", figures)
