"""Long operations: their states, what is remembered of them, and starting one twice."""

from __future__ import annotations

import asyncio

import pytest

from nbdstore.control import long_operations
from nbdstore.control.events import Events
from nbdstore.control.long_operations import LongOperations, Task
from nbdstore.errors import AlreadyExists, Busy, Cancelled, InvalidArgument, NoSpace, NotFound

REQUEST = {"volume": "db"}


async def for_ever(task: Task) -> None:
    task.total = 10
    task.advance(4)
    await asyncio.Event().wait()


async def at_once(task: Task) -> None:
    task.total, task.result = 10, {"found": 3}
    task.advance(10)


@pytest.fixture
def running() -> LongOperations:
    return LongOperations(Events())


async def test_one_that_succeeds(running: LongOperations) -> None:
    info, is_new = running.start("work", REQUEST, at_once)
    assert (info.state, is_new, info.is_running) == ("running", True, True)
    info = await running.wait(info.id, 60)
    assert (info.state, info.progress, info.result) == ("done", 1.0, {"found": 3})
    assert info.ended is not None
    assert running.list() == [info]
    assert await running.cancel(info.id) == info, "it has ended"


async def test_one_that_fails_says_how(running: LongOperations) -> None:
    async def fail(_task: Task) -> None:
        raise NoSpace("the pool is full")

    info = await running.wait(running.start("work", REQUEST, fail)[0].id, 60)
    assert info.state == "failed"
    assert info.error is not None
    assert (info.error["code"], info.error["detail"]) == ("no-space", "the pool is full")


async def test_a_bug_is_told_without_its_details(
    running: LongOperations, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_task: Task) -> None:
        raise KeyError("secret")

    info = await running.wait(running.start("work", REQUEST, fail)[0].id, 60)
    assert info.error is not None
    assert info.error["code"] == "bug"
    assert "secret" not in info.error["detail"]
    assert "this is a bug" in caplog.text


async def test_one_that_is_cancelled(running: LongOperations) -> None:
    info, _ = running.start("work", REQUEST, for_ever)
    assert (await running.wait(info.id, 0.01)).progress == 0.4
    cancelled = await running.cancel(info.id)
    assert (cancelled.state, cancelled.progress) == ("cancelled", 0.4)


async def test_the_end_of_the_server_cancels_all(running: LongOperations) -> None:
    infos = [running.start("work", REQUEST, for_ever)[0] for _ in range(3)]
    await asyncio.sleep(0)
    await running.close()
    assert [running.find(info.id).state for info in infos] == ["cancelled"] * 3


async def test_the_same_id_is_the_same_operation(running: LongOperations) -> None:
    first, is_new = running.start("work", REQUEST, for_ever, operation_id="mine")
    again, is_new_again = running.start("work", REQUEST, for_ever, operation_id="mine")
    assert (first.id, is_new, is_new_again) == ("mine", True, False)
    assert again == first
    assert len(running.list()) == 1
    await running.cancel("mine")
    assert running.start("work", REQUEST, for_ever, operation_id="mine")[0].state == "cancelled"
    for kind, request in (("other", REQUEST), ("work", {"volume": "web"})):
        with pytest.raises(AlreadyExists, match="use a new id"):
            running.start(kind, request, for_ever, operation_id="mine")


@pytest.mark.parametrize("operation_id", ["", "a/b", "x" * 65, "\u00fc", "a b"])
async def test_ids_that_make_no_sense(running: LongOperations, operation_id: str) -> None:
    with pytest.raises(InvalidArgument, match="id of an operation"):
        running.start("work", REQUEST, for_ever, operation_id=operation_id)


async def test_not_too_many_run(running: LongOperations) -> None:
    for _ in range(long_operations.MAX_RUNNING):
        running.start("work", REQUEST, for_ever)
    with pytest.raises(Busy, match="wait for one"):
        running.start("work", REQUEST, for_ever)
    await running.close()


async def test_what_has_ended_is_remembered_within_bounds(
    running: LongOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_operations, "MAX_ENDED", 2)
    infos = []
    for _ in range(4):
        infos.append(running.start("work", REQUEST, at_once)[0])
        await running.wait(infos[-1].id, 60)
    live, _ = running.start("work", REQUEST, for_ever)
    assert [info.id for info in running.list()] == [infos[2].id, infos[3].id, live.id]
    monkeypatch.setattr(long_operations, "KEPT_S", -1)
    assert [info.id for info in running.list()] == [live.id]
    with pytest.raises(NotFound, match="forgotten"):
        running.find(infos[3].id)
    await running.close()


async def test_events_tell_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_operations, "PROGRESS_EVERY_S", 0)
    events = Events()
    running, listener = LongOperations(events), events.listen()
    info = await running.wait(running.start("work", REQUEST, at_once)[0].id, 60)
    told = [await listener.next(1) for _ in range(3)]
    assert [(event.kind, event.subject) for event in told if event] == [
        ("operation.started", info.id),
        ("operation.progress", info.id),
        ("operation.ended", info.id),
    ]
    assert told[2] is not None
    assert told[2].detail == {"state": "done", "result": {"found": 3}, "error": None}


async def test_one_that_is_attended_ends_with_its_call(running: LongOperations) -> None:
    await running.attend("work", REQUEST, at_once, total=5)
    (info,) = running.list()
    assert (info.state, info.done, info.total) == ("done", 10, 10)


async def test_an_attended_one_that_fails_fails_the_call(running: LongOperations) -> None:
    async def fail(_task: Task) -> None:
        raise NoSpace("the pool is full")

    with pytest.raises(NoSpace, match="is full"):
        await running.attend("work", REQUEST, fail)
    assert [info.state for info in running.list()] == ["failed"]


async def test_an_attended_one_that_others_cancel(running: LongOperations) -> None:
    call = asyncio.create_task(running.attend("work", REQUEST, for_ever))
    await asyncio.sleep(0)
    (info,) = running.list()
    assert (await running.cancel(info.id)).state == "cancelled"
    with pytest.raises(Cancelled, match=info.id):
        await call


async def test_when_the_call_is_cancelled_the_operation_is(running: LongOperations) -> None:
    cleaned = []

    async def work(_task: Task) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    call = asyncio.create_task(running.attend("work", REQUEST, work))
    while not running.list():
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert cleaned == [True]
    assert [info.state for info in running.list()] == ["cancelled"]


async def test_attended_ones_do_not_keep_others_from_starting(running: LongOperations) -> None:
    calls = [
        asyncio.create_task(running.attend("work", REQUEST, for_ever))
        for _ in range(long_operations.MAX_RUNNING)
    ]
    while len(running.list()) < len(calls):
        await asyncio.sleep(0)
    assert running.start("other", REQUEST, at_once)[1]
    await running.close()
    assert all(isinstance(found, Cancelled) for found in await _outcomes(calls))


async def _outcomes(calls: list[asyncio.Task[None]]) -> list[BaseException | None]:
    return await asyncio.gather(*calls, return_exceptions=True)


async def test_what_was_an_estimate_is_known_at_the_end(running: LongOperations) -> None:
    async def less(task: Task) -> None:
        task.advance(4)

    await running.attend("work", REQUEST, less, total=10)
    (info,) = running.list()
    assert (info.state, info.done, info.total, info.progress) == ("done", 4, 4, 1.0)
