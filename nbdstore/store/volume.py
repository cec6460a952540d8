"""A volume of an open pool: what servers and commands hold in their hands.

Owns nothing but the joining of the parts: to what every image has (image.py), it adds the write
path, range operations and sync.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nbdstore.errors import NotFast
from nbdstore.store import layout
from nbdstore.store.blockmap import BlockMap
from nbdstore.store.catalogue import VolumeInfo
from nbdstore.store.durability import OnDurable, Unsynced
from nbdstore.store.host import Buffer
from nbdstore.store.image import Image, Services
from nbdstore.store.layout import I64, U64
from nbdstore.store.ranges import Ranges
from nbdstore.store.writing import Writing

if TYPE_CHECKING:
    from nbdstore.store.snapshot import Snapshot


OnGivenUp = Callable[[U64], None]
"""Called with locations, each of which names a slot, that a volume gives up and are not its own."""


class Undecided:
    """Slots that a volume gives up while a snapshot comes or goes, which a crash may prevent.

    The snapshot, if it is there in the end, holds them; if not, nobody does.

    Arguments:
        floor: what was born up to this epoch is older snapshots' in either case.
    """

    def __init__(self, floor: int) -> None:
        self._floor = floor
        self._parts: list[I64] = []

    def add(self, locations: U64) -> None:
        """The volume has given up `locations`, each of which names a slot."""
        younger = locations >> layout.NP_SLOT_BITS > np.uint64(self._floor)
        self._parts.append(layout.slots_of(locations[younger]))

    @property
    def slots(self) -> I64:
        """All of them, int64."""
        return np.concatenate([np.empty(0, np.int64), *self._parts])


class Volume(Image):
    """One volume.

    Attributes:
        last_seq, durable_seq: its newest record, and its newest durable one.
        unsynced: its data that is in the page cache only.
        flushes_little: see Syncable.
        snapshots: of it, by what follows the '@', oldest first; changed by the registry only.
        on_given_up: who wants to know what it gives up that a snapshot keeps, or perhaps does not.
        is_going: its deletion has begun, with that of its snapshots.
    """

    info: VolumeInfo
    kind = "volume"

    def __init__(self, services: Services, info: VolumeInfo, blocks: BlockMap) -> None:
        super().__init__(services)
        self.info = info
        self.map = blocks
        self.last_seq = 0
        self.durable_seq = 0
        self.unsynced = Unsynced()
        self.flushes_little = False
        self.snapshots: dict[str, Snapshot] = {}
        self.on_given_up: OnGivenUp | None = None
        self.is_going = False
        self.writing = Writing(self)
        self.ranges = Ranges(self)

    @property
    def is_gone(self) -> bool:
        """It was deleted."""
        return self.info.deleted

    @property
    def properties(self) -> dict[str, Any]:
        """What others keep with the volume; changed by Pool.set_properties only."""
        return self.info.properties

    # -- data -------------------------------------------------------------------------------

    def write_now(self, writes: Sequence[tuple[int, Buffer]], *, n_clients: int = 1) -> bool:
        """Do all of `writes` ((offset, data), in order) without waiting, or nothing (False).

        What is done survives the death of this process; :meth:`flush` makes it survive power loss.

        Arguments:
            n_clients: who has sent them, each of whom may be about to flush.
        """
        self.core.n_calls += n_clients
        return self.writing.now(writes)

    async def write(self, offset: int, data: Buffer) -> None:
        """Write, waiting for the disk, for a checkpoint or for space; see :meth:`write_now`.

        Raises:
            NoSpace, WriteFailed, ReadFailed, Corruption, PoolFailed.
        """
        await self.writing.write(offset, data)

    async def flush(self) -> None:
        """Make durable what was acknowledged on this volume before the call.

        Raises:
            PoolFailed: the sync failed, now or before.
        """
        self.core.check_alive()
        await self.services.committer.commit(self)

    def flush_soon(self, done: OnDurable) -> bool:
        """Like :meth:`flush`, but call `done` at its end, with the error if it failed.

        Returns False, and calls nothing, if all is durable already.

        Raises:
            PoolFailed: a sync failed before.
        """
        self.core.check_alive()
        return self.services.committer.commit_soon(self, done)

    async def trim(self, offset: int, length: int) -> None:
        """Make holes of the whole blocks within `[offset, offset + length)`."""
        self.check_range(offset, length)
        await self.ranges.trim(offset, length)

    async def write_zeroes(
        self, offset: int, length: int, *, no_hole: bool = False, fast: bool = False
    ) -> None:
        """Make `[offset, offset + length)` read as zeros; with `no_hole` keep space for it.

        Arguments:
            fast: rather fail, having done nothing, than wait for space.

        Raises:
            NotFast: with `fast` and `no_hole`, where there is not enough space at once.
            NoSpace: with `no_hole`, as for writes; else only for the merging of the two ends.
        """
        self.check_range(offset, length)
        n_blocks = length // self.block_size + 2
        if fast and no_hole and not self.core.may_set_aside(n_blocks):
            raise NotFast(f"volume {self.name}: no space at once for {length} bytes of zeroes")
        await self.ranges.write_zeroes(offset, length, no_hole=no_hole)

    # -- for the parts of the store ---------------------------------------------------------

    def release(self, old: U64, seq: int, *, n_mapped: int = 0, n_provisioned: int = 0) -> None:
        """Record `seq` replaced the entries with locations `old`: free and account them.

        Arguments:
            n_mapped, n_provisioned: how many blocks have a slot, or space set aside, instead.
        """
        is_held = layout.holds_slot(old)
        n_held = int(np.count_nonzero(is_held))
        held = own = old if n_held == len(old) else old[is_held]
        if self.kept_epoch and len(held):
            is_own = held >> layout.NP_SLOT_BITS > np.uint64(self.kept_epoch)
            own = held[is_own]
            if self.on_given_up is not None:
                self.on_given_up(held[~is_own])
        n_promised = 0
        if n_held < len(old):
            n_promised = int(np.count_nonzero(layout.is_provisioned(old)))
        if len(own):
            self.core.slots.free_later(layout.slots_of(own), seq)
        self.info.n_mapped += n_mapped - n_held
        self.info.n_own += n_mapped - len(own)
        self.info.n_provisioned += n_provisioned - n_promised
        self.core.slots.n_set_aside += n_provisioned - n_promised

    def release_few(self, old: list[int], seq: int) -> None:
        """Like :meth:`release` where each of the few blocks has a slot now."""
        freed: list[int] = []
        given_up: list[int] = []
        n_promised = 0
        first_own = layout.pack_location(0, self.kept_epoch + 1)
        for location in old:
            slot = location & layout.SLOT_MASK
            if slot == layout.PROVISIONED:
                n_promised += 1
            elif 0 < slot < layout.LOST:
                if location >= first_own:
                    freed.append(slot)
                else:
                    given_up.append(location)
        if freed:
            self.core.slots.free_few_later(freed, seq)
        if given_up and self.on_given_up is not None:
            self.on_given_up(np.array(given_up, np.uint64))
        self.info.n_mapped += len(old) - len(freed) - len(given_up)
        self.info.n_own += len(old) - len(freed)
        if n_promised:
            self.info.n_provisioned -= n_promised
            self.core.slots.n_set_aside -= n_promised

    def run_of_own(self, first: int, stop: int) -> int:
        """The first of the slots in which blocks `[first, stop)` lie in order, as last written.

        Returns 0 if they do not, or if a snapshot keeps any.  None of their leaves is STORED.
        """
        words, n = self.map.words, stop - first
        location = words[2 * first]
        slot = location & layout.SLOT_MASK
        if not 0 < slot < layout.LOST - n or location >> layout.SLOT_BITS <= self.kept_epoch:
            return 0
        in_order = words[2 * first : 2 * stop : 2].tolist() == [*range(location, location + n)]
        return slot if in_order else 0

    def n_filling(self, old: U64) -> int:
        """Of how many of the entries with locations `old` a write gives no slot back for its own.

        They are holes, or a snapshot keeps what they point to.
        """
        empty = int(np.count_nonzero(old == layout.HOLE))
        if not self.kept_epoch:
            return empty
        held = old[layout.holds_slot(old)] >> layout.NP_SLOT_BITS
        return empty + int(np.count_nonzero(held <= np.uint64(self.kept_epoch)))

    def n_filling_few(self, old: list[int]) -> int:
        """Like :meth:`n_filling`, of so few that arrays would cost more than they save."""
        n_filling = old.count(layout.HOLE)
        first_own = layout.pack_location(0, self.kept_epoch + 1)
        if self.kept_epoch and min(old) < first_own:
            for location in old:
                if location < first_own and 0 < location & layout.SLOT_MASK < layout.LOST:
                    n_filling += 1
        return n_filling

    def status(self) -> dict[str, Any]:
        """What there is to know, JSON-able; sizes in bytes."""
        info = self.info
        created = datetime.datetime.fromtimestamp(info.created, datetime.UTC)
        return {
            "id": info.id,
            "uuid": info.uuid,
            "name": info.name,
            "size": info.size,
            "block_size": self.block_size,
            "mapped": info.n_mapped * self.block_size,
            "own": info.n_own * self.block_size,
            "reserved": info.n_provisioned * self.block_size,
            "written": info.written or info.n_mapped > 0,
            "trashed": info.trashed,
            "snapshots": len(self.snapshots),
            "epoch": info.epoch,
            "created": created.isoformat(timespec="seconds"),
            "properties": info.properties,
        }
