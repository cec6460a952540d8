"""The long tests: a part that fails or hangs is told, the others run on."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from dataclasses import dataclass

import pytest

from tests.soak import PARTS, Part, run_parts


@dataclass(frozen=True)
class Script(Part):
    """A part that is a few lines of Python."""

    module: str = ""
    proves: str = "nothing"
    script: str = ""

    def command(self, seed: int, minutes: float) -> list[str]:
        return [sys.executable, "-c", self.script, str(seed), f"{minutes:.2f}"]


def test_parts_share_the_time_and_get_the_seed() -> None:
    told = "import sys; print(*sys.argv[1:])"
    parts = {
        "long": Script(script=told, share=2),
        "a": Script(script=told),
        "b": Script(script=told),
    }
    outcomes = asyncio.run(run_parts(parts, 7, 10, n_processes=1))
    lines = {name: outcome.last[-1] for name, outcome in outcomes.items()}
    assert lines == {"long": "7 5.00", "a": "7 2.50", "b": "7 2.50"}
    outcomes = asyncio.run(run_parts(parts, 7, 10, n_processes=3))
    assert outcomes["long"].last[-1] == "7 10.00", "no part runs for longer than all may"
    assert {outcome.verdict for outcome in outcomes.values()} == {"ok"}


def test_a_part_that_fails_or_hangs_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    parts = {
        "bad": Script(script="print('seed 3 failed'); raise SystemExit(1)"),
        "stuck": Script(script="import time; print('here', flush=True); time.sleep(600)"),
        "good": Script(script="print('all well')"),
    }
    outcomes = asyncio.run(run_parts(parts, 1, 0, n_processes=2, grace_s=5))
    verdicts = {name: outcome.verdict for name, outcome in outcomes.items()}
    assert verdicts == {"bad": "FAILED", "stuck": "HUNG", "good": "ok"}
    assert list(outcomes["stuck"].last) == ["here"]
    shown = capsys.readouterr().out
    assert "bad | seed 3 failed" in shown
    assert "good | all well" in shown


@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_there(name: str) -> None:
    assert importlib.util.find_spec(PARTS[name].module) is not None
