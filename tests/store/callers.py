"""Callers that go away in the middle of what they have asked for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any


async def cancelled_after(n_turns: int, change: Coroutine[Any, Any, Any]) -> None:
    """Begin `change`, cancel it after so many turns of the loop, and wait for its end.

    It may have been over before; what else than that it was cancelled ended it is raised.
    """
    task = asyncio.create_task(change)
    for _ in range(n_turns):
        await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
