"""Somebody who makes, imports, grows, shrinks, renames, limits, snapshots, clones, flattens, rolls
back, leases, trashes and restores volumes, and has them scrubbed, while the server is killed.

What the control API has acknowledged must be there after a kill; the one call that was on its way
may have been done or not, but not by half. An import that was cut off may leave its volume behind,
marked, so that nobody takes it for whole; a shrink that was cut off, a volume of the size before
without what lay beyond the new end, which was to be lost. After each kill a scrub, which goes on
with the one that was cut off, finds nothing; whoever was fenced before it is refused after it.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from nbdstore.control.client import ControlClient
from nbdstore.control.model import SnapshotInfo, VolumeInfo
from nbdstore.control.stream import Piece
from nbdstore.errors import Busy, ControlError, NoSpace
from tests.load.model import Violation
from tests.load.stamps import SECTOR, Sequences, sequences, stamped

PREFIX: Final = "extra-"
IMPORTED_BYTES: Final = 256 << 10
SMALLEST_BYTES: Final = 64 << 10
MAX_VOLUMES: Final = 6
MAX_SNAPSHOTS: Final = 6
MAX_LEASED: Final = 2
"""What is leased cannot be renamed, rolled back or deleted."""
REFUSED_PAUSE_S: Final = 0.1
TRASHED: Final = "trash:"
HOLDERS: Final = ("node-1", "node-2")
SLOW_RATE: Final = 1 << 20
FAST_RATE: Final = 1 << 30
REFUSED: Final = (NoSpace.code, Busy.code)


Shown = tuple[int, str | None, int, int]
"""Of a volume: size, holder and epoch of its lease, limit."""


@dataclass(frozen=True)
class Extra:
    """A volume or snapshot: `n_imported` bytes of content number `number`, then zeroes.

    holder: of its lease; `n_leases` is the epoch of the newest one it had.
    iops: its limit; 0 = none.
    snapshots: what it has, by their own names; of a volume in the trash alone.
    """

    number: int
    size: int
    n_imported: int = 0
    holder: str | None = None
    n_leases: int = 0
    iops: int = 0
    snapshots: tuple[tuple[str, Extra], ...] = ()

    def shown(self, name: str) -> Shown:
        """What the server tells of it under a name, in the trash less."""
        if is_trashed(name):
            return self.size, None, 0, 0
        return self.size, self.holder, self.n_leases if self.holder else 0, self.iops

    def cut(self, size: int) -> Extra:
        """The same with holes from byte `size` on."""
        return replace(self, n_imported=min(self.n_imported, size))


@dataclass(frozen=True)
class Call:
    """A change that was asked for: a volume of each name becomes that, or goes away if None.

    imports: the volume that is imported. shrinks: the one that is, and its new size.
    """

    after: dict[str, Extra | None]
    imports: str | None = None
    shrinks: tuple[str, int] | None = None


class Administrator:
    """One person at the control API.

    Arguments:
        control: the server's.
        source: decides everything.
        keeps_trash: the pool has so much room that nothing leaves the trash by itself.

    Attributes:
        n_calls: acknowledged since somebody set it to 0.
        done: what they were, in all.
        fenced: exports that nobody may attach any more.
    """

    def __init__(
        self, control: ControlClient, source: random.Random, *, keeps_trash: bool = False
    ) -> None:
        self.n_calls = 0
        self.done = Counter[str]()
        self.fenced: list[str] = []
        self._keeps_trash = keeps_trash
        self._control = control
        self._source = source
        self._volumes: dict[str, Extra] = {}
        self._on_its_way: Call | None = None
        self._next_number = 1000

    async def run(self) -> None:
        """Do one thing after the other until the server is gone."""
        while True:
            try:
                await asyncio.to_thread(self._do_something)
            except (ControlError, OSError):
                return
            except (NoSpace, Busy):
                await asyncio.sleep(REFUSED_PAUSE_S)
            else:
                self.n_calls += 1

    # --- Calls ---

    def _do_something(self) -> None:
        kind = self._source.choice(self._kinds())
        try:
            kind()
        except (NoSpace, Busy):
            self._refused()
            raise
        assert self._on_its_way
        for name, extra in self._on_its_way.after.items():
            self._volumes.pop(name, None)
            if extra is not None:
                self._volumes[name] = extra
        self._on_its_way = None
        self.done[kind.__name__.strip("_")] += 1

    def _refused(self) -> None:
        """Nothing was done; but a shrink has no space left when it has cut off the end."""
        if self._on_its_way is not None and self._on_its_way.shrinks is not None:
            self._see_what_was_cut(*self._on_its_way.shrinks)
        self._on_its_way = None

    def _kinds(self) -> list[Callable[[], None]]:
        """What can be done now."""
        n_snapshots = sum(map(is_snapshot, self._volumes))
        n_trashed = sum(map(is_trashed, self._volumes))
        n_volumes = len(self._volumes) - n_snapshots - n_trashed
        kinds = [self._create, self._import, *([self._clone] if n_snapshots else [])]
        if n_volumes >= MAX_VOLUMES:
            kinds = [self._delete]
        elif n_volumes:
            kinds += [self._resize, self._shrink, self._shrink, self._rename, self._delete]
        if n_volumes:
            kinds += [self._flatten, self._scrub, self._lease, self._limit]
            kinds += [self._delete] * 2 if self._keeps_trash and not n_trashed else []
        if any(extra.holder for extra in self._volumes.values()):
            kinds += [self._break_lease]
        if n_snapshots:
            kinds += [self._drop, self._roll_back]
        if n_volumes and n_snapshots < MAX_SNAPSHOTS:
            kinds += [self._snapshot, self._snapshot]
        if n_trashed:
            kinds += [self._purge]
            kinds += [self._restore] * 4 if n_volumes < MAX_VOLUMES else []
        return kinds

    def _new(self, n_imported: int) -> tuple[str, Extra]:
        self._next_number += 1
        return f"{PREFIX}{self._next_number}", Extra(self._next_number, 1 << 20, n_imported)

    def _any(self, *, snapshot: bool = False) -> tuple[str, Extra]:
        kind = is_snapshot if snapshot else is_volume
        name = self._source.choice([n for n in sorted(self._volumes) if kind(n)])
        return name, self._volumes[name]

    def _snapshots_of(self, name: str) -> list[str]:
        return [found for found in self._volumes if found.startswith(f"{name}@")]

    def _create(self) -> None:
        name, extra = self._new(0)
        self._on_its_way = Call({name: extra})
        self._control.create_volume(name, extra.size)

    def _import(self) -> None:
        name, extra = self._new(IMPORTED_BYTES)
        self._on_its_way = Call({name: extra}, imports=name)
        content = stamped(extra.number, 0, IMPORTED_BYTES // SECTOR, 1)
        step = IMPORTED_BYTES // 4
        pieces = [Piece(at, content[at : at + step]) for at in range(0, IMPORTED_BYTES, step)]
        self._control.write_content(name, extra.size, pieces)

    def _resize(self) -> None:
        name, extra = self._any()
        larger = replace(extra, size=extra.size + (1 << 20))
        self._on_its_way = Call({name: larger})
        self._control.update_volume(name, size=larger.size)

    def _shrink(self) -> None:
        """By force: what lies beyond the new end is lost."""
        name, extra = self._any()
        size = max(SMALLEST_BYTES, extra.size // 2)
        self._on_its_way = Call({name: replace(extra.cut(size), size=size)}, shrinks=(name, size))
        self._control.update_volume(name, size=size, shrink=True, force=True)

    def _limit(self) -> None:
        name, extra = self._any()
        self._next_number += 1
        self._on_its_way = Call({name: replace(extra, iops=self._next_number)})
        self._control.update_volume(name, iops=self._next_number)

    def _rename(self) -> None:
        name, extra = self._any()
        self._next_number += 1
        new_name = f"{PREFIX}{self._next_number}"
        after: dict[str, Extra | None] = {name: None, new_name: extra}
        for snapshot in self._snapshots_of(name):
            after[snapshot] = None
            after[new_name + snapshot.removeprefix(name)] = self._volumes[snapshot]
        self._on_its_way = Call(after)
        self._control.update_volume(name, new_name=new_name)

    def _delete(self) -> None:
        """Into the trash, with its snapshots: nobody sees those any more either."""
        name, extra = self._any()
        snapshots = self._snapshots_of(name)
        after: dict[str, Extra | None] = dict.fromkeys([name, *snapshots])
        if self._keeps_trash:
            held = tuple((s.partition("@")[2], self._volumes[s]) for s in snapshots)
            after[TRASHED + name] = replace(extra, snapshots=held)
        self._on_its_way = Call(after)
        self._control.delete_volume(name, snapshots=True)

    def _trashed(self) -> tuple[str, Extra]:
        name = self._source.choice([n for n in sorted(self._volumes) if is_trashed(n)])
        return name, self._volumes[name]

    def _restore(self) -> None:
        """With its snapshots."""
        trashed, extra = self._trashed()
        name, _ = self._new(0)
        after: dict[str, Extra | None] = {trashed: None, name: replace(extra, snapshots=())}
        after |= {f"{name}@{snapshot}": held for snapshot, held in extra.snapshots}
        self._on_its_way = Call(after)
        self._control.restore(trashed.removeprefix(TRASHED), name)

    def _purge(self) -> None:
        trashed, extra = self._trashed()
        if extra.snapshots:  # they would go one by one, and each is another state
            self._on_its_way = Call({})
            return
        self._on_its_way = Call({trashed: None})
        self._control.purge(trashed.removeprefix(TRASHED))

    def _flatten(self) -> None:
        """What the volume holds stays as it is, whenever that ends."""
        name, _ = self._any()
        self._on_its_way = Call({})
        operation = self._control.start_flatten(name)
        while operation.is_running:
            operation = self._control.operation(operation.id, wait_s=1)
        if operation.error is not None and operation.error["code"] not in REFUSED:
            raise Violation(f"flattening {name}: {operation.error}")

    def _scrub(self) -> None:
        """Begin to read everything, so slowly that it is not done when the server ends."""
        self._on_its_way = Call({})
        self._control.start_scrub(rate=SLOW_RATE)

    def _lease(self) -> None:
        """Take over the lease of a volume; whoever had it is fenced."""
        leased = [name for name, extra in self._volumes.items() if extra.holder]
        name = self._source.choice(leased) if len(leased) >= MAX_LEASED else self._any()[0]
        extra, holder = self._volumes[name], self._source.choice(HOLDERS)
        is_new = holder != extra.holder
        after = replace(extra, holder=holder, n_leases=extra.n_leases + is_new)
        self._on_its_way = Call({name: after})
        fenced = None
        if is_new and extra.holder is not None:
            fenced = self._control.acquire_lease(name, extra.holder).export  # the same one again
        lease = self._control.acquire_lease(name, holder, force=True)
        if (lease.holder, lease.epoch) != (holder, after.n_leases):
            raise Violation(f"{lease} was granted; wanted: {after}")
        if fenced is not None:
            self.fenced.append(fenced)

    def _break_lease(self) -> None:
        name = self._source.choice([n for n, found in self._volumes.items() if found.holder])
        self._on_its_way = Call({name: replace(self._volumes[name], holder=None)})
        self._control.break_lease(name)

    def _snapshot(self) -> None:
        """Of one volume or two, all or none."""
        self._next_number += 1
        names = {self._any()[0] for _ in range(2)}
        number = self._next_number
        after = {f"{name}@s{number}": _of_a_snapshot(self._volumes[name]) for name in sorted(names)}
        self._on_its_way = Call({**after})
        self._control.create_snapshots([*after])

    def _drop(self) -> None:
        name, _ = self._any(snapshot=True)
        self._on_its_way = Call({name: None})
        self._control.delete_snapshot(name)

    def _clone(self) -> None:
        snapshot, extra = self._any(snapshot=True)
        name, _ = self._new(0)
        self._on_its_way = Call({name: extra})
        self._control.clone(snapshot, name)

    def _roll_back(self) -> None:
        snapshot, held = self._any(snapshot=True)
        name = snapshot.partition("@")[0]
        volume = self._volumes[name]
        after = replace(held, holder=volume.holder, n_leases=volume.n_leases, iops=volume.iops)
        self._on_its_way = Call({name: after})
        self._control.rollback(snapshot)

    # --- Afterwards ---

    def recovered(self) -> None:
        """Compare with what the server has after a crash, and take that for granted from now on.

        Raises Violation or Garbage if that must not be.
        """
        found = {info.name: info for info in self._control.volumes() if _is_extra(info)}
        snapshots = [info for info in self._control.snapshots() if info.volume in found]
        before, call = self._volumes, self._on_its_way
        if call is not None and call.imports in found and found[call.imports].importing:
            self._control.delete_volume(call.imports, now=True)  # cut off, and says so
            del found[call.imports]
        allowed = [before]
        if call is not None:
            after = {**before, **call.after}
            allowed.append({name: extra for name, extra in after.items() if extra is not None})
        shown = self._shown(found, snapshots)
        for state in allowed:
            if shown == {name: extra.shown(name) for name, extra in state.items()}:
                self._volumes = state
                break
        else:
            raise Violation(f"volumes {shown}; allowed: {allowed}")
        self._on_its_way = None
        if call is not None and call.shrinks is not None and state is before:
            self._see_what_was_cut(*call.shrinks)
        for name, extra in self._volumes.items():
            if is_volume(name):  # what others hold is told by their clones, or once restored
                self._verify(name, extra)
        self._scrub_all()

    def granted(self) -> list[str]:
        """The exports of the leases that are held: whoever held one has it yet."""
        exports = []
        for name, extra in self._volumes.items():
            if extra.holder is not None:
                lease = self._control.acquire_lease(name, extra.holder)
                if lease.export is None or lease.epoch != extra.n_leases:
                    raise Violation(f"the lease of {name} is another one: {lease}, {extra}")
                exports.append(lease.export)
        return exports

    def _see_what_was_cut(self, name: str, size: int) -> None:
        """A shrink to `size` was not made: what lies beyond is there yet, or not."""
        extra = self._volumes[name]
        if not self._stamps(name, extra)[size // SECTOR :].any():
            self._volumes[name] = extra.cut(size)

    def _shown(
        self, found: Mapping[str, VolumeInfo], snapshots: Iterable[SnapshotInfo]
    ) -> dict[str, Shown]:
        """All that is there, as `Extra.shown` has it."""
        leases = {info.volume: (info.holder, info.epoch) for info in self._control.leases()}
        shown: dict[str, Shown] = {
            name: (info.size, *leases.get(name, (None, 0)), info.iops)
            for name, info in found.items()
        }
        shown |= {info.snapshot: (info.size, None, 0, 0) for info in snapshots}
        if self._keeps_trash:
            trash = [info for info in self._control.trash() if info.name.startswith(PREFIX)]
            shown |= {TRASHED + info.name: (info.size, None, 0, 0) for info in trash}
        return shown

    def _scrub_all(self) -> None:
        """Read everything, or what a scrub that was cut off has not: all of it is whole."""
        operation = self._control.start_scrub(rate=FAST_RATE)
        while operation.is_running:
            operation = self._control.operation(operation.id, wait_s=1)
        if operation.error is not None and operation.error["code"] in REFUSED:
            return  # there is no room even to note how far it is
        if operation.state != "done" or operation.result["damaged"]:
            raise Violation(f"a scrub has found what must not be: {operation}")

    def _stamps(self, name: str, extra: Extra) -> Sequences:
        content = bytearray(extra.size)
        for piece in self._control.read_content(name).pieces:
            content[piece.offset : piece.offset + len(piece.data)] = piece.data
        return sequences(extra.number, 0, bytes(content))

    def _verify(self, name: str, extra: Extra) -> None:
        stamps = self._stamps(name, extra)
        n_sectors = extra.n_imported // SECTOR
        if not (stamps[:n_sectors] == 1).all() or stamps[n_sectors:].any():
            raise Violation(f"volume {name} has not the content that was imported: {extra}")


def is_snapshot(name: str) -> bool:
    """Tell whether it is the name of a snapshot."""
    return "@" in name


def is_trashed(name: str) -> bool:
    """Tell whether it stands for a volume in the trash."""
    return name.startswith(TRASHED)


def is_volume(name: str) -> bool:
    """Tell whether it is the name of a volume that can be used."""
    return not is_snapshot(name) and not is_trashed(name)


def _of_a_snapshot(extra: Extra) -> Extra:
    return replace(extra, holder=None, n_leases=0, iops=0)


def _is_extra(info: VolumeInfo) -> bool:
    return info.name.startswith(PREFIX)
