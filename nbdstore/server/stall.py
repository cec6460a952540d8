"""What a stall is: a client that does not get on with its own part while memory waits for it."""

from __future__ import annotations

from typing import NamedTuple, Self

PROGRESS_BYTES = 160 << 10
"""What a client must take, or send, within the timeout if it is not done then: 16 KB/s by the
default, so that even a slow network is no stall."""


class Stall(NamedTuple):
    """A client that we wait for: since when, and how far it was then."""

    since_s: float
    n_bytes: int

    @classmethod
    def seen(cls, before: Self | None, now_s: float, n_bytes: int) -> Self:
        """Judge a client that is waited for now: it stalls as before, or anew if it has got on."""
        if before is None or n_bytes - before.n_bytes >= PROGRESS_BYTES:
            return cls(now_s, n_bytes)
        return before
