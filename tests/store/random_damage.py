"""Damage at random, anywhere in a pool: harmless, reported or refused, never believed.

`run_seed` is what the tests call, and what one calls by hand with thousands of seeds::

    python -m tests.store.random_damage 1000 2000
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import sys
import traceback
from collections import Counter
from typing import Final

from nbdstore.errors import Corruption, ReadFailed, StoreError
from nbdstore.store import Pool, Volume
from nbdstore.store.check import check_pool
from tests.store.power_loss import new_pool
from tests.store.simulated_disk import PLACE, Images, SimulatedDisk, adversarial
from tests.store.workload import joined

BLOCK: Final = 4096
MIB: Final = 1 << 20
PLACES: Final = (0, 300 * MIB)
"""Where the volume "wide" has its two MiB of data."""
LENGTH: Final = MIB

States = dict[str, list[bytes]]
"""What each volume held after its last flush, and after each write since."""


async def content(volume: Volume) -> bytes:
    """The two places of a volume."""
    return b"".join([joined(await volume.read(at, LENGTH)) for at in PLACES])


@functools.cache
def subject(*, closed: bool) -> tuple[dict[str, bytes], States]:
    """A pool after some work, closed or killed, and the states its volumes may be in."""
    rng = random.Random(1)
    disk = SimulatedDisk(new_pool(BLOCK, 16 * MIB))
    states: States = {}

    async def main() -> None:
        pool = await Pool.open(PLACE, adversarial(), host=disk.host)
        volumes = [await pool.create_volume(name, PLACES[-1] + LENGTH) for name in ("one", "two")]

        async def write(volume: Volume) -> None:
            at = rng.choice(PLACES) + rng.randrange(LENGTH - 20_000)
            await volume.write(at, rng.randbytes(rng.randrange(1, 20_000)))

        for number in range(60):
            await write(rng.choice(volumes))
            if number in (20, 35):
                await pool.checkpoint()
            if number % 7 == 0:
                await rng.choice(volumes).flush()
        for volume in volumes:
            await volume.flush()
            states[volume.name] = [await content(volume)]
        for _ in range(6):
            for volume in volumes:
                await write(volume)
                states[volume.name].append(await content(volume))
        if closed:
            await pool.close()
            for found in states.values():
                del found[:-1]

    asyncio.run(main())
    return {name: bytes(image) for name, image in disk.images.items()}, states


# -- damage ------------------------------------------------------------------------------------


def _place(rng: random.Random, image: bytearray, size: int) -> int:
    """An aligned place where there is something."""
    for _ in range(50):
        at = rng.randrange(max(1, len(image) // size)) * size
        if any(image[at : at + size]):
            return at
    return 0


def damage(rng: random.Random, images: Images) -> str:
    """Do some damage to one file; return what."""
    name = rng.choice(("super", "journal", "journal", "data", "data", "data"))
    image = images[name]
    kind = rng.choice(("flip", "flip", "flip", "zero", "random", "copy", "swap", "truncate"))
    size = rng.choice((64, 512, BLOCK))
    at = _place(rng, image, size)
    before = bytes(image[at : at + size])
    if kind == "flip":
        at += rng.randrange(size)
        image[at] ^= 1 << rng.randrange(8)
    elif kind == "zero":
        image[at : at + size] = bytes(size)
    elif kind == "random":
        image[at : at + size] = rng.randbytes(size)
    elif kind == "truncate":
        del image[at + rng.randrange(size) :]
    else:
        other = _place(rng, image, size)
        image[at : at + size] = image[other : other + size]
        if kind == "swap":
            image[other : other + size] = before
    return f"{kind} of {size} bytes at {at} of {name}"


# -- what may come of it -----------------------------------------------------------------------


async def _look(disk: SimulatedDisk, states: States) -> str:
    pool = await Pool.open(PLACE, adversarial(), host=disk.host)
    try:
        assert set(pool.volumes) == set(states), "a volume is gone, or came from nowhere"
        kinds = {await _look_at(volume, states[name]) for name, volume in pool.volumes.items()}
        return "lost" if "lost" in kinds else "harmless"
    finally:
        await pool.close()


async def _look_at(volume: Volume, states: list[bytes]) -> str:
    try:
        found = await content(volume)
    except Corruption:
        pass
    else:
        assert found in states, f"volume {volume.name} is in no state that it was ever in"
        return "harmless"
    for index, place in enumerate(PLACES):
        for at in range(0, LENGTH, BLOCK):
            start = index * LENGTH + at
            try:
                block = joined(await volume.read(place + at, BLOCK))
            except (Corruption, ReadFailed):
                continue
            assert any(block == s[start : start + BLOCK] for s in states), f"other data at {start}"
    return "lost"


def run_seed(seed: int) -> str:
    """Damage a pool and look at it in every way; return what came of it."""
    rng = random.Random(seed)
    raw, states = subject(closed=rng.random() < 0.5)
    images = {name: bytearray(image) for name, image in raw.items()}
    told = damage(rng, images)
    try:
        return _judge(rng, images, states)
    except Exception as error:
        error.add_note(f"seed {seed}: {told}")
        raise


def _judge(rng: random.Random, images: Images, states: States) -> str:
    try:
        clean = check_pool(PLACE, host=SimulatedDisk(images).host).clean
    except StoreError:
        clean = False
    try:
        outcome = asyncio.run(_look(SimulatedDisk(images), states))
    except StoreError:
        outcome = "refused"
    assert not (clean and outcome != "harmless"), "check found nothing"
    disk = SimulatedDisk(images)
    try:
        if not check_pool(PLACE, repair=True, host=disk.host).clean:
            return outcome
    except StoreError:
        return outcome
    # What repair calls mended works, and whatever is still readable is right.
    assert check_pool(PLACE, host=disk.host).clean, "repair left something, and did not say so"
    if outcome != "refused":
        looked = asyncio.run(_look(disk, states))
        assert looked == "harmless", "repair lost data and did not say so"
    else:
        asyncio.run(_open_and_read(disk))
        outcome = "repaired"
    return outcome


async def _open_and_read(disk: SimulatedDisk) -> None:
    pool = await Pool.open(PLACE, adversarial(), host=disk.host)
    for volume in pool.volumes.values():
        await content(volume)
    await pool.close()


def main() -> None:
    logging.disable(logging.CRITICAL)
    outcomes: Counter[str] = Counter()
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        try:
            outcomes[run_seed(seed)] += 1
        except Exception:
            outcomes["FAILED"] += 1
            traceback.print_exc(limit=-3)
    print(dict(outcomes))


if __name__ == "__main__":
    main()
