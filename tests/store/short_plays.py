"""Short plays: what can be done to a pool in a few steps, and what it may leave behind.

Owns the table of operations, the pools where a play begins, and the doing of it; the states of
volumes that they lead to are short_states.py's.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final

from nbdstore.store import ExtentKind, Pool, PoolOptions, Snapshot, Volume
from nbdstore.store.image import Image
from tests.store.power_loss import new_pool
from tests.store.short_states import BLOCK, FIRST, Found, History, Known, State, told
from tests.store.simulated_disk import PLACE, SimulatedDisk, adversarial
from tests.store.virtual_clock import VirtualLoop
from tests.store.workload import joined

CAPACITY: Final = 128 << 20  # one whole block of the free map, which is what costs least
OPTIONS: Final = adversarial(PoolOptions())
NAMES: Final = ("pool", "v", "w", "v@s", "w@s", "c", "r", "r@a", "r@b")
"""The pool, of which the size counts, volumes, a snapshot of each, made together, a clone of the
first one's, and what is received."""
OTHER_NAME: Final = "u"
"""What the first volume is called when it is renamed; here it is `v` all the same."""


class Play:
    """One sequence on its way: the pool, and what its user knows.

    Attributes:
        number: of the operation, which its data is told by.
        moments: how many events there were, and what the user knew then.
    """

    def __init__(self, disk: SimulatedDisk, base: Found) -> None:
        self.disk = disk
        self.histories = {name: History([base.get(name)]) for name in NAMES}
        self.number = 0
        self.moments: list[tuple[int, Known]] = []
        self.pool: Pool

    async def open(self) -> None:
        self.pool = await Pool.open(PLACE, OPTIONS, host=self.disk.host)

    @property
    def volume(self) -> Volume:
        return self.volume_of("v")

    def volume_of(self, name: str) -> Volume:
        """A volume by its name here, whatever it is called."""
        other = OTHER_NAME if name == "v" else name
        return self.pool.volumes.get(name) or self.pool.volumes[other]

    @property
    def snapshot(self) -> Snapshot:
        """The first volume's."""
        return self.volume.snapshots["s"]

    @property
    def state(self) -> State:
        """What the volume holds now."""
        return self.state_of("v")

    def state_of(self, name: str) -> State:
        """What a volume that is there holds now."""
        now = self.histories[name].now
        assert now is not None
        return now

    def data(self, length: int) -> bytes:
        return bytes([0x41 + self.number]) * length

    def note(self) -> None:
        """The user knows something new from here on."""
        known = {
            name: (list(h.states), h.n_acknowledged, h.n_durable)
            for name, h in self.histories.items()
        }
        self.moments.append((len(self.disk.events), known))

    async def do(self, request: Awaitable[Any], *states: State | None, name: str = "v") -> None:
        """Make a request that brings a volume to `states`, one after the other."""
        self.histories[name].states += states
        self.note()
        await request
        self.histories[name].acknowledge()
        self.note()

    def durable(self, name: str = "v") -> None:
        """What was acknowledged is durable."""
        self.histories[name].flushed()
        self.note()

    async def write(self, offset: int, length: int) -> None:
        data = self.data(length)
        await self.do(self.put(offset, data), self.state.written(offset, data))

    async def put(self, offset: int, data: bytes) -> None:
        """Write, as a server does it, with nothing noted."""
        if not self.volume.write_now([(offset, data)]):
            await self.volume.write(offset, data)

    async def flush(self) -> None:
        await self.volume.flush()
        self.durable()


# -- the operations ----------------------------------------------------------------------------


async def _write_block(play: Play) -> None:
    await play.write(FIRST + BLOCK, BLOCK)


async def _write_part(play: Play) -> None:
    await play.write(FIRST + BLOCK + 1000, 100)


async def _write_across(play: Play) -> None:
    """Parts of two blocks and a whole one between them, in two leaves of the map."""
    length = min(BLOCK + 2000, play.state.size - FIRST - 100)
    await play.write(FIRST + 100, length)


async def _write_fua(play: Play) -> None:
    """As the server does it."""
    await play.write(FIRST, BLOCK)
    await play.flush()


async def _write_large(play: Play) -> None:
    """More than goes into the journal with a flush, so that data is synced by itself."""
    await play.write(FIRST, play.state.size - FIRST)


async def _trim(play: Play) -> None:
    length = min(2 * BLOCK + 10, play.state.size - FIRST)
    whole = length - length % BLOCK
    await play.do(play.volume.trim(FIRST, length), play.state.cleared(FIRST, whole))


