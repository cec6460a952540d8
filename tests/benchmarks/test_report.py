"""What a person reads of a run."""

from __future__ import annotations

import pytest

from benchmarks import report
from benchmarks.figures import format_value
from benchmarks.model import Goal
from benchmarks.progress import format_time
from tests.benchmarks import made_up


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.013249, "0.0132"),
        (1.254, "1.25"),
        (99.96, "100"),
        (101_463.0, "101,000"),
        (999.6, "1,000"),
    ],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert format_value(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(40.4, "40 s"), (720.0, "12 min"), (3900.0, "1 h 05 min")]
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert format_time(seconds) == text


def cells(text: str, name: str) -> list[str]:
    """The cells of the first table row of that name."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_shows_medians_spread_ratio_and_goal() -> None:
    row = made_up.row(goal=Goal(1.5), nbdstore=[200.0, 210.0, 190.0], nbdkit=[100.0, 100.0, 100.0])
    found = cells(report.markdown(made_up.run(row)), "reads")
    assert found == [
        *("reads", "op/s", "200 [190-210]", "100 [100-100]"),
        *("2.00", ">= 1.5 x the best peer", "yes"),
    ]


def test_a_goal_that_is_missed_is_seen() -> None:
    row = made_up.row(goal=Goal(3), nbdstore=[200.0], nbdkit=[100.0])
    text = report.markdown(made_up.run(row))
    assert cells(text, "reads")[-1] == "**no**"
    assert "Goals met: 0 of 1." in text


def test_who_is_missing_is_told_with_the_reason() -> None:
    first, second = made_up.row("first", nbdstore=[1.0]), made_up.row("second", nbdstore=[1.0])
    for row in (first, second):
        row.left_out["nbdkit"] = "not installed"
    second.failed["nbd-server"] = "died"
    text = report.markdown(made_up.run(first, second))
    assert "- nbdkit: not installed (`first`, `second`)" in text
    assert "## Failed\n\n- nbd-server: died (`second`)" in text


def test_an_interrupted_run_says_so() -> None:
    run = made_up.run()
    assert "interrupted" not in report.markdown(run)
    run.finished = None
    assert "interrupted" in report.markdown(run)


def test_a_report_says_where_and_with_what_it_was_measured() -> None:
    text = report.markdown(made_up.run(made_up.row(nbdstore=[1.0])))
    for fact in ("0123abc", "Linux 6.1", "fio-3.33", "a volume; page cache: warm"):
        assert fact in text
