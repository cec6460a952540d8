"""Requests: JSON bodies and queries whose members are known, of the right type, and not too many.

A mistake in a request is the sender's to see: what is unknown is refused, not ignored, so that a
misspelt member never silently changes nothing. The shapes are also what the OpenAPI document says
of requests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nbdstore.errors import InvalidArgument
from nbdstore.sizes import MAX_SIZE

MAX_BODY = 64 << 10
"""Bytes: far above the largest sensible request (a long allow list)."""

MAX_NUMBER = MAX_SIZE
"""No member means more, and there are whole numbers that no float can be."""

Shape = Mapping[str, str]
"""Member -> its kind, one of KINDS; an optional member's kind ends in ``?``."""


@dataclass(frozen=True)
class Kind:
    """A type of member: for people, for the OpenAPI document, and as a test.

    from_text: reads it from a query, where everything is text; ValueError if it cannot be.
    """

    words: str
    schema: Mapping[str, Any]
    fits: Callable[[object], bool]
    from_text: Callable[[str], object] | None = None


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_NUMBER


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()):  # int() takes more than that
        raise ValueError(text)
    return int(text)


def _flag(text: str) -> bool:
    return {"1": True, "true": True, "0": False, "false": False}[text]


def _is_seconds(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_NUMBER
    )


_BOUNDS = {"minimum": 0, "maximum": MAX_NUMBER}
KINDS: dict[str, Kind] = {
    "text": Kind("a string", {"type": "string"}, lambda value: isinstance(value, str), str),
    "bytes": Kind("a number of bytes", {"type": "integer"} | _BOUNDS, _is_number, _number),
    "number": Kind("a whole number", {"type": "integer"} | _BOUNDS, _is_number, _number),
    "seconds": Kind("a number of seconds", {"type": "number"} | _BOUNDS, _is_seconds, float),
    "flag": Kind(
        "true or false", {"type": "boolean"}, lambda value: isinstance(value, bool), _flag
    ),
    "names": Kind(
        "a list of strings",
        {"type": "array", "items": {"type": "string"}},
        lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    ),
}


def kind_of(text: str) -> Kind:
    """Return the kind that a shape names, whether it is optional or not."""
    return KINDS[text.rstrip("?")]


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
        raise InvalidArgument(f"the request body must be a JSON object, not {_type_of(value)}")
    return _checked(value, shape)


def parse_query(query: Mapping[str, str], shape: Shape) -> dict[str, Any]:
    """Read the parameters behind a path's ``?``; the last of several with one name counts.

    Raises:
        InvalidArgument: a parameter unknown, missing or of another type.
    """
    value: dict[str, object] = {}
    for name, text in query.items():
        read = kind_of(shape[name]).from_text if name in shape else None
        try:
            value[name] = read(text) if read else text
        except (ValueError, KeyError):
            value[name] = text
    return _checked(value, shape)


def _checked(value: dict[str, Any], shape: Shape) -> dict[str, Any]:
    for name in value:
        if name not in shape:
            raise InvalidArgument(f"'{name}' is not known here: give {_listing(shape)}")
    for name, kind in shape.items():
        if name not in value:
            if not kind.endswith("?"):
                raise InvalidArgument(f"'{name}' is missing: give {_listing(shape)}")
        elif not kind_of(kind).fits(value[name]):
            shown = json.dumps(value[name])[:60]
            if isinstance(value[name], int | float) and value[name] > MAX_NUMBER:
                shown = f"{shown}: at most {MAX_NUMBER}"
            raise InvalidArgument(f"'{name}' must be {kind_of(kind).words}, not {shown}")
    return value


def _type_of(value: object) -> str:
    return {list: "a list", str: "a string", type(None): "null"}.get(type(value), "a number")


def _listing(shape: Shape) -> str:
    if not shape:
        return "nothing"
    return ", ".join(
        f"{name} ({kind_of(kind).words}{', optional' if kind.endswith('?') else ''})"
        for name, kind in shape.items()
    )
