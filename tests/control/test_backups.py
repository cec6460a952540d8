"""Send and receive between real pools: everything, changes, what breaks off, what does not fit."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path

import pytest

from nbdstore.control.backup_stream import BackupReader
from nbdstore.errors import (
    Busy,
    Corruption,
    InvalidArgument,
    NotFound,
)
from tests.control.backup_pools import (
    BLOCK,
    Changing,
    Site,
    half_received,
    site,
    two_snapshots,
)
from tests.store.pools import MIB, assert_clean, make_pool

# -- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block_size", [4096, 65536])
async def test_every_snapshot_arrives(
    here: Site, tmp_path: Path, seed: int, block_size: int
) -> None:
    await here.pool.create_volume("db", 5 * MIB + 512)
    changing = Changing(here, "db", seed)
    sizes = [5 * MIB + 512, 9 * MIB, 9 * MIB, 2 * MIB + 1024, 2 * MIB + 1024, 7 * MIB]
    make_pool(tmp_path / "other", 256 * MIB, block_size=block_size)
    async with site(tmp_path / "other") as there:
        since = None
        for n, size in enumerate(sizes):
            await changing.resize(size)
            await changing.change()
            name = f"db@{n}"
            await here.snapshot(name)
            await changing.change(3)  # which must not be in it
            info = await there.receive("copy", await here.stream(name, since))
            assert (info.snapshot, info.size) == (f"copy@{n}", size)
            for image in ("copy", f"copy@{n}"):
                assert await there.content(image) == await here.content(name)
            assert there.uuid(f"copy@{n}") == here.uuid(name)
            since = name
        assert there.visible() == ["copy", *(f"copy@{n}" for n in range(len(sizes)))]
        for n in range(len(sizes)):
            assert await there.content(f"copy@{n}") == await here.content(f"db@{n}")
    await assert_clean(tmp_path / "other")


async def test_a_receiver_may_leave_snapshots_out_and_go_back(here: Site, there: Site) -> None:
    await two_snapshots(here)
    await here.pool.volumes["db"].write(0, b"5" * BLOCK)
    await here.snapshot("db@c")
    await there.receive("db", await here.stream("db@a"))
    await there.receive("db", await here.stream("db@c", "db@a"))
    await there.operations.rollback("db@a")
    await there.receive("db", await here.stream("db@b", "db@a"))
    for name in ("db@a", "db@b", "db@c"):
        assert await there.content(name) == await here.content(name)


async def test_a_copy_can_be_sent_on_and_changes_come_from_either(
    here: Site, there: Site, tmp_path: Path
) -> None:
    await two_snapshots(here)
    await there.receive("db", await here.stream("db@a"))
    async with site(tmp_path / "third") as third:
        await third.receive("db", await there.stream("db@a"))
        await third.receive("db", await here.stream("db@b", "db@a"))
        assert await third.content("db@b") == await here.content("db@b")


async def test_a_received_volume_is_a_volume_like_any_other(here: Site, there: Site) -> None:
    await two_snapshots(here)
    await there.receive("db", await here.stream("db@a"))
    info = there.operations.volume("db")
    assert (info.importing, info.size) == (False, 3 * MIB)
    assert "receiving" not in {k for k, v in there.pool.volumes["db"].properties.items() if v}
    await there.pool.volumes["db"].write(0, b"x" * BLOCK)
    await there.snapshot("db@own")
    await there.operations.clone("db@a", "clone")
    assert await there.content("clone") == await here.content("db@a")


async def test_a_huge_empty_volume_costs_nothing(here: Site, there: Site) -> None:
    volume = await here.pool.create_volume("huge", 1 << 40)
    await volume.write(0, b"1" * BLOCK)
    await volume.write((1 << 40) - BLOCK, b"2" * BLOCK)
    await here.snapshot("huge@a")
    full = await here.stream("huge@a")
    assert len(full) < 3 * BLOCK
    await there.receive("huge", full)
    await volume.trim(0, 1 << 40)
    await volume.write(1 << 39, b"3" * BLOCK)
    await here.snapshot("huge@b")
    changes = await here.stream("huge@b", "huge@a")
    assert len(changes) < 2 * BLOCK
    await there.receive("huge", changes)
    assert there.operations.volume("huge").mapped == BLOCK
    copy = there.pool.volumes["huge"]
    assert b"".join(bytes(s) for s in await copy.read(1 << 39, BLOCK)) == b"3" * BLOCK


async def test_what_was_trimmed_takes_no_space_there(here: Site, there: Site) -> None:
    await two_snapshots(here)
    await there.receive("db", await here.stream("db@a"))
    await there.receive("db", await here.stream("db@b", "db@a"))
    assert there.operations.volume("db").mapped == here.operations.volume("db").mapped


# -- sending ------------------------------------------------------------------------------------


async def test_what_is_being_sent_cannot_be_deleted(here: Site) -> None:
    await two_snapshots(here)
    async with aclosing(here.backups.send("db@b", "db@a")) as frames:
        await anext(frames)
        for name in ("db@a", "db@b"):
            with pytest.raises(Busy):
                await here.operations.snapshots.delete(name)
    await here.operations.snapshots.delete("db@a")


async def test_a_damaged_block_ends_the_stream_and_the_receiver_says_so(
    tmp_path: Path, there: Site
) -> None:
    async with site(tmp_path / "hurt") as here:
        await two_snapshots(here)
        slot = int(here.pool.volumes["db"].map.entries[0, 0]) & ((1 << 40) - 1)
    with (tmp_path / "hurt" / "data").open("r+b") as data:
        data.seek(slot * BLOCK)
        data.write(b"?")
    async with site(tmp_path / "hurt") as here:
        sent: list[bytes] = []
        with pytest.raises(Corruption):
            async for frame in here.backups.send("db@a"):
                sent.append(b"".join(frame))
        with pytest.raises(Corruption, match="checksum"):
            await there.receive("db", b"".join(sent))
        assert there.operations.volumes() == []


async def test_only_snapshots_of_this_pool_are_sent(here: Site) -> None:
    await two_snapshots(here)
    for name, since, wrong in (
        ("db", None, "snapshot create db@"),
        ("db@x", None, "no snapshot 'db@x'"),
        ("x@a", None, "no volume 'x'"),
        ("db@b", "db@x", "no snapshot 'db@x'"),
        ("db@b", "db", "no snapshot"),
    ):
        with pytest.raises(InvalidArgument, match=wrong):
            await here.stream(name, since)


async def test_a_token_of_what_is_gone_says_so(here: Site, there: Site) -> None:
    await half_received(here, there)
    token = there.token("db")
    assert token
    await here.operations.snapshots.delete("db@b")
    with pytest.raises(NotFound, match=r"not here any more.*receive --abort"):
        await here.resumed(token)


async def test_what_is_sent_is_of_one_moment(here: Site, there: Site) -> None:
    await two_snapshots(here)
    expected = await here.content("db@b")
    sent: list[bytes] = []
    async for frame in here.backups.send("db@b"):
        sent.append(b"".join(frame))
        await here.pool.volumes["db"].write(0, b"new" * BLOCK)
        await here.pool.checkpoint()
    await there.receive("db", b"".join(sent))
    assert await there.content("db") == expected


async def test_the_beginning_tells_what_is_in_it(here: Site) -> None:
    await two_snapshots(here)
    reader = BackupReader()
    for _ in reader.feed(await here.stream("db@b", "db@a")):
        pass
    begin = reader.end()
    assert (begin.name, begin.size, begin.base_name, begin.base_size) == (
        "db@b",
        3 * MIB,
        "db@a",
        3 * MIB,
    )
    assert (begin.uuid, begin.base) == (here.uuid("db@b"), here.uuid("db@a"))


async def test_space_that_is_set_aside_does_not_travel(here: Site, there: Site) -> None:
    volume = await here.pool.create_volume("db", 2 * MIB)
    await volume.write(0, b"1" * MIB)
    await here.snapshot("db@a")
    await volume.write_zeroes(0, 3 * MIB // 2, no_hole=True)
    await here.snapshot("db@b")
    assert volume.status()["reserved"] == 3 * MIB // 2
    for name, since in (("db@a", None), ("db@b", "db@a")):
        await there.receive("db", await here.stream(name, since))
    await there.receive("whole", await here.stream("db@b"))
    for name in ("db", "whole"):
        status = there.pool.volumes[name].status()
        assert (status["mapped"], status["reserved"]) == (0, 0)
        assert await there.content(name) == bytes(2 * MIB)
