"""Requests as they come over the socket, and the values in them."""

from __future__ import annotations

import dataclasses

import pytest

from nbdstore.agent.requests import (
    AttachRequest,
    MountRequest,
    from_json,
    parse_mode,
    parse_owner,
)
from nbdstore.errors import InvalidArgument


def test_requests_travel() -> None:
    request = MountRequest(volume="db", path="/srv", owner="1:2", size=5, read_only=True)
    assert from_json(MountRequest, dataclasses.asdict(request)) == request


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "has volume"),
        ({"volume": "db", "colour": "red"}, "has volume"),
        ({"volume": 5}, "volume is 5: it must be str"),
        ({"volume": "db", "force": "yes"}, "force is 'yes': it must be bool"),
        ({}, "without volume"),
    ],
)
def test_nonsense_is_refused(value: object, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason):
        from_json(AttachRequest, value)


@pytest.mark.parametrize(
    "changes",
    [
        {"filesystem": "ntfs"},
        {"fsck": "sometimes"},
        {"propagation": "lively"},
        {"owner": "root"},
        {"owner": "1"},
        {"mode": "rwx"},
        {"mode": "77777"},
        {"path": "srv"},
    ],
)
def test_values_that_make_no_sense(changes: dict[str, str]) -> None:
    request = dataclasses.replace(MountRequest(volume="db", path="/srv"), **changes)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument):
        request.checked()


def test_owners_and_modes() -> None:
    assert parse_owner("999:5") == (999, 5)
    assert parse_mode("2775") == 0o2775
    assert parse_owner("") is None
    assert parse_mode("") is None
