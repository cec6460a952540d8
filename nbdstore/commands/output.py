"""What people and programs see: tables, lists of facts, JSON.

Standard output carries the answer and nothing else; notes and progress go to standard error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import click

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON; sizes are exact bytes."
)


def print_json(value: object) -> None:
    """Print `value` as indented JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: str = "") -> None:
    """Print columns, as wide as they need; those named in `right` (words) are right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    aligned_right = [name in right.split() for name in header]
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, aligned_right, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print one ``label  value`` per line, the values in one column."""
    width = max(len(label) for label, _ in facts)
    for label, value in facts:
        click.echo(f"{label.ljust(width)}  {value}".rstrip())


def note(text: str) -> None:
    """Tell a person something beside the answer, on standard error."""
    click.echo(f"nbdstore: {text}", err=True)


def counted(n: int, noun: str) -> str:
    """Write a number of things: ``1 volume``, ``2 volumes``."""
    return f"{n} {noun}{'' if n == 1 else 's'}"
