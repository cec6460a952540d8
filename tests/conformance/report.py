"""Telling what came of the cases: a table for people, JSON for programs."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from tests.conformance.case import RULES, Case
from tests.conformance.outcome import Outcome
from tests.conformance.runner import Result
from tests.conformance.server import Facts
from tests.conformance.target import Target

ID_WIDTH = 28
WIDTH = 100


def describe(target: Target, facts: Facts) -> str:
    """Say in some lines what is tested."""
    sizes = facts.block_sizes
    blocks = f"{sizes.minimum}/{sizes.preferred}/{sizes.maximum}" if sizes else "not told"
    flags = facts.export.flags.name or str(int(facts.export.flags))
    return "\n".join(
        [
            f"server    {target.uri}",
            f"export    {facts.export.size} bytes, {flags.replace('|', ' ')}",
            f"replies   {', '.join(mode.value for mode in facts.modes)}",
            f"blocks    {blocks}",
            f"contexts  {', '.join(facts.contexts) or 'none'}",
        ]
    )


def line(result: Result) -> str:
    """One result, for a person; why it is so on the lines below."""
    case = result.case
    head = f"{result.outcome.value:<8} {case.id:<{ID_WIDTH}} {case.level.value:<7}{case.asks}"
    if result.outcome is Outcome.PASS:
        return head
    detail = textwrap.wrap(result.detail, WIDTH - 9)
    if result.outcome is not Outcome.SKIPPED:
        detail.append(f"({case.source})")
    return "\n".join([head, *textwrap.indent("\n".join(detail), " " * 9).splitlines()])


def summary(results: Sequence[Result]) -> str:
    """Count the outcomes."""
    counts = Counter(result.outcome for result in results)
    return ", ".join(f"{counts[outcome]} {outcome.value}" for outcome in Outcome)


def as_json(target: Target, facts: Facts, results: Sequence[Result]) -> str:
    """All of it, for programs."""
    document: dict[str, Any] = {
        "server": target.uri,
        "size": facts.export.size,
        "flags": int(facts.export.flags),
        "replies": [mode.value for mode in facts.modes],
        "contexts": list(facts.contexts),
        "results": [
            {
                "id": result.case.id,
                "phase": result.case.phase,
                "level": result.case.level.value,
                "outcome": result.outcome.value,
                "detail": result.detail,
                "source": result.case.source,
                "rules": list(result.case.rules),
                "seconds": round(result.duration_s, 3),
            }
            for result in results
        ],
    }
    return json.dumps(document, indent=2)


def listing(cases: Iterable[Case]) -> str:
    """The table of cases."""
    lines = []
    for case in cases:
        marks = " (writes)" * case.writes + " (slow)" * case.slow
        lines.append(f"{case.id:<{ID_WIDTH}} {case.level.value:<7}{case.asks}{marks}")
        rules = ", ".join(f"{number} {RULES[number]}" for number in case.rules)
        lines.append(f"{'':<{ID_WIDTH}} {case.source}" + (f"; rule {rules}" if rules else ""))
    return "\n".join(lines)
