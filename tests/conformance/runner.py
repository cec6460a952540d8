"""Running cases: one after the other, each with a deadline, and what came of each."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.conformance.case import Case, Level
from tests.conformance.outcome import Broken, Outcome, Skip, Unreachable, Violation
from tests.conformance.server import Facts, Server, Settings, testing
from tests.conformance.target import Target
from tests.conformance.wire import Mode


@dataclass(frozen=True)
class Result:
    """What came of one case; ``detail`` says why, unless it passed."""

    case: Case
    outcome: Outcome
    detail: str
    duration_s: float


def run_cases(
    cases: Iterable[Case], target: Target, settings: Settings, facts: Facts
) -> Iterator[Result]:
    """Run cases, and yield what came of each.

    Ends early if the server cannot be reached any more: the last result then says so.
    """
    for case in cases:
        result = run_case(case, target, settings, facts)
        yield result
        if result.outcome is Outcome.FAIL and not is_alive(target, settings, facts):
            raise Unreachable(f"the server is gone since the case {case.id}")


def run_case(case: Case, target: Target, settings: Settings, facts: Facts) -> Result:
    """Run one case, in each mode if it wants that; the worst outcome counts."""
    started = time.monotonic()
    modes = facts.modes if case.each_mode else (None,)
    outcomes = [_attempt(case, mode, target, settings, facts) for mode in modes]
    worst = max(outcomes, key=lambda found: _SEVERITY.index(found[0]))
    detail = "; ".join(
        _in_mode(mode, text)
        for mode, (outcome, text) in zip(modes, outcomes, strict=True)
        if outcome is worst[0] and text
    )
    return Result(case, worst[0], detail, time.monotonic() - started)


_SEVERITY = (Outcome.SKIPPED, Outcome.PASS, Outcome.DIFFERS, Outcome.FAIL)


def _in_mode(mode: Mode | None, text: str) -> str:
    return f"{mode.value}: {text}" if mode else text


def _attempt(
    case: Case, mode: Mode | None, target: Target, settings: Settings, facts: Facts
) -> tuple[Outcome, str]:
    with testing(target, settings, facts, slow=case.slow) as server:
        try:
            case.run(server) if mode is None else case.run(server, mode)
        except Broken as fault:
            return Outcome.FAIL, str(fault)
        except Violation as violation:
            must = case.level is Level.MUST
            return (Outcome.FAIL if must else Outcome.DIFFERS), str(violation)
        except Skip as skip:
            return Outcome.SKIPPED, str(skip)
    return Outcome.PASS, ""


def is_alive(target: Target, settings: Settings, facts: Facts) -> bool:
    """Whether the server still says hello."""
    with testing(target, settings, facts) as server:
        return _says_hello(server)


def _says_hello(server: Server) -> bool:
    try:
        server.plain()
    except Violation:
        return False
    return True
