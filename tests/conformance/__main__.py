"""The command line: ``python -m tests.conformance nbd://HOST:PORT/EXPORT``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.conformance.case import Case
from tests.conformance.cases import PHASES, all_cases
from tests.conformance.expected import read_expected, surprises
from tests.conformance.outcome import Outcome, Skip, Unreachable, Violation
from tests.conformance.report import as_json, describe, line, listing, summary
from tests.conformance.runner import Result, run_cases
from tests.conformance.server import Settings, find_facts
from tests.conformance.target import BadTarget, TlsFiles, parse_uri

OK, FAILED, UNUSABLE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = parser().parse_args(arguments)
    try:
        chosen = choose(options.only, slow=options.slow)
        if options.list:
            print(listing(chosen))
            return OK
        if options.uri is None:
            raise BadTarget("which server? Give an NBD URI (or --help)")
        return test(options, chosen)
    except (BadTarget, Unreachable) as error:
        print(f"conformance: {error}", file=sys.stderr)
        return UNUSABLE


def test(options: argparse.Namespace, chosen: Sequence[Case]) -> int:
    """Test a server."""
    target = parse_uri(options.uri, tls_files_of(options))
    if target.tls:
        target.tls_files.context()  # what is wrong with the files is no fault of the server's
    expected = read_expected(options.expect) if options.expect else None
    settings = Settings(
        timeout_s=options.timeout,
        slow_timeout_s=max(options.timeout, options.slow_timeout),
        unreadable=options.unreadable,
    )
    try:
        facts = find_facts(target, settings)
    except (Violation, Skip) as problem:
        raise BadTarget(f"{target.uri} cannot be tested: {problem}") from None
    if not options.json:
        print(describe(target, facts), end="\n\n")
    if not options.destructive:
        chosen = [case for case in chosen if not case.writes]
    results = collect(run_cases(chosen, target, settings, facts), quiet=options.json)
    found = [] if expected is None else surprises(results, expected)
    if options.json:
        print(as_json(target, facts, results))
    else:
        print("\n".join(["", summary(results), *found]))
        if not options.destructive:
            print("Cases that write were left out: --destructive runs them, too.")
    if expected is not None:
        return FAILED if found else OK
    return FAILED if any(result.outcome is Outcome.FAIL for result in results) else OK


def collect(running: Iterator[Result], *, quiet: bool) -> list[Result]:
    """Let the cases run, and show each as it ends."""
    results = []
    try:
        for result in running:
            results.append(result)
            if not quiet:
                print(line(result), flush=True)
    except Unreachable as gone:
        print(f"conformance: {gone}", file=sys.stderr)
    return results


def choose(only: Sequence[str] | None, *, slow: bool) -> list[Case]:
    """Find the cases that a person names, by id or by phase."""
    if not only:
        return [case for case in all_cases() if slow or not case.slow]
    known = {case.id for case in all_cases()} | set(PHASES)
    if unknown := [name for name in only if name not in known]:
        raise BadTarget(f"there is no case or phase {unknown[0]!r}: see --list")
    return [case for case in all_cases() if case.id in only or case.phase in only]


def byte_range(text: str) -> tuple[int, int]:
    """Parse ``OFFSET:LENGTH``."""
    offset, _, length = text.partition(":")
    return int(offset, 0), int(length, 0)


def tls_files_of(options: argparse.Namespace) -> TlsFiles:
    return TlsFiles(
        options.tls_ca,
        options.tls_cert,
        options.tls_key,
        options.tls_hostname,
        not options.tls_insecure,
    )


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance",
        description="Test whether an NBD server keeps to the protocol.",
        epilog="Exit status: 0 all well, 1 a case failed (or, with --expect, came out otherwise), "
        "2 the server cannot be tested, or the command line makes no sense.",
    )
    add = parser.add_argument
    add("uri", nargs="?", help="nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH, nbds://")
    parser.set_defaults(destructive=False)
    writing = parser.add_mutually_exclusive_group()
    writing.add_argument(
        "--read-only",
        action="store_false",
        dest="destructive",
        help="send no command that could change the export (the default)",
    )
    writing.add_argument(
        "--destructive",
        action="store_true",
        help="run the cases that write, too: THE EXPORT'S CONTENT IS LOST",
    )
    add("--only", nargs="+", metavar="CASE", help="run these cases or phases; see --list")
    add("--list", action="store_true", help="print the table of cases and stop")
    add("--json", action="store_true", help="print the results as JSON")
    add("--expect", type=Path, metavar="FILE", help="outcomes that are known; others fail the run")
    add("--timeout", type=float, default=10.0, metavar="S", help="for each case (%(default)g s)")
    add("--slow", action="store_true", help="run cases that wait for the server's own deadlines")
    add("--slow-timeout", type=float, default=60.0, metavar="S", help="for those (%(default)g s)")
    add(
        "--unreadable",
        type=byte_range,
        metavar="OFFSET:LENGTH",
        help="a range that the server fails to read, with EIO",
    )
    add("--tls-ca", type=Path, metavar="FILE", help="PEM file that the server's CA is in")
    add("--tls-cert", type=Path, metavar="FILE", help="PEM file with a client's certificate")
    add("--tls-key", type=Path, metavar="FILE", help="PEM file with its private key")
    add("--tls-hostname", metavar="NAME", help="what the server's certificate calls it")
    add("--tls-insecure", action="store_true", help="take any certificate")
    return parser


if __name__ == "__main__":
    sys.exit(main())
