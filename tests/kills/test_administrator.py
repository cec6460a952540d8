"""The administrator notices what a killed server lost, made up, or did by half."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest

from nbdstore.control.client import ControlClient
from nbdstore.control.model import VolumeInfo
from nbdstore.control.service import Content
from nbdstore.control.stream import Piece
from nbdstore.errors import Busy, NoSpace
from tests.kills.administrator import Administrator, Call, is_snapshot
from tests.load.model import Violation
from tests.load.stamps import Garbage


class Volumes:
    """A control API of nothing but names, sizes and contents, until it is killed."""

    def __init__(self) -> None:
        self.contents: dict[str, bytearray] = {}
        self.importing: set[str] = set()
        self.is_dead = False
        self.leased: dict[str, tuple[str, int]] = {}
        self.n_leases: Counter[str] = Counter()
        self.trashed: dict[str, dict[str, bytearray]] = {}
        self.n_damaged = 0
        self.limits: Counter[str] = Counter()

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
                iops=self.limits[name],
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
        self._require_unleased(name.partition("@")[0])
        self.contents[name.partition("@")[0]] = bytearray(self.contents[name])

    def start_flatten(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(is_running=False, error=None)

    def start_scrub(self, *, rate: int) -> SimpleNamespace:
        result = {"damaged": self.n_damaged}
        return SimpleNamespace(is_running=False, error=None, state="done", result=result)

    def acquire_lease(self, name: str, holder: str, *, force: bool = False) -> SimpleNamespace:
        held, epoch = self.leased.get(name, (None, 0))
        if held != holder:
            self.n_leases[name] += 1
            epoch = self.n_leases[name]
            self.leased[name] = holder, epoch
        return SimpleNamespace(volume=name, holder=holder, epoch=epoch, export=f"{name},{epoch}")

    def break_lease(self, name: str) -> None:
        self.leased.pop(name, None)

    def leases(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(volume=name, holder=holder, epoch=epoch)
            for name, (holder, epoch) in self.leased.items()
        ]

    def trash(self) -> list[SimpleNamespace]:
        found = self.trashed.items()
        return [SimpleNamespace(name=name, size=len(held[name])) for name, held in found]

    def restore(self, which: str, name: str) -> None:
        for found, content in self.trashed.pop(which).items():
            self.contents[name + found.removeprefix(which)] = content
        self.n_leases[name] = self.n_leases.pop(which, 0)
        self.limits[name] = self.limits.pop(which, 0)

    def purge(self, which: str) -> None:
        del self.trashed[which]

    def _require_unleased(self, name: str) -> None:
        if name in self.leased:
            raise Busy("it is leased")

    def create_volume(self, name: str, size: int) -> None:
        self._live()
        self.contents[name] = bytearray(size)

    def write_content(self, name: str, size: int, pieces: Iterable[Piece]) -> None:
        self.create_volume(name, size)
        for piece in pieces:
            self.contents[name][piece.offset : piece.offset + len(piece.data)] = piece.data

    def update_volume(
        self,
        name: str,
        *,
        size: int | None = None,
        new_name: str | None = None,
        iops: int | None = None,
        shrink: bool = False,
        force: bool = False,
    ) -> None:
        self._live()
        assert force == shrink
        if shrink:
            self._require_unleased(name)
            del self.contents[name][size:]
        if iops is not None:
            self.limits[name] = iops
        if new_name is not None:
            self._require_unleased(name)
            self.n_leases[new_name] = self.n_leases.pop(name, 0)
            self.limits[new_name] = self.limits.pop(name, 0)
        content = self.contents.pop(name)
        content.extend(bytes(max(0, (size or 0) - len(content))))
        self.contents[new_name or name] = content
        for snapshot in self._snapshots_of(name):
            held = self.contents.pop(snapshot)
            self.contents[(new_name or name) + snapshot.removeprefix(name)] = held

    def _snapshots_of(self, name: str) -> list[str]:
        return [found for found in self.contents if found.startswith(f"{name}@")]

    def delete_volume(self, name: str, *, snapshots: bool = False, now: bool = False) -> None:
        self._require_unleased(name)
        names = [name, *self._snapshots_of(name)]
        held = {gone: self.contents.pop(gone) for gone in names}
        if not now:
            self.trashed[name] = held

    def read_content(self, name: str) -> Content:
        content = self.contents[name]
        return Content(len(content), iter([Piece(0, bytes(content))]))


@pytest.fixture
def volumes() -> Volumes:
    return Volumes()


@pytest.fixture
async def administrator(volumes: Volumes) -> Administrator:
    """Somebody who has made some volumes."""
    control = cast("ControlClient", volumes)
    administrator = Administrator(control, random.Random(4), keeps_trash=True)
    for _ in range(80):
        with contextlib.suppress(Busy):
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


async def test_what_the_trash_has_lost_is_noticed(
    administrator: Administrator, volumes: Volumes
) -> None:
    administrator._create()
    name = next(reversed(volumes.contents))
    administrator._on_its_way = None
    volumes.trashed["extra-1"] = {"extra-1": volumes.contents[name]}
    with pytest.raises(Violation, match="allowed"):
        administrator.recovered()
    volumes.trashed.popitem()
    assert volumes.trashed, "nothing was deleted"
    volumes.trashed.popitem()
    with pytest.raises(Violation, match="allowed"):
        administrator.recovered()


async def test_a_lease_that_is_lost_or_is_another_one_is_noticed(
    administrator: Administrator, volumes: Volumes
) -> None:
    administrator.recovered()
    assert volumes.leased, "nothing is leased"
    name, (holder, epoch) = next(iter(volumes.leased.items()))
    for wrong in ((holder, epoch + 1), ("node-3", epoch)):
        volumes.leased[name] = wrong
        with pytest.raises(Violation, match="allowed"):
            administrator.recovered()
    del volumes.leased[name]
    with pytest.raises(Violation, match="allowed"):
        administrator.recovered()


async def test_damage_that_a_scrub_finds_is_noticed(
    administrator: Administrator, volumes: Volumes
) -> None:
    volumes.n_damaged = 1
    with pytest.raises(Violation, match="scrub"):
        administrator.recovered()


async def test_a_limit_that_is_lost_is_noticed(
    administrator: Administrator, volumes: Volumes
) -> None:
    name = next(found for found in volumes.contents if volumes.limits[found])
    volumes.limits[name] -= 1
    with pytest.raises(Violation, match="allowed"):
        administrator.recovered()


@pytest.mark.parametrize("n_bytes_more", [0, 512])
async def test_a_shrink_that_was_cut_off_has_taken_no_more_than_its_end(
    administrator: Administrator, volumes: Volumes, n_bytes_more: int
) -> None:
    administrator._import()
    administrator.recovered()
    name, content = next(reversed(volumes.contents.items()))
    size = len(content) // 8
    administrator._on_its_way = Call(
        {name: replace(administrator._volumes[name].cut(size), size=size)}, shrinks=(name, size)
    )
    content[size - n_bytes_more :] = bytes(len(content) - size + n_bytes_more)
    if n_bytes_more:
        with pytest.raises(Violation, match="not the content"):
            administrator.recovered()
    else:
        administrator.recovered()
        administrator.recovered()


@pytest.mark.parametrize("is_cut", [True, False])
async def test_a_shrink_that_is_refused_may_have_taken_the_end(
    administrator: Administrator, volumes: Volumes, is_cut: bool
) -> None:
    administrator._import()
    administrator.recovered()
    name, content = next(reversed(volumes.contents.items()))

    def refuse(_name: str, *, size: int, **_how: bool) -> None:
        if is_cut:
            content[size:] = bytes(len(content) - size)
        volumes.is_dead = True  # the next call finds nobody
        raise NoSpace("there is none for a checkpoint")

    chosen = name, replace(administrator._volumes[name], size=len(content) // 4)
    kinds = [[administrator._shrink], [administrator._create]]
    with (
        mock.patch.object(volumes, "update_volume", refuse),
        mock.patch.object(administrator, "_any", lambda: chosen),
        mock.patch.object(administrator, "_kinds", side_effect=kinds),
        mock.patch("tests.kills.administrator.REFUSED_PAUSE_S", 0),
    ):
        await administrator.run()
    administrator.recovered()
    assert any(content[len(content) // 8 :]) != is_cut
