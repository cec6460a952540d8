"""Operations that take long: they run on, tell how far they are, and can be cancelled.

Owns their life and how long they are remembered; what one does is a coroutine of its own, which
gets a `Task` to report to. An id given by the caller makes the start idempotent: who did not hear
the answer starts it again under the same id and gets the same operation.

    state        leaves it when
    -----------  ---------------------------------------------------------------
    running      the coroutine returns -> done; raises -> failed; is cancelled -> cancelled
    done, failed, cancelled
                 an hour has passed, or MAX_ENDED newer ones have ended -> forgotten

An operation does not outlive the server: what must go on after a restart keeps its own record of
how far it came, as a scrub does. One that is attended (`attend`) does not outlive the call that
waits for it, either: it is here to be seen, and to be cancelled by others.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import re
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

from nbdstore.control import problems
from nbdstore.control.events import Events
from nbdstore.control.model import OperationInfo
from nbdstore.errors import (
    AlreadyExists,
    Busy,
    Cancelled,
    InvalidArgument,
    NbdstoreError,
    NotFound,
)

MAX_RUNNING = 16
"""Of those that nobody attends; the others are as many as there are callers."""
MAX_ENDED = 256
KEPT_S = 3600.0
PROGRESS_EVERY_S = 1.0
_ID = re.compile(r"[A-Za-z0-9._~-]{1,64}")

log = logging.getLogger(__name__)


class Task:
    """One operation, as the coroutine that does it reports to it.

    Attributes:
        done, total: how far it is, in bytes; `total` may be corrected on the way.
        result: what it found so far; JSON-able.
    """

    def __init__(
        self, operation_id: str, kind: str, request: dict[str, Any], *, is_attended: bool = False
    ) -> None:
        self.id = operation_id
        self.kind = kind
        self.request = request
        self.is_attended = is_attended
        self.done = 0
        self.total = 0
        self.result: dict[str, Any] = {}
        self.state = "running"
        self.error: dict[str, Any] | None = None
        self.started = _now()
        self.ended: str | None = None
        self.ended_s = 0.0
        self.running: asyncio.Task[None] | None = None
        self.on_progress: Callable[[], None] = lambda: None

    def advance(self, n_bytes: int) -> None:
        """Report that `n_bytes` more are done."""
        self.done += n_bytes
        self.on_progress()

    def reach(self, n_bytes: int) -> None:
        """Report that `n_bytes` are done in all."""
        self.advance(n_bytes - self.done)

    def info(self) -> OperationInfo:
        """Describe it."""
        if self.state == "done":
            progress = 1.0
        else:
            progress = min(self.done / self.total, 1.0) if self.total else 0.0
        return OperationInfo(
            id=self.id,
            kind=self.kind,
            state=self.state,
            progress=round(progress, 6),
            done=self.done,
            total=max(self.total, self.done),
            request=dict(self.request),
            result=dict(self.result),
            error=self.error,
            started=self.started,
            ended=self.ended,
        )


Work = Callable[[Task], Coroutine[Any, Any, None]]


class LongOperations:
    """The long operations of one pool."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._tasks: dict[str, Task] = {}

    def start(
        self,
        kind: str,
        request: dict[str, Any],
        work: Work,
        *,
        total: int = 0,
        result: dict[str, Any] | None = None,
        operation_id: str | None = None,
    ) -> tuple[OperationInfo, bool]:
        """Start an operation, or find the one that has this id; return it and whether it is new.

        Arguments:
            total, result: of the Task to begin with.

        Raises:
            InvalidArgument: the id makes no sense.
            AlreadyExists: the id is that of another operation, or of one that was asked otherwise.
            Busy: too many are running.
        """
        if (known := self._known(kind, request, operation_id)) is not None:
            return known.info(), False
        n_running = sum(
            task.state == "running" and not task.is_attended for task in self._tasks.values()
        )
        if n_running >= MAX_RUNNING:
            raise Busy(f"{n_running} operations are running: wait for one, or cancel one")
        task = Task(operation_id or uuid.uuid4().hex, kind, request)
        task.total, task.result = total, result or {}
        self._run(task, work)
        return task.info(), True

    async def attend(
        self, kind: str, request: dict[str, Any], work: Work, *, total: int = 0
    ) -> None:
        """Run an operation, and return at its end; it ends at once when the caller is cancelled.

        Raises:
            Cancelled: somebody else has cancelled it. And all that `work` raises.
        """
        task = Task(uuid.uuid4().hex, kind, request, is_attended=True)
        task.total = total
        running = self._run(task, work)
        try:
            await asyncio.wait([running])
        finally:
            if not running.done():
                running.cancel()
                await asyncio.wait([running])
        if running.cancelled():
            raise Cancelled(f"{kind} was cancelled, as operation {task.id}")
        running.result()

    def _run(self, task: Task, work: Work) -> asyncio.Task[None]:
        self._forget_old()
        self._tasks[task.id] = task
        self._events.tell("operation.started", task.id, kind=task.kind, request=task.request)
        task.on_progress = _Progress(task, self._events).tell
        task.running = asyncio.create_task(work(task))
        task.running.add_done_callback(lambda _: self._ended(task))
        return task.running

    def known(
        self, kind: str, request: dict[str, Any], operation_id: str | None
    ) -> OperationInfo | None:
        """Return the operation that was started by the same call before; None if none was.

        Raises:
            InvalidArgument, AlreadyExists: as `start`.
        """
        task = self._known(kind, request, operation_id)
        return task.info() if task else None

    def _known(self, kind: str, request: dict[str, Any], operation_id: str | None) -> Task | None:
        if operation_id is None:
            return None
        if not _ID.fullmatch(operation_id):
            raise InvalidArgument(
                f"'{operation_id:.80}' cannot be the id of an operation: give up to 64 letters, "
                "digits and ._~-"
            )
        self._forget_old()
        task = self._tasks.get(operation_id)
        if task is not None and (task.kind, task.request) != (kind, request):
            raise AlreadyExists(
                f"operation '{operation_id}' is another one ({task.kind}): use a new id"
            )
        return task

    def _ended(self, task: Task) -> None:
        assert task.running is not None
        if task.running.cancelled():
            task.state = "cancelled"
        elif (error := task.running.exception()) is None:
            task.state = "done"
            task.total = task.done  # what was an estimate is known now
        else:
            if not isinstance(error, NbdstoreError):
                log.error("%s %s: this is a bug", task.kind, task.id, exc_info=error)
            task.state, task.error = "failed", problems.to_json(error)
        task.ended, task.ended_s = _now(), asyncio.get_running_loop().time()
        info = task.info()
        log.info("%s %s: %s", task.kind, task.id, task.state)
        self._events.tell(
            "operation.ended", task.id, state=info.state, result=info.result, error=info.error
        )

    def list(self) -> list[OperationInfo]:
        """List the operations that run, and those that ended within the hour, oldest first."""
        self._forget_old()
        return [task.info() for task in self._tasks.values()]

    def find(self, operation_id: str) -> OperationInfo:
        """Describe an operation; NotFound if there is none, or none any more."""
        return self._find(operation_id).info()

    async def wait(self, operation_id: str, timeout_s: float) -> OperationInfo:
        """Return at the end of an operation, or after `timeout_s`; see `find`."""
        task = self._find(operation_id)
        if task.running is not None and not task.running.done():
            await asyncio.wait([task.running], timeout=timeout_s)
        return task.info()

    async def cancel(self, operation_id: str) -> OperationInfo:
        """End an operation and return when it has ended; one that has ended stays as it is."""
        task = self._find(operation_id)
        if task.running is not None and not task.running.done():
            task.running.cancel()
            await asyncio.wait([task.running])
        return task.info()

    async def close(self) -> None:
        """Cancel all that run, and wait for their ends."""
        running = [task.running for task in self._tasks.values() if task.running is not None]
        for one in running:
            one.cancel()
        if running:
            await asyncio.wait(running)

    def _find(self, operation_id: str) -> Task:
        self._forget_old()
        task = self._tasks.get(operation_id)
        if task is None:
            raise NotFound(
                f"there is no operation '{operation_id:.80}': those that have ended are forgotten "
                "after an hour, or when the server stops"
            )
        return task

    def _forget_old(self) -> None:
        now_s = asyncio.get_running_loop().time()
        ended = [task for task in self._tasks.values() if task.ended is not None]
        ended.sort(key=lambda task: task.ended_s)
        surplus = max(0, len(ended) - MAX_ENDED)
        for position, task in enumerate(ended):
            if position < surplus or now_s - task.ended_s > KEPT_S:
                del self._tasks[task.id]


class _Progress:
    """Tells of an operation's progress, now and then."""

    def __init__(self, task: Task, events: Events) -> None:
        self._task = task
        self._events = events
        self._told_s = asyncio.get_running_loop().time()

    def tell(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._told_s >= PROGRESS_EVERY_S:
            self._told_s = now_s
            info = self._task.info()
            self._events.tell(
                "operation.progress",
                info.id,
                progress=info.progress,
                done=info.done,
                total=info.total,
            )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
