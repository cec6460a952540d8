"""A host in memory that remembers what power loss may take: the simulated I/O layer.

Owns the log of everything that was done to the files of a pool, and the making of what could be
on the platter after a crash at any moment of it; knows nothing of what the bytes mean.

What a crash leaves: all that a completed fdatasync covers (everything written to that file before
the call), and of each later write nothing, all of it, or any of its sectors of 512 bytes; or the
pages of 4096 bytes that it touches hold anything at all, other bytes in them included.

The same log takes the marks of a test ("this write was acknowledged"), so that disk and model
agree on what happened before a crash.  Everything random comes from one seeded generator.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import numpy as np

from nbdstore.errors import StoreError
from nbdstore.store import PoolOptions
from nbdstore.store.host import Buffer, Failpoint, Host
from nbdstore.store.layout import I64
from nbdstore.store.slots import Slots

SECTOR: Final = 512
PAGE: Final = 4096
NAMES: Final = ("super", "journal", "data")

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Write:
    """Bytes on their way to the platter; of a punched hole, zeros."""

    file: str
    offset: int
    data: bytes


@dataclass(frozen=True)
class Synced:
    """All writes of `file` before event number `covered` are on the platter."""

    file: str
    covered: int


@dataclass(frozen=True)
class Mark:
    """Something that a test wants to know the time of."""

    what: Any


@dataclass(frozen=True)
class Reached:
    """The store came to a failpoint."""

    place: Failpoint


Event = Write | Synced | Mark | Reached
Images = dict[str, bytearray]
Fault = Callable[[str, str], None]
"""Called with the operation and the file's name before it is done; raises what shall go wrong."""


def apply(image: bytearray, offset: int, data: Buffer) -> None:
    """Put `data` into `image`, which grows as need be."""
    if offset > len(image):
        image.extend(bytes(offset - len(image)))
    image[offset : offset + len(data)] = data


class SimulatedFile:
    """One file: `live` is what reads find, the page cache included."""

    def __init__(self, disk: SimulatedDisk, name: str) -> None:
        self._disk = disk
        self.name = name
        self.live = disk.images[name]
        self.n_syncs = 0

    @property
    def size(self) -> int:
        return len(self.live)

    @property
    def allocated(self) -> int:
        return len(self.live)

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        assert not self._disk.read_only
        data = b"".join(buffers)
        self._disk.before("write", self.name)
        self._disk.events.append(Write(self.name, offset, data))
        apply(self.live, offset, data)

    def pread(self, length: int, offset: int) -> bytes:
        self._disk.before("read", self.name)
        return bytes(self.live[offset : offset + length])

    def preadv(self, buffer: Buffer, offset: int) -> int:
        found = self.pread(len(buffer), offset)
        memoryview(buffer)[: len(found)] = found
        return len(found)

    def preadv_cached(self, buffer: Buffer, offset: int) -> bool:
        if self._disk.random.random() < self._disk.share_uncached:
            return False
        return self.preadv(buffer, offset) == len(buffer)

    def pread_direct(self, length: int, offset: int) -> bytes:
        return self.pread(length, offset)

    def will_need(self, offset: int, length: int) -> None:
        pass

    def fdatasync(self) -> None:
        self.end_sync(self.begin_sync())

    def begin_sync(self) -> int:
        self.n_syncs += 1
        self._disk.before("sync", self.name)
        return len(self._disk.events)

    def end_sync(self, covered: int) -> None:
        self._disk.events.append(Synced(self.name, covered))

    def punch(self, offset: int, length: int) -> bool:
        length = max(0, min(length, len(self.live) - offset))
        if length:
            self.pwritev([bytes(length)], offset)
        return True

    def truncate(self, size: int) -> None:
        raise NotImplementedError("pools are made on a real disk")

    def close(self) -> None:
        pass


