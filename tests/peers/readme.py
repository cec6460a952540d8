"""The tables of tests/conformance/README.md: rules and their cases, and what other servers do.

``python -m tests.peers.readme`` writes them there: from the table of cases, and from the files in
tests/conformance/known.
"""

from __future__ import annotations

import re
from pathlib import Path

import tests.conformance
from tests.conformance.case import RULES, TABLE
from tests.conformance.cases import all_cases
from tests.conformance.expected import read_expected

PACKAGE = Path(tests.conformance.__file__).parent
KNOWN = PACKAGE / "known"
README = PACKAGE / "README.md"


def with_tables(text: str) -> str:
    """Return the README's text with its tables, and the number of cases, as they are now."""
    text = re.sub(r"\d+ questions", f"{len(all_cases())} questions", text)
    for name, table in (("rules", rules()), ("differences", differences())):
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert marks.search(text), f"the README has no place for {name}"
        text = marks.sub(rf"\g<1>{table}\n\g<2>", text)
    return text


def rules() -> str:
    """One row per rule, in Markdown."""
    lines = ["| rule | | cases |", "|---|---|---|"]
    for number, rule in RULES.items():
        about = [f"`{case.id}`" for case in all_cases() if number in case.rules]
        lines.append(f"| {number} | {rule} | {', '.join(about)} |")
    return "\n".join(lines)


def differences() -> str:
    """One row per case and server, in Markdown."""
    order = [case.id for case in all_cases()]
    rows = []
    for path in sorted(KNOWN.glob("*.txt")):
        for case_id, known in read_expected(path).items():
            level, outcome = TABLE[case_id].level.value, known.outcome.value
            cells = f"| `{case_id}` | {level} | {path.stem} | {outcome} | {known.reason} |"
            rows.append((order.index(case_id), cells))
    head = ["| case | level | server | outcome | what it does |", "|---|---|---|---|---|"]
    return "\n".join(head + [cells for _, cells in sorted(rows)])


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
