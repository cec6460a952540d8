"""A host in memory that remembers what power loss may take: the simulated I/O layer.

Owns the log of everything that was done to the files of a pool, and the failing of any call on
demand; knows nothing of what the bytes mean.  What could be on the platter after a crash at any
moment of the log is crashes.py's.

Durable is what host.py promises: all that a completed fdatasync covers (everything written to that
file before the call), and names that a directory sync covers.

After an fdatasync that failed, the kernel takes the dirty pages for clean (fsync(2)): each of
these writes has reached the platter or never will, whatever syncs come later, and reads find the
new bytes for as long as the page cache keeps them, then what the platter has.

The same log takes the marks of a test ("this write was acknowledged"), so that disk and model
agree on what happened before a crash.  Everything random comes from one seeded generator.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import numpy as np

from nbdstore.errors import ReadFailed, StoreError, WriteFailed
from nbdstore.store import PoolOptions
from nbdstore.store.host import Buffer, Failpoint, Host
from nbdstore.store.layout import I64
from nbdstore.store.slots import Slots

PAGE: Final = 4096
NAMES: Final = ("super", "journal", "data")
PLACE: Final = Path("simulated")
DIRECTORY: Final = "directory"
"""Stands for a file's name where a call works on names."""

_FORGET_SHARE: Final = 0.1  # of the reads of a page that was taken for clean
_LOOKS: Final = (1, 1, 4, 10_000)  # at what is not in the page cache, until it is

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Write:
    """Bytes on their way to the platter; of a punched hole, zeros."""

    file: str
    offset: int
    data: bytes


@dataclass(frozen=True)
class Truncated:
    """A new length on its way to the platter."""

    file: str
    size: int


@dataclass(frozen=True)
class Synced:
    """All changes of `file` before event number `covered` are on the platter."""

    file: str
    covered: int


@dataclass(frozen=True)
class SyncFailed:
    """A sync of `file` failed: the events `landed` are on the platter, `lost` never will be."""

    file: str
    landed: frozenset[int]
    lost: frozenset[int]


@dataclass(frozen=True)
class Named:
    """The names of `changes` stand for these files now, or for none: all at once, or not at all."""

    changes: tuple[tuple[str, str | None], ...]
    file: str = DIRECTORY


@dataclass(frozen=True)
class Mark:
    """Something that a test wants to know the time of."""

    what: Any


@dataclass(frozen=True)
class Reached:
    """The store came to a failpoint."""

    place: Failpoint


Event = Write | Truncated | Synced | SyncFailed | Named | Mark | Reached
Images = dict[str, bytearray]
Fault = Callable[[str, str], None]
"""Called with the operation and the file's name before it is done; raises what shall go wrong."""


class ShortWrite(Exception):
    """Raised by a fault: a write puts `share` of its bytes into the file, and then fails."""

    def __init__(self, share: float, error: StoreError) -> None:
        super().__init__(share, error)
        self.share = share
        self.error = error


def apply(image: bytearray, offset: int, data: Buffer) -> None:
    """Put `data` into `image`, which grows as need be."""
    if offset > len(image):
        image.extend(bytes(offset - len(image)))
    image[offset : offset + len(data)] = data


def resize(image: bytearray, size: int) -> None:
    """Set the length of `image`."""
    del image[size:]
    image.extend(bytes(size - len(image)))


