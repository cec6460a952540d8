"""Creating a volume again, as who has not heard the answer does."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbdstore.errors import AlreadyExists, InvalidArgument
from tests.control.real_pool import Served

MIB = 1 << 20
UUID = "01234567-89ab-4def-8123-456789abcdef"


def test_the_same_call_is_answered_with_the_same_volume(served: Served) -> None:
    body = {"name": "db", "size": MIB, "uuid": UUID}
    first = served.call("POST", "/v1/volumes", body)
    again = served.call("POST", "/v1/volumes", body | {"uuid": UUID.upper()})
    assert (first.status, again.status) == (201, 200)
    assert first.value == again.value
    assert first.value["uuid"] == UUID
    assert first.headers["Location"] == again.headers["Location"]
    assert len(served.client.volumes()) == 1


def test_many_at_once_make_one(served: Served) -> None:
    def create(_: int) -> str:
        return served.client.create_volume("db", MIB, uuid=UUID).uuid

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(create, range(16))) == {UUID}
    assert len(served.client.volumes()) == 1


@pytest.mark.parametrize(
    ("name", "size", "number"),
    [
        ("db", 2 * MIB, UUID),
        ("web", MIB, UUID),
        ("db", MIB, str(uuid.UUID(int=7))),
        ("db", MIB, None),
    ],
    ids=["another size", "another name", "another uuid", "no uuid"],
)
def test_what_differs_is_refused(served: Served, name: str, size: int, number: str | None) -> None:
    served.client.create_volume("db", MIB, uuid=UUID)
    with pytest.raises(AlreadyExists):
        served.client.create_volume(name, size, uuid=number)
    assert [(volume.name, volume.size) for volume in served.client.volumes()] == [("db", MIB)]


def test_a_volume_in_the_trash_keeps_its_uuid(served: Served) -> None:
    served.client.create_volume("db", MIB, uuid=UUID)
    served.client.delete_volume("db")
    with pytest.raises(AlreadyExists, match="take a new one"):
        served.client.create_volume("db", MIB, uuid=UUID)


@pytest.mark.parametrize("number", ["", "db", UUID[:-1], UUID + "0"])
def test_what_is_no_uuid(served: Served, number: str) -> None:
    with pytest.raises(InvalidArgument, match="is no uuid"):
        served.client.create_volume("db", MIB, uuid=number)
