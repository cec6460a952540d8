"""The administrator notices what a killed server lost, made up, or did by half."""

from __future__ import annotations

import random
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nbdstore.control.client import ControlClient
from nbdstore.control.model import VolumeInfo
from nbdstore.control.service import Content
from nbdstore.control.stream import Piece
from tests.kills.administrator import Administrator, is_snapshot
from tests.load.model import Violation
from tests.load.stamps import Garbage


class Volumes:
    """A control API of nothing but names, sizes and contents, until it is killed."""

    def __init__(self) -> None:
        self.contents: dict[str, bytearray] = {}
        self.importing: set[str] = set()
        self.is_dead = False

    def _live(self) -> None:
        if self.is_dead:
            raise ConnectionResetError("killed")

    def volumes(self) -> list[VolumeInfo]:
        unset = {"id": 1, "uuid": "", "block_size": 4096, "mapped": 0, "reserved": 0, "epoch": 1}
        return [
            VolumeInfo(
                name=name,
                size=len(content),
                created="",
                importing=name in self.importing,
                **cast("dict[str, Any]", unset),
            )
            for name, content in self.contents.items()
            if not is_snapshot(name)
        ]

    def snapshots(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(snapshot=name, volume=name.partition("@")[0], size=len(content))
            for name, content in self.contents.items()
            if is_snapshot(name)
        ]

    def create_snapshots(self, names: Iterable[str]) -> None:
        for name in names:
            self.contents[name] = bytearray(self.contents[name.partition("@")[0]])

    def delete_snapshot(self, name: str) -> None:
        del self.contents[name]

    def clone(self, name: str, new_name: str) -> None:
        self.contents[new_name] = bytearray(self.contents[name])

    def rollback(self, name: str) -> None:
        self.contents[name.partition("@")[0]] = bytearray(self.contents[name])

    def create_volume(self, name: str, size: int) -> None:
        self._live()
        self.contents[name] = bytearray(size)

    def write_content(self, name: str, size: int, pieces: Iterable[Piece]) -> None:
        self.create_volume(name, size)
        for piece in pieces:
            self.contents[name][piece.offset : piece.offset + len(piece.data)] = piece.data

    def update_volume(
        self, name: str, *, size: int | None = None, new_name: str | None = None
    ) -> None:
        self._live()
        content = self.contents.pop(name)
        content.extend(bytes(max(0, (size or 0) - len(content))))
        self.contents[new_name or name] = content
        for snapshot in self._snapshots_of(name):
            held = self.contents.pop(snapshot)
            self.contents[(new_name or name) + snapshot.removeprefix(name)] = held

    def _snapshots_of(self, name: str) -> list[str]:
        return [found for found in self.contents if found.startswith(f"{name}@")]

    def delete_volume(self, name: str, *, snapshots: bool = False) -> None:
        for gone in [name, *self._snapshots_of(name)]:
            del self.contents[gone]

    def read_content(self, name: str) -> Content:
        content = self.contents[name]
        return Content(len(content), iter([Piece(0, bytes(content))]))


@pytest.fixture
def volumes() -> Volumes:
    return Volumes()


@pytest.fixture
async def administrator(volumes: Volumes) -> Administrator:
    """Somebody who has made some volumes."""
    administrator = Administrator(cast("ControlClient", volumes), random.Random(1))
    for _ in range(40):
        administrator._do_something()
    administrator.recovered()
    assert any(any(content) for content in volumes.contents.values()), "nothing was imported"
    return administrator


def imported(volumes: Volumes) -> bytearray:
    found = volumes.contents.items()
    return next(content for name, content in found if any(content) and not is_snapshot(name))


async def test_a_volume_that_is_lost_is_noticed(
    administrator: Administrator, volumes: Volumes
) -> None:
    volumes.contents.popitem()
    with pytest.raises(Violation, match="allowed"):
        administrator.recovered()


async def test_a_volume_that_nobody_made_is_noticed(
    administrator: Administrator, volumes: Volumes
) -> None:
    volumes.contents["extra-1"] = bytearray(512)
    with pytest.raises(Violation, match="allowed"):
        administrator.recovered()


async def test_a_size_of_the_past_is_noticed(
    administrator: Administrator, volumes: Volumes
) -> None:
    del imported(volumes)[-512:]
    with pytest.raises(Violation, match="allowed"):
        administrator.recovered()


async def test_content_that_is_not_what_was_imported_is_noticed(
    administrator: Administrator, volumes: Volumes
) -> None:
    content = imported(volumes)
    content[:512] = bytes(512)
    with pytest.raises(Violation, match="not the content"):
        administrator.recovered()
    content[:512] = b"x" * 512
    with pytest.raises(Garbage):
        administrator.recovered()


async def test_a_call_that_was_on_its_way_may_be_done_or_not(
    administrator: Administrator, volumes: Volumes
) -> None:
    volumes.is_dead = True
    with pytest.raises(ConnectionResetError):
        administrator._create()
    volumes.is_dead = False
    administrator.recovered()
    administrator._create()
    administrator.recovered()
    administrator.recovered()


@pytest.mark.parametrize("is_marked", [True, False])
async def test_an_import_that_was_cut_off_must_say_so(
    administrator: Administrator, volumes: Volumes, is_marked: bool
) -> None:
    administrator._import()
    name, content = next(reversed(volumes.contents.items()))
    content[:512] = bytes(512)
    if is_marked:
        volumes.importing.add(name)
        administrator.recovered()
        assert name not in volumes.contents, "it is of no use any more"
    else:
        with pytest.raises(Violation, match="not the content"):
            administrator.recovered()


async def test_a_snapshot_that_is_lost_or_that_nobody_made_is_noticed(
    administrator: Administrator, volumes: Volumes
) -> None:
    administrator._snapshot()
    administrator.recovered()
    name = next(found for found in reversed(volumes.contents) if is_snapshot(found))
    content = volumes.contents.pop(name)
    with pytest.raises(Violation, match="allowed"):
        administrator.recovered()
    volumes.contents[name] = content
    volumes.contents[f"{name}0"] = content
    with pytest.raises(Violation, match="allowed"):
        administrator.recovered()
