"""Waiting for what must not be left half-way, whatever becomes of who waits.

Owns what it means for a caller to be cancelled then; what the task does its callers know.
"""

from __future__ import annotations

import asyncio
from typing import TypeVar

T = TypeVar("T")


async def to_its_end(task: asyncio.Task[T]) -> T:
    """Return what `task` returns, at its end.

    A caller that is cancelled meanwhile waits for that end all the same: what it holds - locks,
    bars that keep clients away - it must not let go of before.  Then it is cancelled, and does not
    hear how the task ended: an error instead would be taken for a reason to try again.
    """
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # or asyncio would complain that nobody asked
    raise cancelled
