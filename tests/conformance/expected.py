"""What is known of a server beforehand: the outcomes that differ from "pass".

A file of these has one case per line, ``outcome case-id reason...``; ``#`` begins a comment. Cases
that are not in it are expected to pass, or to be skipped. A run that fits its file exactly is a
success, so that a project can test its server's conformance with what it does on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.conformance.case import TABLE
from tests.conformance.outcome import Outcome
from tests.conformance.runner import Result
from tests.conformance.target import BadTarget


@dataclass(frozen=True)
class Known:
    """One line: what is known to come of one case, and why."""

    outcome: Outcome
    reason: str


def read_expected(path: Path) -> dict[str, Known]:
    """Read a file of expected outcomes; BadTarget if it makes no sense."""
    expected = {}
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise BadTarget(f"cannot read {path}: {error.strerror}") from None
    for number, text in enumerate(lines, 1):
        words = text.split("#", 1)[0].split(None, 2)
        if not words:
            continue
        try:
            outcome, case_id, reason = words
            expected[case_id] = Known(Outcome(outcome), reason.strip())
        except ValueError:
            raise BadTarget(f"{path}:{number}: not 'outcome case reason': {text!r}") from None
        if case_id not in TABLE:
            raise BadTarget(f"{path}:{number}: there is no case {case_id!r}")
    return expected


def surprises(results: Sequence[Result], expected: dict[str, Known]) -> list[str]:
    """Tell where results differ from what was expected, a sentence each."""
    found = []
    for result in results:
        known = expected.get(result.case.id)
        usual = result.outcome in (Outcome.PASS, Outcome.SKIPPED)
        if known is None and not usual:
            found.append(f"{result.case.id}: {result.outcome.value}, not expected")
        elif known is not None and known.outcome is not result.outcome:
            found.append(
                f"{result.case.id}: {result.outcome.value}, expected {known.outcome.value}"
            )
    return found
