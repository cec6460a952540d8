"""Medians, ratios and goals; JSON and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.model import Goal, Point, Unit
from benchmarks.results import Summary
from tests.benchmarks import made_up


def test_a_summary_is_the_median_and_the_ends() -> None:
    assert made_up.row(nbdstore=[3.0, 1.0, 10.0]).summary("nbdstore") == Summary(3.0, 1.0, 10.0)
    assert made_up.row(nbdstore=[1.0, 2.0]).summary("nbdstore") == Summary(1.5, 1.0, 2.0)
    assert made_up.row().summary("nbdstore") is None


def test_cpu_is_counted_for_each_operation() -> None:
    assert made_up.row(nbdstore=[5.0, 6.0]).cpu_us("nbdstore") == pytest.approx(20)
    assert made_up.row().cpu_us("nbdstore") is None


@pytest.mark.parametrize(
    ("unit", "fastest", "ratio"), [(Unit.IOPS, "nbdkit", 2.0), (Unit.SECONDS, "nbd-server", 0.25)]
)
def test_the_ratio_is_to_the_best_peer_and_more_is_better(
    unit: Unit, fastest: str, ratio: float
) -> None:
    row = made_up.row(unit=unit, nbdstore=[40.0], nbdkit=[20.0], nbd_server=[10.0])
    assert row.fastest_peer() == fastest
    assert row.ratio() == ratio


def test_nbdstore_of_another_checkout_is_no_peer() -> None:
    row = made_up.row(nbdstore=[40.0], nbdkit=[20.0])
    row.samples["nbdstore@main"] = made_up.row(nbdstore=[80.0]).samples["nbdstore"]
    assert row.fastest_peer() == "nbdkit"


def test_there_is_no_ratio_without_nbdstore_or_without_peers() -> None:
    assert made_up.row(nbdkit=[1.0]).ratio() is None
    assert made_up.row(nbdstore=[1.0]).ratio() is None


@pytest.mark.parametrize(("goal", "is_met"), [(1.5, True), (2.0, True), (2.1, False)])
def test_a_goal_is_met_from_its_ratio_on(goal: float, is_met: bool) -> None:
    row = made_up.row(goal=Goal(goal), nbdstore=[40.0], nbdkit=[20.0])
    assert made_up.run(row).is_goal_met(row) is is_met


def test_nobody_knows_of_a_goal_if_one_who_was_to_be_measured_is_missing() -> None:
    row = made_up.row(goal=Goal(1.5), nbdstore=[40.0, 40.0], nbdkit=[20.0, 20.0])
    run = made_up.run(row)
    assert run.is_goal_met(row) is True
    del row.left_out["nbd-server"]
    assert run.is_goal_met(row) is None


def test_nobody_knows_of_a_goal_before_the_last_round() -> None:
    small = made_up.row("small", nbdstore=[100.0, 100.0])
    large = made_up.row("large", goal=Goal(0.8, "small"), nbdstore=[90.0, 90.0])
    run = made_up.run(small, large)
    assert run.is_goal_met(large) is True
    small.samples["nbdstore"].pop()
    assert run.is_goal_met(large) is None


def test_a_goal_may_be_a_row_of_our_own() -> None:
    small = made_up.row("small", nbdstore=[100.0], nbdkit=[1.0])
    large = made_up.row("large", goal=Goal(0.8, "small"), nbdstore=[79.0], nbdkit=[1.0])
    run = made_up.run(small, large)
    assert run.reached(large) == 0.79
    assert run.is_goal_met(large) is False
    assert made_up.run(large).is_goal_met(large) is None


def test_results_are_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    row = made_up.row(goal=Goal(1.5), point=Point("reads", "depth", 32), nbdstore=[2.0, 4.0])
    row.left_out["nbdkit"] = "not installed"
    row.failed["nbd-server"] = "died"
    run = made_up.run(row, made_up.row("others", Unit.SECONDS))
    results.save(run, tmp_path)
    assert results.load(tmp_path) == run
    body = json.loads((tmp_path / "results.json").read_text())
    assert body["rows"][0]["summary"]["nbdstore"]["median"] == 3.0


def test_results_of_another_format_are_refused() -> None:
    body = results.to_json(made_up.run()) | {"format": 99}
    with pytest.raises(ValueError, match="format 99"):
        results.from_json(body)
