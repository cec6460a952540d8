"""The command line of the simulator; see tests/seeds.py."""

from __future__ import annotations

from tests import seeds
from tests.simulation.plan import choose_plan
from tests.simulation.world import run_world


def run_seed(seed: int) -> dict[str, int]:
    """Run one world; return its figures."""
    world = run_world(seed, choose_plan(seed))
    return {"worlds": 1, **world.figures()}


if __name__ == "__main__":
    seeds.main("tests.simulation", run_seed)
