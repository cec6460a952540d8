"""A pool and a server in memory: what the control API needs of them, and faults on demand."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from nbdstore.control.operations import Operations
from nbdstore.control.stream import Buffer
from nbdstore.errors import AlreadyExists, InvalidArgument, NbdstoreError, StoreError
from nbdstore.sizes import MAX_SIZE

BLOCK = 4096


@dataclass
class Kind:
    name: str


@dataclass
class MemoryExtent:
    length: int
    kind: Kind


@dataclass
class MemoryVerified:
    n_bytes: int
    faults: list[tuple[int, Exception]] = field(default_factory=list)


@dataclass
class MemoryVolume:
    """A volume as a dict of blocks."""

    id: int
    name: str
    size: int
    block_size: int = BLOCK
    properties: dict[str, Any] = field(default_factory=dict)
    blocks: dict[int, bytearray] = field(default_factory=dict)
    fail_write_at: int | None = None
    fail_read_at: int | None = None
    n_flushes: int = 0
    reserved: int = 0
    snapshots: dict[str, Any] = field(default_factory=dict)
    was_written: bool | None = None
    """None: the pool does not remember it."""

    def status(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "uuid": str(uuid.UUID(int=self.id)),
            "name": self.name,
            "size": self.size,
            "block_size": BLOCK,
            "mapped": len(self.blocks) * BLOCK,
            "reserved": self.reserved,
            "epoch": 1,
            "created": "2026-01-01T00:00:00+00:00",
            "properties": dict(self.properties),
            "of_a_newer_version": True,
        } | ({} if self.was_written is None else {"written": self.was_written})

    def _check_range(self, offset: int, length: int) -> None:
        if offset + length > self.size:
            raise StoreError("beyond the end: connect anew")

    async def read(self, offset: int, length: int) -> list[Buffer | int]:
        self._check_range(offset, length)
        if self.fail_read_at is not None and offset <= self.fail_read_at < offset + length:
            raise NbdstoreError("the disk is on fire")
        segments: list[Buffer | int] = []
        for start in range(offset, offset + length, BLOCK):
            block = self.blocks.get(start // BLOCK)
            n = min(BLOCK, offset + length - start)
            segments.append(n if block is None else bytes(block[:n]))
        return segments

    async def write(self, offset: int, data: Buffer) -> None:
        if self.fail_write_at is not None and offset + len(data) > self.fail_write_at:
            raise NbdstoreError("the disk is full of eels")
        for position, byte in enumerate(bytes(data), offset):
            block = self.blocks.setdefault(position // BLOCK, bytearray(BLOCK))
            block[position % BLOCK] = byte

    async def write_zeroes(self, offset: int, length: int) -> None:
        for index in [i for i in self.blocks if offset <= i * BLOCK < offset + length]:
            del self.blocks[index]

    async def flush(self) -> None:
        self.n_flushes += 1

    async def verify(self, offset: int, length: int, *, unlike: Any = None) -> MemoryVerified:
        indexes = range(offset // BLOCK, -(-(offset + length) // BLOCK))
        return MemoryVerified(sum(index in self.blocks for index in indexes) * BLOCK)

    async def extents(self, offset: int, length: int, *, max_extents: int) -> list[MemoryExtent]:
        self._check_range(offset, length)
        found: list[MemoryExtent] = []
        for start in range(offset, offset + length, BLOCK):
            kind = "DATA" if start // BLOCK in self.blocks else "HOLE"
            n = min(BLOCK, offset + length - start)
            if found and found[-1].kind.name == kind:
                found[-1].length += n
            elif len(found) == max_extents:
                break
            else:
                found.append(MemoryExtent(n, Kind(kind)))
        return found


class MemoryPool:
    """A pool of MemoryVolumes."""

    def __init__(self, capacity: int = 1 << 30) -> None:
        self.volumes: dict[str, MemoryVolume] = {}
        self.capacity = capacity
        self.state = "ok"
        self.n_checkpoints = 0
        self.corruptions = 0
        self.held_writes = 0

    def status(self) -> dict[str, Any]:
        used = sum(len(volume.blocks) for volume in self.volumes.values()) * BLOCK
        return {
            "uuid": str(uuid.UUID(int=0)),
            "directory": "/memory",
            "format_version": 1,
            "block_size": BLOCK,
            "capacity": self.capacity,
            "used": used,
            "reserved": 0,
            "reclaimable": 0,
            "free": self.capacity - used,
            "fill": used / self.capacity,
            "state": self.state,
            "failure": None,
            "shortage": None,
            "held_writes": self.held_writes,
            "corruptions": self.corruptions,
            "newest_corruption": "block 7",
            "mapped": used,
            "allocated_on_host": used,
            "free_on_host": 0,
            "volumes": len(self.volumes),
            "provisioned": sum(volume.size for volume in self.volumes.values()),
            "journal": {"size": 1 << 20, "used": 0},
        }

    async def create_volume(
        self,
        name: str,
        size: int,
        properties: dict[str, Any] | None = None,
        *,
        uuid: uuid.UUID | None = None,
    ) -> MemoryVolume:
        if name in self.volumes:
            raise AlreadyExists(f"volume '{name}' exists")
        if not 0 < size <= MAX_SIZE:
            raise InvalidArgument(f"a volume cannot have {size} bytes")
        volume = MemoryVolume(len(self.volumes) + 1, name, size, properties=properties or {})
        self.volumes[name] = volume
        return volume

    async def resize_volume(self, volume: Any, size: int, *, force: bool = False) -> None:
        if not force and any(index * BLOCK >= size for index in volume.blocks):
            raise InvalidArgument(f"volume '{volume.name}' holds data beyond {size}")
        volume.size = size

    async def rename_volume(self, volume: Any, name: str) -> None:
        if name in self.volumes:
            raise AlreadyExists(f"volume '{name}' exists")
        self.volumes[name] = self.volumes.pop(volume.name)
        volume.name = name

    def require_deletable(self, volume: Any) -> None:
        """There are no snapshots."""

    async def delete_volume(self, volume: Any) -> None:
        del self.volumes[volume.name]

    async def set_properties(self, volume: Any, properties: dict[str, Any]) -> None:
        volume.properties = properties

    # Without snapshots; real ones are in tests that have a real pool.

    snapshots: Mapping[str, Any] = MappingProxyType({})
    trash: Sequence[Any] = ()

    def origin(self, volume: Any) -> None:
        return None

    def data_bytes(self) -> int:
        return sum(len(volume.blocks) for volume in self.volumes.values()) * BLOCK

    def heirs(self, snapshot: Any) -> Sequence[Any]:
        return ()

    async def trash_volume(self, volume: Any) -> None:
        del self.volumes[volume.name]

    async def grow(self, capacity: int) -> None:
        if capacity <= self.capacity:
            raise InvalidArgument(f"the pool has {self.capacity} bytes already")
        self.capacity = capacity

    async def checkpoint(self) -> None:
        self.n_checkpoints += 1


@dataclass
class MemoryConnection:
    """A connection that only looks like one."""

    export: str | None
    peer: str = "192.0.2.7:4711"
    id: int = 1
    since: str = "2026-01-01T00:00:00+00:00"
    read_only: bool = False
    tls_name: str | None = None
    holder: str | None = None
    lease_epoch: int | None = None
    age_s: float = 90.0
    requests_per_s: float = 250.04
    read_per_s: float = 2 << 20
    written_per_s: float = 0.0
    in_flight: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


@dataclass
class MemoryServer:
    """The connections of a server that is not there."""

    connections: list[MemoryConnection] = field(default_factory=list)
    grown_to: list[tuple[str, int]] = field(default_factory=list)
    limited: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    barred_volumes: list[str] = field(default_factory=list)
    fenced: list[tuple[str, str]] = field(default_factory=list)
    """(peer, why) of the connections that were ended."""

    def measures(self, _images: Any) -> list[Any]:
        return []

    def attached(self, volume: Any) -> int:
        return sum(connection.export == volume.name for connection in self.connections)

    def grown(self, volume: Any) -> None:
        self.grown_to.append((volume.name, volume.size))

    def limits_changed(self, volume: Any) -> None:
        self.limited.append((volume.name, volume.properties["qos"]))

    @contextmanager
    def barred(self, volume: Any) -> Iterator[None]:
        name = volume.name  # it may change meanwhile
        self.barred_volumes.append(name)
        try:
            yield
        finally:
            self.barred_volumes.remove(name)

    async def fence(self, volume: Any, why: str) -> int:
        return await self._end(
            [item for item in self.connections if item.export == volume.name], why
        )

    async def disconnect(self, connection_id: int, why: str) -> bool:
        found = [item for item in self.connections if item.id == connection_id]
        return bool(await self._end(found, why))

    async def _end(self, ending: list[MemoryConnection], why: str) -> int:
        await asyncio.sleep(0)
        self.fenced += [(item.peer, why) for item in ending]
        self.connections[:] = [item for item in self.connections if item not in ending]
        return len(ending)


@dataclass
class Bench:
    """A pool, a server, and the operations on them."""

    pool: MemoryPool = field(default_factory=MemoryPool)
    server: MemoryServer = field(default_factory=MemoryServer)

    def __post_init__(self) -> None:
        self.operations = Operations(self.pool, self.server)
