"""The event loop of a world: virtual time, sockets that are simulated, tasks that have an owner.

Owns what asyncio and the operating system leave to chance: the order in which sets of tasks are
walked, and which tasks belong to which process of the world.  Who is ready when is the network's.

A process of the world is a context: whatever runs in it, and whatever that starts, is its own.
When it is killed its tasks are ghosts, until they have noticed: what they do has no effect.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Final

from tests.store.virtual_clock import VirtualLoop

N_RECENT: Final = 400
MOST_TURNS: Final = 100_000
"""Turns of the loop at one moment, after which somebody spins."""
_GHOST_S: Final = 1.0
"""After this a ghost that was cancelled, and has not ended, is cancelled again."""


class Trace:
    """Everything that happens in a world, in its order: a running digest, and the last lines.

    Attributes:
        now: number of the last event; the time of the model, which knows no two at once.
        echo: called with each line, for a person who replays a seed.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._digest = hashlib.blake2b(digest_size=16)
        self.now = 0
        self.recent: deque[str] = deque(maxlen=N_RECENT)
        self.echo: Callable[[str], None] | None = None

    def note(self, *what: object) -> int:
        """Take note of an event; return its number."""
        self.now += 1
        line = f"{self.now} {self._loop.time():.6f} " + " ".join(map(str, what))
        self._digest.update(line.encode())
        self.recent.append(line)
        if self.echo is not None:
            self.echo(line)
        return self.now

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()


class Process:
    """Something that can be killed: the tasks that it has begun.

    Attributes:
        alive: False from the moment of its death.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self.context = contextvars.copy_context()
        self.context.run(PROCESS.set, self)

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run `work` as a task of this process."""
        return asyncio.get_running_loop().create_task(work, context=self.context.copy())

    def ended(self, task: asyncio.Task[Any]) -> None:
        """One of its tasks has ended; a ghost's errors are nobody's."""
        self.tasks.pop(task, None)
        if not self.alive and not task.cancelled():
            task.exception()

    async def bury(self) -> None:
        """Cancel what still runs, and wait for its end.

        What puts things in order when it is cancelled may wait for what is dead: once more, then.
        """
        assert not self.alive
        while self.tasks:
            for task in list(self.tasks):
                task.cancel()
            await asyncio.wait(list(self.tasks), timeout=_GHOST_S)


PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


def is_ghost() -> bool:
    """Whether who calls belongs to a process that is dead."""
    process = PROCESS.get()
    return process is not None and not process.alive


class NumberedTask(asyncio.Task[Any]):
    """A task that sets of tasks have always in the same order."""

    _numbers = itertools.count(1)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.number = next(self._numbers)
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self.number


class Watch:
    """A callback that is called once in each turn of the loop while its condition holds."""

    def __init__(self, loop: asyncio.AbstractEventLoop, condition: Callable[[], bool]) -> None:
        self._loop = loop
        self._condition = condition
        self._call: tuple[Callable[..., object], tuple[Any, ...]] | None = None
        self._context = contextvars.copy_context()
        self._scheduled = False

    def set(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._call = callback, args
        self._context = contextvars.copy_context()
        self.poke()

    def clear(self) -> bool:
        had, self._call = self._call is not None, None
        return had

    @property
    def is_set(self) -> bool:
        return self._call is not None

    def poke(self) -> None:
        """The condition may hold now."""
        if self._call is not None and not self._scheduled and self._condition():
            self._scheduled = True
            self._loop.call_soon(self._fire, context=self._context)

    def _fire(self) -> None:
        self._scheduled = False
        if self._call is None or not self._condition():
            return
        callback, args = self._call
        try:
            callback(*args)
        finally:
            self.poke()


class WorldLoop(VirtualLoop):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        NumberedTask._numbers = itertools.count(1)
        self.set_task_factory(_make_task)
        self._moment = 0.0
        self._n_turns = 0

    def _run_once(self) -> None:
        self._n_turns += 1
        if self.time() > self._moment:
            self._moment, self._n_turns = self.time(), 0
        elif self._n_turns > MOST_TURNS:
            raise RuntimeError("livelock: many turns, and time does not go on")
        super()._run_once()  # type: ignore[misc]

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:
        fd.reading.set(callback, args)

    def remove_reader(self, fd: Any) -> bool:
        cleared: bool = fd.reading.clear()
        return cleared

    def add_writer(self, fd: Any, callback: Any, *args: Any) -> None:
        fd.writing.set(callback, args)

    def remove_writer(self, fd: Any) -> bool:
        cleared: bool = fd.writing.clear()
        return cleared


def _make_task(
    loop: asyncio.AbstractEventLoop,
    work: Coroutine[Any, Any, Any],
    context: contextvars.Context | None = None,
) -> NumberedTask:
    process = context.get(PROCESS) if context is not None else PROCESS.get()
    task = NumberedTask(work, loop=loop, context=context)
    if process is not None:
        process.tasks[task] = None
        task.add_done_callback(process.ended)
    return task
