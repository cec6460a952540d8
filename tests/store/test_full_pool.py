"""When space runs out: writes are held, or refused; nothing is lost, and freeing always works."""

from __future__ import annotations

import asyncio
import random

import pytest

from nbdstore.errors import NoSpace, NotFound, PoolFailed
from nbdstore.store import Pool, Volume
from tests.store.crashes import KILLED
from tests.store.pools import read
from tests.store.scene import Scene

BLOCK = 4096
MIB = 1 << 20
GIB = 1 << 30
CAPACITY = 16 * MIB


@pytest.fixture(params=[4096, 65536])
def scene(request: pytest.FixtureRequest) -> Scene:
    """A pool of 16 MiB."""
    return Scene(CAPACITY, block_size=request.param)


async def fill(volume: Volume, piece: int = 65536) -> int:
    """Write until no more fits; return how many bytes did."""
    at = 0
    while True:
        try:
            await asyncio.wait_for(volume.write(at, b"f" * piece), 0.5)
        except (TimeoutError, NoSpace):
            return at
        at += piece


async def is_held(task: asyncio.Task[None]) -> bool:
    """Whether a request still waits after plenty of time."""
    await asyncio.sleep(3)
    return not task.done()


# -- holding -------------------------------------------------------------------------------------


def test_a_full_pool_holds_nearly_its_capacity(scene: Scene) -> None:
    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", 64 * MIB)
        n_bytes = await fill(volume)
        assert n_bytes >= CAPACITY * 85 // 100
        status = pool.status()
        assert status["state"] in ("warning", "full")  # by whether another block would fit
        assert status["fill"] > 0.85
        assert await read(volume, 0, n_bytes) == b"f" * n_bytes

    scene.play(act, close=True)
    scene.assert_clean()


@pytest.mark.parametrize("relief", ["trim", "write_zeroes", "delete", "grow"])
def test_a_held_write_goes_on_as_soon_as_there_is_space(scene: Scene, relief: str) -> None:
    async def act(pool: Pool) -> None:
        other = await pool.create_volume("other", MIB)
        await other.write(0, b"o" * MIB)
        volume = await pool.create_volume("v", 64 * MIB)
        n_bytes = await fill(volume)
        places = (n_bytes, n_bytes + MIB)
        held = [asyncio.create_task(volume.write(place, b"h" * 65536)) for place in places]
        assert await is_held(held[0]) and not held[1].done()
        assert (pool.status()["state"], pool.status()["shortage"]) == ("full", "pool")
        assert pool.status()["held_writes"] == 2
        if relief == "delete":
            await pool.delete_volume(other)
        elif relief == "grow":
            await pool.grow(CAPACITY + MIB)
        else:
            await getattr(other, relief)(0, MIB)
        await asyncio.wait_for(asyncio.gather(*held), 2)
        assert await read(volume, n_bytes, 65536) == b"h" * 65536
        assert pool.status()["held_writes"] == 0
        assert pool.status()["state"] != "full"

    scene.play(act, close=True)
    scene.assert_clean()


def test_a_held_write_fails_when_its_time_is_up(scene: Scene) -> None:
    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", 64 * MIB)
        n_bytes = await fill(volume)
        loop = asyncio.get_running_loop()
        before = loop.time()
        with pytest.raises(NoSpace, match="grow"):
            await volume.write(n_bytes, b"x" * 65536)
        assert 30 <= loop.time() - before < 40
        assert pool.status()["held_writes"] == 0

    scene.play(act, full_timeout_s=30.0)


def test_a_write_may_be_held_for_ever(scene: Scene) -> None:
    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", 64 * MIB)
        n_bytes = await fill(volume)
        held = asyncio.create_task(volume.write(n_bytes, b"x" * 65536))
        await asyncio.sleep(500)
        assert not held.done()
        await volume.trim(0, MIB)
        await asyncio.wait_for(held, 2)

    scene.play(act, full_timeout_s=0.0)


