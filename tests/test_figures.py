"""Figures that tests tell are summed up by part, and shown."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.figures import show, teller


class Reporter(SimpleNamespace):
    """What of pytest's reporter is used."""

    def __init__(self, *reports: pytest.TestReport) -> None:
        super().__init__(stats={"passed": list(reports)}, lines=[])

    def section(self, title: str) -> None:
        self.lines.append(title)

    def line(self, text: str) -> None:
        self.lines.append(text)


def report(*told: tuple[str, dict[str, int]]) -> pytest.TestReport:
    """The report of a test that told figures."""
    properties: list[tuple[str, Any]] = [("something else", 1)]
    tell = teller(lambda name, value: properties.append((name, value)))
    for part, figures in told:
        tell(part, figures)
    return pytest.TestReport(
        "test", ("", None, ""), {}, "passed", None, "call", user_properties=properties
    )


def shown(reporter: Any) -> list[str]:
    show(reporter)
    lines: list[str] = reporter.lines
    return lines


def test_figures_of_all_tests_are_summed_up_in_the_order_of_parts() -> None:
    first = report(("fuzz", {"inputs": 1000}), ("exhaustive", {"sequences": 3}))
    second = report(("fuzz", {"inputs": 500, "crashes": 0}))
    assert shown(Reporter(first, report(), second)) == [
        "what was tried",
        "  exhaustive | 3 sequences",
        "        fuzz | 1,500 inputs",
    ]


def test_a_run_that_told_nothing_shows_nothing() -> None:
    assert shown(Reporter(report())) == []


def test_a_part_that_is_none_is_refused() -> None:
    with pytest.raises(AssertionError, match="fuss"):
        report(("fuss", {"inputs": 1}))