def pages(offset: int, length: int) -> range:
    """The pages that `[offset, offset + length)` touches."""
    return range(offset // PAGE, -(-(offset + length) // PAGE))


class SimulatedFile:
    """One open file.

    Attributes:
        key: its name in the log, which outlives renaming.
        live: what reads find, the page cache included.
        syncing: held by the one sync that runs; `sync_failed`: none will do any good.
        stale: by number, what the platter has of pages whose newer bytes it will never get.
    """

    def __init__(self, disk: SimulatedDisk, name: str, key: str, live: bytearray) -> None:
        self._disk = disk
        self.name = name
        self.key = key
        self.live = live
        self.stale = disk.stale.setdefault(key, {})
        self.n_syncs = 0
        self.syncing = asyncio.Lock()
        self.sync_failed = False
        self._absent: dict[int, int] = {}  # looks until what lies there has come

    @property
    def size(self) -> int:
        return len(self.live)

    @property
    def allocated(self) -> int:
        return len(self.live)

    def held(self, offset: int, length: int) -> list[tuple[int, int]]:
        return [(offset, offset + length)]

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        assert not self._disk.read_only
        data = b"".join(buffers)
        try:
            self._disk.before("write", self.name)
        except ShortWrite as short:
            self._write(data[: int(len(data) * short.share)], offset)
            raise short.error from None
        self._write(data, offset)

    def _write(self, data: bytes, offset: int) -> None:
        apply(self.live, offset, data)
        again = [page for page in pages(offset, len(data)) if self.stale.pop(page, None)]
        if again:  # the whole page is dirty once more
            start, stop = min(offset, again[0] * PAGE), offset + len(data)
            stop = max(stop, (again[-1] + 1) * PAGE)
            offset, data = start, bytes(self.live[start:stop])
        self._disk.events.append(Write(self.key, offset, data))

    def pread(self, length: int, offset: int) -> bytes:
        self._disk.before("read", self.name)
        if self._disk.reads is not None:
            self._disk.reads.append((self.name, offset, length))
        if self.stale and not self._disk.deceives:
            for page in pages(offset, length):
                if self._disk.random.random() < _FORGET_SHARE:
                    self.forget(page)
        with memoryview(self.live) as live:
            return bytes(live[offset : offset + length])

    def preadv(self, buffer: Buffer, offset: int) -> int:
        self._absent.pop(offset, None)
        found = self.pread(len(buffer), offset)
        memoryview(buffer)[: len(found)] = found
        return len(found)

    def preadv_cached(self, buffer: Buffer, offset: int) -> int:
        chance = self._disk.random
        left = self._absent.pop(offset, -1)
        if left < 0:
            if chance.random() >= self._disk.share_uncached:
                return self.preadv(buffer, offset)
            left = chance.choice(_LOOKS) if self._disk.slow else 1
        if left:
            self._absent[offset] = left - 1
            return -1
        return self.preadv(memoryview(buffer)[: chance.choice((PAGE, len(buffer)))], offset)

    def preadv_cached_all(
        self, parts: Sequence[Sequence[Buffer]], offsets: Sequence[int], length: int
    ) -> bool:
        assert sum(len(buffer) for part in parts for buffer in part) == length
        try:
            return all(
                self.preadv_cached(buffer, offset) == len(buffer)
                for (buffer,), offset in zip(parts, offsets, strict=True)
            )
        except ReadFailed:
            return False

    def pread_direct(self, length: int, offset: int) -> bytes:
        assert length % PAGE == offset % PAGE == 0
        for page in pages(offset, length) if self.stale else ():
            self.forget(page)
        return self.pread(length, offset)

    def will_need(self, offset: int, length: int) -> None:
        pass

    def fdatasync(self) -> None:
        self.end_sync(self.begin_sync())

    def begin_sync(self) -> int:
        self.n_syncs += 1
        if self.sync_failed:
            raise WriteFailed(f"{self.name}: an earlier sync failed")
        try:
            self._disk.before("sync", self.name)
        except StoreError:
            self.sync_failed = True
            self._disk.fail_sync(self)
            raise
        return len(self._disk.events)

    def end_sync(self, covered: int) -> None:
        self._disk.events.append(Synced(self.key, covered))

    def punch(self, offset: int, length: int) -> bool:
        self._disk.before("punch", self.name)
        length = max(0, min(length, len(self.live) - offset))
        if length:
            self._write(bytes(length), offset)
        return True

    def truncate(self, size: int) -> None:
        self._disk.before("truncate", self.name)
        resize(self.live, size)
        self._disk.events.append(Truncated(self.key, size))

    def forget(self, page: int) -> None:
        """The page cache drops a page that it takes for clean."""
        found = self.stale.pop(page, None)
        if found is not None:
            apply(self.live, page * PAGE, found)

    def close(self) -> None:
        pass


class SimulatedDisk:
    """The disk of one pool.

    Arguments:
        images: what the platter holds at the start, by name; None = the directory does not exist.
        seed: of all delays, of the page cache's misses, and of what failed syncs lose.
        share_uncached: how often a read finds nothing in the page cache.
        slow: calls that wait for the disk take their time, others go on meanwhile.
        fault: see Fault.

    Attributes:
        events: everything that happened, in order.
        images: what the files hold for the processes of this machine, by name.
        there: the directory exists.
        free: bytes that the filesystem has left.
        reads: name, offset and length of all that was read, if somebody wants to know.
        deceives: of what a failed sync should have covered the platter gets nothing, and the page
            cache keeps everything.
    """

    def __init__(
        self,
        images: Mapping[str, bytes | bytearray] | None,
        seed: int = 0,
        *,
        share_uncached: float = 0.0,
        slow: bool = False,
        fault: Fault | None = None,
    ) -> None:
        self.start = {name: bytes(image) for name, image in (images or {}).items()}
        self.images = {name: bytearray(image) for name, image in self.start.items()}
        self.there = images is not None
        self.random = random.Random(seed)
        self.share_uncached = share_uncached
        self.slow = slow
        self.fault = fault
        self.events: list[Event] = []
        self.directory = PLACE
        self.free = 1 << 40
        self.reads: list[tuple[str, int, int]] | None = None
        self.deceives = False
        self.host: Host = SimulatedHost(self)
        self.files: dict[str, SimulatedFile] = {}
        self.read_only = False
        self.stale: dict[str, dict[int, bytes]] = {}
        self.keys = {name: name for name in self.images}
        self.has_lock_file = False

    def before(self, operation: str, name: str) -> None:
        """Do `operation` with file `name` next, or fail."""
        if self.fault is not None:
            self.fault(operation, name)

    def mark(self, what: Any) -> None:
        """Remember that `what` happened now."""
        self.events.append(Mark(what))

    def fail_sync(self, file: SimulatedFile) -> None:
        """A sync of `file` fails: decide for each change that it would have covered."""
        pending, lost = undecided(self.events)
        changes = [i for i in pending if getattr(self.events[i], "file", None) == file.key]
        share_landed = 0.0 if self.deceives else 0.5
        landed = frozenset(index for index in changes if self.random.random() < share_landed)
        doomed = frozenset(changes) - landed
        self.events.append(SyncFailed(file.key, landed, doomed))
        image = bytearray(self.start.get(file.key, b""))
        for index, event in enumerate(self.events):
            if index not in lost and index not in doomed:
                put(image, event, file.key)
        for event in [self.events[index] for index in sorted(doomed)]:
            for page in pages(event.offset, len(event.data)) if isinstance(event, Write) else ():
                found = bytes(image[page * PAGE : (page + 1) * PAGE])
                file.stale[page] = found.ljust(PAGE, b"\0")  # beyond the end it is a hole
                if self.random.random() < 0.3 and not self.deceives:
                    file.forget(page)

    # -- the contract of host.Disk ------------------------------------------------------------

    def lock(self) -> None:
        self.before("lock", DIRECTORY)
        self.has_lock_file = True

    def open(self, name: str, *, create: bool = False) -> SimulatedFile:
        self.before("create" if create else "open", name)
        if create:
            if name in self.images:
                raise StoreError(f"{name}: File exists")
            key = name
            while key in self.start or any(key == file.key for file in self.files.values()):
                key += "'"
            self.images[name] = bytearray()
            self._name({name: key})
        elif name not in self.images:
            raise StoreError(f"{name}: No such file or directory")
        file = SimulatedFile(self, name, self.keys[name], self.images[name])
        self.files[name] = file
        return file

    def _name(self, changes: Mapping[str, str | None]) -> None:
        for name, key in changes.items():
            if key is None:
                del self.keys[name]
            else:
                self.keys[name] = key
        self.events.append(Named(tuple(changes.items())))

    def exists(self, name: str) -> bool:
        return name in self.images

    def remove(self, name: str) -> None:
        self.before("remove", name)
        if name == "lock":
            self.has_lock_file = False
            return
        del self.images[name]
        self._name({name: None})

    def rename(self, old: str, new: str) -> None:
        self.before("rename", old)
        self.images[new] = self.images.pop(old)
        self.files[new] = self.files.pop(old)
        self._name({new: self.keys[old], old: None})

    def sync(self) -> None:
        self.before("sync", DIRECTORY)
        self.events.append(Synced(DIRECTORY, len(self.events)))

    def free_bytes(self) -> int:
        return self.free

    def total_bytes(self) -> int:
        return 1 << 40

    async def offload(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        owner = getattr(call, "__self__", None)
        if isinstance(owner, SimulatedFile) and call == owner.fdatasync:
            async with owner.syncing:
                covered = owner.begin_sync()
                await self.pause()
                owner.end_sync(covered)
            return None  # type: ignore[return-value]
        for _ in range(self.random.choice((1, 1, 3, 10)) if self.slow else 1):
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
        self._disk.before("open", DIRECTORY)
        if not self.is_directory(directory):
            raise StoreError(f"{directory}: No such file or directory")
        self._disk.read_only = read_only
        return self._disk

    def make_directory(self, directory: Path) -> bool:
        self._disk.before("make", DIRECTORY)
        made, self._disk.there = not self._disk.there, True
        return made

    def list_directory(self, directory: Path) -> list[str]:
        self._disk.before("list", DIRECTORY)
        return sorted([*self._disk.images, *(["lock"] if self._disk.has_lock_file else [])])

    def remove_directory(self, directory: Path) -> None:
        self._disk.before("remove", DIRECTORY)
        assert not self.list_directory(directory)
        self._disk.there = False

    def is_directory(self, directory: Path) -> bool:
        return directory == PLACE and self._disk.there

    def exists(self, path: Path) -> bool:
        return path.parent == PLACE and self._disk.exists(path.name)

    def monotonic(self) -> float:
        try:
            return asyncio.get_running_loop().time()
        except RuntimeError:  # a pool is made outside of any loop
            return 0.0

    def time(self) -> float:
        return 1_700_000_000 + self.monotonic()

    def new_uuid(self) -> uuid.UUID:
        return uuid.UUID(bytes=self._disk.random.randbytes(16), version=4)

    async def sleep(self, delay_s: float) -> None:
        """A turn of the loop takes its time on a slow disk."""
        await (asyncio.sleep(delay_s) if delay_s else self._disk.pause())

    def reached(self, place: Failpoint) -> None:
        self._disk.events.append(Reached(place))


# -- the log ---------------------------------------------------------------------------------


def put(image: bytearray, event: Event, key: str) -> None:
    """Do to `image` what `event` does to file `key`."""
    if isinstance(event, Write) and event.file == key:
        apply(image, event.offset, event.data)
    elif isinstance(event, Truncated) and event.file == key:
        resize(image, event.size)


def undecided(events: Iterable[Event]) -> tuple[list[int], set[int]]:
    """The numbers of the changes that may or may not be on the platter, and of those that are not.

    All others are.  A change of names is pending under the file :data:`DIRECTORY`.
    """
    pending: dict[str, list[int]] = {}
    lost: set[int] = set()
    for index, event in enumerate(events):
        if isinstance(event, Write | Truncated | Named):
            pending.setdefault(event.file, []).append(index)
        elif isinstance(event, Synced):
            pending[event.file] = [i for i in pending.get(event.file, ()) if i >= event.covered]
        elif isinstance(event, SyncFailed):
            gone = event.landed | event.lost
            lost |= event.lost
            pending[event.file] = [i for i in pending.get(event.file, ()) if i not in gone]
    return sorted(i for indices in pending.values() for i in indices), lost


# -- choices that look for trouble -------------------------------------------------------------


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
        self.forget_window()  # it may hold what was just taken
        if len(found) == n:
            return found
        rest = super().allocate(n - len(found), floor)
        assert rest is not None
        return np.concatenate([found, rest])

    def allocate_run(self, n: int, floor: int) -> int:
        found = self.allocate(n, floor)
        if found is None or bool((np.diff(found) == 1).all()):
            return 0 if found is None else int(found[0])
        self.give_back(found)
        return 0

    def allocate_few(self, n: int, floor: int) -> list[int] | None:
        found = self.allocate(n, floor)
        return None if found is None else found.tolist()


def adversarial(options: PoolOptions | None = None) -> PoolOptions:
    """Options that look for trouble: freed slots are used again as soon as that is allowed, the
    last freed first, and checkpoints let others go on after each leaf."""
    return replace(options or PoolOptions(), slots=_GreedySlots, checkpoint_slice_nodes=1)
