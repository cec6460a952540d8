"""Two hundred connections for some seconds; `python -m tests.load` does it for longer."""

from __future__ import annotations

from pathlib import Path

import pytest
import uvloop

from tests.children import Children
from tests.clients.served_pool import ServedPool
from tests.figures import Tell
from tests.load.hostile import MISDEEDS
from tests.load.scene import Scene

SECONDS = 20


@pytest.mark.timeout(180)
def test_good_clients_among_bad_ones(children: Children, tmp_path: Path, tell: Tell) -> None:
    scene = Scene(ServedPool(children, tmp_path), n_connections=200, n_exports=64)
    scene.prepare()
    uvloop.run(scene.run(1, SECONDS, print))
    scene.check_vitals()
    scene.check_pool()
    assert set(scene.misdeeds) == {misdeed.__name__ for misdeed in MISDEEDS}
    assert scene.figures.bytes_verified > 0
    tell("load", scene.figures_by_name())
