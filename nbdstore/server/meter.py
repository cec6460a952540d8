"""How fast a connection's counters have grown over the last seconds.

Owns a few samples of them. Nobody counts per request for this: whoever looks after the clients
takes a sample now and then, and who asks gets the growth since the oldest that is kept.
"""

from __future__ import annotations

from collections import deque

SAMPLE_EVERY_S = 1.0
"""Samples that follow sooner are not kept."""
N_SAMPLES = 5


class Meter:
    """The recent rates of some counters.

    Arguments:
        now_s: of a monotonic clock.
        counts: the counters; as many, and in the same order, in all calls.
    """

    def __init__(self, now_s: float, counts: tuple[int, ...]) -> None:
        self._samples: deque[tuple[float, tuple[int, ...]]] = deque(maxlen=N_SAMPLES)
        self._samples.append((now_s, counts))

    def sample(self, now_s: float, counts: tuple[int, ...]) -> None:
        """Remember the counters of now, unless it is too soon."""
        if now_s - self._samples[-1][0] >= SAMPLE_EVERY_S * 0.9:  # timers are not exact
            self._samples.append((now_s, counts))

    def rates(self, now_s: float, counts: tuple[int, ...]) -> tuple[float, ...]:
        """Growth per second of each counter since the oldest sample, up to now."""
        then_s, before = self._samples[0]
        elapsed_s = now_s - then_s
        if elapsed_s <= 0:
            return (0.0,) * len(counts)
        return tuple((count - old) / elapsed_s for count, old in zip(counts, before, strict=True))
