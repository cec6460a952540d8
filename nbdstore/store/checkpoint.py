"""Checkpoints: write the trees as they were at one moment, and let the journal forget.

Owns the writing of dirty leaves, nodes, the catalogue and the free map, and the flip of the
superblock; how a frozen leaf is kept from changing is the map's (blockmap.py, slots.py).

A checkpoint of seq S holds exactly what records 1..S did, whatever is written while it runs:

1. freeze (no await): end the journal's part up to here by an empty record, S, the mark that a
   lost journal would lack; mark dirty leaves and the free map frozen;
2. write, in slices with the loop let in between: frozen leaves, then the nodes above them, then
   the catalogue with the new roots, twice, then the free map, all into free slots;
3. sync the data file and, for the mark, the journal;
4. write the superblock to one copy, sync it: from here on this checkpoint is what recovery reads;
   write it to the other copy, sync it: from here on nobody needs the checkpoint before;
5. release the journal up to S and the slots of what was replaced.

A checkpoint can carry a change: snapshots come and go with the catalogue that it writes, at the
moment that it holds.  So there is no record of them in the journal, and nothing to be done again.

A crash before 4 leaves the checkpoint before, and the journal from there.  A failure before 4
(no space) leaves the pool running: what was written is what the maps point to now, the rest is
dirty still, and the slots that the old superblock needs stay in `_replaced` until a later flip.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from xxhash import xxh3_64_intdigest

from nbdstore.errors import NoSpace, StoreError, WriteFailed
from nbdstore.store import layout, superblock
from nbdstore.store.blockmap import Leaves
from nbdstore.store.catalogue import Catalogue, SnapshotInfo, VolumeInfo
from nbdstore.store.core import Core
from nbdstore.store.durability import Committer
from nbdstore.store.host import Failpoint, File
from nbdstore.store.layout import I64, U64
from nbdstore.store.slots import FrozenBitmap
from nbdstore.store.slotset import SlotSet
from nbdstore.store.superblock import NULL, Pointer, Superblock
from nbdstore.store.uninterrupted import to_its_end

if TYPE_CHECKING:
    from nbdstore.store.image import Image
    from nbdstore.store.registry import Registry
    from nbdstore.store.volume import Volume

log = logging.getLogger("nbdstore.store")

_DEAD_SLICE: Final = 1 << 18  # slots: freeing them all takes 10 ms


@dataclass
class FrozenImage:
    """An image as one checkpoint writes it.

    Attributes:
        info: what the catalogue will say of it.
        leaves: those to be written.
        epoch: the birth epoch of the nodes that are written.
        kept_epoch: nodes that were born up to it are snapshots', and stay when they are replaced.
    """

    image: Image
    info: VolumeInfo | SnapshotInfo
    leaves: Leaves = field(init=False)
    epoch: int = field(init=False)
    kept_epoch: int = field(init=False)

    def __post_init__(self) -> None:
        self.leaves = self.image.map.freeze()
        self.epoch = self.info.epoch
        self.kept_epoch = self.image.kept_epoch


@dataclass
class FrozenVolume(FrozenImage):
    """A volume as one checkpoint writes it."""

    info: VolumeInfo


@dataclass
class Frozen:
    """What one checkpoint writes: the state at `seq`.

    Attributes:
        mark: the empty record that ends what it covers; 0 = there is none.
        snapshots: what the catalogue will say of them.
        mended: snapshots whose maps have to be written; only repair changes them.
        own: slots taken for the pool's own trees, given back if the checkpoint fails.
        dead: slots that this checkpoint frees beside those that it replaces.
    """

    seq: int
    journal_offset: int
    mark: int
    volumes: dict[int, FrozenVolume]
    snapshots: dict[int, SnapshotInfo]
    mended: list[FrozenImage]
    bitmap: FrozenBitmap
    dead: SlotSet
    own: list[I64] = field(default_factory=list)

    @property
    def images(self) -> list[FrozenImage]:
        """All whose maps are written."""
        return [*self.volumes.values(), *self.mended]


class Change(Protocol):
    """Something that a checkpoint makes true: snapshots that come or go (snapshots.py)."""

    def begin(self, frozen: Frozen) -> None:
        """At the moment that the checkpoint holds: say in `frozen` what shall be true."""

    async def complete(self, frozen: Frozen) -> None:
        """All volumes are written: add what only their trees on disk could tell.

        Whatever this raises ends the checkpoint, and is raised by it; the pool goes on.
        """

    def end(self, *, made: bool) -> None:
        """The change is made, and durable; or it is not, and never will be."""


class _ChangeFailed(Exception):
    """What a change's `complete` raised."""


