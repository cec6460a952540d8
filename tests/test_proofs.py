"""Every operation is covered by each crash proof, or it is said why not; see tests/proofs.py."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

import pytest

from nbdstore.control.backup_service import BackupService
from nbdstore.control.service import VolumeService
from nbdstore.protocol.constants import Command
from nbdstore.store import Pool
from tests.control.backup_power_loss import Receiver, Sender
from tests.kills import administrator as killed
from tests.kills.backups import BackupKills
from tests.load.worker import KINDS
from tests.proofs import COURSE, NOTHING_KEPT, PROOFS, TABLE
from tests.simulation.carrier import Carrier
from tests.simulation.jobs import _COMMANDS
from tests.simulation.mutations import MUTATIONS
from tests.simulation.plan import choose_plan
from tests.store.short_sequences import ALL
from tests.store.snapshot_work import SnapshotWork
from tests.store.workload import Client, Workload

LIFE = {"open", "close", "backups"}
"""What begins and ends a pool or a connection to it, or leads to other methods."""
NO_REQUESTS = {Command.DISC, Command.RESIZE}
"""One ends a connection, the other is not spoken."""


def public(cls: type) -> dict[str, Any]:
    found = {name: f for name, f in vars(cls).items() if not name.startswith("_")}
    return {name: f for name, f in found.items() if inspect.isfunction(f)}


def asked() -> set[str]:
    """Whatever can be asked for."""
    commands = {command.name for command in Command if command not in NO_REQUESTS}
    services = {*public(VolumeService), *public(BackupService)}
    pool = {n for n, f in public(Pool).items() if inspect.iscoroutinefunction(f)} | {"changes"}
    return commands | services | pool


def drawn(*classes: type) -> set[str]:
    """The steps of a workload, which take their chance."""
    return {
        f"{cls.__name__}.{name}"
        for cls in classes
        for name, f in vars(cls).items()
        if inspect.isfunction(f) and "rng" in inspect.signature(f).parameters
    }


def chosen(method: Any, *, of: type) -> set[str]:
    """The methods of a class that one of them chooses from."""
    names = re.findall(r"self\.(_\w+)", inspect.getsource(method))
    return {name for name in names if inspect.isfunction(vars(of).get(name))}


def entries(proof: str) -> set[str]:
    """The table of a proof, as far as it can be told."""
    if proof == "enumeration":
        return {*ALL}
    if proof == "histories":
        ways = chosen(Receiver._do_something, of=Receiver)
        return drawn(Client, Workload, SnapshotWork) - NOT_STEPS | {f"Receiver.{w}" for w in ways}
    if proof == "simulation":
        plans = [*map(choose_plan, range(100)), *(mutation.plan for mutation in MUTATIONS)]
        actions = {action for plan in plans for action in plan.actions}
        return actions | {command.name for command in _COMMANDS}
    kinds = chosen(killed.Administrator._kinds, of=killed.Administrator)
    return kinds | {command.name for command in KINDS}


NOT_STEPS = {
    *("Client._range", "Client._data", "Client._a_write", "SnapshotWork._a_snapshot"),
}
"""They choose what a step does."""

NAMED = {
    f"{cls.__name__}.{name}"
    for cls in (Client, Workload, SnapshotWork, Receiver, Sender, Carrier, BackupKills)
    for name, f in vars(cls).items()
    if inspect.isfunction(f)
}
"""What cells name that no table has."""


def named(proof: str) -> set[str]:
    cells: Iterable[Any] = (row.cell(proof) for row in TABLE.values())
    return {name for cell in cells if not isinstance(cell, str) for name in cell}


def test_every_operation_stands_in_the_table() -> None:
    rows = {name for row in TABLE.values() for name in row.asked}
    assert asked() - LIFE - NOTHING_KEPT - rows == set(), "which proof covers these?"
    assert (rows | NOTHING_KEPT) - asked() == set(), "nobody can ask for these"
    assert rows & NOTHING_KEPT == set()


@pytest.mark.parametrize("proof", PROOFS)
def test_cells_name_what_is_there_and_all_of_it(proof: str) -> None:
    assert named(proof) - entries(proof) - NAMED == set(), "the proof has none of these"
    assert entries(proof) - named(proof) - COURSE[proof] == set(), "which operations are these?"


@pytest.mark.parametrize("name", TABLE)
def test_an_empty_cell_has_a_reason_and_no_operation_is_without_a_proof(name: str) -> None:
    cells = [TABLE[name].cell(proof) for proof in PROOFS]
    assert all(len(cell) > (20 if isinstance(cell, str) else 0) for cell in cells)
    assert any(not isinstance(cell, str) for cell in cells)
