"""send, receive and diff as operations: seen while they run, how far they are, and cancelled."""

from __future__ import annotations

import asyncio
import gc
import http.client
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from nbdstore.control import diff, streaming
from nbdstore.control.backup_stream import BackupReader, BackupWriter
from nbdstore.control.model import OperationInfo
from nbdstore.control.receiving_model import ReceivedInfo
from nbdstore.control.stream import Buffer
from nbdstore.errors import Busy, Cancelled
from tests.control.real_pool import MIB, TIMEOUT_S, Served
from tests.store.workload import joined

SIZE = 32 * MIB
"""More than all buffers between a server and who does not read."""


@pytest.fixture
def filled(served: Served) -> Served:
    """A pool with ``db@a`` of random bytes."""
    served.fill(SIZE)
    return served


def begun(pool: Served, kind: str) -> OperationInfo:
    """The running operation of that kind, once it has done something."""

    async def look() -> OperationInfo:
        while True:
            for info in pool.operations.running.list():
                if info.kind == kind and info.is_running and info.done:
                    return info
            await asyncio.sleep(0)

    return pool.run(look())


def assert_cut_off_and_free(
    served: Served, operation_id: str, response: http.client.HTTPResponse
) -> None:
    """Cancel what a stopped reader has asked for: it is cut off, and its snapshot is free."""
    with mock.patch.object(streaming, "GOODBYE_S", 0.01):
        assert served.client.cancel_operation(operation_id).state == "cancelled"
    served.client.delete_snapshot("db@a")  # nobody holds it any more
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        response.read()


def content(pool: Served, name: str) -> bytes:
    return joined(pool.run(pool.pool.snapshots[name].read(0, SIZE)))


class Sender:
    """Gives the beginning of a stream, and the rest when it is told to."""

    def __init__(self, stream: bytes, n_first: int) -> None:
        self._stream = stream
        self._n_first = n_first
        self.go_on = threading.Event()

    def chunks(self) -> Iterator[Buffer]:
        yield self._stream[: self._n_first]
        assert self.go_on.wait(TIMEOUT_S)
        for at in range(self._n_first, len(self._stream), MIB):
            yield self._stream[at : at + MIB]


def begin_to_receive(
    pool: Served, sender: Sender, threads: ThreadPoolExecutor
) -> Future[ReceivedInfo]:
    return threads.submit(pool.client.backups.receive, "copy", sender.chunks())


def test_a_send_is_an_operation_while_it_runs(filled: Served) -> None:
    chunks = filled.client.backups.send("db@a")
    received = [next(chunks)]
    info = begun(filled, "send")
    assert info.request == {"snapshot": "db@a", "since": None, "start": 0}
    assert (info.total, info.state) == (SIZE, "running")
    assert 0 < info.done < SIZE
    received += chunks
    ended = filled.client.operation(info.id, wait_s=60)
    assert (ended.state, ended.progress, ended.done) == ("done", 1.0, SIZE)
    assert filled.client.backups.receive("copy", received).data == SIZE


def test_a_cancelled_send_ends_as_what_is_not_whole(filled: Served) -> None:
    chunks = filled.client.backups.send("db@a")
    received = [next(chunks)]
    info = begun(filled, "send")
    with saying_goodbye() as begun_to, ThreadPoolExecutor(1) as threads:
        call = threads.submit(filled.client.cancel_operation, info.id)
        assert begun_to.wait(TIMEOUT_S)
        received += chunks
        assert call.result(TIMEOUT_S).state == "cancelled"
    reader = BackupReader()
    with pytest.raises(Cancelled, match="told to end"):
        for chunk in received:
            for _ in reader.feed(chunk):
                pass
    assert not reader.finished
    with pytest.raises(Cancelled):
        filled.client.backups.receive("copy", received)
    half = filled.client.backups.receiving("copy")
    assert 0 < half.position < SIZE
    filled.client.backups.receive("copy", filled.client.backups.resume(half.token))
    assert content(filled, "copy@a") == content(filled, "db@a")
    filled.client.delete_snapshot("db@a")  # nobody holds it any more


@contextmanager
def saying_goodbye(owner: object = BackupWriter) -> Iterator[threading.Event]:
    """Have all the time for the end of a cancelled stream; the event tells that it has come."""
    begun_to, failed = threading.Event(), owner.failed  # type: ignore[attr-defined]

    def say(*about: Any) -> Any:
        begun_to.set()
        return failed(*about)

    with (
        mock.patch.object(owner, "failed", say),
        mock.patch.object(streaming, "GOODBYE_S", TIMEOUT_S),
    ):
        yield begun_to


def test_a_cancelled_send_hangs_up_on_a_reader_that_has_stopped(filled: Served) -> None:
    connection = filled.connect()
    connection.request("GET", "/v1/snapshots/db@a/stream")
    response = connection.getresponse()
    info = begun(filled, "send")
    assert_cut_off_and_free(filled, info.id, response)
    connection.close()


def test_a_reader_that_leaves_a_cancelled_send_is_no_fault(filled: Served) -> None:
    connection = filled.connect()
    connection.request("GET", "/v1/snapshots/db@a/stream")
    response = connection.getresponse()
    info = begun(filled, "send")
    faults: list[dict[str, Any]] = []
    filled.loop.call_soon_threadsafe(
        filled.loop.set_exception_handler, lambda _, context: faults.append(context)
    )
    with saying_goodbye() as begun_to, ThreadPoolExecutor(1) as threads:
        call = threads.submit(filled.client.cancel_operation, info.id)
        assert begun_to.wait(TIMEOUT_S)
        response.close()
        connection.close()
        assert call.result(TIMEOUT_S).state == "cancelled"

    async def collect() -> None:
        gc.collect()  # who has not told of a failure does so now

    filled.run(collect())
    assert faults == []


