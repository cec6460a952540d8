"""An input as a source of choices, so that every mutation of it is some conversation.

Reading past the end gives zeroes: an input that is cut is a shorter program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

NUMBERS = (0, 1, 2, 7, 8, 12, 16, 28, 32, 64, 255, 399, 400, 401, 511, 512, 600, 1000, 4095, 4096)
LARGE = (0xFFFF, 1 << 16, 1 << 20, (1 << 20) + 1, 1 << 25, (1 << 26) + 1, 1 << 31, (1 << 32) - 1)
HUGE = (1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 512, (1 << 64) - 1)
EDGES = NUMBERS + LARGE + HUGE
"""Numbers near which something changes; 2^20 is the size of the exports here."""


class Program:
    """Choices out of bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def take(self, n_bytes: int) -> bytes:
        """Up to so many bytes as they are."""
        self._at += n_bytes
        return self._data[self._at - n_bytes : self._at]

    def text(self) -> bytes:
        """Bytes behind their number."""
        return self.take(self.byte())

    def choose(self, among: Sequence[T]) -> T:
        return among[self.byte() % len(among)]

    def number(self, n_bits: int) -> int:
        """An edge, an edge and a little, or anything."""
        kind = self.byte()
        if kind < 64:
            value = self.byte()
        elif kind < 192:
            value = self.choose(EDGES) + kind % 3 - 1
        else:
            value = int.from_bytes(self.take(n_bits // 8), "big")
        return value & ((1 << n_bits) - 1)
