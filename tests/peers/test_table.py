"""The table of cases, and what is written about it, are whole and true."""

from __future__ import annotations

import ast
import sys
from enum import IntEnum, IntFlag
from pathlib import Path

import pytest

from nbdstore.protocol import constants
from tests.conformance import wire
from tests.conformance.case import RULES
from tests.conformance.cases import PHASES, all_cases
from tests.conformance.report import ID_WIDTH
from tests.peers.readme import PACKAGE, README, with_tables


def test_every_rule_is_covered() -> None:
    assert {rule for case in all_cases() for rule in case.rules} == set(RULES) == set(range(1, 30))


def test_every_case_names_its_source() -> None:
    assert [case.id for case in all_cases() if not case.source or not case.asks] == []


def test_ids_fit_the_report() -> None:
    assert [case.id for case in all_cases() if len(case.id) >= ID_WIDTH] == []


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_the_client_stands_alone(path: Path) -> None:
    """Only Python's own modules, so that anybody can use it on any server."""
    strangers = {
        name
        for name in imports_of(path)
        if name.partition(".")[0] not in sys.stdlib_module_names
        and not name.startswith("tests.conformance")
    }
    assert strangers == set()


@pytest.mark.parametrize(
    ("read_again", "in_nbdstore"),
    [
        (wire.Option, constants.Option),
        (wire.Rep, constants.OptionReply),
        (wire.Info, constants.Info),
        (wire.Flag, constants.TransmissionFlag),
        (wire.Cmd, constants.Command),
        (wire.CmdFlag, constants.CommandFlag),
        (wire.ChunkType, constants.Chunk),
        (wire.Errno, constants.Errno),
        (wire.State, constants.Allocation),
    ],
)
def test_two_readings_of_the_specification_agree(
    read_again: type[IntEnum] | type[IntFlag], in_nbdstore: type[IntEnum] | type[IntFlag]
) -> None:
    assert {m.name: int(m) for m in read_again} == {m.name: int(m) for m in in_nbdstore}


def test_magics_agree() -> None:
    names = [name for name in vars(wire) if name.endswith("_MAGIC")]
    assert len(names) == 6
    assert {n: getattr(wire, n) for n in names} == {n: getattr(constants, n) for n in names}


# --- README.md -----------------------------------------------------------------------------------


def test_the_tables_of_the_readme_are_true() -> None:
    text = README.read_text()
    assert text == with_tables(text), "python -m tests.peers.readme"


def test_the_readme_names_every_phase() -> None:
    assert f"(`{' '.join(PHASES)}`)" in README.read_text()
