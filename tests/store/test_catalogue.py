"""The catalogue: what goes in comes out; names and sizes that make no sense do not go in."""

from __future__ import annotations

import json

import pytest

from nbdstore.errors import InvalidArgument
from nbdstore.store import catalogue, layout
from nbdstore.store.catalogue import Catalogue, SnapshotInfo, VolumeInfo

INFO = VolumeInfo(
    id=7,
    name="a.b-c_D9",
    size=512,
    uuid="7f0c2c7e-9d56-4b0e-9c0b-2f6f0c5f1b11",
    created=1_700_000_000,
    epoch=3,
    root=((1 << 64) - 1, 5),
    n_mapped=1,
    n_provisioned=2,
    n_own=1,
    parent=9,
    written=True,
    trashed=1_700_000_002,
    deleted=True,
    properties={"allow": ["Ä", {"x": None}]},
)


SNAPSHOT = SnapshotInfo(
    id=9,
    volume=7,
    name="nightly",
    size=512,
    uuid="b3bd1ea2-5ee1-4e5b-bd0e-7f3d2a4f5c11",
    created=1_700_000_001,
    epoch=2,
    parent=5,
    root=(3, (1 << 64) - 1),
    n_mapped=2,
    n_provisioned=1,
    n_own=1,
)


def test_volumes_and_snapshots_round_trip() -> None:
    found = Catalogue(12, [INFO, VolumeInfo(1, "x", 1 << 50, "u", 0)], [SNAPSHOT])
    assert Catalogue.decode(found.encode()) == found


def test_an_empty_catalogue_round_trips() -> None:
    assert Catalogue.decode(Catalogue().encode()) == Catalogue()


def test_fields_of_a_newer_version_are_ignored() -> None:
    found = Catalogue(1, [INFO], [SNAPSHOT])
    raw = json.loads(found.encode())
    raw["later"] = raw["volumes"][0]["later"] = raw["snapshots"][0]["later"] = 1
    assert Catalogue.decode(json.dumps(raw).encode()) == found


def test_of_an_older_version_without_snapshots_all_is_the_volumes_own() -> None:
    raw = json.loads(Catalogue(1, [INFO]).encode())
    del raw["snapshots"]
    for later in ("n_own", "parent", "written", "trashed"):
        del raw["volumes"][0][later]
    (info,) = Catalogue.decode(json.dumps(raw).encode()).volumes
    assert (info.n_own, info.parent, info.written, info.trashed) == (INFO.n_mapped, 0, False, 0)


def test_a_snapshot_without_a_uuid_is_read() -> None:
    raw = json.loads(Catalogue(1, [], [SNAPSHOT]).encode())
    del raw["snapshots"][0]["uuid"]
    (info,) = Catalogue.decode(json.dumps(raw).encode()).snapshots
    assert info.uuid == ""


@pytest.mark.parametrize("name", ["a", "0", "v1.2-3_4", "A" * 255, "a..", "9-"])
def test_good_names_are_taken(name: str) -> None:
    catalogue.check_name(name)


BAD_NAMES = ["", ".", "-a", "_a", "a b", "a/b", "a@b", "ä", "a\n", "a\0", "A" * 256, "a" * 10_000]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused_with_the_name_and_the_rule(name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        catalogue.check_name(name)
    assert repr(name[:64])[1:-1] in str(caught.value)
    assert "letters" in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("size", [512, 1024, 10 << 40, layout.MAX_VOLUME_SIZE])
def test_good_sizes_are_taken(size: int) -> None:
    catalogue.check_size(size)


@pytest.mark.parametrize("size", [0, -512, 1, 511, 513, 4097, layout.MAX_VOLUME_SIZE + 512])
def test_bad_sizes_are_refused_with_the_size(size: int) -> None:
    with pytest.raises(InvalidArgument, match=str(size)):
        catalogue.check_size(size)


def test_an_odd_size_is_refused_with_the_next_good_one() -> None:
    with pytest.raises(InvalidArgument, match="1024"):
        catalogue.check_size(700)