def test_with_on_full_error_nothing_is_held(scene: Scene) -> None:
    async def act(pool: Pool) -> None:
        loop = asyncio.get_running_loop()
        volume = await pool.create_volume("v", 64 * MIB)
        n_bytes = await fill(volume)
        before = loop.time()
        for _ in range(3):
            with pytest.raises(NoSpace):
                await volume.write(n_bytes, b"x" * 65536)
            with pytest.raises(NoSpace):
                await volume.write_zeroes(n_bytes, 8 * MIB, no_hole=True)
        assert loop.time() - before < 1
        await volume.trim(0, MIB)
        await volume.write(n_bytes, b"x" * 65536)

    scene.play(act, on_full="error")


def test_a_write_that_finds_no_space_is_not_put_off_for_ever_by_busy_neighbours(
    scene: Scene,
) -> None:
    """Others overwrite all the time; each settling frees what they freed, for them."""

    async def act(pool: Pool) -> None:
        busy = await pool.create_volume("busy", MIB)
        await busy.write(0, b"b" * MIB)
        volume = await pool.create_volume("v", 64 * MIB)
        n_bytes = await fill(volume)

        async def overwrite() -> None:
            while True:
                await busy.write(0, b"c" * 65536)
                await asyncio.sleep(0.01)

        neighbour = asyncio.create_task(overwrite())
        with pytest.raises(NoSpace):
            await asyncio.wait_for(volume.write(n_bytes, b"x" * 65536), 100)
        neighbour.cancel()

    scene.play(act, full_timeout_s=5.0)


def test_a_caller_of_a_held_write_may_go_away(scene: Scene) -> None:
    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", 64 * MIB)
        n_bytes = await fill(volume)
        held = asyncio.create_task(volume.write(n_bytes, b"x" * 65536))
        assert await is_held(held)
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)
        assert pool.status()["held_writes"] == 0
        await volume.trim(0, MIB)
        assert await read(volume, n_bytes, 10) == bytes(10)

    scene.play(act, close=True)
    scene.assert_clean()


@pytest.mark.parametrize("request_", ["write", "write_zeroes"])
def test_a_held_request_of_a_volume_that_is_deleted_ends(scene: Scene, request_: str) -> None:
    moments: list[int] = []

    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", 64 * MIB)
        n_bytes = await fill(volume)
        if request_ == "write":
            held = asyncio.create_task(volume.write(n_bytes, b"x" * 65536))
        else:
            held = asyncio.create_task(volume.write_zeroes(n_bytes, 8 * MIB, no_hole=True))
        assert await is_held(held)
        await pool.delete_volume(volume)
        with pytest.raises(NotFound):
            await asyncio.wait_for(held, 10)
        await asyncio.sleep(3)
        moments.append(len(scene.disk.events))
        assert pool.status()["mapped"] == 0
        fresh = await pool.create_volume("fresh", 64 * MIB)
        assert await fill(fresh) >= n_bytes - MIB

    scene.play(act, close=True)
    scene.assert_clean()
    scene.crashed(at=moments[0])


def test_a_held_write_fails_when_the_pool_does(scene: Scene) -> None:
    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", 64 * MIB)
        n_bytes = await fill(volume)
        held = asyncio.create_task(volume.write(n_bytes, b"x" * 65536))
        assert await is_held(held)
        pool._core.fail("a test says so")
        with pytest.raises(PoolFailed):
            await asyncio.wait_for(held, 1)

    scene.play(act)


# -- what works on a full pool -------------------------------------------------------------------


@pytest.mark.parametrize("on_full", ["wait", "error"])
def test_overwriting_works_on_a_full_pool_for_as_long_as_one_likes(
    scene: Scene, on_full: str
) -> None:
    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", 64 * MIB)
        n_bytes = await fill(volume)
        content = bytearray(b"f" * n_bytes)
        rng = random.Random(1)
        for number in range(300):
            length = rng.choice((512, BLOCK, 65536, 300_000))
            at = rng.randrange(n_bytes - length)
            piece = bytes([number % 256]) * length
            content[at : at + length] = piece
            await asyncio.wait_for(volume.write(at, piece), 30)
        assert await read(volume, 0, n_bytes) == content

    scene.play(act, close=True, on_full=on_full, full_timeout_s=10.0)
    scene.assert_clean()


