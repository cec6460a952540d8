"""The rules of leases: who gets one, who is fenced, and what a lease forbids to others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from nbdstore.control.client import ControlClient
from nbdstore.control.model import LeaseInfo
from nbdstore.control.stream import Piece
from nbdstore.errors import Busy, InvalidArgument, NotFound, WriteFailed
from tests.control.conftest import Answering
from tests.control.memory_pool import BLOCK, Bench, MemoryConnection
from tests.control.test_api import call

SIZE = 64 * BLOCK


@pytest.fixture
async def bench() -> Bench:
    bench = Bench()
    await bench.operations.create_volume("db", SIZE)
    return bench


def attach(bench: Bench, info: LeaseInfo | None = None, peer: str = "192.0.2.7:4711") -> None:
    """Attach `db`, by a lease if one is given."""
    holder, epoch = (info.holder, info.epoch) if info else (None, None)
    bench.server.connections.append(
        MemoryConnection("db", peer=peer, holder=holder, lease_epoch=epoch)
    )


class TestTaking:
    async def test_a_free_volume(self, bench: Bench) -> None:
        info = await bench.operations.leases.acquire("db", "node-1")
        assert (info.volume, info.holder, info.epoch, info.connections) == ("db", "node-1", 1, 0)
        assert info.export == f"db,lease=1-{info.token}"
        shown = bench.operations.volume("db")
        assert (shown.lease_holder, shown.lease_since) == ("node-1", info.since)

    async def test_again_gets_the_same(self, bench: Bench) -> None:
        info = await bench.operations.leases.acquire("db", "node-1")
        attach(bench, info)
        again = await bench.operations.leases.acquire("db", "node-1")
        forced = await bench.operations.leases.acquire("db", "node-1", force=True)
        assert (again.epoch, again.token, again.connections) == (1, info.token, 1)
        assert forced == again
        assert bench.server.fenced == []

    async def test_from_another_is_busy_and_says_who(self, bench: Bench) -> None:
        info = await bench.operations.leases.acquire("db", "node-1")
        attach(bench, info)
        attach(bench, info)
        with pytest.raises(Busy, match=rf"'node-1' since {info.since[:10]}.*, with 2 connections"):
            await bench.operations.leases.acquire("db", "node-2")
        assert bench.server.fenced == []

    async def test_by_force_fences_the_other(self, bench: Bench) -> None:
        info = await bench.operations.leases.acquire("db", "node-1")
        attach(bench, info)
        taken = await bench.operations.leases.acquire("db", "node-2", force=True)
        assert (taken.holder, taken.epoch, taken.connections) == ("node-2", 2, 0)
        assert taken.token != info.token
        assert bench.server.fenced == [("192.0.2.7:4711", "the volume was leased to 'node-2'")]

    async def test_from_who_attached_without_one(self, bench: Bench) -> None:
        attach(bench)
        with pytest.raises(Busy, match=r"attached by 192\.0\.2\.7:4711 \(1 connection\)"):
            await bench.operations.leases.acquire("db", "node-1")
        assert bench.operations.volume("db").lease_holder is None
        await bench.operations.leases.acquire("db", "node-1", force=True)
        assert len(bench.server.fenced) == 1

    async def test_while_an_import_runs(self, bench: Bench) -> None:
        async def meanwhile() -> AsyncIterator[Piece]:
            yield Piece(0, b"x" * BLOCK)
            no_advice = "import into volume 'db' is running: wait before leasing it to 'node-1'$"
            for force in (False, True):  # which does not help
                with pytest.raises(Busy, match=no_advice):
                    await bench.operations.leases.acquire("db", "node-1", force=force)

        await bench.operations.write_content("db", SIZE, meanwhile())

    async def test_of_two_at_once_one_wins(self, bench: Bench) -> None:
        set_properties = bench.pool.set_properties

        async def slow(volume: Any, properties: dict[str, Any]) -> None:
            await asyncio.sleep(0)
            await set_properties(volume, properties)

        bench.pool.set_properties = slow  # type: ignore[method-assign]
        results = await asyncio.gather(
            *(bench.operations.leases.acquire("db", f"node-{n}") for n in range(5)),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [LeaseInfo, Busy, Busy, Busy, Busy]

    async def test_nobody_attaches_while_it_changes_hands(self, bench: Bench) -> None:
        """From before the connections are ended until the new epoch is recorded."""
        barred: list[list[str]] = []
        fence, set_properties = bench.server.fence, bench.pool.set_properties

        async def watched_fence(volume: Any, why: str) -> int:
            barred.append(list(bench.server.barred_volumes))
            return await fence(volume, why)

        async def watched_set(volume: Any, properties: dict[str, Any]) -> None:
            await set_properties(volume, properties)
            barred.append(list(bench.server.barred_volumes))

        bench.server.fence = watched_fence  # type: ignore[method-assign]
        bench.pool.set_properties = watched_set  # type: ignore[method-assign]
        await bench.operations.leases.acquire("db", "node-1")
        await bench.operations.leases.break_("db")
        assert barred == [["db"]] * 4
        assert bench.server.barred_volumes == []

    async def test_that_cannot_be_recorded_was_not_granted(self, bench: Bench) -> None:
        set_properties = bench.pool.set_properties

        async def failing(volume: Any, properties: dict[str, Any]) -> None:
            raise WriteFailed("the disk is full of eels")

        bench.pool.set_properties = failing  # type: ignore[method-assign]
        with pytest.raises(WriteFailed):
            await bench.operations.leases.acquire("db", "node-1")
        assert bench.server.barred_volumes == []
        bench.pool.set_properties = set_properties  # type: ignore[method-assign]
        assert (await bench.operations.leases.acquire("db", "node-2")).epoch == 1

    async def test_mistakes(self, bench: Bench) -> None:
        with pytest.raises(NotFound, match="no volume 'web'"):
            await bench.operations.leases.acquire("web", "node-1")
        with pytest.raises(InvalidArgument, match="holder of a lease"):
            await bench.operations.leases.acquire("db", "")


class TestEnding:
    async def test_releasing_ends_the_connections(self, bench: Bench) -> None:
        attach(bench, await bench.operations.leases.acquire("db", "node-1"))
        await bench.operations.leases.release("db", "node-1")
        assert bench.operations.leases.list() == []
        assert bench.server.fenced == [("192.0.2.7:4711", "'node-1' released its lease")]
        assert (await bench.operations.leases.acquire("db", "node-1")).epoch == 2

    @pytest.mark.parametrize(("holder", "epoch"), [("node-2", None), ("node-1", 1), ("node-1", 3)])
    async def test_of_what_is_not_held_changes_nothing(
        self, bench: Bench, holder: str, epoch: int | None
    ) -> None:
        await bench.operations.leases.acquire("db", "node-2")
        info = await bench.operations.leases.acquire("db", "node-1", force=True)
        attach(bench, info)
        await bench.operations.leases.release("db", holder, epoch)
        assert await bench.operations.leases.acquire("db", "node-1") == LeaseInfo(
            **{**info.to_json(), "connections": 1}
        )

    async def test_twice_is_the_same_as_once(self, bench: Bench) -> None:
        await bench.operations.leases.release("db", "node-1")
        await bench.operations.leases.break_("db")
        attach(bench)
        await bench.operations.leases.break_("db")
        assert bench.server.fenced == [], "there was no lease, only a client without one"

    async def test_breaking_asks_nobody(self, bench: Bench) -> None:
        attach(bench, await bench.operations.leases.acquire("db", "node-1"))
        await bench.operations.leases.break_("db")
        assert bench.operations.volume("db").lease_holder is None
        assert bench.server.fenced == [("192.0.2.7:4711", "its lease was broken")]


class TestForbidding:
    async def test_what_would_harm_the_holder(self, bench: Bench) -> None:
        await bench.operations.leases.acquire("db", "node-1")
        operations = bench.operations
        for change in (
            operations.delete_volume("db"),
            operations.update_volume("db", size=BLOCK, shrink=True, force=True),
            operations.update_volume("db", new_name="web"),
            operations.write_content("db", SIZE, _nothing(), overwrite=True),
        ):
            with pytest.raises(Busy, match=r"leased to 'node-1' since .* with no connections"):
                await change
        assert operations.volume("db").size == SIZE

    async def test_not_what_does_not(self, bench: Bench) -> None:
        info = await bench.operations.leases.acquire("db", "node-1")
        changed = await bench.operations.update_volume("db", size=2 * SIZE, allow=["node-1"])
        assert (changed.size, changed.lease_holder) == (2 * SIZE, "node-1")
        again = await bench.operations.leases.acquire("db", "node-1")
        assert again == info, "other properties do not touch it"

    async def test_deleting_with_a_fence(self, bench: Bench) -> None:
        attach(bench, await bench.operations.leases.acquire("db", "node-1"))
        await bench.operations.delete_volume("db", fence=True)
        assert bench.pool.volumes == {}
        assert bench.server.fenced == [("192.0.2.7:4711", "the volume is deleted")]


async def _nothing() -> AsyncIterator[Piece]:
    return
    yield


class TestOverHttp:
    @pytest.fixture
    def client(self, answering: Answering) -> ControlClient:
        answering.client.create_volume("db", SIZE)
        return answering.client

    def test_a_lease_s_life(self, client: ControlClient, answering: Answering) -> None:
        info = client.acquire_lease("db", "node 1/ä")
        assert info.export == f"db,lease=1-{info.token}"
        with pytest.raises(Busy, match="leased to 'node 1/ä'"):
            client.acquire_lease("db", "node-2")
        taken = client.acquire_lease("db", "node-2", force=True)
        client.release_lease("db", "node 1/ä")
        client.release_lease("db", "node-2", epoch=1)
        assert [item.holder for item in client.leases()] == ["node-2"]
        client.release_lease("db", "node-2", taken.epoch)
        assert client.leases() == []
        client.acquire_lease("db", "node-3")
        client.break_lease("db")
        client.break_lease("db")
        assert client.leases() == []

    def test_a_listing_has_no_tokens(self, client: ControlClient, answering: Answering) -> None:
        info = client.acquire_lease("db", "node-1")
        assert info.token
        for path in ("/v1/leases", "/v1/volumes", "/v1/volumes/db"):
            assert info.token not in str(call(answering, "GET", path)[1])

    def test_deleting_with_a_fence(self, client: ControlClient) -> None:
        client.acquire_lease("db", "node-1")
        with pytest.raises(Busy):
            client.delete_volume("db")
        client.delete_volume("db", fence=True)
        assert client.volumes() == []

    def test_disconnecting(self, client: ControlClient, answering: Answering) -> None:
        answering.bench.server.connections += [
            MemoryConnection("db", id=7),
            MemoryConnection("db", id=8),
        ]
        client.disconnect(7)
        client.disconnect(7)
        assert [item.id for item in client.attachments()] == [8]

    @pytest.mark.parametrize(
        ("method", "path", "body", "status", "detail"),
        [
            ("PUT", "/v1/volumes/db/lease", {}, 400, "'holder' is missing"),
            ("PUT", "/v1/volumes/db/lease", {"holder": ""}, 400, "holder of a lease"),
            ("PUT", "/v1/volumes/db/lease", {"holder": "a", "force": 1}, 400, "true or false"),
            ("PUT", "/v1/volumes/web/lease", {"holder": "a"}, 404, "no volume 'web'"),
            ("DELETE", "/v1/volumes/db/lease", None, 400, "'holder' is missing"),
            (
                "DELETE",
                "/v1/volumes/db/lease?holder=a&epoch=-1",
                None,
                400,
                "'epoch' must be",
            ),
            ("DELETE", "/v1/volumes/db/lease?holder=a&epoc=1", None, 400, "'epoc' is not known"),
            ("DELETE", "/v1/volumes/web/lease?holder=a", None, 404, "no volume 'web'"),
            ("POST", "/v1/volumes/web/lease/break", None, 404, "no volume 'web'"),
            ("DELETE", "/v1/connections/x", None, 400, "'x' is no id"),
            ("DELETE", "/v1/volumes/db?fense=1", None, 400, "'fense' is not known"),
        ],
    )
    def test_mistakes(
        self,
        client: ControlClient,
        answering: Answering,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        status: int,
        detail: str,
    ) -> None:
        found, problem, _ = call(answering, method, path, body)
        assert found == status
        assert detail in problem["detail"]
        assert [volume.name for volume in client.volumes()] == ["db"]
