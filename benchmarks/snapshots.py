"""What snapshots of a large volume cost those who use the pool meanwhile.

Owns the measurement: of each change, how long it takes, how long it holds up the event loop at a
time, how long a client's write waits at most, and how full the journal gets::

    python -m benchmarks.snapshots --mapped 100 DIRECTORY

The volume is of 1 TiB.  So that its map can be large on a small disk, the data of most blocks is
not written: nothing here reads them.  Maps, journal and all of the client's writes are real.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import uvloop

from nbdstore.store import Pool, PoolOptions, Volume
from nbdstore.store.host import Buffer, File

GIB: Final = 1 << 30
SIZE: Final = 1 << 40
PIECE: Final = 4 << 20
FILLER: Final = bytes(4095) + b"x"


class _WithoutFiller:
    """The data file, but blocks of filler are not written: they would be never read."""

    def __init__(self, file: File) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        if bytes(buffers[0][-64:]) != FILLER[-64:]:
            self._file.pwritev(buffers, offset)


@dataclass
class Client:
    """Writes one block after another while something goes on.

    Attributes:
        slowest_s: the longest that one of its writes took.
        longest_slice_s: the longest that the event loop was held up.
        longest_cpu_s: the most that it computed at a time; the rest is the machine's, and threads'.
        journal_used: the most that was in the journal, in bytes.
    """

    pool: Pool
    volume: Volume
    n_writes: int = 0
    slowest_s: float = 0.0
    longest_slice_s: float = 0.0
    longest_cpu_s: float = 0.0
    journal_used: int = 0

    async def write(self, interval_s: float) -> None:
        """Write 4 KiB now and then, all over the last GiB of the volume."""
        while True:
            begun = time.perf_counter()
            at = SIZE - GIB + self.n_writes * 37 * 4096 % GIB
            await self.volume.write(at, b"w" * 4096)
            self.slowest_s = max(self.slowest_s, time.perf_counter() - begun)
            self.journal_used = max(self.journal_used, self.pool._core.journal.used)
            self.n_writes += 1
            await asyncio.sleep(interval_s)

    async def watch(self) -> None:
        """Find the longest time that the loop did not get to us."""
        last, last_cpu = time.perf_counter(), time.thread_time()
        while True:
            await asyncio.sleep(0)
            now, cpu = time.perf_counter(), time.thread_time()
            self.longest_slice_s = max(self.longest_slice_s, now - last)
            self.longest_cpu_s = max(self.longest_cpu_s, cpu - last_cpu)
            last, last_cpu = now, cpu


async def _measure(
    name: str, pool: Pool, volume: Volume, interval_s: float, change: Awaitable[Any]
) -> Any:
    """Wait for `change` beside a client's writes; tell what it cost."""
    client = Client(pool, volume)
    beside = [
        asyncio.ensure_future(client.write(interval_s)),
        asyncio.ensure_future(client.watch()),
    ]
    begun = time.perf_counter()
    found = await change
    seconds = time.perf_counter() - begun
    await asyncio.sleep(0.05)
    for task in beside:
        task.cancel()
    await asyncio.gather(*beside, return_exceptions=True)
    click.echo(
        f"{name:<42} {seconds:8.2f} s   longest slice {client.longest_slice_s * 1e3:6.1f} ms "
        f"(CPU {client.longest_cpu_s * 1e3:5.1f})   "
        f"{client.n_writes:7,} writes, slowest {client.slowest_s * 1e3:7.1f} ms   "
        f"journal {client.journal_used / pool._core.journal.size:4.0%}"
    )
    return found


async def _fill(volume: Volume, n_bytes: int) -> None:
    data = FILLER * (PIECE // len(FILLER))
    stride = (SIZE - 2 * GIB) // (n_bytes // PIECE) // PIECE * PIECE
    for number in range(n_bytes // PIECE):
        await volume.write(number * stride, data)
        await asyncio.sleep(0)


async def _emptied(pool: Pool, volume: Volume) -> None:
    await pool.delete_volume(volume)
    await pool._administration.emptied(volume)


async def run(directory: Path, mapped: int, interval_s: float) -> None:
    """Measure everything in a new pool in `directory`."""
    Pool.create(directory, capacity=3 * mapped + 16 * GIB)
    pool = await Pool.open(directory, PoolOptions(sync_interval_s=1.0))
    pool._core.data = _WithoutFiller(pool._core.data)
    volume = await pool.create_volume("v", SIZE)
    other = await pool.create_volume("other", SIZE)

    async def snap(name: str) -> Any:
        (made,) = await pool.create_snapshots([(volume, name)])
        return made

    async def measured(name: str, change: Awaitable[Any]) -> Any:
        return await _measure(name, pool, volume, interval_s, change)

    begun = time.perf_counter()
    await _fill(volume, mapped)
    click.echo(f"{mapped / GIB:.0f} GiB mapped in {time.perf_counter() - begun:.0f} s")
    first = await measured("create, all mapped since the last one", snap("first"))
    second = await measured("create, little changed", snap("second"))
    await measured("delete, little in it, heir a snapshot", pool.delete_snapshot(first))
    clone = await measured("clone", pool.clone(second, "c"))
    await measured("delete the clone", _emptied(pool, clone))
    await _fill(volume, mapped)
    await pool.checkpoint()
    await measured("what it holds alone, which is all", pool.bytes_alone(second))
    await measured("delete, all is its own, heir the volume", pool.delete_snapshot(second))
    third = await snap("third")
    await _fill(volume, mapped)
    fourth = await snap("fourth")
    await measured("delete, all is its own, heir a snapshot", pool.delete_snapshot(third))
    await measured("roll back, nothing to discard", pool.rollback(volume, fourth))
    await pool.delete_snapshot(fourth)
    await _measure(
        "delete a volume, until it is freed", pool, other, interval_s, _emptied(pool, volume)
    )
    await pool.close()


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--mapped", type=int, default=16, show_default=True, help="GiB.")
@click.option("--interval-ms", type=float, default=0.2, show_default=True, help="Between writes.")
def main(directory: Path, mapped: int, interval_ms: float) -> None:
    """Measure what snapshots cost."""
    try:
        uvloop.run(run(directory, mapped * GIB, interval_ms / 1e3))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
