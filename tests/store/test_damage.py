"""Damage that took thought: each case was, or could be, old or foreign data returned as good."""

from __future__ import annotations

import random

import pytest

from nbdstore.store import Pool
from tests.store.pools import read
from tests.store.scene import Scene
from tests.store.simulated_disk import Crash, crash_images

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
