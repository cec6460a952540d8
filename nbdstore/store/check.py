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

from nbdstore.errors import Corruption, PoolFormatError, ReadFailed
from nbdstore.store import layout, recovery
from nbdstore.store.core import PoolOptions
from nbdstore.store.host import Disk, Host
from nbdstore.store.layout import I64, U8
from nbdstore.store.local_host import LOCAL
from nbdstore.store.slots import bits_set, clear_bits
from nbdstore.store.treewalk import TreeWalk

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
    """One check; what the walk through the trees finds goes to :meth:`add`.

    Attributes:
        repair: mend what can be mended.
        n_damaged_nodes: nodes and leaves of maps that were found damaged so far.
        progress: to be called with blocks checked so far, and blocks in all.
    """

    def __init__(self, host: Host, directory: Path, repair: bool, progress: Progress) -> None:
        self._host = host
        self._directory = directory
        self.repair = repair
        self.progress = progress
        self._report = CheckReport()
        self.n_damaged_nodes = 0

    # -- the course of a check --------------------------------------------------------------

    async def run(self) -> CheckReport:
        if not self._host.exists(self._directory / "super"):
            raise PoolFormatError(f"{self._directory} holds no pool: nothing to check")
        disk = self._host.disk(self._directory, read_only=not self.repair)
        try:
            disk.lock()
            opened = self._open(disk)
            if opened is None:
                return self._report
            if self.repair:
                recovery.check_writable(opened.report.superblock, self._directory)
            self._compare(opened, self._walk(opened))
            if self.repair and any(f.repaired for f in self._report.findings):
                await self._write(opened)
                await self._free_what_nobody_has(opened)
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
            self.add("damage", *_told(error))
            return None
        for fault in opened.report.spare_faults:
            self.add("notice", *_told(fault), repaired=self.repair)
        for volume_id, seq in opened.report.dropped.items():
            self.add(
                "notice",
                f"volume {opened.registry.by_id[volume_id].name}, journal record {seq}",
                "the data that it maps",
                "other data, as after a loss of power: the volume is as it was before that record",
            )
        self._report.n_journal_records = opened.report.n_records
        self._report.n_volumes = len(opened.registry.by_name)
        return opened

    def add(
        self, severity: str, where: str, expected: str, found: str, *, repaired: bool = False
    ) -> None:
        """Note a finding."""
        finding = Finding(severity, where, expected, found, repaired)
        if len(self._report.findings) < _MAX_FINDINGS:
            self._report.findings.append(finding)
        else:
            self._report.n_findings_left_out += 1

    def _journal_damaged(self, error: Corruption | ReadFailed) -> None:
        """The journal ends early: the pool is as it was before."""
        self.add("damage", *_told(error), repaired=self.repair)

    def _free_map_damaged(self, error: Corruption | ReadFailed) -> None:
        """A block of the free map: all of it can be told from the trees."""
        self.add("inconsistency", *_told(error))

    def _node_damaged(self, error: Corruption | ReadFailed) -> None:
        """A node or leaf of a map: what lies below is LOST."""
        self.n_damaged_nodes += 1
        self.add("damage", *_told(error), repaired=self.repair)

    def _walk(self, opened: recovery.Opened) -> U8:
        """Visit everything that is reachable; return the bitmap of slots that are in use."""
        walk = TreeWalk(opened, self)
        try:
            walk.run()
        finally:
            self._report.n_nodes, self._report.n_blocks = walk.n_nodes, walk.n_blocks
        return walk.used

    # -- the free map -----------------------------------------------------------------------

    def _compare(self, opened: recovery.Opened, used: U8) -> None:
        slots = opened.services.core.slots
        stored = slots.without_quarantine()
        clear_bits(stored, opened.services.checkpointer.dropped())
        lost = bits_set(used & ~stored)
        leaked = bits_set(stored & ~used)
        self._add_runs(lost, "in use", "free")
        if not self.n_damaged_nodes:  # else they are what a damaged node pointed to
            self._add_runs(leaked, "free", "in use")
        if self.repair:
            slots.correct(lost, leaked)
            for finding in self._report.findings:
                finding.repaired = finding.repaired or finding.severity == "inconsistency"

    def _add_runs(self, slots: I64, expected: str, found: str) -> None:
        found_runs = layout.runs(slots)
        for start, stop in found_runs[:_SHOWN_RUNS]:
            where = f"free map, slots {int(slots[start])} to {int(slots[stop - 1])}"
            self.add("inconsistency", where, expected, found, repaired=self.repair)
        left = found_runs[_SHOWN_RUNS:]
        if left:
            n = sum(stop - start for start, stop in left)
            where = f"free map, {n} slots in {len(left)} more places"
            self.add("inconsistency", where, expected, found, repaired=self.repair)

    async def _write(self, opened: recovery.Opened) -> None:
        """Write what was mended."""
        core = opened.services.core
        core.journal.make_whole(opened.unreadable)
        for slot, block in opened.inline.items():
            core.data.pwritev([block], slot * core.block_size)
        await opened.services.checkpointer.run()

    async def _free_what_nobody_has(self, opened: recovery.Opened) -> None:
        """Free what only the writing has left to nobody.

        What a volume shared with a part of a snapshot that is LOST now, and has replaced when it
        was written, it took for the snapshot's.
        """
        slots, checkpointer = opened.services.core.slots, opened.services.checkpointer
        opened.roots = checkpointer.roots
        walk = TreeWalk(opened, _Quiet(), verify=False)
        walk.run()
        leaked = bits_set(slots.without_quarantine() & ~walk.used)
        if len(leaked):
            slots.correct(np.empty(0, np.int64), leaked)
            await checkpointer.run()


class _Quiet:
    """What a walk reports to whose findings were told before."""

    repair = False
    n_damaged_nodes = 0

    def add(
        self, severity: str, where: str, expected: str, found: str, *, repaired: bool = False
    ) -> None:
        pass

    def progress(self, n_done: int, n_all: int, /) -> None:
        pass


def _told(error: Corruption | ReadFailed) -> tuple[str, str, str]:
    """Where, what was expected, what was found."""
    if isinstance(error, Corruption):
        return error.where, error.expected, error.found
    return str(error), "a readable block", "an error of the disk"
