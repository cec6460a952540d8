"""Backups of a pool that no server holds; a part of `local`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from typing import Any

from nbdstore.control.backups import Backups
from nbdstore.control.diff import Diff
from nbdstore.control.receiving_model import ReceivedInfo, ReceivingInfo
from nbdstore.control.stream import Buffer

Run = Callable[[Coroutine[Any, Any, Any]], Any]


class LocalBackups:
    """A `BackupService` on an open pool, whose event loop is `run`'s."""

    def __init__(self, backups: Backups, run: Run) -> None:
        self._backups = backups
        self._run = run

    def diff(self, newer: str, older: str | None = None) -> Diff:
        size, older_size, extents = self._backups.diff(newer, older)
        return Diff(size, older_size, self._stepped(extents))

    def send(self, snapshot: str, since: str | None = None) -> Iterator[Buffer]:
        return self._joined(self._backups.send(snapshot, since))

    def resume(self, token: str) -> Iterator[Buffer]:
        return self._joined(self._backups.resume(token))

    def receive(self, name: str, chunks: Iterable[Buffer]) -> ReceivedInfo:
        info: ReceivedInfo = self._run(self._backups.receiving.receive(name, _as_async(chunks)))
        return info

    def receiving(self, name: str) -> ReceivingInfo:
        return self._backups.receiving.show(name)

    def abort_receive(self, name: str) -> None:
        self._run(self._backups.receiving.abort(name))

    def _joined(self, frames: AsyncIterator[list[Buffer]]) -> Iterator[Buffer]:
        for frame in self._stepped(frames):
            yield from frame

    def _stepped(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        async def step() -> Any:
            return await anext(items, None)

        while (item := self._run(step())) is not None:
            yield item


async def _as_async(chunks: Iterable[Buffer]) -> AsyncIterator[Buffer]:
    """Yield from `chunks`, which may block: nothing else runs on the loop of one command."""
    for chunk in chunks:
        yield chunk
