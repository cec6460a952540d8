"""Damage that took thought: each case was, or could be, old or foreign data returned as good."""

from __future__ import annotations

import asyncio
import random

import pytest

from nbdstore.errors import Corruption
from nbdstore.store import Pool
from nbdstore.store.superblock import decode
from tests.store.pools import read
from tests.store.power_loss import recover
from tests.store.scene import Scene
from tests.store.simulated_disk import LAZY, Crash, SimulatedDisk, crash_images
from tests.store.workload import Spread

BLOCK = 4096
LARGE = b"B" * (128 << 10)  # more than goes inline
DATA_ONLY = Crash(applied={"data": 1.0, "journal": 0.0, "super": 0.0})


@pytest.mark.parametrize("copy", [0, 1])
def test_a_damaged_superblock_never_brings_an_older_checkpoint_back(copy: int) -> None:
    """What the older one needs was freed, and a write that no flush covers has taken its slots."""
    scene = Scene()

    async def write(pool: Pool) -> None:
        volume = await pool.create_volume("v", 1 << 20)
        await volume.write(0, b"A" * BLOCK)
        await pool.checkpoint()
        await volume.write(0, b"x" * BLOCK)
        await volume.write(0, b"B" * BLOCK)
        await volume.write(512 << 10, LARGE)
        await pool.checkpoint()
        await volume.flush()
        for number in range(2, 12):
            await volume.write(number * BLOCK, b"W" * BLOCK)

    scene.play(write)
    images = crash_images(scene.disk, len(scene.disk.events), DATA_ONLY, random.Random(1))
    images["super"][copy * BLOCK + 77] ^= 1
    scene.begin_again(images)
    found: list[bytes] = []

    async def look(pool: Pool) -> None:
        found.append(await read(pool.volumes["v"]))

    scene.play(look)
    assert found[0][:BLOCK] == b"B" * BLOCK
    assert found[0][512 << 10 :][: len(LARGE)] == LARGE


# -- the journal -------------------------------------------------------------------------------


def record_offsets(journal: bytes) -> list[int]:
    """Where records are that are not empty."""
    return [
        at
        for at in range(0, len(journal), 64)
        if journal[at : at + 8] == b"NBDSJRNL" and journal[at + 32 : at + 36] != bytes(4)
    ]


@pytest.mark.parametrize("large", [False, True])
def test_damage_to_any_record_that_a_flush_covered_is_found_after_a_kill(large: bool) -> None:
    scene = Scene()

    async def write(pool: Pool) -> None:
        volume = await pool.create_volume("v", 1 << 20)
        await pool.checkpoint()
        for number in range(3):
            await volume.write(number * BLOCK, LARGE if large else b"x" * BLOCK)
            await volume.flush()

    scene.play(write)
    killed = scene.disk.images
    start = decode(bytes(killed["super"][:BLOCK]), "super").journal_offset
    live = [at for at in record_offsets(killed["journal"]) if at >= start]
    assert len(live) == (3 if large else 6)
    for at in live:
        images = {name: bytearray(image) for name, image in killed.items()}
        images["journal"][at + 70] ^= 1
        with pytest.raises(Corruption, match="journal"):
            recover(SimulatedDisk(images), Spread())


def test_soon_after_a_flush_a_loss_of_power_leaves_no_record_whose_damage_would_be_missed() -> None:
    scene = Scene()

    async def write(pool: Pool) -> None:
        volume = await pool.create_volume("v", 1 << 20)
        await pool.checkpoint()
        await volume.write(0, b"x" * BLOCK)
        await volume.flush()
        await asyncio.sleep(3)

    scene.play(write, sync_interval_s=2)
    images = scene.crashed(LAZY)
    images["journal"][record_offsets(images["journal"])[-1] + 70] ^= 1
    with pytest.raises(Corruption, match="journal"):
        recover(SimulatedDisk(images), Spread())
