"""What clients and administrators do to a pool, at random, from one seed.

Owns the requests and the marks they leave in the disk's log; what may be left of them after a
crash is crash_model.py's.  Every read is compared with what was written.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, Final

from nbdstore.errors import (
    AlreadyExists,
    Busy,
    Corruption,
    NoSpace,
    NotFound,
    PoolFailed,
    ReadFailed,
    WriteFailed,
)
from nbdstore.store import Pool, Volume
from nbdstore.store.image import Image
from nbdstore.store.reading import Segment
from tests.store.crash_model import (
    Acknowledged,
    Administered,
    Begun,
    Change,
    Failed,
    Flushed,
    History,
    Refused,
)
from tests.store.simulated_disk import SimulatedDisk
from tests.store.snapshot_model import Key
from tests.store.snapshot_work import SnapshotWork, trash_name

SECTOR: Final = 512
REFUSALS: Final = (NoSpace, WriteFailed, ReadFailed)
"""What a request may get from a disk in trouble; it has done nothing then, or a part."""


WINDOW: Final = 1 << 20


@dataclass(frozen=True)
class Spread:
    """Where the content of a volume lies: windows of 1 MiB, one every `stride` bytes.

    So a model of some MiB stands for a volume of any size, and a tree of any height; between the
    windows there is nothing.  `offset` is of the model, `place` of the volume.
    """

    stride: int = WINDOW

    def place(self, offset: int) -> int:
        return offset // WINDOW * self.stride + offset % WINDOW

    def end(self, offset: int) -> int:
        """Where a range that ends before `offset` ends in the volume."""
        return self.place(offset - 1) + 1 if offset else 0

    def offset(self, end: int) -> int:
        """The inverse of :meth:`end`."""
        return (end - 1) // self.stride * WINDOW + (end - 1) % self.stride + 1 if end else 0

    def windows(self, size: int) -> list[tuple[int, int]]:
        """The windows (place, length) of a volume of `size` bytes."""
        n = self.offset(size)
        return [(self.place(at), min(WINDOW, n - at)) for at in range(0, n, WINDOW)]

    async def read(self, volume: Image) -> bytes:
        """Read all windows."""
        parts = [joined(await volume.read(*window)) for window in self.windows(volume.size)]
        return b"".join(parts)


def joined(segments: list[Segment]) -> bytes:
    """The bytes of what a read returned."""
    return b"".join(bytes(s) for s in segments)  # bytes(n) is n zeros


@dataclass
class Settings:
    """How a workload behaves.

    Attributes:
        n_steps: requests, or handfuls of them, of each volume's client.
        max_volumes, max_size: how many volumes there may be, and how large, in bytes.
        large: how often a write is a large one.
        administration: whether volumes and the pool change.
        snapshots: whether they come and go, and volumes are cloned, rolled back and trashed.
        spread: where the content of volumes lies.
        patience: how long the pool's housekeeping and checkpoints wait, in hundreds of ms.
    """

    n_steps: int = 30
    max_volumes: int = 3
    max_size: int = 3 << 20
    large: float = 0.1
    administration: bool = True
    snapshots: bool = False
    spread: Spread = Spread()
    patience: float = 1.0


@dataclass(frozen=True)
class Style:
    """How the user of a volume works.

    Attributes:
        usual: most requests are of up to so many bytes.
        batches: how many writes come at once.
        weights: how often batches, single writes, zeroing, flushes, reads and races come.
    """

    usual: int
    batches: tuple[int, ...]
    weights: tuple[int, ...]


STYLES: Final = (
    Style(20_000, (1, 1, 2, 4, 10), (6, 6, 2, 3, 3, 2)),  # a bit of everything
    Style(5_000, (1, 1, 2), (6, 6, 1, 12, 1, 0)),  # a database
    Style(80_000, (1, 4, 10), (6, 6, 2, 1, 1, 2)),  # a copy
)


@dataclass
class Client:
    """The user of one volume."""

    world: Workload
    volume: Volume
    content: bytearray
    style: Style
    n_acknowledged: int = 0
    flushes: list[asyncio.Task[None]] = field(default_factory=list)
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    states: list[bytes] | None = None

    # -- marks ------------------------------------------------------------------------------

    def begin(self, change: Change) -> None:
        self.world.disk.mark(Begun(self.volume.id, change))

    def acknowledge(self, change: Change) -> None:
        """To be called without an await since the store returned."""
        self.world.disk.mark(Acknowledged(self.volume.id, change))
        change.apply(self.content)
        self.n_acknowledged += 1
        if self.states is not None:
            self.states.append(bytes(self.content))

    async def do(self, change: Change, request: Awaitable[None]) -> None:
        self.begin(change)
        try:
            await request
        except REFUSALS:
            self.world.disk.mark(Failed(self.volume.id, change))
            self.world.n_refused += 1
            if not change.whole:
                raise
        else:
            self.acknowledge(change)

    # -- requests ---------------------------------------------------------------------------

    @property
    def spread(self) -> Spread:
        return self.world.settings.spread

    def _range(self, rng: random.Random, *, one_window: bool = True) -> tuple[int, int]:
        """A range of the content, not empty."""
        size = len(self.content)
        longest = size if rng.random() < self.world.settings.large else min(size, self.style.usual)
        length = rng.randint(1, longest)
        offset = rng.randrange(size - length + 1)
        if rng.random() < 0.5:  # aligned
            offset -= offset % 4096
            length = min(max(4096, length - length % 4096), size - offset)
        if one_window and self.spread.stride != WINDOW:
            length = min(length, WINDOW - offset % WINDOW)
        return offset, length

    def _data(self, rng: random.Random, length: int) -> bytes:
        kind = rng.random()
        if kind < 0.1:
            return bytes([rng.randrange(3)]) * length  # may equal what is there, or was there
        return rng.randbytes(length)

    def _a_write(self, rng: random.Random) -> tuple[int, bytes]:
        offset, length = self._range(rng)
        return offset, self._data(rng, min(length, 3 << 20))  # one record

    async def step(self, rng: random.Random) -> None:
        """Do something."""
        async with self.busy:
            if self.volume.info.deleted or self.volume.info.trashed:
                return
            action = rng.choices(
                (self._batch, self._writes, self._zero, self._flush, self._read, self._race),
                self.style.weights,
            )[0]
            await action(rng)

    async def _batch(self, rng: random.Random) -> None:
        """What a server does with a wake-up: all at once, or one by one if that would wait."""
        writes = [self._a_write(rng) for _ in range(rng.choice(self.style.batches))]
        change = Change(tuple(writes))
        self.begin(change)
        try:
            done = self.volume.write_now([(self.spread.place(at), data) for at, data in writes])
        except REFUSALS:
            done = False
        if done:
            self.acknowledge(change)
            return
        self.world.disk.mark(Failed(self.volume.id, change))
        for offset, data in writes:
            await self._write(offset, data)

    async def _write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        place = self.spread.place(offset)
        await self.do(Change(((offset, data),)), self.volume.write(place, data))
        if fua:  # what a server does before it answers; no await since the write was done
            await self.flush_and_mark()

    async def _writes(self, rng: random.Random) -> None:
        """Several at once, which may overlap."""
        writes = [self._a_write(rng) for _ in range(rng.choice(self.style.batches[:4]))]
        fua = rng.random() < 0.2
        await asyncio.gather(*(self._write(at, data, fua=fua) for at, data in writes))

    async def _zero(self, rng: random.Random) -> None:
        no_hole = rng.random() < 0.4
        offset, length = self._range(rng, one_window=no_hole)
        if rng.random() < 0.4:
            try:
                await self._trim(offset, length)
            except REFUSALS:
                await self.clear()
            return
        place, end = self.spread.place(offset), self.spread.end(offset + length)
        request = self.volume.write_zeroes(place, end - place, no_hole=no_hole)
        change = Change(self._zeroes(offset, offset + length), whole=False)
        try:
            await self.do(change, request)
        except REFUSALS:  # a part of it may be done: make it known what is there
            await self.clear()

    def _zeroes(self, start: int, stop: int) -> tuple[tuple[int, int], ...]:
        """The pieces `[start, stop)` is zeroed in: parts of blocks, then the rest by windows."""
        size, whole_end = self.volume.block_size, stop - stop % self.volume.block_size
        if stop == len(self.content):
            whole_end = stop
        first = start + -start % size
        cuts = {start, min(first, stop), max(start, whole_end), stop}
        cuts |= set(range(first - first % WINDOW, stop, WINDOW))
        inside = sorted(cut for cut in cuts if start <= cut <= stop)
        return tuple((a, b - a) for a, b in itertools.pairwise(inside))

    async def clear(self) -> None:
        """Trim everything, sooner or later."""
        while True:
            with contextlib.suppress(*REFUSALS):
                await self._trim(0, len(self.content))
                return

    async def _trim(self, offset: int, length: int) -> None:
        size = self.volume.block_size
        start, end = offset + -offset % size, offset + length
        stop = end if end == len(self.content) else end - end % size
        pieces = self._zeroes(start, stop) if start < stop else ()
        place = self.spread.place(offset)
        request = self.volume.trim(place, self.spread.end(end) - place)
        await self.do(Change(pieces, whole=False), request)

    async def _flush(self, rng: random.Random) -> None:
        self.flushes.append(asyncio.create_task(self.flush_and_mark()))
        if rng.random() < 0.5:
            await self.flushes[-1]

    async def flush_and_mark(self) -> None:
        n_changes = self.n_acknowledged
        await self.volume.flush()
        self.world.disk.mark(Flushed(self.volume.id, n_changes))

    async def _read(self, rng: random.Random) -> None:
        offset, length = self._range(rng)
        place = self.spread.place(offset)
        try:
            found = self.volume.read_now(place, length)
            if found is None:
                found = await self.volume.read(place, length)
        except ReadFailed:
            return
        assert joined(found) == self.content[offset : offset + length], "read other data"

    async def _race(self, rng: random.Random) -> None:
        """Read what is being overwritten: each sector is as it was at some time meanwhile."""
        offset, length = self._range(rng)
        self.states = states = [bytes(self.content)]
        reading = asyncio.create_task(self.volume.read(self.spread.place(offset), length))
        for _ in range(rng.choice((1, 3))):
            await self._batch(rng)
            if rng.random() < 0.5:
                await self.world.pause(rng)
            if rng.random() * self.world.settings.patience < 0.7:
                await self.world.pool._committer.settle()  # frees slots as soon as it may be
        self.states = None
        try:
            found = joined(await reading)
        except ReadFailed:
            return
        for at in range(offset, offset + length):
            stop = min(at + SECTOR - at % SECTOR, offset + length)
            if at == offset or at % SECTOR == 0:
                part = found[at - offset : stop - offset]
                assert part in {s[at:stop] for s in states}, f"read at {at} is of no time"


class Workload:
    """All that goes on in one pool until it crashes.

    Attributes:
        n_refused: requests that found no space.
        figures: what else was done.
    """

    def __init__(self, pool: Pool, disk: SimulatedDisk, seed: int, settings: Settings) -> None:
        self.pool = pool
        self.disk = disk
        self.settings = settings
        self.rng = random.Random(seed)
        self.clients: dict[int, Client] = {}
        self.n_refused = 0
        self.figures = Counter[str]()
        self.snapshots = SnapshotWork(self)
        self._n_names = 0

    def adopt(self, histories: dict[int, History], snapshots: dict[Key, bytes]) -> None:
        """Take up the volumes and snapshots that recovery found, as it found them."""
        self.snapshots.known = dict(snapshots)
        for volume in [*self.pool.volumes.values(), *self.pool.trash]:
            content = bytearray(histories[volume.id].base)
            self._add(volume, content)

    def _add(self, volume: Volume, content: bytearray) -> None:
        self.clients[volume.id] = Client(self, volume, content, self.rng.choice(STYLES))

    async def run(self) -> None:
        """Do it all."""
        for _ in range(self.rng.randint(1, self.settings.max_volumes) - len(self.clients)):
            await self._create()
        helpers = [
            asyncio.create_task(work(random.Random(self.rng.random())))
            for work in (self._administrate, self._checkpoint, self._settle, self._snapshot)
        ]
        errors: list[BaseException | None] = []
        done = set[int]()
        while new := [c for n, c in self.clients.items() if n not in done]:
            done |= {client.volume.id for client in new}
            errors += await asyncio.gather(*map(self._use, new), return_exceptions=True)
        for helper in helpers:
            helper.cancel()
        errors += await asyncio.gather(*helpers, return_exceptions=True)
        for error in errors:
            if isinstance(error, Exception) and not isinstance(error, PoolFailed):
                raise error

    async def _use(self, client: Client) -> None:
        rng = random.Random(self.rng.random())
        for _ in range(self.settings.n_steps):
            if client.volume.info.deleted:
                break
            try:
                await client.step(rng)
            except Corruption:  # all right after a failed sync: what was lost is not made up
                if self.pool.status()["state"] != "failed":
                    raise
                break
            await self.pause(rng)
        await asyncio.gather(*client.flushes, return_exceptions=True)

    async def pause(self, rng: random.Random) -> None:
        """Let others go on, for longer or shorter."""
        await asyncio.sleep(rng.choice((0, 0, 0, 0.001, 0.01, 0.05)))

    # -- the pool ---------------------------------------------------------------------------

    async def _checkpoint(self, rng: random.Random) -> None:
        while True:
            await asyncio.sleep(rng.choice((0.01, 0.1, 0.4)) * self.settings.patience)
            counts = {number: c.n_acknowledged for number, c in self.clients.items()}
            try:
                await self.pool._checkpointer.join()
                await self.pool.checkpoint()
            except REFUSALS:
                self.n_refused += 1
                continue
            for number, n_changes in counts.items():
                self.disk.mark(Flushed(number, n_changes))

    async def _settle(self, rng: random.Random) -> None:
        """What the pool's own housekeeping does after seconds."""
        while True:
            await asyncio.sleep(rng.choice((0.01, 0.05, 0.3)) * self.settings.patience)
            await self.pool._committer.settle()
            if rng.random() < 0.2:
                self.pool._services.memory.balance(1 << 20)  # evicts all that is clean
            if rng.random() < 0.1:
                with contextlib.suppress(*REFUSALS):
                    await self.pool._puncher._punch(1 << 40)  # all that is free

    async def _snapshot(self, rng: random.Random) -> None:
        if self.settings.snapshots:
            await self.snapshots.run(rng)

    # -- administration ---------------------------------------------------------------------

    async def _administrate(self, rng: random.Random) -> None:
        if not self.settings.administration:
            return
        while True:
            await asyncio.sleep(rng.choice((0.005, 0.05, 0.2)))
            client = rng.choice([*self.clients.values()])
            action = rng.choice((self._resize, self._rename, self._properties, self._delete, None))
            if action is None:
                await self._grow(rng)
            elif len(self.clients) < self.settings.max_volumes and rng.random() < 0.5:
                await self._create()
            elif action != self._delete or len(self.clients) > 1:
                async with client.busy:
                    info = client.volume.info
                    if not info.deleted and (action == self._delete or not info.trashed):
                        await action(client, rng)

    def _name(self) -> str:
        self._n_names += 1
        return f"v{self._n_names % 7}-{self.rng.randrange(1000)}"

    def _size(self) -> int:
        return self.rng.randint(1, self.settings.max_size // SECTOR) * SECTOR

    async def _create(self) -> None:
        about: dict[str, Any] = {"name": self._name(), "size": self._size(), "properties": {}}
        if about["name"] in self.pool.volumes:
            return
        self.disk.mark(Administered(None, about, begun=True))
        size = self.settings.spread.end(about["size"])
        try:
            volume = await self.pool.create_volume(about["name"], size)
        except REFUSALS:
            self.disk.mark(Refused(None, about))
            return
        self.disk.mark(Administered(volume.id, about, begun=False))
        self._add(volume, bytearray(about["size"]))

    async def _change(self, client: Client, about: Any, request: Awaitable[None]) -> None:
        number = client.volume.id
        n_changes = client.n_acknowledged
        self.disk.mark(Administered(number, about, begun=True))
        try:
            await request
        except (*REFUSALS, AlreadyExists, Busy, NotFound):
            if about is None:
                self.snapshots.lost(client.volume)
            self.disk.mark(Refused(number, about))
            return
        self.disk.mark(Administered(number, about, begun=False))
        self.disk.mark(Flushed(number, n_changes))

    @staticmethod
    def _about(client: Client) -> dict[str, Any]:
        volume = client.volume
        name = trash_name(volume) if volume.info.trashed else volume.name
        return {"name": name, "properties": dict(client.volume.properties)}

    async def _rename(self, client: Client, rng: random.Random) -> None:
        name = self._name()
        if name not in self.pool.volumes:
            about = {**self._about(client), "name": name}
            await self._change(client, about, self.pool.rename_volume(client.volume, name))

    async def _properties(self, client: Client, rng: random.Random) -> None:
        found = {"n": rng.random()}
        about = {**self._about(client), "properties": found}
        await self._change(client, about, self.pool.set_properties(client.volume, found))

    async def _delete(self, client: Client, rng: random.Random) -> None:
        await asyncio.gather(*client.flushes, return_exceptions=True)
        await self._change(client, None, self.pool.delete_volume(client.volume))
        if client.volume.info.deleted:
            del self.clients[client.volume.id]

    async def _resize(self, client: Client, rng: random.Random) -> None:
        size, old = self._size(), len(client.content)
        changes = [Change(size=size)]
        if size < old:
            changes.insert(0, Change(client._zeroes(size, old), whole=False))
        for change in changes:
            client.begin(change)
        try:
            await self.pool.resize_volume(client.volume, client.spread.end(size), force=True)
        except (
            *REFUSALS,
            Busy,
            NotFound,
        ):  # some may be gone: say what is there
            for change in changes:
                self.disk.mark(Failed(client.volume.id, change))
            await client.clear()
            return
        for change in changes:
            client.acknowledge(change)
        self.disk.mark(Flushed(client.volume.id, client.n_acknowledged))

    async def _grow(self, rng: random.Random) -> None:
        now = self.pool.status()["capacity"]
        if now < 400 << 20:
            with contextlib.suppress(*REFUSALS):
                await self.pool.grow(now + rng.choice((0, 4096, 1 << 20, 100 << 20)))
