"""Checking a pool that nobody serves: every pointer, every checksum, and the free map.

Owns what a finding is and what can be repaired.  The pool is opened as recovery opens it (the
journal is replayed in memory), then all trees are walked, all blocks read, and what they use is
compared with what the free map says.

Repair makes a pool usable again, and never makes bad data of damaged data:

- what is derived is rebuilt: free map, counters, the second copies of superblock and catalogue;
- a damaged journal is cut off where the damage is;
- for a damaged node of a map, everything below becomes LOST (layout.py): reading it is an error
  until it is written again.  What it pointed to and nothing else does is freed;
- a damaged block of a volume stays as it is, and reading it an error.

So what is not damaged works again, whatever else is, as long as one superblock and one copy of the
catalogue are whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from xxhash import xxh3_64_intdigest

from nbdstore.errors import Corruption, PoolFormatError, ReadFailed
from nbdstore.store import layout, recovery
from nbdstore.store.blockmap import RESIDENT
from nbdstore.store.core import PoolOptions
from nbdstore.store.host import Disk, Host
from nbdstore.store.layout import I64, U8
from nbdstore.store.lazyarray import LazyArray
from nbdstore.store.local_host import LOCAL
from nbdstore.store.mapmemory import load_now
from nbdstore.store.slots import bits_set, clear_bits, set_bits, test_bits
from nbdstore.store.volume import Volume

_MAX_FINDINGS: Final = 10_000
_SHOWN_RUNS: Final = 20  # of misplaced slots, each a finding

Progress = Callable[[int, int], None]
"""Called with blocks checked so far, and blocks in all."""


@dataclass
class Finding:
    """Something that is not as it should be.

    Attributes:
        severity: "damage": data or the way to it is lost; "inconsistency": derived facts are off,
            and can be rebuilt; "notice": harmless, such as a superblock torn by a crash.
        where: file, volume and offset.
        expected, found: as a person should see them.
        repaired: repair has mended it.
    """

    severity: str
    where: str
    expected: str
    found: str
    repaired: bool = False

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: expected {self.expected}, found {self.found}"


@dataclass
class CheckReport:
    """What a check found, and how much it looked at."""

    findings: list[Finding] = field(default_factory=list)
    n_volumes: int = 0
    n_nodes: int = 0
    n_blocks: int = 0
    n_journal_records: int = 0
    n_findings_left_out: int = 0

    @property
    def clean(self) -> bool:
        """Nothing is left to be mended; notices do not count."""
        return all(f.repaired or f.severity == "notice" for f in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-able objects."""
        return {**asdict(self), "clean": self.clean}


def check_pool(
    directory: Path,
    *,
    repair: bool = False,
    progress: Progress | None = None,
    host: Host = LOCAL,
) -> CheckReport:
    """Check the pool in `directory`, which must not be served.

    Arguments:
        repair: mend what can be mended, and write it.
        progress: called now and then.
        host: what the pool stands on.

    Raises:
        PoolLocked: it is being served.
        PoolFormatError: there is no pool, or of a format not known here.
    """
    check = _Check(host, directory, repair, progress or (lambda _done, _all: None))
    return asyncio.run(check.run())


