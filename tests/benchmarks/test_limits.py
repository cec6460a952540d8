"""benchmarks/README.md tells of each row that may be below its goal what limits it."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from benchmarks.peers import ROOT
from benchmarks.rows import rows
from benchmarks.scale import SCALES

README = (ROOT / "benchmarks" / "README.md").read_text()
SECTION = README.split("## What limits the rows below their goal\n")[1].split("\n## ")[0]
LIMITS = {
    pattern: paragraph
    for patterns, paragraph in re.findall(r"^\| (`.+`) \| (.+?) \|$", SECTION, re.M)
    for pattern in re.findall(r"`(.+?)`", patterns)
}
NAMES = {row.name for scale in SCALES.values() for row in rows(scale) if row.goal}


def test_each_row_with_a_goal_is_among_those_whose_limit_is_told() -> None:
    untold = {name for name in NAMES if not any(fnmatchcase(name, pattern) for pattern in LIMITS)}
    assert untold == set()


def test_no_limit_is_told_of_rows_that_are_not_there() -> None:
    assert {
        pattern for pattern in LIMITS if not any(fnmatchcase(name, pattern) for name in NAMES)
    } == set()


def test_each_limit_that_is_named_has_its_paragraph() -> None:
    titles = re.findall(r"^\*\*(.+?)\.\*\*", SECTION, re.M)
    assert set(LIMITS.values()) <= set(titles)
    assert len(titles) == len(set(titles))
