"""What a person reads of a run."""

from __future__ import annotations

import pytest

from benchmarks import report
from benchmarks.figures import format_value
from benchmarks.model import Goal, Unit
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


def test_each_row_below_its_goal_is_named_with_its_ratio() -> None:
    met = made_up.row("met", goal=Goal(1.5), nbdstore=[150.0], nbdkit=[100.0])
    slow = made_up.row("slow", goal=Goal(1), nbdstore=[99.7], nbdkit=[100.0], nbd_server=[5.0])
    large = made_up.row("large", goal=Goal(1 / 1.2, "met"), nbdstore=[100.0], nbdkit=[1.0])
    late = made_up.row("late", Unit.SECONDS, goal=Goal(1), nbdstore=[0.7], nbdkit=[0.004])
    free = made_up.row("free", nbdstore=[1.0], nbdkit=[2.0])
    text = report.markdown(made_up.run(met, slow, large, late, free))
    assert text.split("## Below their goal\n\n")[1].split("\n\n")[0].splitlines() == [
        "- `slow`: 0.997 of 1 x nbdkit",
        "- `large`: 0.667 of 0.833 x met",
        "- `late`: 0.00571 of 1 x nbdkit",
    ]
    assert "Goals met: 1 of 4." in text
    assert cells(text, "slow")[-3:] == ["0.997", ">= 1 x the best peer", "**no**"]


def test_a_run_that_meets_all_goals_has_no_list_of_others() -> None:
    row = made_up.row(goal=Goal(1), nbdstore=[1.0], nbdkit=[1.0])
    assert "Below" not in report.markdown(made_up.run(row))


def test_goals_of_which_nobody_knows_are_counted_apart() -> None:
    row = made_up.row(goal=Goal(1), nbdstore=[1.0], nbdkit=[2.0])
    run = made_up.run(row, made_up.row("other", goal=Goal(1), nbdstore=[2.0], nbdkit=[1.0]))
    row.failed["nbd-server"] = "died"
    del row.left_out["nbd-server"]
    text = report.markdown(run)
    assert "Goals met: 1 of 1.\nNot measured in full, so that nobody knows: 1 more." in text
    assert "Below" not in text


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
