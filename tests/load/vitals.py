"""A process's memory and descriptors over time, from /proc: is it flat?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """One look at a process: resident bytes, of which anonymous, and open descriptors."""

    at_s: float
    rss: int
    n_descriptors: int


def sample(pid: int, at_s: float) -> Sample:
    """Look at a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.M)
    assert found, "the kernel tells no RssAnon"
    descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    return Sample(at_s, int(found[1]) << 10, len(descriptors))


def growth(samples: list[Sample]) -> tuple[int, int]:
    """How much more memory, and how many more descriptors, the last third has than the first.

    The least of each third is compared: a peak that goes away again is no leak.
    """
    third = len(samples) // 3
    assert third, "too few samples to compare"
    first, last = samples[:third], samples[-third:]
    return (
        min(one.rss for one in last) - min(one.rss for one in first),
        min(one.n_descriptors for one in last) - min(one.n_descriptors for one in first),
    )
