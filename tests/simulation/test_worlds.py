"""Worlds that end well, worlds that are the same each time, and worlds that find what is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from nbdstore.errors import StoreError
from tests.figures import Tell
from tests.simulation.mutations import BACKUPS, LEASES, MUTATIONS, SCRUBS, Mutation
from tests.simulation.oracle import Wrong
from tests.simulation.plan import choose_plan
from tests.simulation.world import run_world

ROOT = Path(__file__).parents[2]
SCALE = 0.25
"""Of the number of requests; `python -m tests.simulation` does it all."""

N_WORLDS = 40
N_BACKUP_WORLDS = 30
N_SCRUBBED_WORLDS = 10
N_LEASED_WORLDS = 10


@pytest.mark.parametrize("first", range(0, N_WORLDS, 4))
def test_nothing_is_lost(tell: Tell, first: int) -> None:
    figures: Counter[str] = Counter()
    for seed in range(first, first + 4):
        figures.update(run_world(seed, choose_plan(seed, scale=SCALE)).figures())
    assert figures["requests answered"] > 100
    tell("simulation", {"worlds": 4, **figures})


def test_what_is_carried_to_another_pool_and_back_is_what_was_sent(tell: Tell) -> None:
    figures: Counter[str] = Counter()
    for seed in range(N_BACKUP_WORLDS):
        figures.update(run_world(seed, BACKUPS).figures())
    for what in ("received", "broken off", "resumed", "given up"):
        assert figures[f"transfers {what}"], what
    assert figures["volumes restored"]
    tell("simulation", {"worlds": N_BACKUP_WORLDS, **figures})


def test_what_is_scrubbed_while_it_is_used_is_never_taken_for_damaged(tell: Tell) -> None:
    figures: Counter[str] = Counter()
    for seed in range(N_SCRUBBED_WORLDS):
        figures.update(run_world(seed, SCRUBS).figures())
    assert figures["scrubs"] > 50
    assert figures["power losses"]
    tell("simulation", {"worlds": N_SCRUBBED_WORLDS, **figures})


def test_who_has_lost_the_lease_of_a_volume_is_out_and_stays_out(tell: Tell) -> None:
    figures: Counter[str] = Counter()
    for seed in range(N_LEASED_WORLDS):
        figures.update(run_world(seed, LEASES).figures())
    for what in ("leases taken", "limits set", "clients with an old lease turned away"):
        assert figures[what] > 10, what
    assert figures["power losses"]
    tell("simulation", {"worlds": N_LEASED_WORLDS, **figures})


DIGEST = """
from tests.simulation.plan import choose_plan
from tests.simulation.world import run_world
from tests.simulation.mutations import BACKUPS
for seed in (3, 6, 8):
    print(run_world(seed, choose_plan(seed, scale=0.2)).trace.digest)
print(run_world(1, BACKUPS).trace.digest)
"""


def test_a_seed_is_the_same_world_in_every_process() -> None:
    digests = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        found = subprocess.run(
            [sys.executable, "-c", DIGEST],
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        digests.append(found.stdout.split())
    assert len(set(digests[0])) == 4
    assert digests[0] == digests[1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_broken_server_is_found_out(tell: Tell, mutation: Mutation) -> None:
    with mutation.applied():
        for seed in range(mutation.n_seeds):
            try:
                run_world(seed, mutation.plan)
            except (Wrong, AssertionError, RuntimeError, StoreError) as error:
                assert mutation.says in str(error), error
                tell("simulation", {"broken servers found out": 1})
                return
    pytest.fail(f"{mutation.n_seeds} worlds have not noticed: {mutation.name}")
