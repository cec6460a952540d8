"""Receiving: what breaks off goes on or is given up; what does not fit is refused, and harmless."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nbdstore.control.stream import Piece
from nbdstore.errors import (
    AlreadyExists,
    BadStream,
    Busy,
    Cancelled,
    NbdstoreError,
    NoSpace,
    NotFound,
    WrongBase,
)
from tests.control.backup_pools import (
    BLOCK,
    Site,
    flipped,
    frame_ends,
    half_received,
    site,
    two_snapshots,
)
from tests.control.memory_pool import MemoryConnection, MemoryServer
from tests.store.pools import MIB, assert_clean, killed, make_pool

# -- what breaks off ----------------------------------------------------------------------------


async def received_bit_by_bit(here: Site, there: Site, name: str, stream: bytes) -> int:
    """Receive what a stream has up to the end of each frame, going on each time with a token."""
    n_resumed = 0
    while True:
        ends = [*frame_ends(stream)]
        if len(ends) == 2:
            await there.receive(name, stream)
            return n_resumed
        with pytest.raises(BadStream, match="cut off"):
            await there.receive(name, stream[: ends[1] + 5])
        token = there.token(name)
        assert token
        assert there.operations.volume(name).importing
        stream = await here.resumed(token)
        n_resumed += 1


async def test_a_transfer_goes_on_after_each_interruption(here: Site, there: Site) -> None:
    await two_snapshots(here)
    assert await received_bit_by_bit(here, there, "db", await here.stream("db@a")) == 2
    assert await received_bit_by_bit(here, there, "db", await here.stream("db@b", "db@a")) == 3
    for name in ("db@a", "db@b"):
        assert await there.content(name) == await here.content(name)
        assert there.uuid(name) == here.uuid(name)
    assert "db" in there.visible()


async def test_the_same_stream_again_goes_on_too(here: Site, there: Site) -> None:
    """As from a file, whose sender may be gone."""
    await two_snapshots(here)
    for name, since in (("db@a", None), ("db@b", "db@a")):
        stream = await here.stream(name, since)
        for end in [*frame_ends(stream)][:-1]:
            if end == next(frame_ends(stream)):
                continue
            with pytest.raises(BadStream):
                await there.receive("db", stream[:end])
        await there.receive("db", stream)
        assert await there.content(name) == await here.content(name)


async def test_a_resumed_stream_has_only_the_rest(here: Site, there: Site) -> None:
    await two_snapshots(here)
    whole = await here.stream("db@a")
    with pytest.raises(BadStream):
        await there.receive("db", whole[: [*frame_ends(whole)][1]])
    token = there.token("db")
    assert token
    rest = await here.resumed(token)
    assert len(rest) < len(whole) - MIB // 2
    info = await there.receive("db", rest)
    assert info.resumed_at == MIB


@pytest.mark.parametrize("since", [None, "db@a"])
async def test_no_damaged_stream_leaves_anything_to_be_seen(
    here: Site, there: Site, since: str | None
) -> None:
    await two_snapshots(here)
    if since:
        await there.receive("db", await here.stream(since))
    name = "db@b"
    stream = await here.stream(name, since)
    before = there.visible()
    places = {at + d for end in [0, *frame_ends(stream)] for at in (end, end - 9) for d in (0, 5)}
    for at in sorted(places | {*range(0, len(stream), 40_009)}):
        if 0 <= at < len(stream):
            with pytest.raises(BadStream):
                await there.receive("db", flipped(stream, at))
            assert name not in there.pool.snapshots
            # What was there before can be attached until the first change came.
            assert there.visible() in ([], before)
    await there.receive("db", stream)
    assert await there.content(name) == await here.content(name)


async def killed_while_receiving(there: Site, stream: bytes, source: Path, to: Path) -> Path:
    """Copy what a kill leaves when two parts of a stream have come."""
    come, gate = asyncio.Event(), asyncio.Event()

    async def stalled() -> AsyncIterator[bytes]:
        yield stream[: [*frame_ends(stream)][2]]
        come.set()
        await gate.wait()
        yield b"the end of the test"

    task = asyncio.ensure_future(there.backups.receiving.receive("db", stalled()))
    await come.wait()
    dead = killed(source, to)
    gate.set()
    with pytest.raises(BadStream):
        await task
    return dead


async def test_what_was_killed_while_it_received_goes_on(
    here: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdstore.control.receiving._SAVE_BYTES", 1)
    await two_snapshots(here)
    for name, since in (("db@a", None), ("db@b", "db@a")):
        stream = await here.stream(name, since)
        source = tmp_path / f"there{name}"
        async with site(source) as there:
            if since:
                await there.receive("db", await here.stream(since))
            dead = await killed_while_receiving(there, stream, source, tmp_path / "dead")
        async with site(dead) as there:
            token = there.token("db")
            assert token
            assert there.visible() == []
            info = await there.receive("db", await here.resumed(token))
            assert info.resumed_at > 0
            assert await there.content(name) == await here.content(name)
        await assert_clean(dead)


async def test_a_crash_between_the_snapshot_and_the_end_is_mended(
    here: Site, there: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    await two_snapshots(here)
    await there.receive("db", await here.stream("db@a"))
    stream = await here.stream("db@b", "db@a")

    async def crash(*_: object) -> None:
        raise NbdstoreError("the lights went out")

    with monkeypatch.context() as patched:
        patched.setattr("nbdstore.control.receiving._unmark", crash)
        with pytest.raises(NbdstoreError, match="lights"):
            await there.receive("db", stream)
    assert there.visible() == []
    await there.receive("db", stream)
    assert there.visible() == ["db", "db@a", "db@b"]
    assert await there.content("db@b") == await here.content("db@b")


async def test_a_crash_between_the_snapshot_and_the_end_is_mended_by_the_next_start(
    here: Site, tmp_path: Path
) -> None:
    await two_snapshots(here)
    source, whole, half = tmp_path / "there", tmp_path / "whole", tmp_path / "half"
    async with site(source) as there:
        create = there.pool.create_snapshots

        async def create_and_crash(*what: Any, **how: Any) -> Any:
            made = await create(*what, **how)
            killed(source, whole)
            return made

        with mock.patch.object(there.pool, "create_snapshots", create_and_crash):
            await there.receive("db", await here.stream("db@a"))
        with pytest.raises(BadStream):
            await there.receive("web", (await here.stream("db@a"))[:-1])
        killed(source, half)
    async with site(whole) as there:
        assert there.visible() == []
        await there.operations.begin()
        assert there.visible() == ["db", "db@a"]
        assert await there.content("db") == await here.content("db@a")
        await there.receive("db", await here.stream("db@b", "db@a"))
    async with site(half) as there:
        await there.operations.begin()
        assert there.visible() == ["db", "db@a"]
        assert there.token("web")


async def test_of_a_stream_whose_first_frame_is_bad_nothing_is_kept(
    here: Site, there: Site
) -> None:
    await two_snapshots(here)
    for name, since in (("db@a", None), ("db@b", "db@a")):
        stream = await here.stream(name, since)
        for stop in (0, 10, 100, next(frame_ends(stream)), next(frame_ends(stream)) + 30):
            with pytest.raises(BadStream):
                await there.receive("db", stream[:stop])
            assert there.token("db") is None
        await there.receive("db", stream)


async def test_a_full_pool_keeps_what_fits_and_goes_on_when_it_has_grown(
    here: Site, tmp_path: Path
) -> None:
    volume = await here.pool.create_volume("db", 40 * MIB)
    await volume.write(0, b"full" * (8 * MIB))
    await here.snapshot("db@a")
    make_pool(tmp_path / "small", 24 * MIB)
    async with site(tmp_path / "small") as there:
        there.pool._core.options = type(there.pool._core.options)(on_full="error")
        stream = await here.stream("db@a")
        with pytest.raises(NoSpace):
            await there.receive("db", stream)
        token = there.token("db")
        assert token
        await there.pool.grow(64 * MIB)
        info = await there.receive("db", await here.resumed(token))
        assert info.resumed_at > MIB
        assert await there.content("db@a") == await here.content("db@a")


# -- giving up ----------------------------------------------------------------------------------


async def test_giving_up_changes_leaves_the_base(here: Site, there: Site) -> None:
    await half_received(here, there)
    await there.backups.receiving.abort("db")
    assert there.visible() == ["db", "db@a"]
    assert await there.content("db") == await here.content("db@a")
    await there.receive("db", await here.stream("db@b", "db@a"))
    assert await there.content("db") == await here.content("db@b")


async def test_giving_up_a_resized_volume_gives_it_its_size_back(here: Site, there: Site) -> None:
    await two_snapshots(here)
    await there.receive("db", await here.stream("db@a"))
    for size in (MIB, 9 * MIB):
        await here.pool.resize_volume(here.pool.volumes["db"], size, force=True)
        await here.pool.volumes["db"].write(0, b"7" * MIB)
        await here.snapshot(f"db@{size}")
        stream = await here.stream(f"db@{size}", "db@a")
        with pytest.raises(BadStream):
            await there.receive("db", stream[:-1])
        await there.backups.receiving.abort("db")
        assert await there.content("db") == await here.content("db@a")


async def test_giving_up_a_new_volume_leaves_nothing(here: Site, there: Site) -> None:
    await two_snapshots(here)
    stream = await here.stream("db@a")
    with pytest.raises(BadStream):
        await there.receive("db", stream[:-1])
    await there.backups.receiving.abort("db")
    assert there.operations.volumes() == []
    with pytest.raises(NotFound):
        await there.backups.receiving.abort("db")


async def test_only_what_is_half_received_can_be_given_up(here: Site) -> None:
    await two_snapshots(here)
    with pytest.raises(NotFound, match="not half received"):
        await here.backups.receiving.abort("db")
    with pytest.raises(NotFound, match="not half received"):
        here.backups.receiving.show("db")


# -- what does not fit --------------------------------------------------------------------------


async def test_another_base_is_refused(here: Site, there: Site) -> None:
    await two_snapshots(here)
    stream = await here.stream("db@b", "db@a")
    with pytest.raises(WrongBase, match=r"no volume 'db'.*builds on db@a"):
        await there.receive("db", stream)
    await there.pool.create_volume("db", 3 * MIB)
    await there.snapshot("db@a")  # of the same name, and yet not the same
    with pytest.raises(WrongBase, match="does not have"):
        await there.receive("db", stream)
    assert there.visible() == ["db", "db@a"]


@pytest.mark.parametrize("change", ["write", "trim", "grow", "shrink"])
async def test_a_volume_that_has_changed_since_is_refused(
    here: Site, there: Site, change: str
) -> None:
    await two_snapshots(here)
    await there.receive("db", await here.stream("db@a"))
    volume = there.pool.volumes["db"]
    if change == "write":
        await volume.write(2 * MIB + MIB // 2, b"y" * 512)
    elif change == "trim":
        await volume.trim(0, BLOCK)
    else:
        size = 3 * MIB + (BLOCK if change == "grow" else -BLOCK)
        await there.pool.resize_volume(volume, size, force=True)
    stream = await here.stream("db@b", "db@a")
    with pytest.raises(WrongBase, match=r"has changed since db@a.*snapshot rollback db@a"):
        await there.receive("db", stream)
    assert "db" in there.visible()
    await there.operations.rollback("db@a")
    await there.receive("db", stream)


async def test_a_volume_in_use_is_refused(here: Site, there: Site, server: MemoryServer) -> None:
    await two_snapshots(here)
    await there.receive("db", await here.stream("db@a"))
    server.connections.append(MemoryConnection("db"))
    with pytest.raises(Busy, match=r"attached by 192.0.2.7.*before receiving"):
        await there.receive("db", await here.stream("db@b", "db@a"))
    server.connections.clear()
    await there.operations.leases.acquire("db", "node-1")
    with pytest.raises(Busy, match="leased to 'node-1'"):
        await there.receive("db", await here.stream("db@b", "db@a"))


async def test_what_is_there_already_is_refused(here: Site, there: Site) -> None:
    await two_snapshots(here)
    full = await here.stream("db@a")
    await there.receive("db", full)
    with pytest.raises(AlreadyExists, match="has db@a already"):
        await there.receive("db", full)
    with pytest.raises(AlreadyExists, match="full stream of db@b: receive it under another name"):
        await there.receive("db", await here.stream("db@b"))
    await there.snapshot("db@b")
    with pytest.raises(AlreadyExists, match="db@b is another snapshot"):
        await there.receive("db", await here.stream("db@b", "db@a"))


async def test_another_stream_into_a_half_received_volume_is_refused(
    here: Site, there: Site
) -> None:
    await half_received(here, there)
    await here.snapshot("db@c")
    for name, since in (("db@c", "db@a"), ("db@b", None)):
        with pytest.raises(WrongBase, match=r"half received, with db@b.*--abort db"):
            await there.receive("db", await here.stream(name, since))


async def test_a_stream_that_goes_on_where_nothing_is_is_refused(here: Site, there: Site) -> None:
    await half_received(here, there)
    token = there.token("db")
    assert token
    rest = await here.resumed(token)
    await there.backups.receiving.abort("db")
    with pytest.raises(WrongBase, match="send it without --resume"):
        await there.receive("db", rest)
    full = await here.stream("db@a")
    with pytest.raises(BadStream):
        await there.receive("new", full[: [*frame_ends(full)][1]])
    rest = await here.resumed(there.token("new") or "")
    await there.backups.receiving.abort("new")
    with pytest.raises(WrongBase, match="from the beginning, without --resume"):
        await there.receive("new", rest)
    with pytest.raises(BadStream):
        await there.receive("new", full[: [*frame_ends(full)][1] - 1] + b"?")
    assert there.token("new") is None


async def test_what_is_half_received_is_left_alone_by_others(here: Site, there: Site) -> None:
    await half_received(here, there)
    operations = there.operations
    for forbidden in (
        operations.delete_volume("db"),
        operations.delete_volume("db", fence=True),
        operations.rollback("db@a"),
        operations.rollback("db@a", fence=True),
        operations.snapshots.create(["db@x"]),
        operations.snapshots.delete("db@a"),
        operations.leases.acquire("db", "node-1"),
        operations.write_content("db", MIB, no_pieces(), overwrite=True),
        operations.update_volume("db", size=MIB, shrink=True, force=True),
        operations.update_volume("db", size=9 * MIB),
    ):
        with pytest.raises(Busy, match=r"half received.*--abort db"):
            await forbidden
    await there.receive("db", await here.stream("db@b", "db@a"))
    assert await there.content("db@b") == await here.content("db@b")


async def no_pieces() -> AsyncIterator[Piece]:
    for piece in ():
        yield piece


async def test_one_volume_is_received_once_at_a_time(here: Site, there: Site) -> None:
    await two_snapshots(here)
    stream = await here.stream("db@a")
    begun, gate = asyncio.Event(), asyncio.Event()

    async def slow() -> Any:
        yield stream[:-10]
        begun.set()
        await gate.wait()
        yield stream[-10:]

    task = asyncio.ensure_future(there.backups.receiving.receive("db", slow()))
    await begun.wait()
    with pytest.raises(Busy, match="right now"):
        await there.receive("db", stream)
    with pytest.raises(Busy, match="right now"):
        await there.backups.receiving.abort("db")
    assert there.backups.receiving.show("db").running
    gate.set()
    await task
    assert await there.content("db") == await here.content("db@a")


@pytest.mark.parametrize("size", [MIB, 0])
async def test_what_is_cancelled_when_all_has_come_is_received(
    here: Site, there: Site, size: int
) -> None:
    """`size`: bytes of data; without any, nothing of a new volume but its snapshot is written."""
    volume = await here.pool.create_volume("db", 3 * MIB)
    await volume.write(0, b"1" * size)
    await here.snapshot("db@a")
    stream = await here.stream("db@a")
    real, last = there.pool.set_properties, asyncio.Event()

    async def set_properties(volume: Any, properties: dict[str, Any]) -> None:
        await real(volume, properties)
        if not properties["importing"] and not last.is_set():
            last.set()
            await asyncio.Event().wait()  # for the answer, until it is cancelled

    with mock.patch.object(there.pool, "set_properties", set_properties):
        task = asyncio.ensure_future(there.receive("db", stream))
        await last.wait()
        (running,) = there.operations.running.list()
        await there.operations.running.cancel(running.id)
        with pytest.raises(Cancelled):
            await task
    assert not there.operations.volume("db").importing
    assert there.token("db") is None
    assert await there.content("db@a") == await here.content("db@a")


async def test_who_listens_is_told_what_came_and_what_was_given_up(here: Site, there: Site) -> None:
    listener = there.operations.events.listen()
    await half_received(here, there)
    await there.backups.receiving.abort("db")
    events = [event for _ in range(7) if (event := await listener.next(60))]
    told = [(event.kind, event.subject) for event in events if event.kind[:9] != "operation"]
    assert told == [
        ("volume.created", "db"),
        ("snapshot.created", "db@a"),
        ("volume.changed", "db"),
    ]
    ends = [event.detail["state"] for event in events if event.kind == "operation.ended"]
    assert ends == ["done", "failed"]
