"""`kill -9` under load, in the drain and in the recovery: see tests.kills.loop."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.children import Children
from tests.clients.served_pool import ServedPool
from tests.figures import Tell
from tests.kills.loop import ROOMY, Geometry, KillLoop, Tally

KILLS_PER_SEED = 8
MIB = 1 << 20

GEOMETRIES = {
    "small blocks": Geometry(4 << 10, ROOMY, MIB, (4 * MIB, 2 * MIB, 4 * MIB)),
    "large blocks": Geometry(64 << 10, 16 * MIB, MIB, (8 * MIB, 2 * MIB)),
    "a full pool": Geometry(4 << 10, 16 * MIB, MIB, (16 * MIB, 16 * MIB)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_what_was_acknowledged_survives_kills_at_any_moment(
    children: Children, tmp_path: Path, tell: Tell, name: str
) -> None:
    geometry = GEOMETRIES[name]
    tally = Tally()
    pool = ServedPool(children, tmp_path)
    loop = KillLoop(pool, geometry, random.Random(1), tally)

    def was_full() -> bool:
        return "writes are held: the pool is full" in pool.log.read_text()

    while tally.n_kills < KILLS_PER_SEED:
        loop.round()
    if name == "a full pool":  # when it is, depends on what was chosen
        while not was_full() and tally.n_kills < 5 * KILLS_PER_SEED:
            loop.round()
        assert was_full()
    pool.close()
    tell("kills", tally.figures_by_name())
    tell("kills", {f"times {kind}": n for kind, n in loop.administrator.done.items()})
    assert tally.lost_in_flight > 0, "no kill has met a change in flight"
