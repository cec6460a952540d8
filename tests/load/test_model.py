"""The oracle finds every kind of loss, and nothing where nothing is wrong."""

from __future__ import annotations

import pytest

from tests.load.model import Violation, VolumeModel
from tests.load.stamps import SECTOR

BLOCK = 8 * SECTOR
N_BLOCKS = 4


@pytest.fixture
def model() -> VolumeModel:
    return VolumeModel(1, N_BLOCKS * BLOCK, BLOCK)


def put(disk: bytearray, first: int, content: bytes) -> None:
    disk[first * SECTOR : first * SECTOR + len(content)] = content


@pytest.fixture
def disk(model: VolumeModel) -> bytearray:
    """Blocks 0 and 1 are written and acknowledged, 2 and 3 have never been written."""
    disk = bytearray(N_BLOCKS * BLOCK)
    change, content = model.begin_write(0, 16)
    put(disk, 0, content)
    model.acknowledged(change)
    return disk


def look(model: VolumeModel, disk: bytearray) -> None:
    seen = model.begin_look(0, model.n_sectors)
    model.verify(seen, bytes(disk))
    model.end_look(seen)


def test_what_was_acknowledged_must_be_there(model: VolumeModel, disk: bytearray) -> None:
    look(model, disk)
    disk[SECTOR : 2 * SECTOR] = bytes(SECTOR)
    with pytest.raises(Violation, match="sector 1 "):
        look(model, disk)
    with pytest.raises(Violation, match="sector 1 "):
        model.recovered(bytes(disk))


def test_an_older_write_is_a_loss(model: VolumeModel, disk: bytearray) -> None:
    change, _ = model.begin_write(3, 4)
    model.acknowledged(change)
    with pytest.raises(
        Violation, match=r"sector 3 \(1 such sectors\) holds write 1; allowed: \[2\]"
    ):
        model.recovered(bytes(disk))


@pytest.mark.parametrize("is_there", [False, True])
def test_what_was_in_flight_may_be_there(
    model: VolumeModel, disk: bytearray, is_there: bool
) -> None:
    _, content = model.begin_write(4, 20)
    if is_there:
        put(disk, 4, content)
    look(model, disk)
    model.recovered(bytes(disk))
    model.recovered(bytes(disk))  # and stays so, one way or the other
    assert model.is_free(0, model.n_sectors)


def test_a_recovered_volume_must_not_change_again(model: VolumeModel, disk: bytearray) -> None:
    _, content = model.begin_write(0, 8)
    model.recovered(bytes(disk))
    put(disk, 0, content)
    with pytest.raises(Violation):
        model.recovered(bytes(disk))


def test_blocks_are_never_torn_but_requests_may_be(model: VolumeModel, disk: bytearray) -> None:
    _, content = model.begin_write(0, 16)
    put(disk, 0, content[:BLOCK])
    model.recovered(bytes(disk))
    _, content = model.begin_write(0, 16)
    put(disk, 0, content[: BLOCK + SECTOR])
    with pytest.raises(Violation, match="block 1 is torn"):
        model.recovered(bytes(disk))


def test_two_changes_in_one_block_are_apart(model: VolumeModel, disk: bytearray) -> None:
    model.begin_write(0, 3)
    _, content = model.begin_write(3, 8)
    put(disk, 3, content)
    model.recovered(bytes(disk))


def test_what_was_read_stays(model: VolumeModel, disk: bytearray) -> None:
    _, content = model.begin_write(0, 8)
    without = bytes(disk)
    put(disk, 0, content)
    look(model, disk)
    with pytest.raises(Violation, match="sector 0 "):
        model.recovered(without)


def test_a_read_may_find_a_write_that_ends_meanwhile(model: VolumeModel, disk: bytearray) -> None:
    change, content = model.begin_write(0, 8)
    seen = model.begin_look(0, 8)
    assert not model.is_free(7, 9)
    model.acknowledged(change)
    assert not model.is_free(7, 9), "a read is on its way"
    model.verify(seen, bytes(disk[:BLOCK]))
    model.verify(seen, content)
    model.end_look(seen)
    assert model.is_free(7, 9)
    with pytest.raises(Violation):
        look(model, disk)


def test_trims_zero_whole_blocks_only(model: VolumeModel, disk: bytearray) -> None:
    model.acknowledged(model.begin_trim(1, 15))  # nothing whole in it
    look(model, disk)
    model.acknowledged(model.begin_trim(1, 17))
    disk[BLOCK : 2 * BLOCK] = bytes(BLOCK)
    look(model, disk)


def test_zeroes_are_exact(model: VolumeModel, disk: bytearray) -> None:
    change = model.begin_zero(3, 13)
    model.acknowledged(change)
    with pytest.raises(Violation, match="sector 3 "):
        look(model, disk)
    put(disk, 3, bytes(10 * SECTOR))
    look(model, disk)
    seen = model.begin_look(0, 16)
    model.verify_zeroes(seen, 3, 13)
    with pytest.raises(Violation, match="sector 2 "):
        model.verify_zeroes(seen, 2, 13)