def test_a_send_whose_receiver_leaves_has_failed(filled: Served) -> None:
    connection = filled.connect()
    connection.request("GET", "/v1/snapshots/db@a/stream")
    connection.getresponse().read(1)
    info = begun(filled, "send")
    connection.close()
    ended = filled.client.operation(info.id, wait_s=60)
    assert ended.state == "failed"
    assert ended.error is not None
    assert "has left" in ended.error["detail"]


def test_a_receive_is_an_operation_while_it_runs(filled: Served) -> None:
    stream = b"".join(filled.client.backups.send("db@a"))
    sender = Sender(stream, len(stream) // 2)
    with ThreadPoolExecutor(1) as threads:
        call = begin_to_receive(filled, sender, threads)
        info = begun(filled, "receive")
        assert info.request == {"volume": "copy", "snapshot": "db@a", "since": None}
        assert (info.total, info.state) == (SIZE, "running")
        assert 0 < info.done < SIZE
        sender.go_on.set()
        assert call.result(TIMEOUT_S).data == SIZE
    assert filled.client.operation(info.id, wait_s=60).done == SIZE


def test_a_cancelled_receive_goes_on_later(filled: Served) -> None:
    stream = b"".join(filled.client.backups.send("db@a"))
    sender = Sender(stream, len(stream) // 2)
    with ThreadPoolExecutor(1) as threads:
        call = begin_to_receive(filled, sender, threads)
        info = begun(filled, "receive")
        ended = filled.client.cancel_operation(info.id)
        assert ended.state == "cancelled"
        half = filled.client.backups.receiving("copy")
        assert not half.running
        assert half.position == ended.done > 0
        sender.go_on.set()
        with pytest.raises(Cancelled, match=info.id):
            call.result(TIMEOUT_S)
    filled.client.backups.receive("copy", filled.client.backups.resume(half.token))
    assert content(filled, "copy@a") == content(filled, "db@a")


def test_a_cancelled_receive_may_be_given_up(filled: Served) -> None:
    stream = b"".join(filled.client.backups.send("db@a"))
    sender = Sender(stream, len(stream) // 2)
    with ThreadPoolExecutor(1) as threads:
        call = begin_to_receive(filled, sender, threads)
        filled.client.cancel_operation(begun(filled, "receive").id)
        filled.client.backups.abort_receive("copy")
        sender.go_on.set()
        with pytest.raises(Cancelled):
            call.result(TIMEOUT_S)
    assert [info.name for info in filled.client.volumes()] == ["db"]


# -- diff ----------------------------------------------------------------------------------------

BLOCK = 4096
N_EXTENTS = 20_000
"""Their lines are more than all buffers between a server and who does not read."""


@pytest.fixture
def scattered(served: Served) -> Served:
    """A pool with ``db@a``, of which every other block is written."""

    async def fill() -> None:
        volume, data = await served.pool.create_volume("db", 2 * N_EXTENTS * BLOCK), b"x" * BLOCK
        for first in range(0, N_EXTENTS, 100):
            assert volume.write_now([(2 * n * BLOCK, data) for n in range(first, first + 100)])
        await served.pool.create_snapshots([(volume, "a")])

    served.run(fill())
    return served


def test_a_diff_is_an_operation_while_it_runs(scattered: Served) -> None:
    found = scattered.client.backups.diff("db@a")
    next(found.extents)
    info = begun(scattered, "diff")
    assert (info.request, info.total) == ({"newer": "db@a", "older": None}, found.size)
    assert 0 < info.done < info.total
    assert sum(1 for _ in found.extents) == N_EXTENTS - 1
    ended = scattered.client.operation(info.id, wait_s=60)
    assert (ended.state, ended.progress) == ("done", 1.0)


def test_a_cancelled_diff_hangs_up_on_a_reader_that_has_stopped(scattered: Served) -> None:
    connection = scattered.connect()
    with mock.patch.object(diff, "_LINES_AT_ONCE", N_EXTENTS):
        connection.request("GET", "/v1/diff?newer=db@a")
        response = connection.getresponse()
        info = begun(scattered, "diff")
    with pytest.raises(Busy, match="is being read"):
        scattered.client.delete_snapshot("db@a")
    assert_cut_off_and_free(scattered, info.id, response)
    connection.close()


def test_a_cancelled_diff_tells_its_reader_so(scattered: Served) -> None:
    found = scattered.client.backups.diff("db@a")
    next(found.extents)
    info = begun(scattered, "diff")
    with saying_goodbye(diff) as begun_to, ThreadPoolExecutor(1) as threads:
        call = threads.submit(scattered.client.cancel_operation, info.id)
        assert begun_to.wait(TIMEOUT_S)
        with pytest.raises(Cancelled, match="told to end"):
            list(found.extents)
        assert call.result(TIMEOUT_S).state == "cancelled"


@pytest.mark.parametrize("kind", ["send", "receive", "diff"])
def test_what_has_reached_the_end_says_so_though_that_is_a_hole(served: Served, kind: str) -> None:
    served.client.create_volume("db", SIZE)
    served.client.create_snapshots(["db@a"])
    backups = served.client.backups
    assert list(backups.diff("db@a").extents) == []
    backups.receive("copy", backups.send("db@a"))
    (info,) = [info for info in served.client.operations() if info.kind == kind]
    ended = served.client.operation(info.id, wait_s=60)
    assert (ended.state, ended.done, ended.total) == ("done", SIZE, SIZE)