async def _zero(play: Play) -> None:
    """From the middle of one block to the middle of another."""
    start = FIRST + 1000
    stop = min(start + 2 * BLOCK, play.state.size)
    head = play.state.merged(start, min(BLOCK - 1000, stop - start))
    end = stop - stop % BLOCK
    tail = head.merged(end, stop - end) if stop > end else head
    whole = tail.cleared(FIRST + BLOCK, end - FIRST - BLOCK) if end > FIRST + BLOCK else tail
    await play.do(play.volume.write_zeroes(start, stop - start), head, tail, whole)


async def _zero_no_hole(play: Play) -> None:
    length = min(2 * BLOCK, play.state.size - FIRST)
    after = play.state.cleared(FIRST, length, "Z")
    await play.do(play.volume.write_zeroes(FIRST, length, no_hole=True), after)


async def _flush(play: Play) -> None:
    await play.flush()


async def _checkpoint(play: Play) -> None:
    await play.pool.checkpoint()
    for name in play.histories:
        play.durable(name)


async def _settle(play: Play) -> None:
    """What housekeeping does after seconds: what was freed can be used again."""
    await play.pool._committer.settle()
    play.durable()


async def _resize(play: Play, n_blocks: int) -> None:
    old, size = play.state, FIRST + n_blocks * BLOCK
    tail = [old.cleared(size, old.size - size)] if size < old.size else []
    after = (tail or [old])[-1].resized(size)
    await play.do(play.pool.resize_volume(play.volume, size, force=True), *tail, after)
    play.durable()


async def _shrink(play: Play) -> None:
    await _resize(play, 1)


async def _grow(play: Play) -> None:
    await _resize(play, 6)


async def _create(play: Play) -> None:
    empty = State(2 * BLOCK, "HH", bytes(2 * BLOCK))
    await play.do(play.pool.create_volume("w", empty.size), empty, name="w")
    play.durable("w")


async def _delete(play: Play) -> None:
    """From the trash or not, with the freeing of what it held, which goes on afterwards; its
    snapshot goes first.
    """
    (volume,) = play.pool.trash or [play.pool.volumes["w"]]
    await delete(play, volume, play.pool.delete_volume(volume))


async def delete(play: Play, volume: Volume, request: Awaitable[None]) -> None:
    """Make a request that deletes the second volume."""
    if volume.snapshots:
        play.histories["w@s"].states.append(None)
    await play.do(request, None, name="w")
    play.histories["w@s"].acknowledge()
    play.durable("w@s")
    play.durable("w")
    await emptied(play)


async def _trash(play: Play) -> None:
    """With its snapshot, of which nothing changes."""
    after = replace(play.state_of("w"), in_trash=True)
    await play.do(play.pool.trash_volume(play.pool.volumes["w"]), after, name="w")
    play.durable("w")


async def _restore(play: Play) -> None:
    (volume,) = play.pool.trash
    after = replace(play.state_of("w"), in_trash=False)
    await play.do(play.pool.restore_volume(volume, "w"), after, name="w")
    play.durable("w")


async def emptied(play: Play) -> None:
    for _ in range(1000):  # it ends early if the disk fails
        if not play.pool._administration._emptying:
            break
        await asyncio.sleep(0)


async def _snapshot(play: Play) -> None:
    """Of all volumes at once; while it is made, the first one is written."""
    names = ["v", "w"] if "w" in play.pool.volumes else ["v"]
    snapshots = [play.histories[f"{name}@s"] for name in names]
    for name, snapshot in zip(names, snapshots, strict=True):
        snapshot.states.append(play.state_of(name).held())
    sure = {name: play.histories[name].n_acknowledged for name in names}
    play.note()
    epoch = play.volume.info.epoch
    wanted = [(play.volume_of(name), "s") for name in names]
    making = asyncio.ensure_future(play.pool.create_snapshots(wanted))
    try:
        while play.volume.info.epoch == epoch and not making.done():
            await asyncio.sleep(0)
        if not making.done():
            await play.write(FIRST, BLOCK)
    finally:
        await making
    for name, snapshot in zip(names, snapshots, strict=True):
        snapshot.acknowledge()
        snapshot.flushed()
        history = play.histories[name]
        history.n_durable = max(history.n_durable, sure[name])
    play.note()


async def _drop(play: Play) -> None:
    """Delete the first volume's snapshot."""
    await play.do(play.pool.delete_snapshot(play.snapshot), None, name="v@s")
    play.durable("v@s")


async def _clone(play: Play) -> None:
    held = play.histories["v@s"].now
    await play.do(play.pool.clone(play.snapshot, "c"), held, name="c")
    play.durable("c")


async def _unclone(play: Play) -> None:
    await play.do(play.pool.delete_volume(play.pool.volumes["c"]), None, name="c")
    play.durable("c")
    await emptied(play)


