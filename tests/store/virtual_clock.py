"""An event loop whose clock jumps: sleeping costs nothing, and who would wait for ever is told.

Owns the loop; for tests whose host is simulated, too.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

R = TypeVar("R")

LIMIT_S: Final = 20_000.0
"""Virtual seconds after which a test has hung."""


class _Selector(selectors.SelectSelector):
    """Never waits: moves the clock on instead."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("deadlock: everybody waits for somebody else")
        if timeout > 0:
            self.now += timeout
            if self.now > LIMIT_S:
                raise RuntimeError("hung: virtual hours have passed")
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def run(main: Coroutine[Any, Any, R]) -> R:
    """Like asyncio.run, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        found: list[R] = []

        async def keep() -> None:
            found.append(await main)

        runner.run(keep())  # the runner calls repr() on what its task returns
        return found[0]
