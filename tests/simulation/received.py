"""What there may be of a backup at its receiver: the oracle of the transfers in a world.

Of the snapshots sent to a volume, one after the other, those are there that were acknowledged,
whole, under their names and uuids, and the volume is as in the last of them; or the next one is
there as well; or the volume says that it is half received: then its cells are as in the next one up
to the place that it tells, and as in either of both beyond.  A place that was told holds from then
on, unless what came is given up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from nbdstore.control.receiving import HalfReceived, received_so_far
from nbdstore.store import Volume
from tests.simulation.oracle import CELL, Stamps, Wrong, stamps_of, zero_stamps
from tests.store.workload import WINDOW, Spread


@dataclass(frozen=True, eq=False)
class Sent:
    """A snapshot where it is sent: its own name, its uuid, and what it holds."""

    name: str
    uuid: str
    content: Stamps


@dataclass(frozen=True, eq=False)
class Found:
    """A volume at the receiver.

    Attributes:
        half: what it says of what is half received; None = nothing is.
        importing: nobody can attach it.
        snapshots: uuid and content, by name, the oldest first.
    """

    content: Stamps
    half: HalfReceived | None
    importing: bool
    snapshots: dict[str, tuple[str, Stamps]]


async def look(volume: Volume, spread: Spread) -> Found:
    """Read all that there is of a volume."""
    snapshots = {}
    for snapshot in volume.snapshots.values():
        raw = await spread.read(snapshot)
        snapshots[snapshot.info.name] = snapshot.info.uuid, stamps_of(raw)
    content = stamps_of(await spread.read(volume))
    importing = bool(volume.properties.get("importing"))
    return Found(content, received_so_far(volume), importing, snapshots)


@dataclass
class Received:
    """What is known of one volume at a receiver.

    Attributes:
        have: the snapshots that have come, the oldest first.
        coming: the next one, once it was begun, and not given up.
        position: so much of that is kept for sure, in bytes of the volume.
        going: it is being given up.
        marked: all has come, and the volume's mark is left.
    """

    name: str
    spread: Spread
    have: list[Sent] = field(default_factory=list)
    coming: Sent | None = None
    position: int = 0
    going: bool = False
    marked: bool = False

    def compare(self, found: Found | None) -> None:
        """Assert that what was found may be; it is what is known from now on.

        Raises:
            Wrong: it must not be.
        """
        try:
            self._compare(found)
        except Wrong as error:
            raise Wrong(f"received into {self.name}: {error}") from None
        self.going = False

    def _compare(self, found: Found | None) -> None:
        if found is None:
            if self.have or (self.position and not self.going):
                raise Wrong("the volume is gone")
            self.coming, self.position = None, 0
            return
        self._compare_snapshots(found)
        if found.importing != (found.half is not None):
            raise Wrong("nobody can go on, or use it")
        self.marked = self._is_left_over(found)
        if found.half is None or self.marked:
            self._compare_whole(found)
        else:
            self._compare_half(found.content, found.half)

    def _compare_snapshots(self, found: Found) -> None:
        """Those that have come are there, and perhaps the one on its way."""
        names = [sent.name for sent in self.have]
        if self.coming is not None and [*found.snapshots] == [*names, self.coming.name]:
            self.have.append(self.coming)
            self.coming, self.position = None, 0
        elif [*found.snapshots] != names:
            raise Wrong(f"snapshots {[*found.snapshots]}, not {names}: {self.coming}")
        for sent in self.have:
            uuid, content = found.snapshots[sent.name]
            if uuid != sent.uuid:
                raise Wrong(f"snapshot {sent.name} has another uuid")
            if not np.array_equal(content, sent.content):
                raise Wrong(f"snapshot {sent.name} is not as it was sent")

    def _is_left_over(self, found: Found) -> bool:
        half = found.half
        return half is not None and bool(self.have) and half.uuid == self.have[-1].uuid

    def _compare_whole(self, found: Found) -> None:
        if not self.have:
            raise Wrong("a volume without a snapshot can be used")
        if self.position and not self.going:
            raise Wrong(f"what was kept, {self.position} bytes, is gone")
        if not np.array_equal(found.content, self.have[-1].content):
            raise Wrong(f"the volume is not as in {self.have[-1].name}")
        self.coming, self.position = None, 0

    def _compare_half(self, content: Stamps, half: HalfReceived) -> None:
        if self.coming is None or half.uuid != self.coming.uuid:
            raise Wrong(f"{half.name} is half received, and nobody sent it: {self.coming}")
        if half.position < self.position and not self.going:
            raise Wrong(f"{half.position} bytes are left of {self.position}")
        new = self.coming.content
        old = self.have[-1].content if self.have else new[:0]
        if len(content) not in (len(old), len(new)):
            raise Wrong(f"{len(content)} cells of {len(old)} or {len(new)}")
        n_sure = self._cells_before(half.position)
        before, after = _fitted(old, len(content)), _fitted(new, len(content))
        allowed = content == after
        allowed[n_sure:] |= (content == before)[n_sure:]
        if not allowed.all():
            cell = int(np.argmin(allowed))
            raise Wrong(f"cell {cell} of {n_sure} that are sure is not as sent: {content[cell]}")
        self.position = half.position

    def _cells_before(self, position: int) -> int:
        n_windows, rest = divmod(position, self.spread.stride)
        return (n_windows * WINDOW + min(rest, WINDOW)) // CELL


def _fitted(stamps: Stamps, n_cells: int) -> Stamps:
    """Cells of a volume that has become larger or smaller."""
    fitted = zero_stamps(n_cells)
    n = min(n_cells, len(stamps))
    fitted[:n] = stamps[:n]
    return fitted
