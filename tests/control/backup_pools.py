"""Two real pools, to send from and to receive into, and a volume that changes at random."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdstore.control.backup_stream import FRAME_HEADER_SIZE
from nbdstore.control.contracts import ServerLike
from nbdstore.control.operations import Operations
from nbdstore.control.receiving_model import ReceivedInfo
from nbdstore.control.stream import Buffer
from nbdstore.errors import BadStream, NotFound
from nbdstore.store import Image, Pool
from tests.store.pools import MIB, make_pool, opened
from tests.store.workload import joined

BLOCK = 4096


class Site:
    """An open pool with its operations."""

    def __init__(self, pool: Pool, server: ServerLike | None = None) -> None:
        self.pool = pool
        self.operations = Operations(pool, server)
        self.backups = self.operations.backups

    async def stream(self, name: str, since: str | None = None) -> bytes:
        """The whole stream of a snapshot."""
        return b"".join([b"".join(frame) async for frame in self.backups.send(name, since)])

    async def resumed(self, token: str) -> bytes:
        """The stream that goes on from a token."""
        return b"".join([b"".join(frame) async for frame in self.backups.resume(token)])

    async def receive(self, name: str, stream: bytes, n_bytes: int = 70_000) -> ReceivedInfo:
        """Receive a stream that comes in chunks of `n_bytes`."""
        return await self.backups.receiving.receive(name, in_chunks(stream, n_bytes))

    async def content(self, name: str) -> bytes:
        """What a volume or a snapshot reads as."""
        image = self.backups.find(name)
        assert isinstance(image, Image)
        return joined(await image.read(0, image.size))

    async def snapshot(self, *names: str) -> None:
        """Make snapshots ``VOLUME@NAME``."""
        await self.operations.snapshots.create(names)

    def visible(self) -> list[str]:
        """The images that somebody could attach."""
        infos = {info.name: info for info in self.operations.volumes()}
        return [
            name
            for name in [*infos, *self.pool.snapshots]
            if not infos[name.partition("@")[0]].importing
        ]

    def uuid(self, name: str) -> str:
        """The uuid of a snapshot."""
        return str(self.pool.snapshots[name].info.uuid)

    def token(self, name: str) -> str | None:
        """The token to go on with; None if there is nothing to go on with."""
        try:
            return self.backups.receiving.show(name).token
        except NotFound:
            return None


async def two_snapshots(here: Site) -> None:
    """``db@a`` and ``db@b`` of 3 MiB, some data in the first, some changes in the second."""
    volume = await here.pool.create_volume("db", 3 * MIB)
    await volume.write(0, b"1" * MIB)
    await volume.write(2 * MIB, b"2" * 10 * BLOCK)
    await here.snapshot("db@a")
    await volume.write(BLOCK, b"3" * 3 * BLOCK)
    await volume.trim(2 * MIB, 4 * BLOCK)
    await volume.write(5 * MIB // 2, b"4" * 100_000)
    await here.snapshot("db@b")


async def half_received(here: Site, there: Site) -> None:
    """Leave ``db`` with a part of ``db@b`` over ``db@a``."""
    await two_snapshots(here)
    await there.receive("db", await here.stream("db@a"))
    stream = await here.stream("db@b", "db@a")
    with pytest.raises(BadStream):
        await there.receive("db", stream[: [*frame_ends(stream)][2]])
    assert there.token("db")


async def in_chunks(stream: bytes, n_bytes: int) -> AsyncIterator[Buffer]:
    for at in range(0, len(stream), n_bytes):
        yield stream[at : at + n_bytes]


@asynccontextmanager
async def site(directory: Path, server: ServerLike | None = None) -> AsyncIterator[Site]:
    """A pool in `directory`, made if it is not there."""
    if not directory.exists():
        make_pool(directory, 256 * MIB)
    async with opened(directory) as pool:
        yield Site(pool, server)


class Changing:
    """A volume that is changed at random, in all ways there are."""

    def __init__(self, site: Site, name: str, seed: int) -> None:
        self._site = site
        self._random = random.Random(seed)
        self.name = name

    async def change(self, n: int = 12) -> None:
        """Make some changes."""
        for _ in range(n):
            await self._random.choice([self._write, self._write, self._trim, self._zero])()

    async def resize(self, size: int) -> None:
        """Grow or shrink it, whatever lies there."""
        volume = self._site.pool.volumes[self.name]
        await self._site.pool.resize_volume(volume, size, force=True)

    def _range(self, most: int) -> tuple[Any, int, int]:
        volume = self._site.pool.volumes[self.name]
        offset = self._random.randrange(0, volume.size // 512) * 512
        length = min(self._random.randrange(1, most // 512) * 512, volume.size - offset)
        return volume, offset, length

    async def _write(self) -> None:
        volume, offset, length = self._range(self._random.choice([BLOCK * 2, MIB]))
        await volume.write(offset, self._random.randbytes(length))

    async def _trim(self) -> None:
        volume, offset, length = self._range(MIB)
        await volume.trim(offset, length)

    async def _zero(self) -> None:
        volume, offset, length = self._range(MIB)
        await volume.write_zeroes(offset, length, no_hole=self._random.random() < 0.3)


def frame_ends(stream: bytes) -> Iterator[int]:
    """The offsets at which frames of a stream end, that of the preamble and BEGIN first."""
    at = 16
    while at < len(stream):
        at += FRAME_HEADER_SIZE + int.from_bytes(stream[at + 4 : at + 8], "big")
        yield at


def flipped(stream: bytes, at: int) -> bytes:
    """The stream with a wrong byte."""
    return stream[:at] + bytes([stream[at] ^ 0x10]) + stream[at + 1 :]


def merged(extents: Iterable[tuple[int, int]]) -> bool:
    """Tell whether extents ascend and are never adjacent."""
    stop = -1
    for offset, length in extents:
        if offset <= stop or length <= 0:
            return False
        stop = offset + length
    return True
