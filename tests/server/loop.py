"""Waiting for what other tasks of the same loop do, without a sleep."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

DEADLINE_S = 20.0
"""Later, it is a failure; nothing waits for it to pass."""


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until something is so."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0)
