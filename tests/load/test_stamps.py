"""Stamps tell every sector's origin, and everything else is garbage."""

from __future__ import annotations

import pytest

from tests.load.stamps import SECTOR, Garbage, sequences, stamped


def test_stamps_tell_their_write() -> None:
    content = stamped(3, 10, 2, 7) + bytes(SECTOR) + stamped(3, 13, 1, 1 << 40)
    assert sequences(3, 10, content).tolist() == [7, 7, 0, 1 << 40]


@pytest.mark.parametrize("offset", [0, 8, 16, 24, 511])
def test_a_flipped_bit_is_garbage(offset: int) -> None:
    content = bytearray(stamped(3, 10, 3, 7))
    content[SECTOR + offset] ^= 1
    with pytest.raises(Garbage, match="volume 3, sector 11 "):
        sequences(3, 10, bytes(content))


def test_other_places_and_other_volumes_are_garbage() -> None:
    with pytest.raises(Garbage, match="sector 11"):
        sequences(3, 11, stamped(3, 10, 1, 7))
    with pytest.raises(Garbage, match="volume 4"):
        sequences(4, 10, stamped(3, 10, 1, 7))


def test_a_sector_of_two_writes_is_garbage() -> None:
    torn = stamped(3, 10, 1, 7)[:256] + stamped(3, 10, 1, 8)[256:]
    with pytest.raises(Garbage, match="2 kinds of stamps"):
        sequences(3, 10, torn)
    with pytest.raises(Garbage):
        sequences(3, 10, stamped(3, 10, 1, 7)[:256] + bytes(256))
