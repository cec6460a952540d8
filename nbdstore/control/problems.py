"""Errors over HTTP: `application/problem+json` (RFC 9457) with the exception's stable code.

Both directions live here, so that what a server raises is what its client raises.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from nbdstore.errors import Bug, ControlError, Corruption, NbdstoreError

CONTENT_TYPE = "application/problem+json"


def _tree(root: type[NbdstoreError]) -> Iterator[type[NbdstoreError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


# What has no code of its own is something that only its own package tells from its parent.
CLASSES = {cls.code: cls for cls in _tree(NbdstoreError) if "code" in vars(cls)}
"""Every code there is, and what it means."""


def to_json(error: BaseException) -> dict[str, Any]:
    """Describe an error; anything not from nbdstore's tree is told as a bug without details."""
    if not isinstance(error, NbdstoreError):
        error = Bug(f"the server has a bug ({type(error).__name__}); its log says more")
    return {
        "type": "about:blank",
        "title": type(error).__name__,
        "status": error.http_status,
        "code": error.code,
        "detail": str(error),
    }


def dump(error: Exception) -> bytes:
    """Describe an error as JSON text."""
    return json.dumps(to_json(error)).encode()


def load(body: bytes, status: int | None = None) -> NbdstoreError:
    """Rebuild the exception from a problem; ControlError if `body` is none.

    A code that this version does not know becomes a plain `NbdstoreError` with the same message.
    """
    try:
        problem = json.loads(body)
        code, detail = str(problem["code"]), str(problem["detail"])
    except (ValueError, TypeError, KeyError):
        return ControlError(
            f"the server answered {status or 'an error'} with {body[:80]!r}: "
            "is this an nbdstore control address?"
        )
    cls = CLASSES.get(code, NbdstoreError)
    if issubclass(cls, Corruption):
        return _rebuilt_corruption(cls, detail)
    return cls(detail)


def _rebuilt_corruption(cls: type[Corruption], detail: str) -> Corruption:
    """Rebuild a Corruption, whose text is made of parts that do not travel apart."""
    error = cls.__new__(cls)
    Exception.__init__(error, detail)
    error.where, error.expected, error.found, error.advice = detail, "", "", ""
    return error
