"""What a receiver of backups may have after a crash: the oracle of backup_power_loss.py.

Of a chain of snapshots of which the first n were acknowledged there are those n, whole, under their
uuids, and the volume as in the last of them; or the next one as well; or a volume that says it is
half received, whose bytes are as in the next one up to the place that it tells, and as in either of
both beyond.  A place that it has told holds from then on, unless what came is given up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nbdstore.control.receiving_model import ReceivingInfo
from tests.control.backup_pools import Site
from tests.store.simulated_disk import Mark, SimulatedDisk

SECTOR: Final = 512


@dataclass(frozen=True)
class Sent:
    """A snapshot, where it is sent."""

    name: str
    uuid: str
    content: bytes


@dataclass(frozen=True)
class Known:
    """What whoever receives knows; a mark in the log of the disk whenever that has changed.

    Attributes:
        n: so many of the chain were received.
        position: so much of the next one is kept for sure, in bytes.
        on_its_way: the next one was begun, and not given up.
        going: it is being given up.
        left_over: a crash came after the last snapshot and before its volume could be used.
        strayed: somebody has written to the volume.
    """

    n: int = 0
    position: int = 0
    on_its_way: bool = False
    going: bool = False
    left_over: bool = False
    strayed: bool = False


def known_at(disk: SimulatedDisk, moment: int, before: Known) -> Known:
    """What was known after so many events."""
    for event in reversed(disk.events[:moment]):
        if isinstance(event, Mark) and isinstance(event.what, Known):
            return event.what
    return before


class Oracle:
    """Tells what may be there.

    Arguments:
        chain: the snapshots that come, each after the one before it.
    """

    def __init__(self, chain: list[Sent]) -> None:
        self.chain = chain

    async def look(self, there: Site, known: Known) -> Known:
        """Assert that what is there may be; return what is known then."""
        found = [*there.pool.snapshots]
        names = [sent.name for sent in self.chain]
        n = len(found)
        assert found == names[:n], f"snapshots {found} of {names}"
        assert n in (known.n, known.n + known.on_its_way), f"{n} snapshots: {known}"
        for sent in self.chain[:n]:
            assert there.uuid(sent.name) == sent.uuid, f"{sent.name} has another uuid"
            assert await there.content(sent.name) == sent.content, f"{sent.name} is not as sent"
        if known.on_its_way and n > known.n:
            known = Known(n, left_over=True)
        info = there.operations.volume("db") if "db" in there.pool.volumes else None
        if info is None:
            assert not n, "the volume is gone"
            assert known.going or not known.position, f"what was kept is gone: {known}"
            return Known()
        half = there.backups.receiving.show("db") if info.receiving else None
        assert info.importing == (half is not None), "nobody can go on, or use it"
        content = await there.content("db")
        if half is None:
            assert n, "a volume without a snapshot can be used"
            assert known.going or not known.position, f"what was kept is gone: {known}"
        if half is None or (n and half.uuid == self.chain[n - 1].uuid):
            assert half is None or known.left_over, "what has come is still half received"
            assert known.strayed or content == self.chain[n - 1].content, (
                f"it is not {names[n - 1]}"
            )
            return Known(n, left_over=half is not None, strayed=known.strayed)
        self._look_at_half(content, half, known)
        return Known(n, half.position, on_its_way=True)

    def _look_at_half(self, content: bytes, half: ReceivingInfo, known: Known) -> None:
        assert known.on_its_way, f"what was given up is still half received: {half}"
        wanted = self.chain[known.n]
        before = self.chain[known.n - 1].content if known.n else b""
        assert half.uuid == wanted.uuid, f"{half.snapshot} is half received, not {wanted.name}"
        assert len(content) in (len(before), len(wanted.content)), f"it has {len(content)} bytes"
        at = half.position
        assert known.going or at >= known.position, f"{at} bytes are left of {known.position}"
        assert content[:at] == wanted.content[:at], f"not all of the {at} bytes are there"
        for place in range(at - at % SECTOR, len(content), SECTOR):
            sector = content[place : place + SECTOR]
            allowed = [
                whole[place : place + SECTOR].ljust(len(sector), b"\0")
                for whole in (before, wanted.content)
            ]
            assert sector in allowed, f"at {place} there is something of neither"


def half_received(there: Site) -> ReceivingInfo | None:
    """What is half received, and has no snapshot yet."""
    volume = there.pool.volumes.get("db")
    if volume is None or not volume.properties.get("receiving"):
        return None
    half = there.backups.receiving.show("db")
    uuids = [snapshot.info.uuid for snapshot in volume.snapshots.values()]
    return None if half.uuid in uuids else half


def is_left_over(there: Site) -> bool:
    """Tell whether the volume is marked although all of it has come."""
    volume = there.pool.volumes.get("db")
    return bool(volume and volume.properties.get("receiving")) and not half_received(there)
