"""The table of what other servers do differently, as tests/conformance/README.md shows it.

``python -m tests.peers.differences`` prints it, from the files in tests/conformance/known.
"""

from __future__ import annotations

from pathlib import Path

import tests.conformance
from tests.conformance.case import TABLE
from tests.conformance.cases import all_cases
from tests.conformance.expected import Known, read_expected

PACKAGE = Path(tests.conformance.__file__).parent
KNOWN = PACKAGE / "known"


def differences() -> str:
    """One row per case and server, in Markdown."""
    order = [case.id for case in all_cases()]
    rows = [
        (order.index(case_id), name, case_id, known)
        for path in sorted(KNOWN.glob("*.txt"))
        for name, (case_id, known) in ((path.stem, item) for item in read_expected(path).items())
    ]
    lines = ["| case | level | server | outcome | what it does |", "|---|---|---|---|---|"]
    lines += [row(name, case_id, known) for _, name, case_id, known in sorted(rows, key=first_two)]
    return "\n".join(lines)


def first_two(entry: tuple[int, str, str, Known]) -> tuple[int, str]:
    return entry[:2]


def row(name: str, case_id: str, known: Known) -> str:
    level = TABLE[case_id].level.value
    return f"| `{case_id}` | {level} | {name} | {known.outcome.value} | {known.reason} |"


if __name__ == "__main__":
    print(differences())
