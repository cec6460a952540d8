"""What can come of a case: the exceptions that cases raise, and the outcomes made of them.

nothing raised      PASS
Violation           FAIL if the case is a MUST, DIFFERS if it is a SHOULD or MAY
Broken              FAIL always: the stream is cut or makes no sense, or the server hangs
Skip                SKIPPED: the server offers nothing that the case could be about
"""

from __future__ import annotations

from enum import Enum


class Outcome(Enum):
    PASS = "pass"
    FAIL = "fail"
    DIFFERS = "differs"
    SKIPPED = "skipped"


class Violation(Exception):
    """The server does not do what the case asks."""


class Broken(Violation):
    """Going on makes no sense: whatever the case asks, this must not happen."""


class Closed(Broken):
    """The server closed the connection where it must not."""


class Hung(Broken):
    """Nothing came before the case's deadline."""


class Unreachable(Broken):
    """The server cannot be connected to."""


class Skip(Exception):
    """The case is not about this server; the text says why."""


def require(condition: object, text: str) -> None:
    """Raise Violation unless the condition holds; the text tells what was found instead."""
    if not condition:
        raise Violation(text)