@dataclass(frozen=True)
class Roots:
    """The trees that belong to the pool itself, as the last superblock has them.

    Attributes:
        catalogue_slots: all slots of both copies of the catalogue, nodes included.
        free_map: entries of the free map's blocks, uint64, shape (n_regions, 2).
        free_map_nodes: slots of the nodes above them.
    """

    catalogue_slots: I64
    free_map: U64
    free_map_nodes: I64

    def all_slots(self) -> I64:
        """The slots of everything in these trees."""
        blocks = self.free_map[:, 0]
        slots = layout.slots_of(blocks[blocks != layout.HOLE])
        return np.concatenate([self.catalogue_slots, slots, self.free_map_nodes])


class Checkpointer:
    """Writes the checkpoints of one pool.

    Attributes:
        lock: held while a checkpoint runs, and by whoever changes a volume's shape.
        seq: the newest record that the last checkpoint covers.
        superblock: as it is on disk.
        n_checkpoints: written so far.
    """

    def __init__(
        self,
        core: Core,
        committer: Committer,
        super_file: File,
        found: superblock.Found,
        roots: Roots,
        registry: Registry,
        next_id: int,
    ) -> None:
        self._core = core
        self._committer = committer
        self._super_file = super_file
        self._opened_by = found.copy
        self._roots = roots
        self._registry = registry
        self._replaced: list[I64] = []
        self._running: asyncio.Task[None] | None = None
        self.superblock = found.newest
        self.next_id = next_id
        self.lock = asyncio.Lock()
        self.seq = found.newest.journal_seq - 1
        self.done_at = core.host.monotonic()
        self.n_checkpoints = 0
        self._is_postponed = False

    async def join(self) -> None:
        """Return at the end of a checkpoint: the one that runs, or else a new one.

        Who waits may be cancelled, the checkpoint is not.  Errors as :meth:`run`.
        """
        if self._running is None:
            self._running = asyncio.create_task(self.run())
            self._running.add_done_callback(self._ended)
        await asyncio.shield(self._running)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running = None
        if not task.cancelled():
            task.exception()  # those who joined have it; without any, run() has logged it

    async def run(self, *, last: bool = False) -> None:
        """Write a checkpoint of the present.

        Arguments:
            last: nothing will come after it, so that nobody needs the journal any more.

        Raises:
            NoSpace: there is no space for it; the pool goes on, the journal keeps what it has.
            PoolFailed: a write or sync failed; the pool has stopped.
        """
        async with self.lock:
            await self.run_locked(last=last)

    async def run_locked(self, *, last: bool = False, change: Change | None = None) -> None:
        """Like :meth:`run`, for the holder of `lock`; with `change` made true by it.

        A cancelled caller waits for the end all the same: once the superblock's write has begun,
        nobody knows which one a crash leaves, so there is no turning back half-way.
        """
        await to_its_end(asyncio.create_task(self._run(last, change)))

    async def _run(self, last: bool, change: Change | None) -> None:
        self._core.check_alive()
        frozen = self._freeze(last=last)
        flipped = False
        try:
            if change is not None:
                change.begin(frozen)
            self._core.host.reached(Failpoint.CHECKPOINT_FROZEN)
            await self._write(frozen, change)
            flipped = True
            self._is_postponed = False
        except _ChangeFailed as error:
            assert error.__cause__ is not None
            raise error.__cause__ from None
        except NoSpace as error:
            # It is tried again every other second for as long as there is no space: said once.
            level = logging.DEBUG if self._is_postponed else logging.WARNING
            log.log(level, "checkpoint postponed: %s", error)
            self._is_postponed = True
            raise
        except StoreError as error:
            self._core.fail(f"checkpoint: {error}")
            self._core.check_alive()
        finally:
            self._core.slots.thaw(written=flipped)
            if change is not None:
                change.end(made=flipped)
            if not flipped:
                for part in frozen.images:
                    part.image.map.abandon_freeze(part.leaves)
                for slots in frozen.own:
                    self._core.slots.give_back(slots)
        self._release(frozen)
        await self._release_dead(frozen)
        self._core.host.reached(Failpoint.CHECKPOINT_RELEASED)

    @property
    def roots(self) -> Roots:
        """The pool's own trees, as of the last checkpoint."""
        return self._roots

    def take_id(self) -> int:
        """Return an id for a new snapshot."""
        self.next_id += 1
        return self.next_id - 1

    def drop(self, slots: I64) -> None:
        """Slots of nodes that the next checkpoint does not need any more."""
        self._replaced.append(slots)

    def dropped(self) -> I64:
        """The slots that the next checkpoint will free."""
        return np.concatenate([np.empty(0, np.int64), *self._replaced])

    # -- 1. freeze --------------------------------------------------------------------------

    def _freeze(self, *, last: bool = False) -> Frozen:
        journal = self._core.journal
        mark = 0 if last else self._mark()
        snapshots = {number: replace(s.info) for number, s in self._registry.snapshots.items()}
        return Frozen(
            seq=journal.seq,
            journal_offset=journal.head,
            mark=mark,
            volumes={
                volume.id: FrozenVolume(volume, _info_of(volume))
                for volume in self._registry.by_id.values()
            },
            snapshots=snapshots,
            mended=[
                FrozenImage(snapshot, snapshots[snapshot.id])
                for snapshot in self._registry.snapshots.values()
                if snapshot.is_open and snapshot.map.is_changed
            ],
            bitmap=self._core.slots.freeze(),
            dead=SlotSet(self._core.slots),
        )

    def _mark(self) -> int:
        """Return the seq of an empty record at the journal's head, 0 if there is no room for it.

        While a full pool keeps checkpoints from being written, they do not fill the journal.
        """
        journal = self._core.journal
        if journal.ends_empty:
            return journal.seq
        return self._core.append(b"") if journal.room_for(0) else 0

    # -- 2. write ---------------------------------------------------------------------------

    async def _write(self, frozen: Frozen, change: Change | None) -> None:
        reached = self._core.host.reached
        for part in frozen.images:
            await self._write_leaves(part, frozen)
            reached(Failpoint.CHECKPOINT_LEAVES_WRITTEN)
            await self._write_nodes(part, frozen)
            reached(Failpoint.CHECKPOINT_NODES_WRITTEN)
            part.info.root = part.image.info.root = part.image.map.nodes.root
            part.image.services.memory.balance()  # what was dirty may be evicted now
        if change is not None:
            try:
                await change.complete(frozen)
            except Exception as error:
                raise _ChangeFailed from error
        for slots in frozen.dead:
            frozen.bitmap.clear(slots)
            await self._core.host.sleep(0)
        raw = Catalogue(
            self.next_id,
            [part.info for part in frozen.volumes.values()],
            [*frozen.snapshots.values()],
        ).encode()
        roots = self._write_catalogue(raw, frozen)
        catalogue_slots = np.concatenate(frozen.own)
        free_map_root, free_map, free_map_nodes, doomed = self._write_free_map(frozen)
        reached(Failpoint.CHECKPOINT_WRITTEN)
        await self._sync(frozen)
        reached(Failpoint.CHECKPOINT_SYNCED)
        new = self.superblock.next(
            incompatible=self.superblock.incompatible | layout.SNAPSHOTS,
            n_slots=self._core.slots.n_slots,
            journal_offset=frozen.journal_offset,
            journal_seq=frozen.seq + 1,
            journal_mark=frozen.mark,
            catalogue=roots[0],
            catalogue_copy=roots[1],
            catalogue_bytes=len(raw),
            free_map=free_map_root,
        )
        await self._flip(new)
        self._roots = Roots(catalogue_slots, free_map, free_map_nodes)
        self._replaced = doomed

    async def _sync(self, frozen: Frozen) -> None:
        disk, journal = self._core.disk, self._core.journal
        syncs = [disk.offload(self._core.data.fdatasync)]
        if frozen.mark:
            journal.seal()
            syncs.append(journal.sync(disk))
        await asyncio.gather(*syncs)

    async def _flip(self, new: Superblock) -> None:
        """Make `new` the superblock; a failure cannot be taken back, so it fails the pool."""
        for copy in (1 - self._opened_by, self._opened_by):
            try:
                superblock.write(self._super_file, new, copy)
            except NoSpace as error:
                raise WriteFailed(f"superblock: {error}") from error
            self._core.host.reached(Failpoint.CHECKPOINT_FLIPPED)
            await self._core.disk.offload(self._super_file.fdatasync)
        self._core.host.reached(Failpoint.CHECKPOINT_DURABLE)
        self.superblock = new

    async def _write_leaves(self, own: FrozenImage, frozen: Frozen) -> None:
        image, leaves = own.image, own.leaves
        blocks, memory = image.map, image.services.memory
        n_slice = self._core.options.checkpoint_slice_nodes
        for at in range(0, len(leaves), n_slice):
            await memory.load_nodes(lambda: blocks, leaves[at : at + n_slice], image.name)
            part = leaves[at : at + n_slice].tolist()
            nodes = [blocks.frozen_leaf(leaf) for leaf in part]
            stored = [node for node in nodes if isinstance(node, bytes)]
            places = iter(self._store(stored, own.epoch, frozen))
            old = [
                blocks.leaf_written(leaf, next(places) if isinstance(node, bytes) else (node, 0))
                for leaf, node in zip(part, nodes, strict=True)
            ]
            self._replace(old, own.kept_epoch)
            await self._core.host.sleep(0)

    async def _write_nodes(self, own: FrozenImage, frozen: Frozen) -> None:
        tree, n_slice = own.image.map.nodes, self._core.options.checkpoint_slice_nodes
        for level in range(tree.depth - 1):
            dirty = sorted(tree.dirty[level])
            for at in range(0, len(dirty), n_slice):
                part = dirty[at : at + n_slice]
                nodes = [tree.node_bytes(level, node) for node in part]
                pointers = self._store_or_null(nodes, own.epoch, frozen)
                self._replace(tree.written(level, part, pointers), own.kept_epoch)
                await self._core.host.sleep(0)
        tree.dirty[-1].clear()

    def _store_or_null(self, nodes: list[bytes], epoch: int, frozen: Frozen) -> list[Pointer]:
        """Store nodes; one full of holes is a hole itself."""
        zeros = bytes(self._core.block_size)
        places = iter(self._store([n for n in nodes if n != zeros], epoch, frozen))
        return [NULL if node == zeros else next(places) for node in nodes]

    def _store(self, blocks: Sequence[bytes], epoch: int, frozen: Frozen) -> list[Pointer]:
        """Write blocks to free slots and return their entries."""
        if not blocks:
            return []
        slots = self._take(len(blocks))
        try:
            self._core.write_slots(slots, list(blocks))
        except BaseException:
            self._core.slots.give_back(slots)
            raise
        frozen.bitmap.set(slots)
        return [
            (layout.pack_location(slot, epoch), xxh3_64_intdigest(block))
            for slot, block in zip(slots.tolist(), blocks, strict=True)
        ]

    def _take(self, n: int) -> I64:
        """Free slots for a checkpoint, which may use all of the reserve."""
        slots = self._core.slots.allocate(n, 0)
        if slots is None:
            raise self._core.no_space()
        return slots

    def _replace(self, locations: Sequence[int], kept_epoch: int) -> None:
        old = np.array(locations, np.uint64)
        free = old[layout.holds_slot_of_after(old, kept_epoch)]
        self._replaced.append(layout.slots_of(free))

    # -- the pool's own trees: written whole, or given back ----------------------------------

    def _take_own(self, n: int, frozen: Frozen) -> I64:
        slots = self._take(n)
        frozen.own.append(slots)
        frozen.bitmap.set(slots)
        return slots

    def _write_own(self, blocks: list[bytes], slots: I64) -> U64:
        """Write `blocks` to `slots`; return their entries, uint64, shape (n, 2)."""
        self._core.write_slots(slots, blocks)
        entries = np.empty((len(blocks), 2), np.uint64)
        entries[:, 0] = slots
        entries[:, 1] = [*map(xxh3_64_intdigest, blocks)]
        return entries

    def _nodes_of(self, entries: U64) -> list[bytes]:
        size = self._core.block_size
        fanout = size // layout.ENTRY_SIZE
        return [
            entries[at : at + fanout].tobytes().ljust(size, b"\0")
            for at in range(0, len(entries), fanout)
        ]

    def _write_above(self, entries: U64, slots: I64) -> Pointer:
        """Write all nodes above `entries` to `slots`, as many as :func:`_n_above` says."""
        while True:
            nodes = self._nodes_of(entries)
            entries = self._write_own(nodes, slots[: len(nodes)])
            slots = slots[len(nodes) :]
            if len(entries) == 1:
                location, checksum = entries[0].tolist()
                return location, checksum

    def _write_catalogue(self, raw: bytes, frozen: Frozen) -> list[Pointer]:
        """Write both copies; return their roots."""
        size = self._core.block_size
        blocks = [raw[at : at + size].ljust(size, b"\0") for at in range(0, len(raw), size)]
        one, two = (self._write_own(blocks, self._take_own(len(blocks), frozen)) for _ in range(2))
        n_above = _n_above(2 * len(blocks), size)
        return [
            self._write_above(np.concatenate(entries), self._take_own(n_above, frozen))
            for entries in ((one, two), (two, one))
        ]

    def _write_free_map(self, frozen: Frozen) -> tuple[Pointer, U64, I64, list[I64]]:
        """Write the changed blocks of the free map, which say what is used, themselves included.

        A slot for a block of the bitmap changes the bitmap: so first take slots until no block
        changes that has none, and then write.

        Returns the root, the entries of the blocks, the slots of the nodes above, and all slots
        that the new superblock does not need.
        """
        bitmap, core = frozen.bitmap, self._core
        entries = np.zeros((core.slots.n_regions, 2), np.uint64)
        entries[: len(self._roots.free_map)] = self._roots.free_map
        doomed = [*self._replaced, self._roots.catalogue_slots, self._roots.free_map_nodes]
        bitmap.clear(np.concatenate(doomed))
        nodes = self._take_own(_n_above(len(entries), core.block_size), frozen)
        places: dict[int, int] = {}
        while missing := [region for region in bitmap.blocks if region not in places]:
            slots = self._take_own(len(missing), frozen)
            places.update(zip(missing, slots.tolist(), strict=True))
            old = entries[missing, 0]
            doomed.append(layout.slots_of(old[old != layout.HOLE]))
            bitmap.clear(doomed[-1])
        blocks = [bitmap.blocks[region].tobytes() for region in places]
        entries[list(places)] = self._write_own(blocks, np.array([*places.values()], np.int64))
        return self._write_above(entries, nodes), entries, nodes, doomed

    # -- 5. release -------------------------------------------------------------------------

    def _release(self, frozen: Frozen) -> None:
        core = self._core
        core.journal.release(frozen.journal_offset)
        core.journal.durable_seq = max(core.journal.durable_seq, frozen.seq)
        # A read planned before now may still be using what was replaced: it is freed as if by
        # the record to come.
        for slots in self._replaced:
            core.slots.free_later(slots, core.journal.seq + 1)
        self._replaced = []
        self.seq = frozen.seq
        self.done_at = core.host.monotonic()
        self.n_checkpoints += 1
        self._committer.raise_horizon(frozen.seq)
        core.space_changed()

    async def _release_dead(self, frozen: Frozen) -> None:
        """Free what snapshots have held alone, which may be much: a part after another.

        No other checkpoint may come before the end of it, which would count the rest as used.
        """
        n_pending = 0
        for slots in frozen.dead:
            if n_pending + len(slots) > _DEAD_SLICE:
                await self._committer.settle()  # so that what waits for that does not add up
                n_pending = 0
            self._core.slots.free_later(slots, self._core.journal.seq + 1)
            n_pending += len(slots)
            await self._core.host.sleep(0)


def _info_of(volume: Volume) -> VolumeInfo:
    """What the catalogue says of a volume whose map is frozen now."""
    volume.info.written = volume.info.written or volume.info.n_mapped > 0
    return replace(volume.info)


def _n_above(n_entries: int, block_size: int) -> int:
    """How many nodes all levels above `n_entries` entries have together, the one root included."""
    fanout = block_size // layout.ENTRY_SIZE
    sizes = [-(-n_entries // fanout)]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // fanout))
    return sum(sizes)
