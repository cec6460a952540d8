"""A deletion that takes long holds up nobody who changes something else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest

from nbdstore.errors import Busy, NotFound
from nbdstore.store import Image, differences
from nbdstore.store.layout import I64
from nbdstore.store.snapshot import Snapshot
from tests.control.real_pool import TIMEOUT_S, Served

MIB = 1 << 20


class Search:
    """Holds up the searches of deletions for what they free."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.passed = threading.Event()

    async def blocks_alone(self, snapshot: Snapshot, heirs: Sequence[Image]) -> AsyncIterator[I64]:
        if snapshot._n_going:  # else somebody only asks what it holds alone
            self.reached.set()
            while not self.passed.is_set():
                await asyncio.sleep(0)
        async for slots in differences.blocks_alone(snapshot, heirs):
            yield slots


@pytest.fixture
def search() -> Iterator[Search]:
    found = Search()
    with mock.patch("nbdstore.store.snapshots.blocks_alone", found.blocks_alone):
        yield found
        found.passed.set()


@pytest.fixture
def pool(served: Served) -> Served:
    """A pool with ``db``, of which there are snapshots ``a`` and ``b``, and ``logs``."""

    async def fill() -> None:
        volume = await served.pool.create_volume("db", 4 * MIB)
        for name in ("a", "b"):
            await volume.write(0, name.encode() * MIB)
            await served.pool.create_snapshots([(volume, name)])
        await served.pool.create_volume("logs", MIB)

    served.run(fill())
    return served


def delete_snapshot(pool: Served) -> None:
    pool.client.delete_snapshot("db@b")


def delete_volume(pool: Served) -> None:
    pool.client.delete_volume("db", snapshots=True, now=True)


def purge(pool: Served) -> None:
    pool.client.delete_volume("db", snapshots=True)
    pool.client.purge("db")


@pytest.mark.parametrize("delete", [delete_snapshot, delete_volume, purge])
def test_other_changes_do_not_wait(
    pool: Served, search: Search, delete: Callable[[Served], None]
) -> None:
    client = pool.client
    with ThreadPoolExecutor(1) as threads:
        deleting = threads.submit(delete, pool)
        assert search.reached.wait(TIMEOUT_S)
        try:
            client.create_volume("web", MIB)
            client.update_volume("web", size=2 * MIB, new_name="net", iops=100)
            client.create_snapshots(["logs@a", "net@a"])
            client.clone("logs@a", "copy")
            client.rollback("logs@a")
            client.acquire_lease("net", "node-1")
            client.delete_volume("copy")
            assert {info.snapshot for info in client.snapshots(unique=True)} >= {"logs@a", "net@a"}
            assert not deleting.done()
        finally:
            search.passed.set()
        deleting.result(TIMEOUT_S)
    left = {"db", "logs", "net"} if delete is delete_snapshot else {"logs", "net"}
    assert {info.name for info in client.volumes()} == left
    assert [info.name for info in client.trash()] == ["copy"]


def test_what_is_being_deleted_cannot_be_used(pool: Served, search: Search) -> None:
    client = pool.client
    with ThreadPoolExecutor(1) as threads:
        deleting = threads.submit(delete_snapshot, pool)
        assert search.reached.wait(TIMEOUT_S)
        try:
            for use in (
                lambda: client.clone("db@b", "copy"),
                lambda: client.rollback("db@b"),
                lambda: next(client.backups.send("db@b")),
            ):
                with pytest.raises(NotFound, match="is being deleted"):
                    use()
            (shown,) = [info for info in client.snapshots(unique=True) if info.name == "b"]
            assert shown.unique is None
        finally:
            search.passed.set()
        deleting.result(TIMEOUT_S)


def test_a_deletion_by_uuid_is_repeated_while_the_first_runs(pool: Served, search: Search) -> None:
    client = pool.client
    (uuid,) = [info.uuid for info in client.snapshots("db") if info.name == "b"]
    with ThreadPoolExecutor(3) as threads:
        deletions = [threads.submit(client.delete_snapshot, "db@b", uuid=uuid) for _ in range(2)]
        unnamed = threads.submit(delete_snapshot, pool)
        assert search.reached.wait(TIMEOUT_S)
        try:
            pool.run(all_going(pool.pool.snapshots["db@b"], 4))
        finally:
            search.passed.set()
        found = [deletion.exception(TIMEOUT_S) for deletion in [*deletions, unnamed]]
    assert [error for error in found[:2] if error] == []
    assert found[2] is None or isinstance(found[2], NotFound)
    assert sorted(pool.pool.snapshots) == ["db@a"]


async def all_going(snapshot: Snapshot, n_calls: int) -> None:
    """Return when `n_calls` hold it as going: each deletion does, and its search once more."""
    while snapshot._n_going < n_calls:
        await asyncio.sleep(0)


def test_a_volume_deleted_by_uuid_is_not_told_to_be_absent_while_that_lasts(
    pool: Served, search: Search
) -> None:
    client = pool.client
    uuid = client.volume("db").uuid
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(client.delete_volume, "db", snapshots=True, now=True, uuid=uuid)
        assert search.reached.wait(TIMEOUT_S)
        try:
            with pytest.raises(Busy, match="db is being deleted"):
                client.delete_volume("db", snapshots=True, now=True, uuid=uuid)
        finally:
            search.passed.set()
        first.result(TIMEOUT_S)
    client.delete_volume("db", snapshots=True, now=True, uuid=uuid)
    assert client.trash() == []


def test_a_volume_whose_snapshots_are_read_is_not_even_put_into_the_trash(pool: Served) -> None:
    with (
        pool.pool.snapshots["db@a"].in_use(),
        pytest.raises(Busy, match="db@a is being read"),
    ):
        pool.client.delete_volume("db", snapshots=True, now=True)
    assert [info.name for info in pool.client.volumes()] == ["db", "logs"]
    assert pool.client.trash() == []
