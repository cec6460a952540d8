"""Running the conformance client's cases within a test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tests.conformance.case import Case
from tests.conformance.cases import all_cases
from tests.conformance.expected import Known, surprises
from tests.conformance.outcome import Outcome, Unreachable
from tests.conformance.runner import Result, run_cases
from tests.conformance.server import Settings, find_facts
from tests.conformance.target import TlsFiles, parse_uri
from tests.conformance.wire import Mode

Restart = Callable[[], None]


def outcomes(
    uri: str,
    cases: Iterable[Case] | None = None,
    *,
    settings: Settings | None = None,
    tls_files: TlsFiles | None = None,
    restart: Restart | None = None,
    modes: Sequence[Mode] = tuple(Mode),
) -> list[Result]:
    """Run cases, all but the slow ones if none are given; return what came of them.

    Cases that run once for each family of replies do so for ``modes`` only. A server that is gone
    is a failure, unless ``restart`` can bring it back.
    """
    settings = settings or Settings()
    target = parse_uri(uri, tls_files)
    facts = find_facts(target, settings)
    facts.modes = tuple(mode for mode in facts.modes if mode in modes)
    left = list(cases) if cases is not None else [c for c in all_cases() if not c.slow]
    results: list[Result] = []
    while left:
        try:
            for result in run_cases(left, target, settings, facts):
                results.append(result)
                left = left[1:]
        except Unreachable:
            if restart is None:
                raise
            restart()
    return results


def skipped(results: Sequence[Result]) -> set[str]:
    return {result.case.id for result in results if result.outcome is Outcome.SKIPPED}


def explain(results: Sequence[Result], expected: dict[str, Known]) -> str:
    """What was not expected, with the reasons that were found; empty if there is nothing."""
    details = {result.case.id: result.detail for result in results}
    found = surprises(results, expected)
    return "\n".join(f"{text}: {details[text.partition(':')[0]]}" for text in found)
