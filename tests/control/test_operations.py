"""The rules of the operations: who is in the way, what an import leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from unittest import mock

import pytest

from nbdstore.control import content
from nbdstore.control.model import VolumeInfo
from nbdstore.control.stream import Piece
from nbdstore.errors import AlreadyExists, Busy, InvalidArgument, NotFound
from tests.control.memory_pool import BLOCK, Bench, MemoryConnection

SIZE = 64 * BLOCK


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def pieces(*items: tuple[int, bytes]) -> AsyncIterator[Piece]:
    for offset, data in items:
        yield Piece(offset, data)


async def failing_pieces() -> AsyncIterator[Piece]:
    yield Piece(0, b"x" * BLOCK)
    raise ConnectionResetError("the client left")


async def content_of(bench: Bench, name: str) -> list[Piece]:
    _, found = bench.operations.read_content(name)
    return [piece async for piece in found]


class TestAttachedVolumes:
    @pytest.fixture
    async def attached(self, bench: Bench) -> Bench:
        await bench.operations.create_volume("db", SIZE)
        bench.server.connections += [MemoryConnection("db"), MemoryConnection(None)]
        return bench

    async def test_deleting_says_who_is_attached(self, attached: Bench) -> None:
        with pytest.raises(Busy, match=r"'db' is attached by 192\.0\.2\.7:4711 \(1 connection\)"):
            await attached.operations.delete_volume("db")
        assert "db" in attached.pool.volumes

    async def test_shrinking_is_refused_and_growing_is_not(self, attached: Bench) -> None:
        with pytest.raises(Busy):
            await attached.operations.update_volume(
                "db", size=SIZE - BLOCK, shrink=True, force=True
            )
        info = await attached.operations.update_volume("db", size=SIZE * 2)
        assert (info.size, info.attached) == (SIZE * 2, 1)
        assert attached.server.grown_to == [("db", SIZE * 2)]

    async def test_nobody_attaches_while_it_is_shrunk(self, bench: Bench) -> None:
        resize_volume, barred = bench.pool.resize_volume, []

        async def watched(volume: Any, size: int, *, force: bool = False) -> None:
            barred.append(list(bench.server.barred_volumes))
            await resize_volume(volume, size, force=force)

        bench.pool.resize_volume = watched  # type: ignore[method-assign]
        await bench.operations.create_volume("db", SIZE)
        await bench.operations.update_volume("db", size=SIZE - BLOCK, shrink=True)
        await bench.operations.update_volume("db", size=SIZE)
        assert barred == [["db"], []]
        assert bench.server.barred_volumes == []

    async def test_shrinking_must_be_meant(self, bench: Bench) -> None:
        await bench.operations.create_volume("db", SIZE)
        for force in (False, True):
            with pytest.raises(InvalidArgument, match=r"has 256 KiB, .*say so with --shrink"):
                await bench.operations.update_volume("db", size=SIZE - BLOCK, force=force)
        await bench.pool.volumes["db"].write(SIZE - BLOCK, b"x")
        with pytest.raises(InvalidArgument, match="holds data beyond"):
            await bench.operations.update_volume("db", size=SIZE - BLOCK, shrink=True)
        await bench.operations.update_volume("db", size=SIZE - BLOCK, shrink=True, force=True)
        assert bench.operations.volume("db").size == SIZE - BLOCK

    async def test_importing_is_refused(self, attached: Bench) -> None:
        with pytest.raises(Busy, match="importing"):
            await attached.operations.write_content("db", SIZE, pieces(), overwrite=True)

    async def test_connections_without_an_export_are_not_listed(self, attached: Bench) -> None:
        assert [item.export for item in attached.operations.attachments()] == ["db"]

    async def test_who_attaches_while_the_import_begins_is_noticed(self, bench: Bench) -> None:
        await bench.operations.create_volume("db", SIZE)
        set_properties = bench.pool.set_properties

        async def slow(volume: Any, properties: dict[str, Any]) -> None:
            bench.server.connections[:] = [MemoryConnection("db")]
            await set_properties(volume, properties)

        bench.pool.set_properties = slow  # type: ignore[method-assign]
        with pytest.raises(Busy, match="importing"):
            await bench.operations.write_content("db", SIZE, pieces((0, b"x")))
        assert not bench.operations.volume("db").importing
        assert bench.pool.volumes["db"].blocks == {}


class TestChanges:
    async def test_several_at_once(self, bench: Bench) -> None:
        await bench.operations.create_volume("db", SIZE, ["alice"])
        info = await bench.operations.update_volume(
            "db", size=2 * SIZE, new_name="data", allow=["bob"]
        )
        assert (info.name, info.size, info.allow) == ("data", 2 * SIZE, ["bob"])

    async def test_all_are_of_one_volume_whatever_others_do_while_it_shrinks(
        self, bench: Bench
    ) -> None:
        operations, resize = bench.operations, bench.pool.resize_volume
        await operations.create_volume("db", 2 * SIZE)

        async def rename_and_resize(volume: Any, size: int, *, force: bool) -> None:
            await operations.update_volume("db", new_name="old")
            await operations.create_volume("db", 2 * SIZE)
            await resize(volume, size, force=force)

        with mock.patch.object(bench.pool, "resize_volume", rename_and_resize):
            info = await operations.update_volume("db", size=SIZE, shrink=True, iops=100)
        assert (info.name, info.size, info.iops) == ("old", SIZE, 100)
        assert (operations.volume("db").size, operations.volume("db").iops) == (2 * SIZE, 0)

    async def test_what_is_not_named_stays(self, bench: Bench) -> None:
        created = await bench.operations.create_volume("db", SIZE, ["alice"])
        assert await bench.operations.update_volume("db") == created

    async def test_an_empty_list_lets_anyone_in(self, bench: Bench) -> None:
        await bench.operations.create_volume("db", SIZE, ["alice"])
        assert (await bench.operations.update_volume("db", allow=[])).allow == []

    @pytest.mark.parametrize("name", ["", "a\nb", "\x1b[31m", "\ud800"])
    async def test_names_that_no_certificate_has(self, bench: Bench, name: str) -> None:
        await bench.operations.create_volume("db", SIZE, ["alice"])
        with pytest.raises(InvalidArgument, match="cannot be the name of a client certificate"):
            await bench.operations.update_volume("db", size=2 * SIZE, allow=["bob", name])
        with pytest.raises(InvalidArgument):
            await bench.operations.create_volume("db2", SIZE, [name])
        info = bench.operations.volume("db")
        assert (info.size, info.allow) == (SIZE, ["alice"]), "nothing was changed"

    async def test_names_leave_space_for_what_else_is_recorded(self, bench: Bench) -> None:
        names = ["n" * 60] * 128
        await bench.operations.create_volume("db", SIZE)
        await bench.operations.update_volume("db", allow=names)
        with pytest.raises(InvalidArgument, match=r"129 names .* more than 8 KiB together"):
            await bench.operations.update_volume("db", allow=[*names, "n" * 60])
        assert len(bench.operations.volume("db").allow) == 128

    async def test_a_list_from_before_there_was_a_limit_gets_shorter(self, bench: Bench) -> None:
        """Name by name, and a create that made it may be repeated."""
        names = [f"{number:060}" for number in range(140)]
        uuid = (await bench.operations.create_volume("db", SIZE)).uuid
        volume = bench.pool.volumes["db"]
        await bench.pool.set_properties(volume, {**volume.properties, "allow": names})
        again = await bench.operations.create_volume("db", SIZE, names, uuid=uuid)
        assert again.allow == names
        for wrong in ([*names, "bob"], [*names[:139], "bob"], [*names[:139], names[0]]):
            with pytest.raises(InvalidArgument, match=r"names .* more than 8 KiB together"):
                await bench.operations.update_volume("db", allow=wrong)
        with pytest.raises(InvalidArgument, match="140 names"):
            await bench.operations.create_volume("db2", SIZE, names, uuid=uuid)
        for n_left in (139, 138, 1):
            info = await bench.operations.update_volume("db", allow=names[-n_left:])
            assert info.allow == names[-n_left:]
        again = await bench.operations.create_volume("db", SIZE, names, uuid=uuid)
        assert again.allow == names[-1:], "what was made then, as it is now"

    async def test_changes_of_properties_do_not_undo_each_other(self, bench: Bench) -> None:
        set_properties = bench.pool.set_properties

        async def slow(volume: Any, properties: dict[str, Any]) -> None:
            await asyncio.sleep(0)
            await set_properties(volume, properties)

        async def meanwhile() -> AsyncIterator[Piece]:
            yield Piece(0, b"x")
            changes.append(
                asyncio.create_task(bench.operations.update_volume("db", allow=["alice"]))
            )
            await asyncio.sleep(0)

        changes: list[asyncio.Task[Any]] = []
        bench.pool.set_properties = slow  # type: ignore[method-assign]
        await bench.operations.write_content("db", SIZE, meanwhile())
        await changes[0]
        info = bench.operations.volume("db")
        assert (info.allow, info.importing) == (["alice"], False)

    async def test_a_volume_that_is_not_there(self, bench: Bench) -> None:
        with pytest.raises(NotFound, match="no volume 'db'"):
            await bench.operations.update_volume("db", size=SIZE)


class TestLimits:
    async def test_are_kept_and_felt(self, bench: Bench) -> None:
        info = await bench.operations.create_volume("db", SIZE)
        assert (info.iops, info.bandwidth, info.burst_s) == (0, 0, 1)
        await bench.operations.update_volume("db", iops=100, burst_s=2)
        info = await bench.operations.update_volume("db", bandwidth=1 << 20)
        assert (info.iops, info.bandwidth, info.burst_s) == (100, 1 << 20, 2)
        recorded = {"iops": 100, "bandwidth": 1 << 20, "burst_s": 2}
        assert bench.pool.volumes["db"].properties == {"qos": recorded}
        assert bench.server.limited[-1] == ("db", recorded)

    async def test_are_taken_away(self, bench: Bench) -> None:
        await bench.operations.create_volume("db", SIZE)
        await bench.operations.update_volume("db", iops=100, bandwidth=1 << 20)
        info = await bench.operations.update_volume("db", iops=0)
        assert (info.iops, info.bandwidth) == (0, 1 << 20)

    async def test_that_stay_the_same_are_not_recorded_again(self, bench: Bench) -> None:
        await bench.operations.create_volume("db", SIZE)
        for _ in range(2):
            await bench.operations.update_volume("db", iops=100)
        await bench.operations.update_volume("db", size=2 * SIZE)
        assert len(bench.server.limited) == 1

    @pytest.mark.parametrize(
        ("limits", "words"),
        [
            ({"iops": 10**9 + 1}, "1000000001 requests per second: give 1 to"),
            ({"bandwidth": 1}, "1 B per second: give at least 64 KiB"),
            ({"bandwidth": 1 << 51}, "and at most"),
            ({"burst_s": 3601}, "a burst of 3601 seconds: give 0 to 3600"),
            ({"burst_s": float("nan")}, "a burst of nan seconds"),
            ({"burst_s": float("inf")}, "a burst of inf seconds"),
        ],
    )
    async def test_that_make_no_sense_change_nothing(
        self, bench: Bench, limits: dict[str, Any], words: str
    ) -> None:
        before = await bench.operations.create_volume("db", SIZE)
        with pytest.raises(InvalidArgument, match=words):
            await bench.operations.update_volume("db", size=2 * SIZE, **limits)
        assert bench.operations.volume("db") == before


class TestImport:
    async def test_into_a_new_volume(self, bench: Bench) -> None:
        data = b"x" * BLOCK
        info = await bench.operations.write_content("db", SIZE, pieces((BLOCK, data)))
        assert (info.size, info.mapped, info.importing) == (SIZE, BLOCK, False)
        assert await content_of(bench, "db") == [Piece(BLOCK, data)]
        assert bench.pool.volumes["db"].n_flushes == 1

    async def test_that_fails_leaves_no_new_volume(self, bench: Bench) -> None:
        with pytest.raises(ConnectionResetError):
            await bench.operations.write_content("db", SIZE, failing_pieces())
        assert bench.pool.volumes == {}

    async def test_that_fails_leaves_an_old_volume_marked(self, bench: Bench) -> None:
        await bench.operations.create_volume("db", SIZE)
        with pytest.raises(ConnectionResetError):
            await bench.operations.write_content("db", SIZE, failing_pieces())
        assert bench.operations.volume("db").importing

    async def test_a_marked_volume_may_be_imported_again(self, bench: Bench) -> None:
        await self.test_that_fails_leaves_an_old_volume_marked(bench)
        info = await bench.operations.write_content("db", SIZE, pieces((BLOCK, b"y")))
        assert not info.importing
        assert [piece.offset for piece in await content_of(bench, "db")] == [BLOCK]

    async def test_into_a_volume_with_data_wants_overwrite(self, bench: Bench) -> None:
        await bench.operations.write_content("db", SIZE, pieces((0, b"x" * BLOCK)))
        with pytest.raises(AlreadyExists, match=r"holds 4 KiB of data.*--overwrite"):
            await bench.operations.write_content("db", SIZE, pieces())

    async def test_overwriting_leaves_nothing_of_before(self, bench: Bench) -> None:
        await bench.operations.write_content("db", SIZE, pieces((0, b"x" * SIZE)))
        await bench.operations.write_content(
            "db", SIZE // 2, pieces((BLOCK, b"y" * BLOCK)), overwrite=True
        )
        assert await content_of(bench, "db") == [Piece(BLOCK, b"y" * BLOCK)]

    async def test_what_does_not_fit_is_refused(self, bench: Bench) -> None:
        await bench.operations.create_volume("db", SIZE)
        with pytest.raises(InvalidArgument, match="do not fit into volume 'db'"):
            await bench.operations.write_content("db", SIZE + BLOCK, pieces())

    async def test_while_another_runs_is_busy(self, bench: Bench) -> None:
        async def meanwhile() -> AsyncIterator[Piece]:
            yield Piece(0, b"x" * BLOCK)
            with pytest.raises(Busy, match="import into volume 'db' is running"):
                await bench.operations.delete_volume("db")
            with pytest.raises(Busy, match="import into volume 'db' is running"):
                await bench.operations.write_content("db", SIZE, pieces())

        await bench.operations.write_content("db", SIZE, meanwhile())

    async def test_a_new_name_does_not_hide_one_that_runs(self, bench: Bench) -> None:
        async def meanwhile() -> AsyncIterator[Piece]:
            yield Piece(0, b"x" * BLOCK)
            await bench.operations.update_volume("db", new_name="data")
            with pytest.raises(Busy, match="import into volume 'data' is running"):
                await bench.operations.delete_volume("data")
            await bench.operations.create_volume("db", SIZE)
            await bench.operations.delete_volume("db")

        info = await bench.operations.write_content("db", SIZE, meanwhile())
        assert (info.name, info.importing) == ("data", False)

    @pytest.mark.parametrize("is_there", [False, True])
    async def test_two_that_begin_at_once_do_not_mix(self, bench: Bench, is_there: bool) -> None:
        create_volume, set_properties = bench.pool.create_volume, bench.pool.set_properties

        async def slow_create(*args: Any) -> Any:
            volume = await create_volume(*args)  # there for all to see, but not durable yet
            await asyncio.sleep(0)
            return volume

        async def slow_set(*args: Any) -> None:
            await asyncio.sleep(0)
            await set_properties(*args)

        async def slowly(data: bytes) -> AsyncIterator[Piece]:
            for offset in range(0, SIZE, BLOCK):
                await asyncio.sleep(0)
                yield Piece(offset, data)

        if is_there:
            await bench.operations.create_volume("db", SIZE)
        bench.pool.create_volume = slow_create  # type: ignore[method-assign]
        bench.pool.set_properties = slow_set  # type: ignore[method-assign]
        results = await asyncio.gather(
            bench.operations.write_content("db", SIZE, slowly(b"x" * BLOCK)),
            bench.operations.write_content("db", SIZE, slowly(b"y" * BLOCK)),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [VolumeInfo, Busy]
        assert {piece.data for piece in await content_of(bench, "db")} == {b"x" * BLOCK}


class TestWritten:
    async def test_not_before_something_was(self, bench: Bench) -> None:
        info = await bench.operations.create_volume("db", SIZE)
        assert not info.written
        await bench.pool.volumes["db"].write(0, b"x" * BLOCK)
        assert bench.operations.volume("db").written

    async def test_as_the_pool_remembers_it(self, bench: Bench) -> None:
        await bench.operations.create_volume("db", SIZE)
        bench.pool.volumes["db"].was_written = True
        assert bench.operations.volume("db").written

    async def test_set_aside_space_counts(self, bench: Bench) -> None:
        await bench.operations.create_volume("db", SIZE)
        bench.pool.volumes["db"].reserved = BLOCK
        assert bench.operations.volume("db").written


class TestExport:
    @pytest.mark.parametrize("extents_per_call", [1, 1000])
    async def test_a_shrinking_volume_is_noticed(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch, extents_per_call: int
    ) -> None:
        monkeypatch.setattr(content, "EXTENTS_PER_CALL", extents_per_call)
        await bench.operations.write_content("db", 8 << 20, pieces((0, b"x"), (5 << 20, b"y")))
        _, found = bench.operations.read_content("db")
        await anext(found)
        await bench.operations.update_volume("db", size=1 << 20, shrink=True, force=True)
        with pytest.raises(Busy, match="was shrunk while it was read: read it again"):
            await anext(found)