@pytest.mark.parametrize("on_full", ["wait", "error"])
def test_zeroes_with_no_hole_over_data_work_on_a_full_pool(scene: Scene, on_full: str) -> None:
    """They take no space that the data has not taken already."""

    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", 64 * MIB)
        n_bytes = await fill(volume)
        await volume.write_zeroes(0, n_bytes, no_hole=True)
        await volume.write_zeroes(0, n_bytes, no_hole=True)
        assert volume.status()["reserved"] == n_bytes
        assert await read(volume, 0, n_bytes) == bytes(n_bytes)
        for at in range(0, n_bytes, 65536):
            await volume.write(at, b"y" * 65536)
        assert await read(volume, 0, n_bytes) == b"y" * n_bytes

    scene.play(act, close=True, on_full=on_full, full_timeout_s=10.0)
    scene.assert_clean()


def test_what_is_provisioned_is_there_whatever_fills_the_pool(scene: Scene) -> None:
    async def act(pool: Pool) -> None:
        mine = await pool.create_volume("mine", 8 * MIB)
        await mine.write_zeroes(0, 6 * MIB, no_hole=True)
        others = [await pool.create_volume(f"v{n}", 64 * MIB) for n in range(2)]
        for other in others:
            await fill(other)
        rng = random.Random(1)
        places = [n * 65536 for n in range(6 * MIB // 65536)]
        rng.shuffle(places)
        for number, at in enumerate(places):
            await mine.write(at, b"m" * 65536)
            if number % 10 == 0:  # and others go on overwriting
                await others[0].write(0, b"o" * 200_000)
        assert await read(mine, 0, 6 * MIB) == b"m" * 6 * MIB

    scene.play(act, close=True, on_full="error")
    scene.assert_clean()


def test_no_more_can_be_provisioned_than_there_is(scene: Scene) -> None:
    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", 64 * MIB)
        with pytest.raises(NoSpace):
            await volume.write_zeroes(0, 64 * MIB, no_hole=True)
        await volume.trim(0, 64 * MIB)
        await volume.write_zeroes(0, 13 * MIB, no_hole=True)
        with pytest.raises(NoSpace):
            await volume.write(20 * MIB, b"x" * 4 * MIB)
        await volume.write(0, b"x" * 13 * MIB)

    scene.play(act, close=True, on_full="error")
    scene.assert_clean()


def test_new_volumes_are_refused_first(scene: Scene) -> None:
    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", 64 * MIB)
        n_bytes = await fill(volume)
        held = asyncio.create_task(volume.write(n_bytes, b"x" * 65536))
        assert await is_held(held)
        with pytest.raises(NoSpace):
            await pool.create_volume("w", MIB)
        await pool.rename_volume(volume, "u")
        await pool.set_properties(volume, {"x": 1})
        await pool.resize_volume(volume, 65 * MIB)
        await volume.trim(0, 4 * MIB)
        await held
        await pool.create_volume("w", MIB)

    scene.play(act)


def test_a_full_pool_is_flushed_checkpointed_closed_and_opened_again(scene: Scene) -> None:
    found: list[int] = []

    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", 64 * MIB)
        found.append(await fill(volume))
        for number in range(5):
            await volume.write(number * 65536, b"o" * 65536)
            await volume.flush()
            await pool.checkpoint()

    async def again(pool: Pool) -> None:
        volume = pool.volumes["v"]
        expected = b"o" * 5 * 65536 + b"f" * (found[0] - 5 * 65536)
        assert await read(volume, 0, found[0]) == expected
        await volume.trim(0, volume.size)
        await pool.checkpoint()
        assert await fill(volume) >= found[0] - 65536

    scene.play(act)
    scene.begin_again(scene.crashed())
    scene.play(again, close=True)
    scene.assert_clean()


# -- space for the trees -------------------------------------------------------------------------


def test_scattered_blocks_leave_space_for_the_nodes_above_them(scene: Scene) -> None:
    """Each block has a leaf of its own, which the next checkpoint must be able to write."""

    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", 64 << 40)
        n_written = 0
        with pytest.raises(NoSpace):
            while True:
                await volume.write(n_written * GIB, b"s" * BLOCK)
                n_written += 1
        assert n_written * volume.block_size > CAPACITY // 4
        await pool.checkpoint()
        for number in range(0, n_written, 97):  # overwriting dirties leaf after leaf
            await volume.write(number * GIB, b"t" * BLOCK)

    async def again(pool: Pool) -> None:
        volume = pool.volumes["v"]
        assert await read(volume, 97 * GIB, BLOCK) == b"t" * BLOCK
        assert await read(volume, 98 * GIB, BLOCK) == b"s" * BLOCK
        await volume.trim(0, volume.size // 2)
        await pool.checkpoint()
        await volume.write(5 * GIB, b"u" * BLOCK)

    scene.play(act, on_full="error")
    scene.begin_again(scene.crashed(KILLED))
    scene.play(again, close=True, on_full="error")
    scene.assert_clean()


def test_scattered_provisioned_blocks_are_there_with_the_nodes_above_them(scene: Scene) -> None:
    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", 64 << 40)
        places = []
        with pytest.raises(NoSpace):
            while True:
                await volume.write_zeroes(len(places) * GIB, BLOCK * 16, no_hole=True)
                places.append(len(places) * GIB)
        await pool.checkpoint()
        for place in places:
            await volume.write(place, b"p" * BLOCK * 16)
        await pool.checkpoint()
        for place in places[::7]:
            assert await read(volume, place, BLOCK * 16) == b"p" * BLOCK * 16

    scene.play(act, close=True, on_full="error")
    scene.assert_clean()


def test_checkpoints_that_find_no_space_do_not_fill_the_journal(scene: Scene) -> None:
    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", 64 * MIB)
        await volume.write(0, b"x" * BLOCK)
        await pool.checkpoint()
        scene.disk.fault = host_full
        with pytest.raises(NoSpace):
            await pool.checkpoint()
        used = pool.status()["journal"]["used"]
        for _ in range(10):
            with pytest.raises(NoSpace):
                await pool.checkpoint()
        assert pool.status()["journal"]["used"] == used
        scene.disk.fault = None
        await pool.checkpoint()

    scene.play(act, close=True)
    scene.assert_clean()


def test_whole_provisioned_leaves_are_there_with_their_nodes(scene: Scene) -> None:
    """A leaf that is provisioned as a whole takes no node until it is written to."""

    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", 64 * MIB)
        await volume.write_zeroes(0, 14 * MIB, no_hole=True)
        await pool.checkpoint()
        other = await pool.create_volume("other", 64 * MIB)
        await fill(other)
        await pool.checkpoint()
        rng = random.Random(1)
        places = [n * BLOCK for n in range(14 * MIB // BLOCK)]
        rng.shuffle(places)
        for number, place in enumerate(places):
            await volume.write(place, b"p" * BLOCK)
            if number % 500 == 0:
                await pool.checkpoint()
        assert await read(volume, 0, 14 * MIB) == b"p" * 14 * MIB

    scene.play(act, close=True, on_full="error")
    scene.assert_clean()


# -- the host's filesystem -----------------------------------------------------------------------


def host_full(operation: str, name: str) -> None:
    if operation == "write" and name == "data":
        raise NoSpace("data: No space left on device while writing")


def test_writes_are_held_while_the_host_is_full(scene: Scene) -> None:
    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", 8 * MIB)
        await volume.write(0, b"x" * 65536)
        await volume.flush()
        scene.disk.fault = host_full
        held = asyncio.create_task(volume.write(65536, b"y" * 65536))
        assert await is_held(held)
        assert (pool.status()["state"], pool.status()["shortage"]) == ("full", "host")
        assert not volume.write_now([(0, b"z" * 65536)])
        with pytest.raises(NoSpace):
            await pool.checkpoint()
        await volume.trim(0, 65536)
        await volume.flush()
        assert await read(volume, 0, 65536) == bytes(65536)
        scene.disk.fault = None
        await asyncio.wait_for(held, 5)
        assert await read(volume, 65536, 65536) == b"y" * 65536
        await pool.checkpoint()
        assert pool.status()["state"] == "ok"

    scene.play(act, close=True)
    scene.assert_clean()


def test_a_full_host_is_told_from_a_full_pool(scene: Scene) -> None:
    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", 8 * MIB)
        scene.disk.fault = host_full
        with pytest.raises(NoSpace, match="filesystem under"):
            await volume.write(0, b"x" * 65536)

    scene.play(act, on_full="error")


def test_a_pool_closes_and_opens_while_the_host_is_full(scene: Scene) -> None:
    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", 8 * MIB)
        await volume.write(0, b"x" * 200_000)
        await volume.flush()
        await volume.write(200_000, b"y" * 200_000)
        scene.disk.fault = host_full

    async def again(pool: Pool) -> None:
        volume = pool.volumes["v"]
        assert await read(volume, 0, 400_000) == b"x" * 200_000 + b"y" * 200_000
        await volume.trim(0, 131_072)
        await volume.flush()

    async def later(pool: Pool) -> None:
        volume = pool.volumes["v"]
        expected = bytes(131_072) + b"x" * 68_928 + b"y" * 200_000
        assert await read(volume, 0, 400_000) == expected

    scene.play(act, close=True)
    scene.begin_again(fault=host_full)
    scene.play(again, close=True)
    images = scene.crashed()
    scene.begin_again(images, fault=host_full)
    scene.play(later)
    scene.begin_again(scene.crashed())
    scene.play(later, close=True)
    scene.assert_clean()


@pytest.mark.parametrize("is_told", [False, True])
def test_a_shrink_that_waits_for_space_is_no_reason_not_to_close(
    scene: Scene, is_told: bool
) -> None:
    """It would merge the volume's last block; its caller has been told to end, or will be."""
    size = 4 * MIB + 512

    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", 8 * MIB)
        await volume.write(0, b"x" * 8 * MIB)
        scene.disk.fault = host_full
        shrink = asyncio.create_task(pool.resize_volume(volume, size, force=True))
        assert await is_held(shrink)
        if is_told:
            shrink.cancel()
        await asyncio.wait_for(pool.close(), 5)
        assert shrink.cancelled() or not is_told

    async def again(pool: Pool) -> None:
        volume = pool.volumes["v"]
        assert await read(volume) == b"x" * 8 * MIB
        await pool.resize_volume(volume, size, force=True)
        assert await read(volume) == b"x" * size

    scene.play(act, full_timeout_s=0)
    scene.begin_again(scene.crashed())
    scene.play(again, close=True)
    scene.assert_clean()


@pytest.mark.parametrize("turns", range(6))
def test_a_deleted_volume_that_cannot_be_emptied_yet_is_no_reason_not_to_close(turns: int) -> None:
    """Whatever it is at when it is told to end: a checkpoint that fails then tells nobody."""
    scene = Scene(CAPACITY)

    async def act(pool: Pool) -> None:
        volume = await pool.create_volume("v", MIB)
        await volume.write(0, b"x" * MIB)
        await pool.checkpoint()
        scene.disk.fault = host_full
        await pool.delete_volume(volume)
        for _ in range(turns):
            await asyncio.sleep(0)
        await asyncio.wait_for(pool.close(), 60)

    scene.play(act)
    scene.begin_again(scene.crashed())
    scene.play(_nothing, close=True)
    scene.assert_clean()


async def _nothing(pool: Pool) -> None:
    assert not pool.volumes