class SimulatedDisk:
    """The disk of one pool.

    Arguments:
        images: what the platter holds at the start.
        seed: of all delays, and of the page cache's misses.
        share_uncached: how often a read finds nothing in the page cache.
        slow: calls that wait for the disk take their time, others go on meanwhile.
        fault: see Fault.

    Attributes:
        events: everything that happened, in order.
    """

    def __init__(
        self,
        images: Mapping[str, bytes | bytearray],
        seed: int = 0,
        *,
        share_uncached: float = 0.0,
        slow: bool = False,
        fault: Fault | None = None,
    ) -> None:
        self.start = {name: bytes(image) for name, image in images.items()}
        self.images = {name: bytearray(image) for name, image in images.items()}
        self.random = random.Random(seed)
        self.share_uncached = share_uncached
        self.slow = slow
        self.fault = fault
        self.events: list[Event] = []
        self.directory = PLACE
        self.host: Host = SimulatedHost(self)
        self.files: dict[str, SimulatedFile] = {}
        self.read_only = False

    def before(self, operation: str, name: str) -> None:
        if self.fault is not None:
            self.fault(operation, name)

    def mark(self, what: Any) -> None:
        """Remember that `what` happened now."""
        self.events.append(Mark(what))

    # -- the contract of host.Disk ------------------------------------------------------------

    def lock(self) -> None:
        pass

    def open(self, name: str, *, create: bool = False) -> SimulatedFile:
        if name not in self.images:
            raise StoreError(f"{name}: No such file or directory")
        self.files[name] = SimulatedFile(self, name)
        return self.files[name]

    def exists(self, name: str) -> bool:
        return name in self.images

    def remove(self, name: str) -> None:
        raise NotImplementedError("pools are made on a real disk")

    def rename(self, old: str, new: str) -> None:
        raise NotImplementedError("pools are made on a real disk")

    def sync(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 1 << 40

    def total_bytes(self) -> int:
        return 1 << 40

    async def offload(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        owner = getattr(call, "__self__", None)
        if isinstance(owner, SimulatedFile) and call == owner.fdatasync:
            covered = owner.begin_sync()
            await self.pause()
            owner.end_sync(covered)
            return None  # type: ignore[return-value]
        await self.pause()
        found = call(*args, **kwargs)
        await self.pause()
        return found

    async def pause(self) -> None:
        """Let others do something, or a lot; an instant disk lets them only have a turn."""
        for _ in range(self.random.choice((0, 1, 2, 5)) if self.slow else 1):
            await asyncio.sleep(self.random.choice((0, 0, 0.001, 0.02)) if self.slow else 0)

    def close(self) -> None:
        pass


class SimulatedHost:
    """A host whose only disk is `disk`; time is the event loop's, chance comes from a seed."""

    def __init__(self, disk: SimulatedDisk) -> None:
        self._disk = disk

    def disk(self, directory: Path, *, read_only: bool = False) -> SimulatedDisk:
        self._disk.read_only = read_only
        return self._disk

    def make_directory(self, directory: Path) -> bool:
        raise NotImplementedError("pools are made on a real disk")

    def list_directory(self, directory: Path) -> list[str]:
        return sorted(self._disk.images)

    def remove_directory(self, directory: Path) -> None:
        raise NotImplementedError("pools are made on a real disk")

    def is_directory(self, directory: Path) -> bool:
        return directory == PLACE

    def exists(self, path: Path) -> bool:
        return path.parent == PLACE and self._disk.exists(path.name)

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    def time(self) -> float:
        return 1_700_000_000 + self.monotonic()

    def new_uuid(self) -> uuid.UUID:
        return uuid.UUID(bytes=self._disk.random.randbytes(16), version=4)

    async def sleep(self, delay_s: float) -> None:
        """A turn of the loop takes its time on a slow disk."""
        await (asyncio.sleep(delay_s) if delay_s else self._disk.pause())

    def reached(self, place: Failpoint) -> None:
        self._disk.events.append(Reached(place))


# -- crashes ---------------------------------------------------------------------------------


@dataclass
class Crash:
    """What a power loss does to the writes that no sync covers.

    Attributes:
        applied: by file, the share of them that is on the platter whole.
        torn: the share of which only some sectors are.
        ruined: the share whose pages hold garbage.
        in_order: once one is lost, all later ones of that file are.
    """

    applied: dict[str, float] = field(default_factory=dict)
    torn: float = 0.0
    ruined: float = 0.0
    in_order: bool = False

    @classmethod
    def random(cls, rng: random.Random) -> Crash:
        """Choose one of the kinds that have found bugs, or could."""
        extremes = (0.0, 0.1, 0.5, 0.9, 1.0)
        return cls(
            applied={name: rng.choice(extremes) for name in NAMES},
            torn=rng.choice((0.0, 0.1, 0.5)),
            ruined=rng.choice((0.0, 0.0, 0.1)),
            in_order=rng.random() < 0.2,
        )


KILLED: Final = Crash(applied=dict.fromkeys(NAMES, 1.0))
"""The process dies, the machine lives: nothing is lost."""
LAZY: Final = Crash(applied=dict.fromkeys(NAMES, 0.0))
"""The power fails before the kernel wrote anything that it had not to."""


def crash_images(disk: SimulatedDisk, at: int, crash: Crash, rng: random.Random) -> Images:
    """Return what the platter could hold if the power failed after `at` events."""
    events = disk.events[:at]
    covered = dict.fromkeys(disk.start, 0)
    for event in events:
        if isinstance(event, Synced):
            covered[event.file] = max(covered[event.file], event.covered)
    images = {name: bytearray(image) for name, image in disk.start.items()}
    lost: set[str] = set()
    for index, event in enumerate(events):
        if not isinstance(event, Write):
            continue
        image = images[event.file]
        if index < covered[event.file]:
            apply(image, event.offset, event.data)
        elif event.file not in lost:
            _apply_unsynced(image, event, crash, rng)
            if crash.in_order and rng.random() >= crash.applied.get(event.file, 1.0):
                lost.add(event.file)
    return images


def _apply_unsynced(image: bytearray, event: Write, crash: Crash, rng: random.Random) -> None:
    choice = rng.random()
    if choice < crash.torn:
        for start in range(0, len(event.data), SECTOR):
            if rng.random() < 0.5:
                apply(image, event.offset + start, event.data[start : start + SECTOR])
    elif choice < crash.torn + crash.ruined:
        start, stop = event.offset, event.offset + len(event.data)
        start, stop = start - start % PAGE, stop + -stop % PAGE
        apply(image, start, rng.randbytes(stop - start))
    elif rng.random() < crash.applied.get(event.file, 1.0):
        apply(image, event.offset, event.data)


# -- pools on it -------------------------------------------------------------------------------


PLACE: Final = Path("simulated")


def load_images(directory: Path) -> Images:
    """The files of a pool on a real disk."""
    return {name: bytearray((directory / name).read_bytes()) for name in NAMES}


def save_images(images: Images, directory: Path) -> None:
    """Write the files of a pool to a real disk."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        (directory / name).write_bytes(image)


class _GreedySlots(Slots):
    """Gives out what was freed last, which is what a slot freed too early would be found by."""

    def __init__(self, n_slots: int, block_size: int) -> None:
        self._lately: list[int] = []
        super().__init__(n_slots, block_size)

    def _unmark(self, slots: I64) -> None:
        super()._unmark(slots)
        if len(slots) < 1000:  # more only when the pool grows
            self._lately += slots.tolist()

    def allocate(self, n: int, floor: int) -> I64 | None:
        if self.n_free - n < floor:
            return None
        lately = np.array([*dict.fromkeys(reversed(self._lately))], np.int64)
        lately = lately[~self.is_used(lately)]
        found = np.sort(lately[:n])
        self._lately = lately[n:][::-1].tolist()
        self._mark(found)
        self._window, self._window_at = found[:0], 0  # it may hold what was just taken
        if len(found) == n:
            return found
        rest = super().allocate(n - len(found), floor)
        assert rest is not None
        return np.concatenate([found, rest])

    def allocate_few(self, n: int, floor: int) -> list[int] | None:
        found = self.allocate(n, floor)
        return None if found is None else found.tolist()


def adversarial(options: PoolOptions | None = None) -> PoolOptions:
    """Options that look for trouble: freed slots are used again as soon as that is allowed, the
    last freed first, and checkpoints let others go on after each leaf."""
    return replace(options or PoolOptions(), slots=_GreedySlots, checkpoint_slice_nodes=1)
