"""Request bodies: JSON objects whose members are known, of the right type, and not too many.

A mistake in a request is the sender's to see: what is unknown is refused, not ignored, so that a
misspelt member never silently changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nbdstore.errors import InvalidArgument

MAX_BODY = 64 << 10
"""Bytes: far above the largest sensible request (a long allow list)."""

Shape = Mapping[str, str]
"""Member -> its kind, one of KINDS; an optional member's kind ends in ``?``."""

KINDS: dict[str, str] = {
    "text": "a string",
    "bytes": "a number of bytes",
    "flag": "true or false",
    "names": "a list of strings",
}


def parse(body: bytes, shape: Shape) -> dict[str, Any]:
    """Read a JSON object of exactly this shape.

    Raises:
        InvalidArgument: no JSON, no object, a member unknown, missing or of another type.
    """
    try:
        value = json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"the request body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidArgument(f"the request body must be a JSON object, not {_kind_of(value)}")
    for name in value:
        if name not in shape:
            raise InvalidArgument(f"'{name}' is not known here: give {_listing(shape)}")
    for name, kind in shape.items():
        if name not in value:
            if not kind.endswith("?"):
                raise InvalidArgument(f"'{name}' is missing: give {_listing(shape)}")
        elif not _fits(value[name], kind.rstrip("?")):
            wanted = KINDS[kind.rstrip("?")]
            raise InvalidArgument(f"'{name}' must be {wanted}, not {json.dumps(value[name])[:60]}")
    return value


def _fits(value: object, kind: str) -> bool:
    match kind:
        case "text":
            return isinstance(value, str)
        case "bytes":
            return isinstance(value, int) and not isinstance(value, bool) and value >= 0
        case "flag":
            return isinstance(value, bool)
        case _:
            return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _kind_of(value: object) -> str:
    return {list: "a list", str: "a string", type(None): "null"}.get(type(value), "a number")


def _listing(shape: Shape) -> str:
    if not shape:
        return "an empty object"
    return ", ".join(
        f"{name} ({KINDS[kind.rstrip('?')]}{', optional' if kind.endswith('?') else ''})"
        for name, kind in shape.items()
    )
