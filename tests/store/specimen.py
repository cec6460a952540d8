"""A closed pool with all kinds of blocks, to be damaged in a chosen place.

Owns what it holds, and the short ways to damage it; the fixtures `original`, `before` and
`damaged` (conftest.py) are pools of this kind.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final

from tests.store.anatomy import Anatomy, Place
from tests.store.pools import MIB, make_pool, opened, read

BLOCK: Final = 4096
GIB: Final = 1 << 30
WIDE: Final = 80 * GIB  # three levels above the leaves
PLACES: Final = [0, 200 * MIB, 300 * MIB, 70 * GIB]
"""Where "wide" has data: four leaves below three level 1 nodes."""


async def make_specimen(place: Path) -> Path:
    """Make the pool, with the volumes "small" and "wide"."""
    make_pool(place)
    async with opened(place) as pool:
        small = await pool.create_volume("small", 2 * MIB, {"note": "x" * 5000})
        wide = await pool.create_volume("wide", WIDE)
        rng = random.Random(1)
        await small.write(0, rng.randbytes(MIB + 100))
        for at in PLACES:
            await wide.write(at, rng.randbytes(10_000))
        await wide.write_zeroes(10 * GIB, 4 * MIB, no_hole=True)
    return place


def flip(path: Path, offset: int, length: int = 1) -> None:
    """Change some bits of some bytes of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        raw = file.read(length)
        file.seek(offset)
        file.write(bytes(byte ^ 0x5A for byte in raw))


def flip_slot(directory: Path, place: Place) -> None:
    """Change a byte of a block of the data file."""
    flip(directory / "data", place.slot * BLOCK + 1234)


async def contents(directory: Path) -> dict[str, bytes]:
    """What the volumes of a pool hold, the places of "wide" alone."""
    async with opened(directory) as pool:
        wide = pool.volumes["wide"]
        parts = [await read(wide, at, 12_288) for at in PLACES]
        return {"small": await read(pool.volumes["small"]), "wide": b"".join(parts)}


def first_node(original: Path, depth: int) -> Place:
    """The node of "wide" that its first block lies below, at `depth`; 0 is a leaf."""
    places = Anatomy(original).places
    return next(
        p
        for p in places
        if (p.volume, p.number) == ("wide", 0)
        and p.depth == depth
        and p.kind == ("node" if depth else "leaf")
    )