async def _flatten(play: Play) -> None:
    await play.pool.flatten(play.pool.volumes["c"])


async def _roll_back(play: Play) -> None:
    after = play.state.holding(play.state_of("v@s"))
    await play.do(play.pool.rollback(play.volume, play.snapshot), after)
    play.durable()
    await emptied(play)


async def _kill(play: Play) -> None:
    """The process dies, and another one opens the pool."""
    for task in play.pool._tasks:
        task.cancel()
    await asyncio.gather(*play.pool._tasks, return_exceptions=True)
    await play.open()
    for name in play.histories:
        play.durable(name)


OPERATIONS: Final[dict[str, Callable[[Play], Awaitable[None]]]] = {
    "write": _write_block,
    "part": _write_part,
    "across": _write_across,
    "large": _write_large,
    "fua": _write_fua,
    "trim": _trim,
    "zero": _zero,
    "no-hole": _zero_no_hole,
    "flush": _flush,
    "checkpoint": _checkpoint,
    "settle": _settle,
    "shrink": _shrink,
    "grow": _grow,
    "create": _create,
    "delete": _delete,
    "kill": _kill,
    "trash": _trash,
    "restore": _restore,
    "snapshot": _snapshot,
    "drop": _drop,
    "clone": _clone,
    "unclone": _unclone,
    "flatten": _flatten,
    "rollback": _roll_back,
}
Sequence = tuple[str, ...]


# -- where they begin --------------------------------------------------------------------------


@functools.cache
def base_of(name: str) -> tuple[dict[str, bytes], Found]:
    """A pool that was closed, and what it holds.

    "fresh" has an empty volume, "used" two with data, "snapped" a snapshot of each of them as well,
    and a clone that has been written.
    """
    disk = SimulatedDisk(new_pool(BLOCK, CAPACITY))

    async def main() -> Found:
        pool = await Pool.open(PLACE, OPTIONS, host=disk.host)
        volume = await pool.create_volume("v", FIRST + 4 * BLOCK)
        if name != "fresh":
            other = await pool.create_volume("w", 2 * BLOCK)
            for number in range(3):
                await volume.write(FIRST + number * BLOCK, bytes([0x61 + number]) * BLOCK)
            await other.write(0, b"w" * 2 * BLOCK)
        if name == "snapped":
            await pool.create_snapshots([(volume, "s"), (other, "s")])
            await volume.write(FIRST + BLOCK, b"d" * BLOCK)
            clone = await pool.clone(pool.snapshots["v@s"], "c")
            await clone.write(FIRST, b"e" * BLOCK)
        found = await look(pool)
        await pool.close()
        return found

    found = run(main())
    return {file: bytes(image) for file, image in disk.images.items()}, found


async def look(pool: Pool) -> Found:
    """What an open pool holds; before the first used blocks there must be nothing."""
    found: Found = {"pool": State(pool.status()["capacity"], "", b"")}
    images: dict[str, Image] = {}
    for volume in pool.volumes.values():
        known = "v" if volume.name == OTHER_NAME else volume.name
        snapshots = volume.snapshots.values()
        images |= {known: volume} | {f"{known}@{s.info.name}": s for s in snapshots}
    for trashed in pool.trash:
        assert trashed.name not in images
        images |= {image.name: image for image in (trashed, *trashed.snapshots.values())}
    for name, image in images.items():
        state = await _look_at(image)
        if isinstance(image, Volume):
            state = replace(
                state,
                in_trash=image in pool.trash,
                renamed=image.name == OTHER_NAME,
                properties=told(image.properties),
            )
        elif isinstance(image, Snapshot) and name.startswith("r@"):
            state = replace(state, properties=image.info.uuid)
        found[name] = state
    return found


async def _look_at(image: Image) -> State:
    start = FIRST if image.size > FIRST else 0
    kinds = ""
    if start:
        (before,) = await image.extents(0, start, max_extents=2)
        assert before.kind is ExtentKind.HOLE, "something was written where nothing should be"
    for extent in await image.extents(start, image.size - start, max_extents=100):
        letter = {ExtentKind.DATA: "D", ExtentKind.ZERO: "Z", ExtentKind.HOLE: "H"}
        kinds += letter[extent.kind] * (extent.length // BLOCK)
    return State(image.size, kinds, joined(await image.read(start, image.size - start)))


@functools.cache
def _loop() -> VirtualLoop:
    return VirtualLoop()


def run(main: Any) -> Any:
    """Run a coroutine in virtual time; what it leaves running is ended."""
    loop = _loop()
    loop._clock.now = 0.0
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(main)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
