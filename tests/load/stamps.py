"""What a test writes to a volume, so that every sector tells where it comes from.

A sector of 512 bytes is one stamp of 32 bytes, sixteen times: four little-endian u64, namely the
volume's number, the sector's number, the sequence number of the write, and a mix of these three.
A sector of zeroes has the sequence number 0. Whatever else is found in a volume is garbage: from
another place, from two writes at once, or from nowhere.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

SECTOR: Final = 512
WORDS: Final = SECTOR // 8

_VOLUME, _SECTOR, _SEQUENCE, _MIX = range(4)
# Odd constants: each of the three numbers changes the mix.
_FACTORS: Final = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64
)

Sequences = NDArray[np.uint64]


class Garbage(AssertionError):
    """A sector holds what nobody has written to it."""


def stamped(volume: int, first: int, n_sectors: int, sequence: int) -> bytes:
    """Make the content that write number `sequence` puts into `n_sectors` from `first` on."""
    return _stamps(volume, first, np.full(n_sectors, sequence, np.uint64)).tobytes()


def sequences(volume: int, first: int, content: bytes) -> Sequences:
    """Tell which write each sector of `content` is from; 0 = zeroes.

    Raises Garbage, with the place, for a sector that no write has made.
    """
    words = np.frombuffer(content, np.uint64).reshape(-1, WORDS)
    found: Sequences = words[:, _SEQUENCE].copy()
    expected = _stamps(volume, first, found)
    expected[found == 0] = 0
    wrong = np.flatnonzero((words != expected).any(axis=1))
    if len(wrong):
        at = int(wrong[0])
        raise Garbage(
            f"volume {volume}, sector {first + at} ({len(wrong)} such sectors): "
            + _describe(words[at])
        )
    return found


def _stamps(volume: int, first: int, sequences: Sequences) -> NDArray[np.uint64]:
    n = len(sequences)
    stamps = np.empty((n, 4), np.uint64)
    stamps[:, _VOLUME] = volume
    stamps[:, _SECTOR] = np.arange(first, first + n, dtype=np.uint64)
    stamps[:, _SEQUENCE] = sequences
    stamps[:, _MIX] = (stamps[:, :3] * _FACTORS).sum(axis=1, dtype=np.uint64)
    return np.tile(stamps, (1, WORDS // 4))


def _describe(words: NDArray[np.uint64]) -> str:
    stamps = sorted({tuple(int(word) for word in stamp[:3]) for stamp in words.reshape(-1, 4)})
    shown = ", ".join(f"(volume, sector, sequence) = {stamp}" for stamp in stamps[:4])
    return f"holds {len(stamps)} kinds of stamps: {shown}"
