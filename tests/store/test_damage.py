"""Damage that took thought: each case was, or could be, old or foreign data returned as good."""

from __future__ import annotations

import asyncio
import random

import pytest

from nbdstore.errors import Corruption
from nbdstore.store import Pool
from nbdstore.store.check import check_pool
from nbdstore.store.superblock import decode
from tests.store.crashes import LAZY, Crash, crash_images
from tests.store.pools import read
from tests.store.power_loss import recover
from tests.store.scene import Scene
from tests.store.simulated_disk import PLACE, SimulatedDisk
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


@pytest.mark.parametrize("copy", [0, 1])
def test_the_only_whole_superblock_is_never_the_first_to_be_overwritten(copy: int) -> None:
    scene = Scene()
    files = played(scene)
    expected = recover(SimulatedDisk(files), Spread())
    images = {name: bytearray(image) for name, image in files.items()}
    images["super"][copy * BLOCK + 77] ^= 1
    scene.begin_again(images)

    async def nothing_else(_pool: Pool) -> None:
        pass

    scene.play(nothing_else, close=True)
    torn = Crash(applied=dict.fromkeys(("super", "journal", "data"), 0.0), ruined=1.0)
    for moment in range(len(scene.disk.events) + 1):
        crashed = crash_images(scene.disk, moment, torn, random.Random(moment))
        assert recover(SimulatedDisk(crashed), Spread()) == expected


# -- the journal -------------------------------------------------------------------------------


def record_offsets(journal: bytes) -> list[int]:
    """Where records are that are not empty."""
    return [
        at
        for at in range(0, len(journal), 64)
        if journal[at : at + 8] == b"NBDSJRNL" and journal[at + 32 : at + 36] != bytes(4)
    ]


@pytest.mark.parametrize("share_uncached", [0.0, 1.0])
@pytest.mark.parametrize("large", [False, True])
def test_damage_to_any_record_that_a_flush_covered_is_found_after_a_kill(
    large: bool, share_uncached: float
) -> None:
    """Whether the journal is in the page cache, or the machine has been started again since."""
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
    assert len(live) == (3 if large else 4)  # the later ones have their blocks
    for at in live:
        images = {name: bytearray(image) for name, image in killed.items()}
        images["journal"][at + 70] ^= 1
        with pytest.raises(Corruption, match="journal"):
            recover(SimulatedDisk(images, share_uncached=share_uncached), Spread())


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


# -- whole files, replaced ----------------------------------------------------------------------


def played(scene: Scene, *, close: bool = False, n_writes: int = 3) -> dict[str, bytes]:
    """The files after some work; not closed, they end with a checkpoint and `n_writes` flushes."""

    async def write(pool: Pool) -> None:
        volume = pool.volumes.get("v") or await pool.create_volume("v", 1 << 20)
        await volume.write(500 << 10, LARGE)
        await pool.checkpoint()
        for number in range(n_writes):
            await volume.write(number * BLOCK, random.randbytes(BLOCK))
            await volume.flush()

    scene.play(write, close=close)
    return {name: bytes(image) for name, image in scene.disk.images.items()}


def refused(files: dict[str, bytes], match: str) -> None:
    """Assert that a pool does not open, that a check tells why, and that repair makes it open."""
    disk = SimulatedDisk(files)
    with pytest.raises(Corruption, match=match):
        recover(disk, Spread())
    report = check_pool(PLACE, host=disk.host)
    assert match in report.findings[0].where
    assert not report.clean
    assert check_pool(PLACE, host=disk.host, repair=True).findings[0].repaired
    # What was lost may have freed blocks that others have overwritten since: then those are told.
    assert all("volume v at" in f.where for f in check_pool(PLACE, host=disk.host).findings)

    async def open_it() -> None:
        await (await Pool.open(PLACE, host=disk.host)).close()

    asyncio.run(open_it())


@pytest.mark.parametrize("n_writes", [0, 3])
def test_a_zeroed_journal_is_never_taken_for_one_to_which_nothing_was_written(
    n_writes: int,
) -> None:
    files = played(Scene(), n_writes=n_writes)
    refused(files | {"journal": bytes(len(files["journal"]))}, "journal")


@pytest.mark.parametrize("n_writes", [0, 3])
def test_the_journal_of_another_pool_is_refused(n_writes: int) -> None:
    files = played(Scene(), n_writes=n_writes)
    played(other := Scene(capacity=32 << 20))
    refused(files | {"journal": bytes(other.disk.images["journal"])}, "journal")


def test_a_journal_from_before_the_last_checkpoint_is_refused() -> None:
    scene = Scene()
    old = played(scene)
    refused(played(scene) | {"journal": old["journal"]}, "journal")


def test_a_truncated_journal_is_refused_and_made_whole_by_repair() -> None:
    files = played(Scene())
    refused(files | {"journal": files["journal"][:5000]}, "journal")


def test_a_closed_pool_does_not_need_its_journal() -> None:
    files = played(Scene(), close=True)
    before = recover(SimulatedDisk(files), Spread())
    disk = SimulatedDisk(files | {"journal": bytes(len(files["journal"]))})
    assert not check_pool(PLACE, host=disk.host).findings
    assert recover(disk, Spread()) == before


@pytest.mark.parametrize("close", [False, True])
def test_an_older_superblock_is_refused_or_leads_to_the_present(close: bool) -> None:
    scene = Scene()
    old = [played(scene, close=close) for _ in range(4)]
    present = old.pop()
    expected = recover(SimulatedDisk(present), Spread())
    for files in old:
        try:
            found = recover(SimulatedDisk(present | {"super": files["super"]}), Spread())
        except Corruption:
            continue
        assert found == expected


@pytest.mark.parametrize("close", [False, True])
def test_older_data_is_refused_or_told_and_never_returned(close: bool) -> None:
    scene = Scene()
    old = [played(scene, close=close) for _ in range(4)]
    present = old.pop()
    expected = recover(SimulatedDisk(present), Spread())
    for files in old:
        try:
            found = recover(SimulatedDisk(present | {"data": files["data"]}), Spread())
        except Corruption:
            continue
        assert found == expected


@pytest.mark.parametrize("names", [["super"], ["data"], ["super", "journal"], ["super", "data"]])
def test_files_of_another_pool_are_refused(names: list[str]) -> None:
    files = played(Scene())
    other = played(Scene(capacity=32 << 20))
    with pytest.raises(Corruption):
        recover(SimulatedDisk(files | {name: other[name] for name in names}), Spread())
