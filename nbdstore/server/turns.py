"""Steps that are put off to the event loop's next turn, and done once in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class OnceATurn:
    """Calls a step in the loop's next turn, once for all who have asked for it in this one.

    Attributes:
        is_due: it was asked for, and not called yet.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, step: Callable[[], None]) -> None:
        self._loop = loop
        self._step = step
        self.is_due = False

    def __call__(self) -> None:
        """Have the step called."""
        if not self.is_due:
            self.is_due = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        self.is_due = False
        self._step()
