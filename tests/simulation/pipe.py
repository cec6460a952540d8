"""What stands between a sender and a receiver of a backup: a pipe, or ssh."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Final

_MOST: Final = 4
"""Chunks that it holds."""


class Pipe:
    """It ends when either end is gone; the receiver then gets what is in it, and an end.

    Attributes:
        error: why the sender gave up.
    """

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._changed = asyncio.Event()
        self._is_ended = False
        self.error: Exception | None = None

    async def put(self, chunk: bytes) -> None:
        """Put a chunk into it; BrokenPipeError if nobody takes it out any more."""
        while len(self._chunks) >= _MOST and not self._is_ended:
            await self._changed.wait()
        if self._is_ended:
            raise BrokenPipeError
        self._chunks.append(chunk)
        self._tell()

    def end(self) -> None:
        """One of both ends is gone."""
        self._is_ended = True
        self._tell()

    async def chunks(self) -> AsyncIterator[bytes]:
        """Take out what comes, until the end."""
        while True:
            while not self._chunks:
                if self._is_ended:
                    return
                await self._changed.wait()
            chunk = self._chunks.popleft()
            self._tell()
            yield chunk

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
