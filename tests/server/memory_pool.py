"""A pool in memory, for tests of the server that must steer what the store does.

Behaves as the store's contract says; `MemoryVolume.cold` and `full` make it wait like a cold cache
or a full pool, `error` makes it fail.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from nbdstore.errors import NotFast, StoreError
from nbdstore.store import Extent, ExtentKind

BLOCK = 4096

_ids = itertools.count(1)


class MemoryVolume:
    """A volume of `size` bytes; a block is a hole until something is written to it."""

    def __init__(self, name: str, size: int) -> None:
        self.id = next(_ids)
        self.name = name
        self.size = size
        self.block_size = BLOCK
        self.properties: dict[str, Any] = {}
        self.snapshots: dict[str, Any] = {}
        self.blocks: dict[int, bytearray] = {}
        self.provisioned: set[int] = set()
        self.cold = False
        """Reads must wait."""
        self.space = asyncio.Event()
        self.space.set()
        """Not set: writes must wait for space."""
        self.error: Exception | None = None
        self.calls: list[str] = []
        self.n_written_now = 0

    def _read(self, offset: int, length: int) -> list[memoryview | int]:
        if self.error:
            raise self.error
        segments: list[memoryview | int] = []
        stop = offset + length
        while offset < stop:
            n = min(BLOCK - offset % BLOCK, stop - offset)
            block = self.blocks.get(offset // BLOCK)
            at = offset % BLOCK
            segments.append(n if block is None else memoryview(bytes(block[at : at + n])))
            offset += n
        return segments

    def _write(self, offset: int, data: memoryview | bytes) -> None:
        if self.error:
            raise self.error
        assert offset + len(data) <= self.size
        view = memoryview(data)
        while view:
            block = self.blocks.setdefault(offset // BLOCK, bytearray(BLOCK))
            at = offset % BLOCK
            n = min(BLOCK - at, len(view))
            block[at : at + n] = view[:n]
            view = view[n:]
            offset += n

    def read_now(self, offset: int, length: int) -> list[memoryview | int] | None:
        return None if self.cold else self._read(offset, length)

    def read_batch_now(self, offsets: Sequence[int], length: int) -> list[memoryview | None]:
        if self.cold or self.error:
            return [None] * len(offsets)
        found = [self._read(offset, length) for offset in offsets]
        return [
            segments[0] if len(segments) == 1 and isinstance(segments[0], memoryview) else None
            for segments in found
        ]

    async def read(self, offset: int, length: int) -> list[memoryview | int]:
        self.calls.append("read")
        await asyncio.sleep(0)
        return self._read(offset, length)

    def write_now(self, writes: Sequence[tuple[int, memoryview]], *, n_clients: int = 1) -> bool:
        if not self.space.is_set():
            return False
        for offset, data in writes:
            self._write(offset, data)
        self.n_written_now += len(writes)
        return True

    async def write(self, offset: int, data: memoryview) -> None:
        self.calls.append("write")
        await self.space.wait()
        self._write(offset, data)

    async def flush(self) -> None:
        self.calls.append("flush")
        if self.error:
            raise self.error

    def flush_soon(self, done: Callable[[StoreError | None], None]) -> bool:
        self.calls.append("flush")
        if self.error:
            raise self.error
        return False

    async def trim(self, offset: int, length: int) -> None:
        self.calls.append("trim")
        first, stop = -(-offset // BLOCK), (offset + length) // BLOCK
        for block in [b for b in self.blocks if first <= b < stop]:
            del self.blocks[block]
        self.provisioned.difference_update(b for b in list(self.provisioned) if first <= b < stop)

    async def write_zeroes(
        self, offset: int, length: int, *, no_hole: bool = False, fast: bool = False
    ) -> None:
        self.calls.append(f"write_zeroes no_hole={no_hole}")
        if no_hole and not self.space.is_set():
            if fast:
                raise NotFast("full")
            await self.space.wait()
        if no_hole:
            first, stop = offset // BLOCK, -(-(offset + length) // BLOCK)
            self.provisioned.update(range(first, stop))
        self._write(offset, bytes(length))
        for block in [b for b, data in self.blocks.items() if not any(data)]:
            del self.blocks[block]

    def _kind(self, block: int) -> ExtentKind:
        if block in self.blocks:
            return ExtentKind.DATA
        return ExtentKind.ZERO if block in self.provisioned else ExtentKind.HOLE

    async def extents(self, offset: int, length: int, *, max_extents: int) -> list[Extent]:
        self.calls.append("extents")
        found: list[Extent] = []
        stop = offset + length
        while offset < stop:
            n = min(BLOCK - offset % BLOCK, stop - offset)
            kind = self._kind(offset // BLOCK)
            if found and found[-1].kind is kind:
                found[-1] = Extent(found[-1].length + n, kind)
            elif len(found) == max_extents:
                break
            else:
                found.append(Extent(n, kind))
            offset += n
        return found

    async def cache(self, offset: int, length: int) -> None:
        self.calls.append(f"cache {length}")


class MemoryPool:
    """A pool of such volumes."""

    def __init__(self) -> None:
        self.volumes: dict[str, MemoryVolume] = {}

    def create(self, name: str, size: int) -> MemoryVolume:
        self.volumes[name] = MemoryVolume(name, size)
        return self.volumes[name]