class _Check:
    def __init__(self, host: Host, directory: Path, repair: bool, progress: Progress) -> None:
        self._host = host
        self._directory = directory
        self._repair = repair
        self._progress = progress
        self._report = CheckReport()
        self._n_damaged_nodes = 0
        self._n_total = 0

    # -- the course of a check --------------------------------------------------------------

    async def run(self) -> CheckReport:
        if not self._host.exists(self._directory / "super"):
            raise PoolFormatError(f"{self._directory} holds no pool: nothing to check")
        disk = self._host.disk(self._directory, read_only=not self._repair)
        try:
            disk.lock()
            opened = self._open(disk)
            if opened is None:
                return self._report
            if self._repair:
                recovery.check_writable(opened.report.superblock, self._directory)
            used = self._walk(opened)
            self._compare(opened, used)
            if self._repair and any(f.repaired for f in self._report.findings):
                await self._write(opened)
        finally:
            disk.close()
        return self._report

    def _open(self, disk: Disk) -> recovery.Opened | None:
        damages = recovery.OnDamages(
            self._journal_damaged, self._node_damaged, self._free_map_damaged
        )
        try:
            opened = recovery.open_parts(self._host, disk, PoolOptions(), damage=damages)
        except Corruption as error:
            self._add("damage", *_told(error))
            return None
        for fault in opened.report.spare_faults:
            self._add("notice", *_told(fault), repaired=self._repair)
        for volume_id, seq in opened.report.dropped.items():
            self._add(
                "notice",
                f"volume {opened.registry.by_id[volume_id].name}, journal record {seq}",
                "the data that it maps",
                "other data, as after a loss of power: the volume is as it was before that record",
            )
        self._report.n_journal_records = opened.report.n_records
        self._report.n_volumes = len(opened.registry.by_name)
        return opened

    def _add(
        self, severity: str, where: str, expected: str, found: str, *, repaired: bool = False
    ) -> Finding:
        finding = Finding(severity, where, expected, found, repaired)
        if len(self._report.findings) < _MAX_FINDINGS:
            self._report.findings.append(finding)
        else:
            self._report.n_findings_left_out += 1
        return finding

    def _journal_damaged(self, error: Corruption | ReadFailed) -> None:
        """The journal ends early: the pool is as it was before."""
        self._add("damage", *_told(error), repaired=self._repair)

    def _free_map_damaged(self, error: Corruption | ReadFailed) -> None:
        """A block of the free map: all of it can be told from the trees."""
        self._add("inconsistency", *_told(error))

    def _node_damaged(self, error: Corruption | ReadFailed) -> None:
        """A node or leaf of a map: what lies below is LOST."""
        self._n_damaged_nodes += 1
        self._add("damage", *_told(error), repaired=self._repair)

    # -- the trees --------------------------------------------------------------------------

    def _walk(self, opened: recovery.Opened) -> U8:
        """Visit everything that is reachable; return the bitmap of slots that are in use."""
        slots = opened.services.core.slots
        n_bits = slots.n_regions * slots.region_slots
        used = LazyArray((n_bits // 8,), np.uint8).array
        set_bits(used, np.array([0, *range(slots.n_slots, n_bits)], np.int64))
        self._use(used, opened.roots.all_slots(), "the pool's own trees", slots.n_slots)
        volumes = list(opened.registry.by_id.values())
        self._n_total = sum(v.info.n_mapped for v in volumes)
        for volume in volumes:
            nodes = opened.node_slots.get(volume.id, np.empty(0, np.int64))
            nodes = np.setdiff1d(nodes, opened.services.checkpointer.dropped())
            self._report.n_nodes += len(nodes)
            self._use(used, nodes, f"map of {volume.name}", slots.n_slots)
            self._walk_volume(opened, volume, used)
        return used

    def _use(self, used: U8, slots: I64, who: str, n_slots: int) -> None:
        outside = slots >= n_slots
        if outside.any():
            self._add("damage", who, f"slots below {n_slots}", f"slot {int(slots[outside][0])}")
            slots = slots[~outside]
        distinct, counts = np.unique(slots, return_counts=True)
        shared = distinct[(counts > 1) | test_bits(used, distinct)]
        for slot in shared[:_SHOWN_RUNS].tolist():
            self._add("damage", f"{who}, slot {slot}", "one pointer to it", "more than one")
        set_bits(used, distinct)

    def _walk_volume(self, opened: recovery.Opened, volume: Volume, used: U8) -> None:
        n_slots = opened.services.core.slots.n_slots
        n_mapped = n_provisioned = 0
        lost = _Stretches()
        for leaf, end, is_lost in volume.map.leaves_in_use():
            start = leaf << volume.map.leaf_shift
            stop = min(end << volume.map.leaf_shift, volume.map.n_blocks)
            if is_lost:
                lost.add(start, stop)
                continue
            self._load_leaf(opened, volume, leaf)
            locations = volume.map.locations(start, stop)
            n_provisioned += int(np.count_nonzero(layout.is_provisioned(locations)))
            held = np.flatnonzero(layout.holds_slot(locations)) + start
            n_mapped += len(held)
            lost.add_blocks(np.flatnonzero(layout.is_lost(locations)) + start)
            slots = layout.slots_of(volume.map.entries[held, 0])
            self._use(used, slots, f"volume {volume.name}", n_slots)
            self._verify(opened, volume, held, slots)
            self._evict(volume, leaf)
        self._add_lost(volume, lost)
        if not self._n_damaged_nodes or self._repair:
            self._count(volume, n_mapped, n_provisioned)

    def _load_leaf(self, opened: recovery.Opened, volume: Volume, leaf: int) -> None:
        """Load a leaf; a damaged one is LOST, and dirty, so that repair writes it like that."""
        start = leaf << volume.map.leaf_shift
        n_damaged = self._n_damaged_nodes
        load_now(opened.services.core, volume.map, start, start + 1, volume.name)
        if self._n_damaged_nodes > n_damaged:
            volume.map.make_writable(np.array([start]))

    def _add_lost(self, volume: Volume, lost: _Stretches) -> None:
        """Tell of what cannot be read, for whatever reason, as byte ranges."""
        size = volume.block_size
        for start, stop in lost.found:
            self._add(
                "damage",
                f"volume {volume.name}, bytes {start * size} to {min(stop * size, volume.size)}",
                "data",
                "nothing: the way to it is damaged",
            )

    @staticmethod
    def _evict(volume: Volume, leaf: int) -> None:
        if volume.map.state_bytes[leaf] == RESIDENT:
            volume.map.evict_leaf(leaf)

    def _verify(self, opened: recovery.Opened, volume: Volume, blocks: I64, slots: I64) -> None:
        """Read and hash the blocks; `slots[i]` holds block `blocks[i]`."""
        for start, stop in layout.runs(slots):
            self._verify_run(opened, volume, blocks[start:stop], int(slots[start]))
        self._report.n_blocks += len(blocks)
        self._progress(self._report.n_blocks, self._n_total)

    def _verify_run(
        self, opened: recovery.Opened, volume: Volume, blocks: I64, first_slot: int
    ) -> None:
        core = opened.services.core
        size = core.block_size
        try:
            raw = memoryview(core.data.pread(len(blocks) * size, first_slot * size))
        except ReadFailed as error:
            if len(blocks) > 1:  # which of them is it?
                for index in range(len(blocks)):
                    single = blocks[index : index + 1]
                    self._verify_run(opened, volume, single, first_slot + index)
                return
            raw = memoryview(b"")
            if first_slot not in opened.inline:
                where = f"volume {volume.name} at {int(blocks[0]) * size}"
                self._add("damage", where, "a readable block", str(error))
                return
        expected = volume.map.entries[blocks, 1].tolist()
        for index, block in enumerate(blocks.tolist()):
            slot = first_slot + index
            found = opened.inline.get(slot, raw[index * size : (index + 1) * size])
            if (slot + 1) * size <= opened.data_bytes:
                found = memoryview(bytes(found).ljust(size, b"\0"))
            if len(found) < size or xxh3_64_intdigest(found) != expected[index]:
                self._block_damaged(volume, block, slot, found)

    def _block_damaged(self, volume: Volume, block: int, slot: int, raw: memoryview) -> None:
        size = volume.block_size
        whole = len(raw) == size
        self._add(
            "damage",
            f"volume {volume.name} at {block * size} (slot {slot}, byte {slot * size} of data)",
            f"checksum {volume.map.words[2 * block + 1]:016x}",
            f"{xxh3_64_intdigest(raw):016x}" if whole else f"{len(raw)} bytes",
        )

    def _count(self, volume: Volume, n_mapped: int, n_provisioned: int) -> None:
        info = volume.info
        if (info.n_mapped, info.n_provisioned) != (n_mapped, n_provisioned):
            if not self._n_damaged_nodes:
                self._add(
                    "inconsistency",
                    f"catalogue, volume {volume.name}",
                    f"{n_mapped} blocks mapped, {n_provisioned} provisioned",
                    f"{info.n_mapped} and {info.n_provisioned}",
                )
            volume.core.slots.n_set_aside += n_provisioned - info.n_provisioned
            info.n_mapped, info.n_provisioned = n_mapped, n_provisioned

    # -- the free map -----------------------------------------------------------------------

    def _compare(self, opened: recovery.Opened, used: U8) -> None:
        slots = opened.services.core.slots
        stored = slots.without_quarantine()
        clear_bits(stored, opened.services.checkpointer.dropped())
        lost = bits_set(used & ~stored)
        leaked = bits_set(stored & ~used)
        self._add_runs(lost, "in use", "free")
        if not self._n_damaged_nodes:  # else they are what a damaged node pointed to
            self._add_runs(leaked, "free", "in use")
        if self._repair:
            slots.correct(lost, leaked)
            for finding in self._report.findings:
                finding.repaired = finding.repaired or finding.severity == "inconsistency"

    def _add_runs(self, slots: I64, expected: str, found: str) -> None:
        found_runs = layout.runs(slots)
        for start, stop in found_runs[:_SHOWN_RUNS]:
            where = f"free map, slots {int(slots[start])} to {int(slots[stop - 1])}"
            self._add("inconsistency", where, expected, found, repaired=self._repair)
        left = found_runs[_SHOWN_RUNS:]
        if left:
            n = sum(stop - start for start, stop in left)
            where = f"free map, {n} slots in {len(left)} more places"
            self._add("inconsistency", where, expected, found, repaired=self._repair)

    async def _write(self, opened: recovery.Opened) -> None:
        """Write what was mended."""
        core = opened.services.core
        core.journal.make_whole(opened.unreadable)
        for slot, block in opened.inline.items():
            core.data.pwritev([block], slot * core.block_size)
        await opened.services.checkpointer.run()


class _Stretches:
    """Ranges `[start, stop)` of blocks that come in ascending order, joined as they come."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []

    def add_blocks(self, blocks: I64) -> None:
        """Add `blocks`, int64, ascending."""
        for start, stop in layout.runs(blocks):
            self.add(int(blocks[start]), int(blocks[stop - 1]) + 1)

    def add(self, start: int, stop: int) -> None:
        """Add blocks `[start, stop)`."""
        if self.found and self.found[-1][1] == start:
            start = self.found.pop()[0]
        self.found.append((start, stop))


def _told(error: Corruption | ReadFailed) -> tuple[str, str, str]:
    """Where, what was expected, what was found."""
    if isinstance(error, Corruption):
        return error.where, error.expected, error.found
    return str(error), "a readable block", "an error of the disk"
