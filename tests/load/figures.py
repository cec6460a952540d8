"""What a load has done so far: counted, and the slowest of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Figures:
    """Counts over all connections.

    Arguments:
        requests: acknowledged, by what they were.
        bytes_written, bytes_verified: of content.
        slowest_s: seconds that the slowest request took, and what it was.
    """

    requests: Counter[str] = field(default_factory=Counter)
    bytes_written: int = 0
    bytes_verified: int = 0
    slowest_s: float = 0.0
    slowest: str = ""

    @property
    def n_requests(self) -> int:
        return self.requests.total()

    def took(self, kind: str, seconds: float) -> None:
        """A request was answered."""
        self.requests[kind] += 1
        if seconds > self.slowest_s:
            self.slowest_s, self.slowest = seconds, kind

    def to_json(self) -> dict[str, Any]:
        return {
            "requests": dict(sorted(self.requests.items())),
            "n_requests": self.n_requests,
            "bytes_written": self.bytes_written,
            "bytes_verified": self.bytes_verified,
            "slowest_s": round(self.slowest_s, 3),
            "slowest": self.slowest,
        }
