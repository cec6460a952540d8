"""Limits of a volume: how many requests and bytes per second its clients may move, all together.

Owns the numbers and their form with the volume; holding requests back is the server's business. A
volume's properties hold, durably::

    qos     {"iops": n, "bandwidth": bytes per second, "burst_s": seconds}; absent or null = none

A limit of 0 is none. What clients leave unused is theirs later, up to `burst_s` seconds' worth.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from nbdstore.errors import InvalidArgument
from nbdstore.sizes import exact_size

DEFAULT_BURST_S: Final = 1.0
MAX_BURST_S: Final = 3600.0
MAX_IOPS: Final = 10**9
MIN_BANDWIDTH: Final = 64 << 10
"""Bytes per second. With less, a single request of a client takes longer than it waits for it."""
MAX_BANDWIDTH: Final = 1 << 50


@dataclass(frozen=True)
class Qos:
    """The limits of one volume.

    Arguments:
        iops: requests per second; 0 = any number.
        bandwidth: bytes per second, read and written together; 0 = any number.
        burst_s: seconds' worth of either that may be saved up.
    """

    iops: int = 0
    bandwidth: int = 0
    burst_s: float = DEFAULT_BURST_S

    def changed(self, iops: int | None, bandwidth: int | None, burst_s: float | None) -> Qos:
        """Return other limits; what is None stays.

        Raises:
            InvalidArgument: a limit makes no sense.
        """
        limits = Qos(
            self.iops if iops is None else iops,
            self.bandwidth if bandwidth is None else bandwidth,
            self.burst_s if burst_s is None else float(burst_s),
        )
        _check(limits)
        return limits

    def __bool__(self) -> bool:
        """Whether anything is limited."""
        return bool(self.iops or self.bandwidth)


def current(properties: Mapping[str, Any]) -> Qos:
    """Read the limits that a volume's properties hold."""
    return Qos(**(properties.get("qos") or {}))


def recorded(limits: Qos) -> dict[str, Any]:
    """Return the properties that record limits."""
    return {"qos": dataclasses.asdict(limits)}


def _check(qos: Qos) -> None:
    if not 0 <= qos.iops <= MAX_IOPS:
        raise InvalidArgument(
            f"{qos.iops} requests per second: give 1 to {MAX_IOPS}, or 0 for no limit"
        )
    if qos.bandwidth and not MIN_BANDWIDTH <= qos.bandwidth <= MAX_BANDWIDTH:
        raise InvalidArgument(
            f"{exact_size(qos.bandwidth)} per second: give at least {exact_size(MIN_BANDWIDTH)} "
            f"and at most {exact_size(MAX_BANDWIDTH)}, or 0 for no limit"
        )
    if not (math.isfinite(qos.burst_s) and 0 <= qos.burst_s <= MAX_BURST_S):
        raise InvalidArgument(f"a burst of {qos.burst_s:g} seconds: give 0 to {MAX_BURST_S:g}")
