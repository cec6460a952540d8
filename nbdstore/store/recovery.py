"""Opening a pool: read the last checkpoint, then do again what the journal says came after.

Owns the decision which records count.  Nothing on disk that the last checkpoint or the journal
needs is changed before the checkpoint that ends recovery is durable, so a crash during recovery
changes nothing: the next one reads the same and ends in the same state.

Which records count: the ring is read from the superblock's place on, as far as sequence numbers
and checksums go.  Let D be the largest durable_seq that a superblock or a record states.  Records
up to D are complete, by that promise.  Above D, a record may be in the journal while the data it
maps was lost with the power: every block it maps must match its checksum, in its slot or in a
DATA group of the journal.  The first record of a volume that does not ends that volume's history:
it and all later records of that volume are dropped.  So each volume is as it was at one moment at
or after its last acknowledged flush.  A missing record at or below D is damage of the medium, and
is reported, never taken for the end.

Superblock, journal and unsynced data are read past the page cache.  After a failed fdatasync the
kernel takes pages for clean that the disk has never got (fsync(2)), and a server started anew on
the same machine would build on them, and vouch for them by syncs that have nothing left to write.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from xxhash import xxh3_64_intdigest

from nbdstore.errors import Corruption, PoolFormatError, ReadFailed
from nbdstore.store import layout, superblock
from nbdstore.store.catalogue import Catalogue
from nbdstore.store.checkpoint import Checkpointer, Roots
from nbdstore.store.core import Core, OnDamage, PoolOptions
from nbdstore.store.durability import Committer
from nbdstore.store.host import Disk, File, Host
from nbdstore.store.image import Services
from nbdstore.store.journal import HEADER_SIZE, Journal, Reader, Record, align
from nbdstore.store.layout import I64, JOURNAL_PAGE, U64
from nbdstore.store.mapmemory import MapMemory, load_map_now, load_now
from nbdstore.store.nodes import level_sizes
from nbdstore.store.ranges import apply_range
from nbdstore.store.records import Group, Op, parse
from nbdstore.store.registry import Registry
from nbdstore.store.superblock import NULL, Pointer, Superblock
from nbdstore.store.volume import Volume

log = logging.getLogger("nbdstore.store")

_PIECE_BYTES: Final = 1 << 20
_JOURNAL_ADVICE: Final = (
    "'nbdstore check --repair' goes on with what comes before, 'nbdstore salvage' copies that"
)

_CATALOGUE_ADVICE: Final = (
    "no copy is whole, and nothing else says which volumes there are: restore them from a backup"
)

ReadBlock = Callable[[int, int, str], bytes]
"""Called with location, checksum and a name; returns the verified block."""


@dataclass(frozen=True)
class OnDamages:
    """Whom to tell of damage that opening can do without; None = raise.

    Attributes:
        journal: the journal is damaged, truncated, or not the right one: it ends there, and
            records that were durable are lost.
        maps: of a node or leaf of a volume's map; see Core.on_damage.
        free_map: of a block of the free map.  Everything in it seems to be free then, and the
            free map must be corrected before the pool is written.
    """

    journal: OnDamage | None = None
    maps: OnDamage | None = None
    free_map: OnDamage | None = None


@dataclass
class Report:
    """What recovery found.

    Attributes:
        superblock: the one that was used.
        spare_faults: what is wrong with copies of it and of the catalogue that were not needed.
        n_records: records after the checkpoint.
        dropped: by volume id, the first record that did not survive the crash.
    """

    superblock: Superblock
    spare_faults: list[Corruption | ReadFailed]
    n_records: int = 0
    dropped: dict[int, int] = field(default_factory=dict)


def check_writable(current: Superblock, directory: Path) -> None:
    """Raise PoolFormatError if the pool has features that only a newer version may write to."""
    unknown = current.readonly_compatible & ~layout.FEATURES_READONLY_COMPATIBLE
    if unknown:
        raise PoolFormatError(
            f"pool {directory}: a newer nbdstore has written to it (features {unknown:#x}): this "
            "version may check it, but not change it; install the newer one"
        )


@dataclass
class Opened:
    """The parts of an open pool.

    Attributes:
        super_file: holds the superblock that was used.
        inline: blocks whose only durable copy is in the journal, by slot.
        unreadable: where pages of the journal begin that the disk cannot read.
        data_bytes: where the data file ends before, it must be made so long: what its end lacks
            is zeros that belong to blocks.
    """

    services: Services
    registry: Registry
    report: Report
    super_file: File
    roots: Roots
    inline: dict[int, memoryview]
    unreadable: set[int]
    data_bytes: int


def open_parts(
    host: Host,
    disk: Disk,
    options: PoolOptions,
    *,
    damage: OnDamages | None = None,
) -> Opened:
    """Read a pool into memory, changing nothing on disk.

    Arguments:
        damage: whom to tell of damage that opening can do without; None = raise.

    Raises:
        PoolFormatError: of a format not known here, or no pool.
        Corruption: of a superblock, a node or the journal.
    """
    damage = damage or OnDamages()
    if not disk.exists("super"):
        raise PoolFormatError(
            f"{disk.directory} holds no pool: make one with "
            f"'nbdstore --pool {disk.directory} pool create'"
        )
    super_file, data, ring = disk.open("super"), disk.open("data"), disk.open("journal")
    found = superblock.read(super_file)
    current = found.newest
    if ring.size < current.journal_size:
        error = Corruption(
            f"{disk.directory}/journal",
            f"{current.journal_size} bytes",
            f"{ring.size} bytes",
            f"the file was truncated; {_JOURNAL_ADVICE}",
        )
        _tell(damage.journal, error)
    reader = Reader(ring, current.journal_size, current.uuid, damage.journal)
    last, durable_seq = _scan(reader, current, str(disk.directory), damage.journal)
    end = current.journal_offset if last is None else last.end
    seq = current.journal_seq - 1 if last is None else last.seq
    journal = Journal(
        ring,
        current.journal_size,
        current.uuid,
        seq=seq,
        tail=current.journal_offset,
        head=align(end, JOURNAL_PAGE),
    )
    slots = options.slots(current.n_slots, current.block_size)
    core = Core(host, disk, data, journal, slots, current.block_size, options)
    core.on_damage = damage.maps
    roots = _load_free_map(core, current, damage.free_map)
    report = Report(current, [*found.faults])
    listed, catalogue_slots = _load_catalogue(core, current, report.spare_faults)
    roots = Roots(catalogue_slots, roots.free_map, roots.free_map_nodes)
    committer = Committer(core)
    registry = Registry()
    checkpointer = Checkpointer(core, committer, super_file, found, roots, registry, listed.next_id)
    services = Services(core, committer, MapMemory(core), checkpointer)
    nodes = _load_images(services, registry, listed)
    replay = _Replay(services, registry, reader, report, durable_seq)
    replay.run(np.concatenate([nodes, roots.all_slots()]))
    return Opened(
        services,
        registry,
        report,
        super_file,
        roots,
        replay.inline,
        reader.unreadable,
        replay.n_data_slots * current.block_size,
    )


def _scan(
    reader: Reader, current: Superblock, directory: str, on_damage: OnDamage | None
) -> tuple[Record | None, int]:
    """Find the last record of the log, and the largest durable_seq stated."""
    last: Record | None = None
    durable_seq = current.journal_seq - 1
    for record in reader.records(current.journal_offset, current.journal_seq):
        last = record
        durable_seq = max(durable_seq, record.durable_seq)
    missing = current.journal_seq if last is None else last.seq + 1
    end = current.journal_offset if last is None else last.end
    beyond = reader.damage_after(end, missing)
    if beyond is not None:
        error = Corruption(
            f"{directory}/journal, offset {end % current.journal_size}",
            f"record {missing}, which was durable when record {beyond.seq} was written",
            "no valid record",
            _JOURNAL_ADVICE,
        )
        _tell(on_damage, error)
    elif last is None and not _is_marked(reader, current):
        place = (current.journal_offset - HEADER_SIZE) % current.journal_size
        error = Corruption(
            f"{directory}/journal, offset {place}",
            f"record {current.journal_mark}, with which the last checkpoint ended",
            "no such record: this is not the journal that belongs to 'super'",
            f"put the right one back; {_JOURNAL_ADVICE}",
        )
        _tell(on_damage, error)
    return last, durable_seq


def _is_marked(reader: Reader, current: Superblock) -> bool:
    """Tell a journal to which nothing was written since the checkpoint from one that is not it.

    That may be of another pool or another time, or may have been zeroed.
    """
    mark = current.journal_mark
    return not mark or reader.has_mark(current.journal_offset, mark)


def _tell(on_damage: OnDamage | None, error: Corruption) -> None:
    if on_damage is None:
        raise error
    on_damage(error)


# -- the last checkpoint's trees --------------------------------------------------------------


def _read_tree(
    read_node: ReadBlock, root: Pointer, n_entries: int, block_size: int, what: str
) -> tuple[U64, I64]:
    """Return the entries of a small tree (uint64, shape (n, 2)), and the slots of its nodes."""
    fanout = block_size // layout.ENTRY_SIZE
    entries: U64 = np.array([root], np.uint64)
    nodes: list[int] = []
    for n in reversed(level_sizes(n_entries, fanout)[:-1]):
        below = np.zeros((len(entries) * fanout, 2), np.uint64)
        for index, (location, checksum) in enumerate(entries.tolist()):
            if location:
                raw = read_node(location, checksum, what)
                below[index * fanout : (index + 1) * fanout] = np.frombuffer(raw, "<u8").reshape(
                    fanout, 2
                )
                nodes.append(location & layout.SLOT_MASK)
        entries = below[:n]
    return entries, np.array(nodes, np.int64)


def _load_free_map(core: Core, current: Superblock, on_damage: OnDamage | None) -> Roots:
    n_regions = core.slots.n_regions
    read = _reporting(core, on_damage)
    entries, nodes = _read_tree(read, current.free_map, n_regions, core.block_size, "free map")
    for region, (location, checksum) in enumerate(entries.tolist()):
        if location:
            core.slots.load(region, read(location, checksum, f"free map, block {region}"))
    return Roots(np.empty(0, np.int64), entries, nodes)


def _load_catalogue(
    core: Core, current: Superblock, faults: list[Corruption | ReadFailed]
) -> tuple[Catalogue, I64]:
    """Read both copies; return the catalogue, and the slots of all that was found.

    Raises:
        Corruption, ReadFailed: of the first copy, if neither is whole.
    """
    if not current.catalogue_bytes:
        return Catalogue(), np.empty(0, np.int64)
    whole: list[bytes] = []
    roots = [root for root in (current.catalogue, current.catalogue_copy) if root != NULL]
    slots = [np.array([root[0] & layout.SLOT_MASK for root in roots], np.int64)]
    for number, root in enumerate(roots):
        try:
            whole.append(_read_catalogue(core, current, root, f"catalogue, copy {number}", slots))
        except (Corruption, ReadFailed) as error:
            faults.append(error)
    if not whole:
        first = faults[-len(roots)]
        if isinstance(first, Corruption):
            raise Corruption(first.where, first.expected, first.found, _CATALOGUE_ADVICE)
        raise first
    return Catalogue.decode(whole[0]), np.unique(np.concatenate(slots))


def _read_catalogue(
    core: Core, current: Superblock, root: Pointer, what: str, slots: list[I64]
) -> bytes:
    """Return the bytes of one copy; add to `slots` those that it, and the other, have."""
    n_blocks = -(-current.catalogue_bytes // core.block_size)
    n_copies = 1 + (current.catalogue_copy != NULL)
    entries, nodes = _read_tree(core.read_block, root, n_blocks * n_copies, core.block_size, what)
    slots += [layout.slots_of(entries[:, 0]), nodes]
    raw = b"".join(core.read_block(a, b, what) for a, b in entries[:n_blocks].tolist())
    return raw[: current.catalogue_bytes]


def _reporting(core: Core, on_damage: OnDamage | None) -> ReadBlock:
    """Return a reader of blocks that reports a damaged one, and goes on with zeros."""

    def read(location: int, checksum: int, what: str) -> bytes:
        try:
            return core.read_block(location, checksum, what)
        except (Corruption, ReadFailed) as error:
            if on_damage is None:
                raise
            on_damage(error)
            return bytes(core.block_size)

    return read


def _load_images(services: Services, registry: Registry, listed: Catalogue) -> I64:
    """Take up what the last checkpoint has; return the slots of the nodes of all volumes' maps.

    The maps of snapshots are not loaded: the nodes that the last checkpoint wrote are volumes',
    too, and no other slot could have become a node's while records of it are still to be replayed.
    """
    registry.epochs |= {info.id: info.epoch for info in listed.snapshots}
    nodes = [np.empty(0, np.int64)]
    for info in listed.volumes:
        blocks, locations = load_map_now(services.core, info.root, info.size, info.name)
        registry.add(services, info, blocks)
        nodes.append(layout.slots_of(locations))
    for snapshot in sorted(listed.snapshots, key=lambda info: info.epoch):
        registry.add_snapshot(services, snapshot)
    return np.concatenate(nodes)


# -- the journal ------------------------------------------------------------------------------


class _Replay:
    """The second and third reading of the log: what survived, and then doing it."""

    def __init__(
        self,
        services: Services,
        registry: Registry,
        reader: Reader,
        report: Report,
        durable_seq: int,
    ) -> None:
        self._services = services
        self._core = services.core
        self._registry = registry
        self._reader = reader
        self._report = report
        self._durable_seq = durable_seq
        self.inline: dict[int, memoryview] = {}
        self.n_data_slots = 0

    def run(self, nodes: I64) -> None:
        """Do what the log says; `nodes` are the slots of all trees' nodes."""
        slots = self._core.slots
        slots.begin_replay(self._forget_inline)
        self._find_dropped()
        for record in self._records():
            self._report.n_records += 1
            for group in parse(record.payload, f"journal record {record.seq}"):
                first_dropped = self._report.dropped.get(group.volume, record.seq + 1)
                if record.seq < first_dropped:
                    self._apply(group, record.seq)
        # The free map counts the trees' own nodes as used, but a record may free what stood in
        # the slot before the checkpoint, while it ran, wrote a node there.
        slots.replay_used(nodes)
        self._forget_inline(nodes)
        slots.end_replay(self._core.journal.found_seq)

    def _records(self) -> Iterator[Record]:
        current = self._report.superblock
        return self._reader.records(current.journal_offset, current.journal_seq)

    # -- what survived ----------------------------------------------------------------------

    def _find_dropped(self) -> None:
        """Find the volumes whose history ends before the log does."""
        mapped: list[tuple[int, int, U64]] = []
        inline: dict[int, int] = {}
        for record in self._records():
            if record.seq <= self._durable_seq:
                continue
            for group in parse(record.payload, f"journal record {record.seq}"):
                if group.op is Op.MAP:
                    mapped.append((record.seq, group.volume, group.mapping()))
                elif group.op is Op.DATA:
                    blocks = group.data(self._core.block_size)
                    inline.update((slot, xxh3_64_intdigest(b)) for slot, b in blocks.items())
        for seq, volume, mapping in mapped:
            if volume not in self._report.dropped and not self._is_whole(mapping, inline):
                self._report.dropped[volume] = seq

    def _is_whole(self, mapping: U64, inline: dict[int, int]) -> bool:
        """Tell whether all data that a MAP group maps is there, on the disk or in the journal."""
        all_slots = layout.slots_of(mapping[:, 1]).tolist()
        pairs = zip(all_slots, mapping[:, 2].tolist(), strict=True)
        expected = [(slot, checksum) for slot, checksum in pairs if inline.get(slot) != checksum]
        slots = np.array([slot for slot, _ in expected], np.int64)
        self.n_data_slots = max([self.n_data_slots, *(slots + 1).tolist()])
        checksums = [checksum for _, checksum in expected]
        return all(
            self._is_on_disk(int(slots[start]), checksums[start:stop])
            for start, stop in layout.runs(slots)
        )

    def _is_on_disk(self, slot: int, checksums: list[int]) -> bool:
        """Tell whether the slots from `slot` on hold blocks of `checksums`.

        Past the page cache: it may still have what a failed sync has kept from the disk for good.
        """
        size, n = self._core.block_size, len(checksums)
        if n * size <= _PIECE_BYTES:
            try:
                found = self._core.data.pread_direct(n * size, slot * size)
                # The file may end within a block whose rest is zeros: whether something is
                # written behind it, a recovery that was interrupted perhaps, changes nothing.
                raw = memoryview(found.ljust(n * size, b"\0"))
                blocks = [raw[at : at + size] for at in range(0, len(raw), size)]
                return [*map(xxh3_64_intdigest, blocks)] == checksums
            except ReadFailed as error:
                if self._core.on_damage is None:
                    raise
                if n == 1:  # it is lost, but what came after it need not be
                    self._core.on_damage(error)
                    return True
        half = n // 2
        first, rest = checksums[:half], checksums[half:]
        return self._is_on_disk(slot, first) and self._is_on_disk(slot + half, rest)

    # -- doing it again ---------------------------------------------------------------------

    def _apply(self, group: Group, seq: int) -> None:
        if group.op is Op.DATA:
            self._take_inline(group.data(self._core.block_size))
        elif group.op is Op.ADMIN:
            self._registry.apply(self._services, group.volume, group.admin(), seq)
        elif group.op is Op.MAP:
            self._map(self._registry.by_id[group.volume], group.mapping(), seq)
        else:
            volume = self._registry.by_id[group.volume]
            for start, stop in group.ranges():
                load_now(self._core, volume.map, start, stop, volume.name)
                apply_range(volume, start, stop, group.op, seq)

    def _map(self, volume: Volume, mapping: U64, seq: int) -> None:
        blocks = mapping[:, 0].astype(np.int64)
        shift = volume.map.leaf_shift
        for leaf in volume.map.missing_of(blocks).tolist():
            load_now(self._core, volume.map, leaf << shift, (leaf + 1) << shift, volume.name)
        volume.map.make_writable(blocks)
        # A snapshot that a crash prevented has left its mark: what came after it was born later.
        born = int((mapping[:, 1] >> layout.NP_SLOT_BITS).max())
        volume.info.epoch = max(volume.info.epoch, born)
        old = volume.map.entries[blocks, 0]
        volume.map.entries[blocks] = mapping[:, 1:]
        slots = layout.slots_of(mapping[:, 1])
        self._forget_inline(slots)
        self._core.slots.replay_used(slots)
        volume.release(old, seq, n_mapped=len(blocks))

    def _take_inline(self, blocks: dict[int, memoryview]) -> None:
        """Keep what a flush wrote into the journal, for slots that are in use still."""
        slots = np.fromiter(blocks, np.int64)
        for slot in slots[self._core.slots.is_used(slots)].tolist():
            self.inline[slot] = blocks[slot]

    def _forget_inline(self, slots: I64) -> None:
        """`slots` are freed, or used anew: what the journal has for them is of a former life."""
        if self.inline:
            for slot in slots.tolist():
                self.inline.pop(slot, None)
