"""Changed blocks: what differs, joined, whatever the sizes; and the lines they travel as."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdstore.control import diff
from nbdstore.errors import Busy, ControlError, InvalidArgument, NotFound, ReadFailed
from nbdstore.store import Change
from tests.control.backup_pools import BLOCK, Changing, Site, merged, site
from tests.store.pools import MIB, cold, hooked


async def changed(here: Site, newer: str, older: str | None = None) -> list[diff.Extent]:
    _, _, extents = here.backups.diff(newer, older)
    return [extent async for extent in extents]


async def test_what_was_written_trimmed_and_zeroed_is_one_list(here: Site) -> None:
    volume = await here.pool.create_volume("db", 8 * MIB)
    await volume.write(0, b"1" * MIB)
    await here.snapshot("db@a")
    await volume.write(0, b"2" * BLOCK)
    await volume.trim(BLOCK, BLOCK)
    await volume.write_zeroes(2 * BLOCK, BLOCK, no_hole=True)
    await volume.write(3 * BLOCK, b"3" * 100)
    await volume.write(4 * MIB, b"4" * BLOCK)
    await here.snapshot("db@b")
    expected = [(0, 4 * BLOCK), (4 * MIB, BLOCK)]
    assert await changed(here, "db@b", "db@a") == expected
    assert await changed(here, "db", "db@a") == expected
    assert await changed(here, "db@a", "db@b") == expected
    assert await changed(here, "db", "db@b") == []
    assert await changed(here, "db@b", "db@b") == []
    assert await changed(here, "db@a") == [(0, MIB)]


async def test_zeros_over_holes_are_no_change(here: Site) -> None:
    volume = await here.pool.create_volume("db", MIB)
    await here.snapshot("db@a")
    await volume.write_zeroes(0, MIB // 2, no_hole=True)
    await volume.trim(0, MIB)
    assert await changed(here, "db", "db@a") == []


async def test_of_a_larger_one_the_tail_is_what_it_holds_there(here: Site) -> None:
    volume = await here.pool.create_volume("db", MIB + 512)
    await volume.write(0, b"1" * MIB)
    await here.snapshot("db@a")
    await here.pool.resize_volume(volume, 3 * MIB)
    assert await changed(here, "db", "db@a") == []
    await volume.write(2 * MIB, b"2" * BLOCK)
    size, older_size, _ = here.backups.diff("db", "db@a")
    assert (size, older_size) == (3 * MIB, MIB + 512)
    assert await changed(here, "db", "db@a") == [(2 * MIB, BLOCK)]


async def test_of_a_smaller_one_nothing_beyond_its_end_is_told(here: Site) -> None:
    volume = await here.pool.create_volume("db", 3 * MIB)
    await volume.write(0, b"1" * 3 * MIB)
    await here.snapshot("db@a")
    await here.pool.resize_volume(volume, MIB + 512, force=True)
    await volume.write(MIB, b"2" * 512)
    assert await changed(here, "db", "db@a") == [(MIB, 512)]


async def test_a_clone_differs_from_its_origin_by_what_was_written_to_it(here: Site) -> None:
    volume = await here.pool.create_volume("db", MIB)
    await volume.write(0, b"1" * MIB)
    await here.snapshot("db@a")
    await here.operations.clone("db@a", "copy")
    assert await changed(here, "copy", "db@a") == []
    await here.pool.volumes["copy"].write(BLOCK, b"2" * BLOCK)
    assert await changed(here, "copy", "db@a") == [(BLOCK, BLOCK)]
    assert await changed(here, "copy", "db") == [(BLOCK, BLOCK)]


@pytest.mark.parametrize("seed", range(6))
async def test_at_random_what_is_not_told_is_the_same(here: Site, seed: int) -> None:
    await here.pool.create_volume("db", 5 * MIB + 512)
    changing = Changing(here, "db", seed)
    names = []
    for n, size in enumerate([5 * MIB + 512, 7 * MIB, 7 * MIB, 3 * MIB - 512]):
        await changing.resize(size)
        await changing.change(6)
        await here.snapshot(f"db@{n}")
        names.append(f"db@{n}")
    await changing.change(4)
    for older in [*names, "db"]:
        for newer in [*names, "db"]:
            before, after = await here.content(older), await here.content(newer)
            extents = await changed(here, newer, older)
            assert merged(extents)
            patched = bytearray(before[: len(after)].ljust(len(after), b"\0"))
            for offset, length in extents:
                patched[offset : offset + length] = after[offset : offset + length]
            assert patched == after, (older, newer)


async def test_the_cost_goes_with_what_has_changed(tmp_path: Path) -> None:
    """Nodes and leaves read, for 1 TiB with leaves all over it: as many as for 1 GiB."""
    reads: dict[int, int] = {}
    for size in (1 << 30, 1 << 40):
        directory = tmp_path / str(size)
        async with site(directory) as here:
            volume = await here.pool.create_volume("db", size)
            for part in range(256):
                await volume.write(part * (size // 256), b"1" * BLOCK)
            await here.snapshot("db@a")
            await volume.write(size // 2, b"2" * BLOCK)
            await here.snapshot("db@b")
        calls: list[str] = []
        with hooked(lambda operation, name, calls=calls: calls.append(operation)), cold():
            async with site(directory) as here:
                before = calls.count("read")
                for name in ("db@a", "db@b"):
                    image = here.pool.snapshots[name]
                    await image.open()
                opened = calls.count("read")
                assert await changed(here, "db@b", "db@a") == [(size // 2, BLOCK)]
                reads[size] = calls.count("read") - opened
                assert opened > before
    assert reads[1 << 40] <= reads[1 << 30] + 4
    assert reads[1 << 40] < 10


async def test_names_that_are_not_there_are_told(here: Site) -> None:
    await here.pool.create_volume("db", MIB)
    for newer, older in (("x", None), ("db@x", None), ("db", "db@x"), ("db", "x")):
        with pytest.raises(NotFound, match="there is no"):
            await changed(here, newer, older)
    with pytest.raises(InvalidArgument):
        await changed(here, "")


async def test_while_it_is_read_the_snapshots_stay(here: Site) -> None:
    volume = await here.pool.create_volume("db", 8 * MIB)
    await here.snapshot("db@a")
    for block in range(0, 1000, 2):
        await volume.write(block * BLOCK, b"x" * BLOCK)
    _, _, extents = here.backups.diff("db", "db@a")
    await anext(extents)
    with pytest.raises(Busy):
        await here.operations.snapshots.delete("db@a")
    assert len([extent async for extent in extents]) == 499
    await here.operations.snapshots.delete("db@a")


# -- the lines ----------------------------------------------------------------------------------


async def each(*changes: Change) -> AsyncIterator[Change]:
    for change in changes:
        yield change


async def written(extents: AsyncIterator[diff.Extent]) -> bytes:
    parts: list[bytes] = []
    with contextlib.suppress(ReadFailed):
        async for part in diff.lines(1 << 30, None, extents):
            parts.append(part)
    return b"".join(parts)


async def test_adjacent_changes_are_joined_whatever_they_are() -> None:
    found = diff.merged(
        each(Change(0, 5, True), Change(5, 5, False), Change(10, 1, True), Change(12, 1, True))
    )
    assert [extent async for extent in found] == [(0, 11), (12, 1)]
    assert [extent async for extent in diff.merged(each())] == []


@pytest.mark.parametrize("n", [0, 1, 999, 1000, 2001])
async def test_lines_come_back(n: int) -> None:
    raw = await written(diff.merged(each(*(Change(at * 10, 5, True) for at in range(n)))))
    assert len(raw.splitlines()) == n + 2
    for chunks in ([raw], [raw[at : at + 7] for at in range(0, len(raw), 7)]):
        found = diff.read(chunks)
        assert (found.size, found.older_size) == (1 << 30, None)
        assert list(found.extents) == [(at * 10, 5) for at in range(n)]


async def test_a_failure_on_the_way_is_raised_at_the_other_end() -> None:
    async def failing() -> AsyncIterator[diff.Extent]:
        yield 0, 5
        raise ReadFailed("the disk is on fire")

    found = diff.read([await written(failing())])
    assert next(found.extents) == (0, 5)
    with pytest.raises(ReadFailed, match="fire"):
        next(found.extents)


async def test_lines_that_are_cut_off_or_wrong_are_noticed() -> None:
    raw = await written(diff.merged(each(Change(0, 5, True), Change(10, 5, True))))
    for stop in range(len(raw)):
        with pytest.raises(ControlError):
            list(diff.read([raw[:stop]]).extents)
    lines = raw.splitlines(keepends=True)
    for wrong in (b"[]\n", b"nonsense\n", b"\xff\n", json.dumps({"extents": 7}).encode() + b"\n"):
        for at in range(len(lines)):
            with pytest.raises(ControlError):
                list(diff.read([*lines[:at], wrong, *lines[at + 1 :]]).extents)
