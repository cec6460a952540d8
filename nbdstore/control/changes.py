"""What a change of a volume, and its deletion, may ask for: the keyword arguments of both calls.

They are the same wherever these are called (`VolumeService`, its two implementations, and
`Operations` behind them), so that they are told, and typed, in one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict


class VolumeChanges(TypedDict, total=False):
    """What shall change; what is absent, or None, stays.

    size: bytes. A smaller one wants `shrink`, and is Busy while the volume is leased or attached;
    `force` shrinks below mapped data, which is lost, some of it also if the server ends meanwhile.
    new_name: Busy while it is leased.
    allow: names of client certificates that may attach it; empty = anyone the server lets in.
    iops, bandwidth: requests and bytes per second, of all clients together; 0 = no limit.
    burst_s: how many seconds' worth they may save up.
    """

    size: int | None
    new_name: str | None
    allow: Sequence[str] | None
    iops: int | None
    bandwidth: int | None
    burst_s: float | None
    shrink: bool
    force: bool


class Deletion(TypedDict, total=False):
    """How a volume shall be deleted.

    fence: end its lease and its connections, rather than be Busy with them.
    snapshots: take them along, rather than be Busy with them.
    now: delete it and its data for good, not into the trash.
    uuid: of the volume that is meant: another one of that name stays, and nothing is done if it is
    gone already.
    """

    fence: bool
    snapshots: bool
    now: bool
    uuid: str | None
