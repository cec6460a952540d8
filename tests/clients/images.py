"""Disk images that the tests copy to and from volumes."""

from __future__ import annotations

import random
from pathlib import Path

# (offset, length) of data, with holes around it; odd ends, both sides of 4 KiB and 64 KiB.
DATA = (
    (0, 1),
    (4095, 2),
    (10_000, 70_000),
    (1 << 20, 1 << 20),
    (5 << 20, 4096),
    ((9 << 20) + 512, 3 << 20),
    ((64 << 20) - 777, 777),
)
SIZE = 64 << 20


def write_sparse_image(path: Path, *, size: int = SIZE, seed: int = 0) -> Path:
    """Write an image of ``size`` bytes that is mostly holes."""
    source = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in DATA:
            file.seek(offset)
            file.write(source.randbytes(length))
    return path
