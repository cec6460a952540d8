"""Snapshots before repairs: one for each state worth keeping, none where nothing was wrong."""

from __future__ import annotations

import pytest

from nbdstore.agent.records import AttachRecord
from nbdstore.agent.repairs import Repairs
from nbdstore.agent.store_server import StoreServer
from nbdstore.control.client import ControlClient
from nbdstore.errors import DeviceError
from tests.clients.served_pool import ServedPool


@pytest.fixture
def control(pool: ServedPool) -> ControlClient:
    return ControlClient(f"unix:{pool.directory}/control.sock")


def record(control: ControlClient, epoch: int) -> AttachRecord:
    return AttachRecord(
        id="0" * 16,
        volume="db",
        volume_uuid=control.volume("db").uuid,
        driver="fuse",
        created="",
        export="db",
        epoch=epoch,
        address="",
        request_timeout_s=1,
        dead_timeout_s=1,
    )


def yes() -> bool:
    return True


def in_vain() -> bool:
    raise DeviceError("no")


def test_attempts_in_vain_share_a_snapshot_until_another_had_the_lease(
    control: ControlClient,
) -> None:
    repairs = Repairs(StoreServer(control))
    for epoch in (1, 2):
        with pytest.raises(DeviceError, match=r"no; the snapshot db@before-fsck-.* holds what was"):
            repairs.repair(record(control, epoch), yes, in_vain)
    (first,) = [item.snapshot for item in control.snapshots()]
    said = repairs.repair(record(control, 4), yes, lambda: True)
    assert first not in said
    (left,) = {item.snapshot for item in control.snapshots()} - {first}
    assert left in said


def test_a_repair_in_several_attempts_leaves_the_snapshot(control: ControlClient) -> None:
    """What failed may have changed much before; the next attempt then finds nothing wrong."""
    repairs = Repairs(StoreServer(control))
    with pytest.raises(DeviceError):
        repairs.repair(record(control, 1), yes, in_vain)
    (first,) = [item.snapshot for item in control.snapshots()]
    assert first in repairs.repair(record(control, 2), yes, lambda: False)
    assert [item.snapshot for item in control.snapshots()] == [first]


def test_a_snapshot_that_a_person_deleted_is_taken_anew(control: ControlClient) -> None:
    repairs = Repairs(StoreServer(control))
    with pytest.raises(DeviceError):
        repairs.repair(record(control, 1), yes, in_vain)
    (first,) = [item.snapshot for item in control.snapshots()]
    control.delete_snapshot(first)
    said = repairs.repair(record(control, 1), yes, lambda: True)
    (second,) = [item.snapshot for item in control.snapshots()]
    assert first != second
    assert second in said


def test_what_was_mounted_since_gets_a_snapshot_of_its_own(control: ControlClient) -> None:
    repairs = Repairs(StoreServer(control))
    wanted = record(control, 1)
    with pytest.raises(DeviceError):
        repairs.repair(wanted, yes, in_vain)
    (first,) = [item.snapshot for item in control.snapshots()]
    repairs.forget(wanted)
    said = repairs.repair(wanted, yes, lambda: True)
    assert first not in said
    assert len(control.snapshots()) == 2


def test_where_nothing_was_wrong_no_snapshot_is_left(control: ControlClient) -> None:
    repairs = Repairs(StoreServer(control))
    with pytest.raises(DeviceError):
        repairs.repair(record(control, 1), yes, in_vain)
    assert "before-fsck" in repairs.repair(record(control, 2), yes, lambda: True)
    assert len(control.snapshots()) == 1
    assert repairs.repair(record(control, 3), yes, lambda: False) == ""
    assert len(control.snapshots()) == 1


def test_without_a_snapshot_nothing_is_repaired(control: ControlClient) -> None:
    wanted = record(control, 1)
    control.delete_volume("db")
    repairs = Repairs(StoreServer(control))
    with pytest.raises(DeviceError, match="not repaired, for no snapshot could be taken"):
        repairs.repair(wanted, yes, not_begun)
    assert repairs.repair(wanted, lambda: False, not_begun) == "", (
        "nothing is wrong, none is needed"
    )


def not_begun() -> bool:
    pytest.fail("it must not be begun")
