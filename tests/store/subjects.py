"""Small pools that hold one of everything, to be damaged, and what is true of them.

Owns the pools - closed, killed, and once repaired - with the states that their volumes may be in,
and the map of their files: which bytes belong to which structure.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from nbdstore.errors import Corruption, ReadFailed
from nbdstore.store import Pool, PoolOptions, Volume
from nbdstore.store.check import check_pool
from nbdstore.store.image import Image
from nbdstore.store.journal import ALIGNMENT, HEADER_SIZE, Reader
from nbdstore.store.layout import SLOT_MASK
from nbdstore.store.records import Op, parse
from nbdstore.store.superblock import COPY_SIZE
from tests.store.anatomy import Anatomy
from tests.store.power_loss import new_pool
from tests.store.simulated_disk import PLACE, Images, SimulatedDisk, adversarial
from tests.store.workload import joined

BLOCK: Final = 4096
MIB: Final = 1 << 20
GIB: Final = 1 << 30
FAR: Final = 70 * GIB // BLOCK
PLACES: Final = {
    "one": [*range(22), 255],
    "wide": [0, 1, 2, 255, 256, 257, *(300 * MIB // BLOCK + n for n in range(3)), FAR, FAR + 1],
    "late": [0, 1, 2],
    "renamed": [0, 1, 2],
    "gone": [0, 1],
    "going": [0, 1],
}
"""The blocks that are looked at, by volume: those written, and some beside them."""

Blocks = dict[int, bytes | None]
"""What blocks hold; None = reading them is an error."""
State = dict[str, Blocks]
"""What a pool holds, by volume, by snapshot, and by volume in the trash, as ``NAME~ID``."""
QUIET: Final = PoolOptions(sync_interval_s=1e9, checkpoint_interval_s=1e9)


@dataclass(frozen=True)
class Region:
    """Bytes `[start, stop)` of a file, and what they are."""

    file: str
    start: int
    stop: int
    kind: str


@dataclass
class Subject:
    """A pool, as files in memory.

    Attributes:
        history: states, one for each change since the last checkpoint.
        n_durable: the first of them that a flush has covered; no older one may come back unless
            that is said.
    """

    name: str
    files: dict[str, bytes]
    history: list[State]
    n_durable: int = 0
    regions: list[Region] = field(default_factory=list)


# -- looking -----------------------------------------------------------------------------------


def places_in(image: Image) -> list[int]:
    """The blocks of a volume, or of a snapshot, that are looked at."""
    volume = image.name.partition("@")[0].partition("~")[0]
    return [block for block in PLACES[volume] if block * BLOCK < image.size]


async def look_at(volume: Image) -> Blocks:
    """What the PLACES of an image hold."""
    found: Blocks = {}
    for start, stop in _runs(places_in(volume)):
        try:
            raw = joined(await volume.read(start * BLOCK, (stop - start) * BLOCK))
            for block in range(start, stop):
                found[block] = raw[(block - start) * BLOCK :][:BLOCK]
        except (Corruption, ReadFailed):
            for block in range(start, stop):
                found[block] = await _one(volume, block)
    return found


async def _one(volume: Image, block: int) -> bytes | None:
    try:
        return joined(await volume.read(block * BLOCK, BLOCK))
    except (Corruption, ReadFailed):
        return None


def _runs(blocks: list[int]) -> Iterator[tuple[int, int]]:
    start = stop = blocks[0]
    for block in blocks:
        if block != stop:
            yield start, stop
            start = block
        stop = block + 1
    yield start, stop


async def look(pool: Pool) -> State:
    """What the volumes and snapshots of a pool hold, and the volumes in the trash."""
    images: dict[str, Image] = {**pool.volumes, **pool.snapshots}
    images |= {f"{volume.name}~{volume.id}": volume for volume in pool.trash}
    return {name: await look_at(image) for name, image in sorted(images.items())}


def open_and_look(images: SimulatedDisk) -> State:
    """Open a pool, look, close it."""

    async def main() -> State:
        pool = await Pool.open(PLACE, QUIET, host=images.host)
        try:
            return await look(pool)
        finally:
            await pool.close()

    return asyncio.run(main())


# -- making ------------------------------------------------------------------------------------


def _filled(number: int, n_blocks: int) -> bytes:
    """Blocks that differ from all others."""
    return b"".join(f"{number}:{index};".encode() * 700 for index in range(n_blocks))[
        : n_blocks * BLOCK
    ].ljust(n_blocks * BLOCK, b".")


async def _before_the_checkpoint(pool: Pool) -> None:
    for number, name in enumerate(("gone", "going")):
        await (await pool.create_volume(name, 2 * BLOCK)).write(0, _filled(12 + number, 2))
    await pool.trash_volume(pool.volumes["gone"])
    one = await pool.create_volume("one", MIB, {"note": "x" * 5000})
    wide = await pool.create_volume("wide", 80 * GIB)
    await one.write(0, _filled(1, 3))
    for at in (0, 255 * BLOCK, 300 * MIB, FAR * BLOCK):
        await wide.write(at, _filled(at % 97, 2))
    await wide.write_zeroes(10 * GIB, 4 * MIB, no_hole=True)
    await pool.create_snapshots([(one, "s"), (wide, "s")])
    await one.write(0, _filled(10, 1))  # what the snapshots hold, they share in part
    await wide.write(300 * MIB, _filled(11, 1))
    await pool.checkpoint()


async def _live(pool: Pool, history: list[State]) -> int:
    """Make changes of every kind that only the journal has; return how many are durable."""
    one, wide = pool.volumes["one"], pool.volumes["wide"]

    async def done(*flushed: Volume) -> None:
        for volume in flushed:
            await volume.flush()
        history.append(await look(pool))

    await done()
    await one.write(BLOCK, _filled(2, 1))
    await done(one)
    await wide.write(300 * MIB + BLOCK, _filled(3, 2))
    await done(wide)
    await one.trim(2 * BLOCK, BLOCK)
    await done(one)
    await wide.write_zeroes(2 * BLOCK, 3 * BLOCK, no_hole=True)
    await done(wide)
    await wide.write_zeroes(20 * GIB, 2 * MIB, no_hole=True)
    await done(wide)
    late = await pool.create_volume("late", 2 * BLOCK)
    await done()
    await late.write(100, b"not a whole block")
    await done(late)
    await pool.rename_volume(late, "renamed")
    await done()
    await pool.resize_volume(late, 3 * BLOCK)
    await done()
    await pool.set_properties(late, {"note": "changed"})
    await done()
    await pool.trash_volume(pool.volumes["going"])
    await done()
    await one.write(4 * BLOCK, _filled(4, 17))  # more than goes inline
    await done(one)
    n_durable = len(history) - 1
    for number in range(2):
        await one.write(number * BLOCK, _filled(5 + number, 1))
        await done()
        await wide.write(256 * BLOCK, _filled(7 + number, 1))
        await done()
    return n_durable


@functools.cache
def subjects() -> dict[str, Subject]:
    """The pools, by name: "closed", "killed" and "repaired"."""
    disk = SimulatedDisk(new_pool(BLOCK, 16 * MIB))
    history: list[State] = []
    killed: dict[str, bytes] = {}

    async def main() -> int:
        # What was freed is used again at once, so that old pointers would lead to new data.
        pool = await Pool.open(PLACE, adversarial(QUIET), host=disk.host)
        await _before_the_checkpoint(pool)
        n_durable = await _live(pool, history)
        killed.update({name: bytes(image) for name, image in disk.images.items()})
        await pool.close()
        return n_durable

    n_durable = asyncio.run(main())
    closed = {name: bytes(image) for name, image in disk.images.items()}
    found = [
        Subject("killed", killed, history, n_durable),
        Subject("closed", closed, history[-1:]),
        _repaired(closed),
    ]
    for subject in found:
        subject.regions = regions_of(subject.files)
    return {subject.name: subject for subject in found}


def _repaired(files: dict[str, bytes]) -> Subject:
    """A pool of which parts are LOST: below a node of level 2, and a leaf."""
    disk = SimulatedDisk(files)
    for place in Anatomy(files).places:
        if place.volume == "wide" and (place.depth, place.number) == (2, 1):
            disk.images["data"][place.slot * BLOCK + 99] ^= 1
        if place.volume == "wide" and (place.kind, place.number) == ("leaf", 300):
            disk.images["data"][place.slot * BLOCK + 99] ^= 1
    check_pool(PLACE, host=disk.host, repair=True)
    state = open_and_look(disk)
    assert state["wide"][FAR] is None and state["wide"][300 * MIB // BLOCK] is None
    assert state["wide"][0] is not None
    return Subject("repaired", {name: bytes(image) for name, image in disk.images.items()}, [state])


# -- what is where -----------------------------------------------------------------------------


def regions_of(files: dict[str, bytes]) -> list[Region]:
    """All bytes of all files, by structure; "dead" is what nothing needs."""
    anatomy = Anatomy(files, journal_live=True)
    found = [Region("super", at, at + COPY_SIZE, "superblock") for at in (0, COPY_SIZE)]
    slots = {place.slot: place.kind for place in anatomy.places}
    found += _journal_regions(files, anatomy, slots)
    for slot in range(-(-len(files["data"]) // BLOCK)):
        stop = min((slot + 1) * BLOCK, len(files["data"]))
        found.append(Region("data", slot * BLOCK, stop, slots.get(slot, "dead slot")))
    return found


def _journal_regions(
    files: dict[str, bytes], anatomy: Anatomy, slots: dict[int, str]
) -> list[Region]:
    """The journal's; and note in `slots` what its records map."""
    current = anatomy.superblock
    ring = SimulatedDisk(files).open("journal")
    found: list[Region] = []
    end = current.journal_offset
    if current.journal_mark:
        found.append(Region("journal", end - ALIGNMENT, end, "journal mark"))
    for record in Reader(ring, current.journal_size, current.uuid).records(
        current.journal_offset, current.journal_seq
    ):
        body = record.offset + HEADER_SIZE
        found.append(Region("journal", record.offset, body, "journal header"))
        stop = body + len(record.payload)
        if stop > body:
            found.append(Region("journal", body, stop, "journal payload"))
        end = record.end
        for group in parse(record.payload, "here"):
            if group.op is Op.MAP:
                for location in group.mapping()[:, 1].tolist():
                    slots.setdefault(location & SLOT_MASK, "data since")
    live = sorted((region.start, region.stop) for region in found)
    edges = [0, *(edge for pair in live for edge in pair), len(files["journal"])]
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        if start < stop:
            found.append(Region("journal", start, stop, "dead journal"))
    return found


def damaged(subject: Subject) -> Images:
    """A copy of the files, to be damaged."""
    return {name: bytearray(image) for name, image in subject.files.items()}
