"""Making a pool, while calls fail and power does: a whole pool or none, nothing left behind."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest

from nbdstore.errors import NoSpace, StoreError, WriteFailed
from nbdstore.store import Pool
from nbdstore.store.host import Failpoint
from tests.store.crashes import platter
from tests.store.fault_sweep import Failing
from tests.store.power_loss import assert_clean, recover
from tests.store.simulated_disk import (
    DIRECTORY,
    PLACE,
    Event,
    Named,
    Reached,
    ShortWrite,
    SimulatedDisk,
    undecided,
)
from tests.store.workload import Spread

MIB = 1 << 20
FULL = NoSpace("No space left on device")
BROKEN = WriteFailed("Input/output error")


def make(disk: SimulatedDisk) -> None:
    Pool.create(PLACE, capacity=16 * MIB, journal_size=MIB, host=disk.host)


def made() -> SimulatedDisk:
    disk = SimulatedDisk(None)
    make(disk)
    return disk


def test_after_a_crash_there_is_a_whole_pool_or_none() -> None:
    """Names are kept or lost each by itself, and what files hold as well."""
    disk = made()
    reached = {event.place for event in disk.events if isinstance(event, Reached)}
    assert reached == {Failpoint.POOL_FILES_WRITTEN, Failpoint.POOL_NAMED}
    n_pools = 0
    for at in range(len(disk.events) + 1):
        pending, _ = undecided(disk.events[:at])
        names = [i for i in pending if isinstance(disk.events[i], Named)]
        for kept in itertools.product((True, False), repeat=len(names)):
            for written in (True, False):
                lost = {i for i, keep in zip(names, kept, strict=True) if not keep}

                def fate(
                    index: int, event: Event, lost: set[int] = lost, written: bool = written
                ) -> Iterable[Event]:
                    keep = index not in lost if isinstance(event, Named) else written
                    return (event,) if keep else ()

                images = platter(disk, at, fate)
                if "super" in images:
                    n_pools += 1
                    assert_clean(images)
                    assert recover(SimulatedDisk(images), Spread()) == {}
    assert n_pools


def test_once_made_a_pool_is_durable() -> None:
    disk = made()
    images = platter(disk, len(disk.events), lambda _index, _event: ())
    assert recover(SimulatedDisk(images), Spread()) == {}


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    ("operation", "error"),
    [
        ("write", ShortWrite(0.5, FULL)),
        *itertools.product(
            ("write", "truncate", "sync", "create", "rename", "open"), (FULL, BROKEN)
        ),
    ],
)
def test_whatever_fails_nothing_is_left_behind(
    operation: str, error: Exception, there: bool
) -> None:
    for at in itertools.count():
        disk = SimulatedDisk({} if there else None, fault=Failing(operation, error, at, at + 1))
        try:
            make(disk)
        except StoreError:
            assert not disk.images
            assert disk.there == (there or operation == "open")  # could not even look into it
        else:
            break
        disk.fault = None
        make(disk)
        assert_clean(disk.images)
    assert at > 0 or operation == "open"


def test_what_cannot_be_removed_is_told_and_stays_while_the_rest_goes() -> None:
    """The error is that of making the pool, not of tidying up."""

    def fault(operation: str, name: str) -> None:
        if (operation, name) in (("sync", DIRECTORY), ("remove", "journal")):
            raise WriteFailed(f"{name}: Input/output error: {operation}")

    disk = SimulatedDisk(None, fault=fault)
    with pytest.raises(WriteFailed, match="sync"):
        make(disk)
    assert disk.images.keys() == {"journal"}
