"""The capacity model: what a pool can hold, what was promised, what is stored, what is left.

::

    C_b  = n_b x S_b   block storage capacity        blocks of the pool x block size
    C_c  = n_c x S_c   container platform capacity   containers x the storage each was given
    D    = n_d x S_d   application data stored       mapped blocks x block size
    C_bc = C_b + C_c   integrated capacity

C_c is storage that the platform itself gives to containers, beside the pool; n_c is 0 unless the
caller knows a platform. Volumes that are attached are *not* counted as C_c, since they live in C_b
and would be counted twice. Where containers were given different amounts, S_c is their mean.

Owns the arithmetic and the forecast (`GrowthMeter`); knows neither pools nor servers.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

from nbdstore.control.model import Record

MIN_FORECAST_S = 60.0
"""Growth seen over less than a minute is noise; no forecast is made from it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CapacityReport(Record):
    """The model in numbers, in bytes and counts.

    overcommit: provisioned / C_b, so 2.0 means that twice the pool was promised.
    used: D and the pool's own maps. free: what clients may still
    write, so without reserves. fill: used / C_b, 0..1.
    growth_bytes_per_s, exhausted_in_s: from recent growth; None = not known, or not growing.
    """

    n_blocks: int
    block_size: int
    block_capacity: int
    n_containers: int = 0
    container_size: int = 0
    container_capacity: int = 0
    n_mapped: int
    data: int
    integrated_capacity: int
    n_volumes: int
    provisioned: int
    used: int
    free: int
    overcommit: float
    fill: float
    growth_bytes_per_s: float | None = None
    growth_window_s: float | None = None
    exhausted_in_s: float | None = None

    def with_containers(self, given: Sequence[int]) -> CapacityReport:
        """Return the report with C_c for containers that were `given` so many bytes each."""
        container_capacity = sum(given)
        return dataclasses.replace(
            self,
            n_containers=len(given),
            container_size=container_capacity // max(len(given), 1),
            container_capacity=container_capacity,
            integrated_capacity=self.block_capacity + container_capacity,
        )


@dataclasses.dataclass(frozen=True)
class Growth:
    """How fast used space grew over the last `window_s` seconds."""

    bytes_per_s: float
    window_s: float


def report(
    *,
    block_size: int,
    capacity: int,
    used: int,
    free: int,
    mapped: int,
    sizes: list[int],
    growth: Growth | None,
) -> CapacityReport:
    """Compute the model; all arguments in bytes, `sizes` one entry per volume."""
    provisioned = sum(sizes)
    rate = growth.bytes_per_s if growth else None
    return CapacityReport(
        n_blocks=capacity // block_size,
        block_size=block_size,
        block_capacity=capacity,
        n_mapped=mapped // block_size,
        data=mapped,
        integrated_capacity=capacity,
        n_volumes=len(sizes),
        provisioned=provisioned,
        used=used,
        free=free,
        overcommit=provisioned / capacity if capacity else 0.0,
        fill=used / capacity if capacity else 0.0,
        growth_bytes_per_s=rate,
        growth_window_s=growth.window_s if growth else None,
        exhausted_in_s=free / rate if rate and rate > 0 else None,
    )


class GrowthMeter:
    """Used space over time, a sample a minute for a day, and the growth over that window."""

    def __init__(self, n_samples: int = 24 * 60) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=n_samples)

    def add(self, time_s: float, used: int) -> None:
        """Record that `used` bytes were in use at `time_s` of a monotonic clock."""
        self._samples.append((time_s, used))

    def growth(self) -> Growth | None:
        """Return the mean growth over the samples held, None while they span too little."""
        if len(self._samples) < 2:
            return None
        (start_s, before), (stop_s, after) = self._samples[0], self._samples[-1]
        window_s = stop_s - start_s
        if window_s < MIN_FORECAST_S:
            return None
        return Growth((after - before) / window_s, window_s)
