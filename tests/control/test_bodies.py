"""Request bodies: what is refused, and what the sender reads about it."""

from __future__ import annotations

import json

import pytest

from nbdstore.control import bodies
from nbdstore.errors import InvalidArgument

SHAPE = {"name": "text", "size": "bytes", "allow": "names?", "force": "flag?", "wait": "seconds?"}
GOOD = {"name": "db", "size": 4096}


def test_required_and_optional_members() -> None:
    body = GOOD | {"allow": ["a"], "force": True}
    assert bodies.parse(json.dumps(GOOD).encode(), SHAPE) == GOOD
    assert bodies.parse(json.dumps(body).encode(), SHAPE) == body


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 50_000, "not JSON"),
        (b"[]", "must be a JSON object, not a list"),
        (b"null", "must be a JSON object, not null"),
        (b"", "'name' is missing: give name (a string), size (a number of bytes)"),
        (b'{"name": "db"}', "'size' is missing"),
        (b'{"name": "db", "size": 1, "sise": 2}', "'sise' is not known here"),
        (b'{"name": 7, "size": 1}', "'name' must be a string, not 7"),
        (b'{"name": "db", "size": "10G"}', "'size' must be a number of bytes, not \"10G\""),
        (b'{"name": "db", "size": -1}', "'size' must be a number of bytes, not -1"),
        (b'{"name": "db", "size": 1.5}', "'size' must be a number of bytes, not 1.5"),
        (b'{"name": "db", "size": 9223372036854775808}', "775808: at most 9223372036854775807"),
        (b'{"name": "db", "size": 1, "wait": 1e999}', "'wait' must be a number of seconds"),
        (b'{"name": "db", "size": 1, "wait": NaN}', "'wait' must be a number of seconds"),
        (b'{"name": "db", "size": 1, "wait": %d}' % 10**400, "'wait' must be a number of sec"),
        (b'{"name": "db", "size": true}', "'size' must be a number of bytes, not true"),
        (b'{"name": "db", "size": 1, "force": 1}', "'force' must be true or false, not 1"),
        (b'{"name": "db", "size": 1, "allow": "a"}', "'allow' must be a list of strings"),
        (b'{"name": "db", "size": 1, "allow": [1]}', "'allow' must be a list of strings"),
        (b'{"name": "db", "size": 1, "allow": null}', "'allow' must be a list of strings"),
    ],
)
def test_mistakes_are_named(body: bytes, message: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        bodies.parse(body, SHAPE)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
