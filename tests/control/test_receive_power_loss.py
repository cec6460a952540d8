"""Receiving, and the power fails: at any moment there is the whole of a snapshot, or none of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from nbdstore.errors import AlreadyExists
from nbdstore.store import Pool
from tests.control.backup_pools import BLOCK, Site
from tests.store.crashes import KILLED, LAZY, Crash
from tests.store.scene import Scene

SIZE = 64 * BLOCK


class Sender:
    """A pool with two snapshots, and their streams."""

    def __init__(self) -> None:
        self.streams: dict[str, bytes] = {}
        self.contents: dict[str, bytes] = {}
        self.uuids: dict[str, str] = {}

        async def act(pool: Pool) -> None:
            here = Site(pool)
            volume = await pool.create_volume("db", SIZE)
            await volume.write(0, b"1" * 9 * BLOCK)
            await volume.write(30 * BLOCK, b"2" * 9 * BLOCK)
            await here.snapshot("db@a")
            await volume.write(2 * BLOCK, b"3" * BLOCK)
            await volume.trim(32 * BLOCK, 3 * BLOCK)
            await pool.resize_volume(volume, SIZE + 5 * BLOCK)
            await volume.write(SIZE, b"4" * 512)
            await here.snapshot("db@b")
            for name, since in (("db@a", None), ("db@b", "db@a")):
                self.streams[name] = await here.stream(name, since)
                self.contents[name] = await here.content(name)
                self.uuids[name] = here.uuid(name)

        Scene().play(act)

    async def look(self, there: Site) -> None:
        """Whatever can be attached is one of the snapshots, and whole."""
        for name in there.visible():
            found = await there.content(name)
            if "@" in name:
                assert found == self.contents[name]
                assert there.uuid(name) == self.uuids[name]
            else:
                assert found in self.contents.values()
        if there.pool.volumes:
            info = there.operations.volume("db")
            assert info.importing == (info.receiving is not None)

    async def send_again(self, there: Site) -> None:
        """Bring what is missing, the streams from their beginnings."""
        for name, stream in self.streams.items():
            if name == "db@a" and "db@a" in there.pool.snapshots:
                continue  # it is there, and db@b may be half received over it
            try:
                await there.receive("db", stream)
            except AlreadyExists:
                assert name in there.pool.snapshots
        assert there.visible() == ["db", "db@a", "db@b"]
        await self.look(there)
        assert await there.content("db") == self.contents["db@b"]


@pytest.fixture(scope="module")
def sender() -> Sender:
    return Sender()


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Note after each part how far it is."""
    monkeypatch.setattr("nbdstore.control.receiving._SAVE_BYTES", 1)


Act = Callable[[Site], Coroutine[Any, Any, None]]


def play(scene: Scene, act: Act) -> None:
    async def on_site(pool: Pool) -> None:
        await act(Site(pool))

    scene.play(on_site)


@pytest.mark.parametrize("seed", range(3))
def test_at_any_moment(sender: Sender, seed: int) -> None:
    source = random.Random(seed)

    async def receive(there: Site) -> None:
        for stream in sender.streams.values():
            await there.receive("db", stream, n_bytes=source.choice([100, 5000, 70_000]))

    async def go_on(there: Site) -> None:
        await sender.look(there)
        await sender.send_again(there)

    scene = Scene()
    play(scene, receive)
    n_events = len(scene.disk.events)
    for at in source.sample(range(n_events + 1), 40):
        crash = source.choice([KILLED, LAZY, Crash.random(source)])
        after = Scene()
        after.begin_again(scene.crashed(crash, at=at))
        play(after, go_on)
        after.begin_again()
        play(after, sender.look)
        after.assert_clean()


@pytest.mark.parametrize("goes_on", [True, False])
def test_while_it_is_given_up(sender: Sender, goes_on: bool) -> None:
    """What the crash leaves can be given up again, or gone on with where it says."""

    async def give_up(there: Site) -> None:
        await there.receive("db", sender.streams["db@a"])
        with pytest.raises(Exception, match="cut off"):
            await there.receive("db", sender.streams["db@b"][:-1])
        there.pool._core.disk.mark("begin")  # type: ignore[attr-defined]
        await there.backups.receiving.abort("db")

    async def look(there: Site) -> None:
        if goes_on and there.token("db"):
            await there.receive("db", sender.streams["db@b"])  # what is there already is left out
            assert await there.content("db@b") == sender.contents["db@b"]
            return
        if there.token("db"):
            await there.backups.receiving.abort("db")
        assert there.visible() == ["db", "db@a"]
        assert await there.content("db") == sender.contents["db@a"]
        await sender.send_again(there)

    scene = Scene()
    play(scene, give_up)
    begin = next(n for n, e in enumerate(scene.disk.events) if getattr(e, "what", "") == "begin")
    for at in range(begin, len(scene.disk.events) + 1):
        for crash in (KILLED, LAZY):
            after = Scene()
            after.begin_again(scene.crashed(crash, at=at))
            play(after, look)
            after.assert_clean()
