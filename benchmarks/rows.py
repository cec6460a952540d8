"""Every row: what it asks, of what, and what nbdstore is to reach.

To add a row: put a job of fio into fio/, or write a `Measure`, and list it here. Rows with the same
stage are measured on the same disks in the order of this list, so rows that only read come first.

Goals: at least as fast as the fastest peer everywhere; 1.5 times as fast in random reads and 3
times in random writes with 32 or more in flight, cold and far apart too; twice where several
clients flush; an operation costs less than 20 % more on a volume of 1 TiB than on one of 1 GiB,
and less than 10 % more on one with 100 snapshots than on one without.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

from benchmarks import copying, devices, opening, trimming
from benchmarks.cold import ColdJob
from benchmarks.fio import FioJob
from benchmarks.kernel import KernelJob
from benchmarks.model import Filling, Goal, Need, Point, Row, Stage, Transport, Unit
from benchmarks.recovery import Recovery
from benchmarks.scale import GIB, MIB, TIB, Scale
from benchmarks.source_tree import SourceTree
from nbdstore.sizes import format_size

AS_FAST: Final = Goal(1.0)
READS: Final = Goal(1.5)
WRITES: Final = Goal(3.0)
SEVERAL_FLUSH: Final = Goal(2.0)
COSTS_20_PERCENT_MORE: Final = 1 / 1.2
COSTS_10_PERCENT_MORE: Final = 1 / 1.1

TREE_BYTES: Final = 2 * GIB  # of the volume that a source tree is unpacked on

_KERNEL: Final = ("/dev/nbd0", "nbd-client", "root")
_LOOP: Final = ("root", "/dev/fuse", "/dev/loop-control", "nbdfuse", "fusermount3", "losetup")
_EXT4: Final = ("mkfs.ext4", "mount", "umount", "tar")


class Job(NamedTuple):
    """A row that is one job of fio."""

    name: str
    question: str
    goal: Goal
    depth: int = 0  # of a row that has its place in the plot of depths
    is_quick: bool = False

    @property
    def unit(self) -> Unit:
        return Unit.MB_PER_S if self.name.startswith("sequential") else Unit.IOPS

    def row(self, group: str, stage: Stage) -> Row:
        line = f"{self.name.partition('-4k')[0].replace('-', ' ')}, 4 KiB"
        return Row(
            name=self.name,
            group=group,
            question=self.question,
            unit=self.unit,
            stage=stage,
            measure=FioJob(self.name, self.unit),
            goal=self.goal,
            point=Point(line, "requests in flight", self.depth) if self.depth else None,
            is_quick=self.is_quick,
            warms_up=True,
        )


# Reads before writes, and writes in order before writes at random: a stage ages as it is used.
RANDOM_READS: Final = (
    Job("random-read-4k-depth-1", "How long does one client wait for a block?", AS_FAST, 1, True),
    Job("random-read-4k-depth-32", "How many small reads with a usual queue?", READS, 32, True),
    Job("random-read-4k-depth-128", "And with a deep one?", READS, 128),
    Job("random-read-4k-4-jobs", "How many small reads do four clients get?", READS),
    Job("random-read-16k-depth-32", "How many reads of a database's page?", READS),
)
SEQUENTIAL: Final = (
    Job("sequential-read-128k", "How fast does the kernel read ahead?", AS_FAST, 0, True),
    Job("sequential-read-1m", "How fast are large reads?", AS_FAST),
    Job("sequential-write-128k", "How fast does the kernel write back?", AS_FAST, 0, True),
    Job("sequential-write-1m", "How fast are large writes?", AS_FAST),
)
RANDOM_WRITES: Final = (
    Job("random-write-4k-depth-1", "How long does one write take?", AS_FAST, 1, True),
    Job("random-write-4k-depth-32", "How many small writes with a usual queue?", WRITES, 32, True),
    Job("random-write-4k-depth-128", "And with a deep one?", WRITES, 128),
    Job("random-write-4k-4-jobs", "How many small writes do four clients get?", WRITES),
    Job("random-write-16k-depth-32", "How many writes of a database's page?", WRITES),
    Job("random-mixed-4k-depth-32", "7 reads to 3 writes: do they slow each other?", AS_FAST),
)
FSYNC: Final = (
    Job("fsync-each-write", "How many commits does one database make?", AS_FAST, 0, True),
    Job("fsync-every-32", "How many writes with a flush after every 32?", AS_FAST),
    Job("fsync-8-clients", "How many commits do eight clients make?", SEVERAL_FLUSH, 0, True),
)


def rows(scale: Scale) -> list[Row]:
    """All rows, in the order in which they are measured."""

    def disk(name: str, transport: Transport = Transport.UNIX, aging_writes: int = 0) -> Stage:
        return Stage(
            name=name, size=scale.disk_bytes, transport=transport, aging_writes=aging_writes
        )

    return [
        *fresh_rows(disk("fresh")),
        *transport_rows("tcp", disk("tcp", Transport.TCP)),
        *transport_rows("tls", disk("tls", Transport.TLS)),
        *aged_rows(disk("aged", aging_writes=scale.aging_writes)),
        *cold_rows(disk("cold")),
        *snapshot_rows(disk("without snapshots"), scale.n_snapshots),
        *size_rows(scale),
        *filesystem_rows(scale),
        *opening_rows(scale),
        *volume_count_rows(scale),
        *recovery_rows(scale, disk("recovery")),
        *kernel_rows(disk("kernel")),
    ]


def fresh_rows(disk: Stage) -> list[Row]:
    """A volume that was written once, in order, over a unix socket."""
    return [
        *(job.row("random-read", disk) for job in RANDOM_READS),
        *(job.row("sequential", disk) for job in SEQUENTIAL[:2]),
        _copy_row(disk, "nbdcopy-out", "How fast does nbdcopy read a volume?"),
        *(job.row("sequential", disk) for job in SEQUENTIAL[2:]),
        _copy_row(disk, "nbdcopy-in", "How fast does nbdcopy write a volume, until it is on disk?"),
        *(job.row("random-write", disk) for job in RANDOM_WRITES),
        *(job.row("fsync", disk) for job in FSYNC),
    ]


def _copy_row(disk: Stage, name: str, question: str) -> Row:
    return Row(
        name=name,
        group="sequential",
        question=question,
        unit=Unit.MB_PER_S,
        stage=disk,
        measure=copying.copy_out if name == "nbdcopy-out" else copying.copy_in,
        goal=AS_FAST,
        needs_host=("nbdcopy",),
        is_timed=False,
        cost_s=disk.size / 1e9,
    )


def transport_rows(name: str, disk: Stage) -> list[Row]:
    """The same over another transport."""
    jobs = (*RANDOM_READS, *SEQUENTIAL, *RANDOM_WRITES, *FSYNC)
    needs = frozenset({Need.TLS}) if disk.transport is Transport.TLS else frozenset()
    return [
        dataclasses.replace(
            job.row(name, disk),
            name=f"{name}-{job.name}",
            needs=needs,
            point=None,
            is_quick=False,
        )
        for job in jobs
    ]


def aged_rows(disk: Stage) -> list[Row]:
    """After random overwrites, which scatter what copy-on-write has written in order."""
    jobs = (RANDOM_READS[1], *SEQUENTIAL[:2], RANDOM_WRITES[1], FSYNC[0])
    return [
        dataclasses.replace(
            job.row("aged", disk), name=f"aged-{job.name}", point=None, is_quick=False
        )
        for job in jobs
    ]


def cold_rows(disk: Stage) -> list[Row]:
    """Reads from the disk."""
    return [
        dataclasses.replace(
            job.row("cold", disk),
            name=f"cold-{job.name}",
            measure=ColdJob(job.name, job.unit),
            cache="dropped before each sample",
            point=None,
            is_quick=False,
            warms_up=False,
        )
        for job in (*RANDOM_READS[:2], *SEQUENTIAL[:2])
    ]


def snapshot_rows(disk: Stage, n_snapshots: int) -> list[Row]:
    """Random writes to a volume without and with snapshots, which keep what is overwritten."""
    kept = dataclasses.replace(disk, name="with snapshots", n_snapshots=n_snapshots)
    job = RANDOM_WRITES[1]
    without = f"snapshots-0-{job.name}"
    return [
        dataclasses.replace(
            job.row("snapshots", stage),
            name=f"snapshots-{'many' if stage is kept else '0'}-{job.name}",
            question="What do snapshots cost a writer?",
            goal=Goal(COSTS_10_PERCENT_MORE, without) if stage is kept else WRITES,
            needs=frozenset({Need.SNAPSHOTS}),
            point=None,
            is_quick=False,
        )
        for stage in (disk, kept)
    ]


# --- Size ----------------------------------------------------------------------------------------


def size_rows(scale: Scale) -> list[Row]:
    """The same blocks, far apart: what does an operation cost on a large volume? And trim."""
    small = _scattered("size 1 GiB", scale, GIB)
    large = _scattered("size 1 TiB", scale, TIB)
    found = []
    for stage, name in ((small, "1g"), (large, "1t")):
        for kind, fast in (("read", READS), ("write", WRITES)):
            job = f"scattered-{kind}-4k-depth-32"
            goal = Goal(COSTS_20_PERCENT_MORE, f"{job}-1g") if stage is large else fast
            row = Row(
                name=f"{job}-{name}",
                group="size",
                question=f"Does a {kind} cost more on a large volume?",
                unit=Unit.IOPS,
                stage=stage,
                measure=FioJob(job, is_scattered=True),
                goal=goal,
                point=Point(
                    f"scattered {kind}, 4 KiB", "size of the volume, GiB", stage.size / GIB
                ),
                warms_up=True,
            )
            found.append(row)
    trim = Row(
        name="trim-1t",
        group="size",
        question="How long does it take to trim 1 TiB?",
        unit=Unit.SECONDS,
        stage=large,
        measure=trimming.trim_all,
        goal=AS_FAST,
        needs=frozenset({Need.TRIM}),
        is_timed=False,
        cost_s=1.0 + large.n_scattered / 12e3,  # it is filled again before each
    )
    return [*found, trim]


def _scattered(name: str, scale: Scale, size: int) -> Stage:
    return Stage(
        name=name, size=size, filling=Filling.SCATTERED, filled_bytes=scale.scattered_bytes
    )


# --- Filesystems ---------------------------------------------------------------------------------


def filesystem_rows(scale: Scale) -> list[Row]:
    """A filesystem of the host on nbdfuse and a loop device: the same client for every peer."""
    return [
        Row(
            name="source-tree",
            group="filesystem",
            question="How long do mkfs.ext4, unpacking a source tree and removing it take?",
            unit=Unit.SECONDS,
            stage=Stage(name="filesystem", size=TREE_BYTES, filling=Filling.NOTHING),
            measure=SourceTree(devices.loop),
            goal=AS_FAST,
            needs_host=(*_LOOP, *_EXT4),
            is_timed=False,
            cost_s=0.3 + scale.tree_files / 12e3,
        )
    ]


def kernel_rows(disk: Stage) -> list[Row]:
    """Through the kernel's nbd driver, past the client's page cache."""
    jobs = (*RANDOM_READS[:2], *SEQUENTIAL[::2], *RANDOM_WRITES[:2], FSYNC[0])
    jobs_rows = [
        dataclasses.replace(
            job.row("kernel", disk),
            name=f"kernel-{job.name}",
            measure=KernelJob(job.name, job.unit),
            needs_host=_KERNEL,
            point=None,
            is_quick=False,
        )
        for job in jobs
    ]
    tree = Row(
        name="kernel-source-tree",
        group="kernel",
        question="How long do mkfs.ext4, unpacking a source tree and removing it take?",
        unit=Unit.SECONDS,
        stage=Stage(name="kernel filesystem", size=TREE_BYTES, filling=Filling.NOTHING),
        measure=SourceTree(devices.kernel),
        goal=AS_FAST,
        needs_host=(*_KERNEL, *_EXT4),
        is_timed=False,
        cost_s=10,
    )
    return [*jobs_rows, tree]


# --- Opening and recovery ------------------------------------------------------------------------


def opening_rows(scale: Scale) -> list[Row]:
    """Open time and memory, against the size of a volume."""
    found: list[Row] = []
    for size in scale.thin_bytes:
        found += _opening_pair(_scattered("opening", scale, size), "thin", size)
    for size in scale.mapped_bytes:
        found += _opening_pair(
            Stage(name="opening", size=size, filling=Filling.MAPPED), "mapped", size
        )
    return found


def _opening_pair(stage: Stage, kind: str, size: int) -> list[Row]:
    name = f"{kind}-{format_size(size).replace(' ', '').removesuffix('iB').lower()}"
    is_thin = stage.filling is Filling.SCATTERED
    use = "scattered-read-4k-depth-32" if is_thin else "sequential-read-1m"
    memory = opening.Memory(use, is_scattered=is_thin)
    time_row, memory_row = _pair(stage, name, memory, f"{kind} volume", size / GIB)
    return [time_row, memory_row]


def _pair(
    stage: Stage,
    name: str,
    memory: opening.Memory,
    what: str,
    x: float,
    needs: Collection[Need] = (),
) -> tuple[Row, Row]:
    axis = "number of volumes" if needs else "size of the volume, GiB"
    time_row = Row(
        name=f"open-{name}",
        group="opening",
        question="How long until the first client has its export?",
        unit=Unit.SECONDS,
        stage=stage,
        measure=opening.open_time,
        goal=AS_FAST,
        needs=frozenset(needs),
        point=Point(f"open time, {what}", axis, x),
        is_timed=False,
        cost_s=0.2,
    )
    memory_row = Row(
        name=f"memory-{name}",
        group="opening",
        question="How much memory does the server take once it was used?",
        unit=Unit.MIB,
        stage=stage,
        measure=memory,
        goal=AS_FAST,
        needs=frozenset(needs),
        point=Point(f"memory, {what}", axis, x),
        cost_s=0.6,
    )
    return time_row, memory_row


def volume_count_rows(scale: Scale) -> list[Row]:
    """Open time and memory, against the number of volumes."""
    found: list[Row] = []
    for count in scale.volume_counts:
        stage = Stage(
            name="volumes",
            size=GIB,
            n_volumes=count,
            filling=Filling.SCATTERED,
            filled_bytes=4 * MIB,
        )
        memory = opening.Memory("scattered-read-4k-depth-32", is_scattered=True)
        found += _pair(stage, f"{count}-volumes", memory, "volumes", count, {Need.MANY_VOLUMES})
    return found


def recovery_rows(scale: Scale, stage: Stage) -> list[Row]:
    """Recovery time, against the length of the journal."""
    return [
        Row(
            name=f"recovery-{format_size(n_bytes).replace(' ', '').removesuffix('iB').lower()}",
            group="recovery",
            question="After kill -9: how long until the first client has its export?",
            unit=Unit.SECONDS,
            stage=stage,
            measure=Recovery(n_bytes),
            needs=frozenset({Need.JOURNAL}),
            point=Point("recovery", "length of the journal, MiB", n_bytes / MIB),
            is_timed=False,
            cost_s=1.0 + n_bytes / (2 * MIB),
        )
        for n_bytes in scale.journal_bytes
    ]


def chosen(all_rows: Sequence[Row], patterns: Sequence[str]) -> list[Row]:
    """The rows whose name or group fits one of the patterns, in their order; all without one.

    Raises:
        LookupError: a pattern fits nothing.
    """
    found = set()
    for pattern in patterns:
        fitting = {
            row.name
            for row in all_rows
            if row.group == pattern or fnmatch.fnmatchcase(row.name, pattern)
        }
        if not fitting:
            raise LookupError(
                f"'{pattern}' is no row and no group: see 'python -m benchmarks list'"
            )
        found |= fitting
    return [row for row in all_rows if row.name in found or not patterns]
