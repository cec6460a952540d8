"""How large and how long a run is.

The shape of what is measured never changes, only its size: a figure of one scale must not be
compared with a figure of another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One size of a run.

    Attributes:
        rounds: how often everything is measured.
        runtime_s: of one sample; warm_up_s: of the run before a row's first sample.
        disk_bytes: of the volume that most rows measure; it is written in full beforehand.
        scattered_bytes: what is written beforehand to a volume that is mostly holes. Each block
            lies alone, so that 256 MiB of them take 256 MiB of nbdstore's --map-memory.
        aging_writes: random overwrites of 4 KiB that make a volume old. 360,000 are an hour's
            worth at 100 a second.
        n_snapshots: of a volume that has many.
        tree_files: files in the source tree that is unpacked.
        journal_bytes: how long the journals are that recovery has to replay.
        volume_counts: how many volumes a server opens.
        thin_bytes: sizes of volumes, mostly holes, that a server opens.
        mapped_bytes: the same, mapped in full.
    """

    name: str
    rounds: int
    runtime_s: float
    warm_up_s: float
    disk_bytes: int
    scattered_bytes: int
    aging_writes: int
    n_snapshots: int
    tree_files: int
    journal_bytes: tuple[int, ...]
    volume_counts: tuple[int, ...]
    thin_bytes: tuple[int, ...]
    mapped_bytes: tuple[int, ...]


THIN_BYTES: Final = (GIB, 100 * GIB, TIB, 10 * TIB)

SMOKE: Final = Scale(
    name="smoke",
    rounds=1,
    runtime_s=0.05,
    warm_up_s=0,
    disk_bytes=16 * MIB,
    scattered_bytes=4 * MIB,
    aging_writes=2000,
    n_snapshots=3,
    tree_files=20,
    journal_bytes=(0, 64 * KIB),
    volume_counts=(1, 10),
    thin_bytes=(GIB, 10 * TIB),
    mapped_bytes=(16 * MIB,),
)
QUICK: Final = Scale(
    name="quick",
    rounds=3,
    runtime_s=0.5,
    warm_up_s=0.2,
    disk_bytes=256 * MIB,
    scattered_bytes=64 * MIB,
    aging_writes=90_000,
    n_snapshots=100,
    tree_files=400,
    journal_bytes=(0, 4 * MIB),
    volume_counts=(1, 100),
    thin_bytes=THIN_BYTES,
    mapped_bytes=(256 * MIB,),
)
NORMAL: Final = Scale(
    name="normal",
    rounds=5,
    runtime_s=2,
    warm_up_s=0.5,
    disk_bytes=GIB,
    scattered_bytes=256 * MIB,
    aging_writes=360_000,
    n_snapshots=100,
    tree_files=4000,
    journal_bytes=(0, MIB, 4 * MIB, 16 * MIB),
    volume_counts=(1, 10, 100, 1000),
    thin_bytes=THIN_BYTES,
    mapped_bytes=(GIB, 10 * GIB, 100 * GIB),
)
FULL: Final = Scale(
    name="full",
    rounds=7,
    runtime_s=5,
    warm_up_s=1,
    disk_bytes=4 * GIB,
    scattered_bytes=256 * MIB,
    aging_writes=1_440_000,
    n_snapshots=100,
    tree_files=20_000,
    journal_bytes=(0, MIB, 4 * MIB, 16 * MIB, 56 * MIB),
    volume_counts=(1, 10, 100, 1000),
    thin_bytes=THIN_BYTES,
    mapped_bytes=(GIB, 10 * GIB, 100 * GIB, TIB),
)
SCALES: Final = {scale.name: scale for scale in (SMOKE, QUICK, NORMAL, FULL)}
