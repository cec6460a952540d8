"""One call of the disk fails, whichever: the N-th, for all N of a short play and each error.

Owns the faults and the course of one run: play with one fault, start a new process on the same
machine, whose disk is well again, then cut the power.  Whatever failed: nobody waits for ever, the
pool goes on or says that it failed, and nothing that was promised is lost::

    python -m tests.store.fault_sweep --seed 7 --minutes 10       plays of chance
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Final

from nbdstore.errors import NoSpace, ReadFailed, StoreError, WriteFailed
from nbdstore.store import Pool
from tests.seeds import main
from tests.store.crashes import LAZY, Crash, crash_images
from tests.store.power_loss import assert_clean
from tests.store.short_plays import OPERATIONS, OPTIONS, Play, Sequence, base_of, look, run
from tests.store.short_sequences import BASES, can_be_done
from tests.store.short_states import Known, judge
from tests.store.simulated_disk import PLACE, ShortWrite, SimulatedDisk, SyncFailed

PLAY: Final[Sequence] = (
    *("write", "across", "flush", "write", "part", "no-hole", "checkpoint", "large", "fua"),
    *("trim", "settle", "delete", "create", "zero", "kill", "grow", "large", "shrink"),
    *("snapshot", "fua", "clone", "across", "rollback", "kill", "flatten", "drop", "unclone"),
)
"""Everything that can be done, data that is overwritten with and without a flush between."""

FULL: Final = NoSpace("No space left on device")
BROKEN: Final = WriteFailed("Input/output error")
FAULTS: Final[dict[str, tuple[str, Exception]]] = {
    "write: no space": ("write", FULL),
    "write: error": ("write", BROKEN),
    "short write: no space": ("write", ShortWrite(0.5, FULL)),
    "short write: error": ("write", ShortWrite(0.7, BROKEN)),
    "read: error": ("read", ReadFailed("Input/output error")),
    "sync: error": ("sync", BROKEN),
    "open: error": ("open", StoreError("Too many open files")),
}
"""By name: which calls fail, and how."""


@dataclass
class Failing:
    """Fails a call.

    Attributes:
        operation, error: which calls, and how.
        at: number of the first such call that fails.
        stop: number of the first that does not fail any more.
        n_calls: such calls so far.
    """

    operation: str
    error: Exception
    at: int
    stop: int
    n_calls: int = 0

    def __call__(self, operation: str, _name: str) -> None:
        if operation == self.operation:
            self.n_calls += 1
            if self.at < self.n_calls <= self.stop:
                raise self.error


async def _play(play: Play, sequence: Sequence) -> bool:
    """Do what can be done; return whether the pool is well at the end."""
    try:
        await play.open()
    except StoreError:
        return False
    for number, name in enumerate(sequence):
        play.number = number
        if not can_be_done(name, _there(play.pool)):
            continue  # what should have been before has failed
        try:
            await OPERATIONS[name](play)
        except StoreError:
            if play.pool.status()["state"] == "failed" or name == "kill":
                return False
            await _take_stock(play)
        if play.pool.status()["state"] == "failed":  # by what it does by itself
            return False
    return True


def _there(pool: Pool) -> set[str]:
    """What the operations of short_plays.py need, or are hindered by."""
    shared = {"shared"} if "c" in pool.volumes and pool.volumes["c"].info.parent else set()
    there = {*pool.volumes, *pool.snapshots} | shared
    for volume in pool.trash:
        own = volume.snapshots.values()
        there |= {"trash", volume.name, *(snapshot.name for snapshot in own)}
    return there


async def _take_stock(play: Play) -> None:
    """A request was refused by a pool that goes on: what has become of it must be allowed."""
    fault, play.disk.fault = play.disk.fault, None
    found = await look(play.pool)
    play.disk.fault = fault
    for name, history in play.histories.items():
        now = found.get(name)
        assert now in history.states[history.n_acknowledged :], f"{name} after a refusal"
        history.states.append(now)
        history.acknowledge()
    play.note()


def run_fault(base: str, sequence: Sequence, failing: Failing, seed: int = 0) -> Counter[str]:
    """Play with one fault, start anew, cut the power; return figures, with the calls made."""
    images, holding = base_of(base)
    disk = SimulatedDisk(images, seed, fault=failing)
    play = Play(disk, holding)
    play.note()
    well: bool = run(_play(play, sequence))
    disk.fault = None
    known: Known = play.moments[-1][1]
    n_events = len(disk.events)
    for crash in (LAZY, Crash.random(disk.random)):
        lost = SimulatedDisk(crash_images(disk, n_events, crash, disk.random), seed)
        _tolerant_check(lost, failing)
        judge(run(_open_and_look(lost)), known, killed=False)
    # A new process on the same machine: only what a sync has failed to write may be gone.
    sync_failed = any(isinstance(event, SyncFailed) for event in disk.events)
    found = run(_open_and_look(disk))
    judge(found, known, killed=not sync_failed)
    after = SimulatedDisk(crash_images(disk, len(disk.events), LAZY, disk.random), seed)
    _tolerant_check(after, failing)
    assert run(_open_and_look(after)) == found, "what recovery found was not durable"
    return Counter({"faults survived": 1, "pools failed": not well, "pools went on": well})


async def _open_and_look(disk: SimulatedDisk) -> dict[str, object]:
    return {**await look(await Pool.open(PLACE, OPTIONS, host=disk.host))}


def _tolerant_check(disk: SimulatedDisk, failing: Failing) -> None:
    """A copy of the catalogue that could not be read keeps its slots until `check --repair`."""
    if failing.operation != "read":
        assert_clean(disk.images)


def n_calls(base: str, sequence: Sequence, operation: str) -> int:
    """How many calls of `operation` a play makes if none fails."""
    counting = Failing(operation, BROKEN, at=1 << 60, stop=0)
    run_fault(base, sequence, counting)
    return counting.n_calls


def run_seed(seed: int) -> Counter[str]:
    """A play of chance, with a fault of chance that lasts for a while."""
    rng = random.Random(seed)
    base = rng.choice([*BASES])
    names = [name for name in OPERATIONS if name not in ("grow", "shrink")]
    sequence = tuple(rng.choices(names, k=rng.choice((3, 8, 20))))
    kind = rng.choice([*FAULTS])
    operation, error = FAULTS[kind]
    at = rng.randrange(n_calls(base, sequence, operation) + 1)
    failing = Failing(operation, error, at, at + rng.choice((1, 1, 2, 5, 1 << 60)))
    try:
        return run_fault(base, sequence, failing, seed)
    except BaseException as caught:
        caught.add_note(f"{base}:{','.join(sequence)}, {kind} from call {at} on")
        raise


if __name__ == "__main__":
    main("tests.store.fault_sweep", run_seed)
