"""Leases on their own: what stands with a volume, and in the name of an export."""

from __future__ import annotations

import pytest

from nbdstore import lease
from nbdstore.errors import InvalidArgument
from nbdstore.lease import Claim

SINCE = "2026-01-01T00:00:00+00:00"


def test_a_lease_is_what_its_properties_say() -> None:
    granted, properties = lease.grant({}, "node-1", SINCE)
    assert lease.current(properties) == granted
    assert (granted.holder, granted.epoch, granted.since) == ("node-1", 1, SINCE)


def test_epochs_count_on_when_a_lease_has_ended() -> None:
    _, properties = lease.grant({}, "node-1", SINCE)
    properties |= lease.ended()
    assert lease.current(properties) is None
    again, _ = lease.grant(properties, "node-1", SINCE)
    assert again.epoch == 2


def test_no_two_tokens_are_the_same() -> None:
    assert len({lease.grant({}, "node-1", SINCE)[0].token for _ in range(100)}) == 100


def test_the_export_s_name_shows_the_lease() -> None:
    granted, _ = lease.grant({}, "node-1", SINCE)
    volume, claim = lease.split_export(granted.export("db"))
    assert volume == "db"
    assert claim and granted.admits(claim)


def test_what_is_shown_must_be_the_very_lease() -> None:
    granted, properties = lease.grant({}, "node-1", SINCE)
    assert not granted.admits(Claim(granted.epoch, "0" * 32))
    assert not granted.admits(Claim(granted.epoch + 1, granted.token))
    later, _ = lease.grant(properties, "node-1", SINCE)
    assert not later.admits(Claim(granted.epoch, granted.token))


@pytest.mark.parametrize(
    "name",
    [
        *(
            "db",
            "",
            "db,",
            "db,lease=",
            "db,lease=1",
            "db,lease=-ab",
            "db,lease=1-",
            "db,lease=1-g",
        ),
        *("db,lease=x-ab", "db,lease=1-AB", f"db,lease={'1' * 19}-ab", f"db,lease=1-{'a' * 65}"),
        *("db,lease=1-ab ", "db,lease=1-ab,lease=1-ab", "db,other=1-ab", "db,lease=\u0661-ab"),
    ],
)
def test_what_is_no_claim_is_part_of_a_name(name: str) -> None:
    assert lease.split_export(name) == (name, None)


@pytest.mark.parametrize("holder", ["", "a\nb", "\x1b[31m", "x" * 256])
def test_holders_that_nobody_could_read(holder: str) -> None:
    with pytest.raises(InvalidArgument, match="cannot be the holder of a lease"):
        lease.grant({}, holder, SINCE)
