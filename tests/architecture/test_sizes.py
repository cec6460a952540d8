"""The house's measures: how long files and functions may be, and that modules have docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOPS = ("benchmarks", "nbdstore", "tests")
FILES = sorted(path for top in TOPS for path in ROOT.joinpath(top).rglob("*.py"))

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 70


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_no_file_is_too_long() -> None:
    lengths = {relative(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_no_function_is_too_long() -> None:
    lengths = {
        f"{relative(path)}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in FILES
        for node in functions(path)
    }
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


def test_every_module_says_what_it_owns() -> None:
    texts = {relative(path): path.read_text() for path in FILES}
    silent = [
        name for name, text in texts.items() if text and not ast.get_docstring(ast.parse(text))
    ]
    assert silent == []
