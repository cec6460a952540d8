"""Running seeds: a failing one is shown with the command that replays it."""

from __future__ import annotations

import pytest

from tests.seeds import run_seeds


def _odd_ones_fail(seed: int) -> dict[str, int]:
    assert seed % 2 == 0, f"{seed} is odd"
    return {"crashes": 10}


def test_figures_are_summed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_seeds("some.module", lambda _: {"crashes": 700}, 5, 2, None) == 0
    assert "2 seeds from 5, 0 failed: 1,400 crashes" in capsys.readouterr().out


def test_a_failing_seed_is_shown_with_its_replay(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_seeds("some.module", _odd_ones_fail, 1, 2, None) == 1
    shown = capsys.readouterr().out
    assert "seed 1 failed; replay: python -m some.module --seed 1" in shown
    assert "1 is odd" in shown
    assert "2 seeds from 1, 1 failed: 10 crashes" in shown


def test_it_ends_when_the_time_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_seeds("some.module", _odd_ones_fail, 0, None, 0.0) == 0
    assert "0 seeds from 0" in capsys.readouterr().out


def test_it_ends_when_enough_has_failed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_seeds("some.module", _odd_ones_fail, 0, None, 60.0) == 5
    assert "10 seeds from 0, 5 failed" in capsys.readouterr().out
