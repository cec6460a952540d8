"""One target under atheris: ``python -m tests.fuzz.guided TARGET [libFuzzer's arguments]``.

A process of its own, since libFuzzer takes the process over: it ends it by itself, and its
instrumentation would slow down everything else.
"""

from __future__ import annotations

import shlex
import sys

import atheris  # type: ignore[import-untyped]

INSTRUMENTED = ["nbdstore.protocol", "nbdstore.server"]


def main() -> None:
    """Fuzz until libFuzzer's limits, or a crash."""
    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        from tests.fuzz.targets import TARGETS
    target, *arguments = sys.argv[1:]
    # libFuzzer calls itself through a shell to merge corpora.
    again = f"{shlex.quote(sys.executable)} -m tests.fuzz.guided {target}"
    atheris.Setup([again, *arguments], TARGETS[target], internal_libfuzzer=True)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
