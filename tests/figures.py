"""What a run of the tests has come to: sequences enumerated, crashes injected, faults survived.

Owns how a test tells its figures (the fixture ``tell`` in conftest.py), and how they are summed up
at the end of the report, over all processes of the run, by the names of tests/soak.py's parts::

    --- what was tried ---
      exhaustive | 241 sequences, 2,840 crash points, ...

Figures are of tests that passed: one that failed has its own story.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import pytest

from tests.seeds import told
from tests.soak import PARTS

Tell = Callable[[str, Mapping[str, int]], None]
"""Takes the name of a part, and figures that are added to what others have told about it."""

ONLY_IN_CI = ("failpoints", "conformance")
"""What is enumerated as a whole there, so that a longer run would show no more."""

_PROPERTY = "figures"


def teller(record_property: Callable[[str, object], None]) -> Tell:
    """Return what a test tells its figures to; they travel in its report."""

    def tell(part: str, figures: Mapping[str, int]) -> None:
        assert part in PARTS or part in ONLY_IN_CI, f"there is no part {part!r} in tests/soak.py"
        record_property(_PROPERTY, {"part": part, "figures": dict(figures)})

    return tell


def summed(reporter: pytest.TerminalReporter) -> dict[str, Counter[str]]:
    """Figures by part, of all tests that passed."""
    found: dict[str, Counter[str]] = {}
    for report in reporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == _PROPERTY:
                found.setdefault(value["part"], Counter()).update(value["figures"])
    return found


def show(reporter: pytest.TerminalReporter) -> None:
    """Add what was tried to the end of the report, if anything was."""
    found = summed(reporter)
    if not found:
        return
    reporter.section("what was tried")
    for part in [*PARTS, *ONLY_IN_CI]:
        if part in found:
            reporter.line(f"{part:>12} | {told(found[part])}")
