"""Watches a pool and tells what becomes of it as events: its state, held writes, damage.

Looks once a second: the store has no callbacks for this, and what lasts less than that harms
nobody. Knows the pool's status only.
"""

from __future__ import annotations

import asyncio
from typing import Any

from nbdstore.control.contracts import PoolLike
from nbdstore.control.events import Events

LOOK_EVERY_S = 1.0


class PoolWatch:
    """What a pool was like at the last look."""

    def __init__(self, pool: PoolLike, events: Events) -> None:
        self._pool = pool
        self._events = events
        self._seen = pool.status()

    async def run(self) -> None:
        """Look now and then, for ever."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self.look()

    def look(self) -> None:
        """Tell what has changed since the last look."""
        before, now = self._seen, self._pool.status()
        self._seen = now
        if now["state"] != before["state"]:
            self._events.tell(
                "pool.state",
                state=now["state"],
                before=before["state"],
                failure=now["failure"],
                shortage=now["shortage"],
            )
        if bool(now["held_writes"]) != bool(before["held_writes"]):
            self._events.tell("pool.held", held_writes=now["held_writes"])
        if now["corruptions"] > before["corruptions"]:
            self._events.tell("pool.corruption", **_found(before, now))


def _found(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    return {
        "count": now["corruptions"] - before["corruptions"],
        "detail": now["newest_corruption"],
    }
