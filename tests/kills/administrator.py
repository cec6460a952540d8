"""Somebody who makes, imports, resizes, renames, snapshots, clones, rolls back and deletes volumes
while the server is killed.

What the control API has acknowledged must be there after a kill; the one call that was on its way
may have been done or not, but not by half. An import that was cut off may leave its volume behind,
marked, so that nobody takes it for whole.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace
from typing import Final

from nbdstore.control.client import ControlClient
from nbdstore.control.model import VolumeInfo
from nbdstore.control.stream import Piece
from nbdstore.errors import Busy, ControlError, NoSpace
from tests.load.model import Violation
from tests.load.stamps import SECTOR, sequences, stamped

PREFIX: Final = "extra-"
IMPORTED_BYTES: Final = 256 << 10
MAX_VOLUMES: Final = 6
MAX_SNAPSHOTS: Final = 6
REFUSED_PAUSE_S: Final = 0.1


@dataclass(frozen=True)
class Extra:
    """A volume or snapshot: `n_imported` bytes of content number `number`, then zeroes."""

    number: int
    size: int
    n_imported: int = 0


@dataclass(frozen=True)
class Call:
    """A change that was asked for: a volume of each name becomes that, or goes away if None."""

    after: dict[str, Extra | None]
    imports: str | None = None


class Administrator:
    """One person at the control API.

    Arguments:
        control: the server's.
        source: decides everything.
    """

    def __init__(self, control: ControlClient, source: random.Random) -> None:
        self.n_calls = 0
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
                self._on_its_way = None  # refused: nothing was done
                await asyncio.sleep(REFUSED_PAUSE_S)
            else:
                self.n_calls += 1

    # --- Calls ---

    def _do_something(self) -> None:
        n_snapshots = sum(map(is_snapshot, self._volumes))
        n_volumes = len(self._volumes) - n_snapshots
        kinds = [self._create, self._import, *([self._clone] if n_snapshots else [])]
        if n_volumes >= MAX_VOLUMES:
            kinds = [self._delete]
        elif n_volumes:
            kinds += [self._resize, self._rename, self._delete]
        if n_snapshots:
            kinds += [self._drop, self._roll_back]
        if n_volumes and n_snapshots < MAX_SNAPSHOTS:
            kinds += [self._snapshot, self._snapshot]
        self._source.choice(kinds)()
        assert self._on_its_way
        for name, extra in self._on_its_way.after.items():
            self._volumes.pop(name, None)
            if extra is not None:
                self._volumes[name] = extra
        self._on_its_way = None

    def _new(self, n_imported: int) -> tuple[str, Extra]:
        self._next_number += 1
        return f"{PREFIX}{self._next_number}", Extra(self._next_number, 1 << 20, n_imported)

    def _any(self, *, snapshot: bool = False) -> tuple[str, Extra]:
        name = self._source.choice([n for n in sorted(self._volumes) if is_snapshot(n) is snapshot])
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
        name, _ = self._any()
        self._on_its_way = Call(dict.fromkeys([name, *self._snapshots_of(name)]))
        self._control.delete_volume(name, snapshots=True)

    def _snapshot(self) -> None:
        """Of one volume or two, all or none."""
        self._next_number += 1
        names = {self._any()[0] for _ in range(2)}
        after = {f"{name}@s{self._next_number}": self._volumes[name] for name in sorted(names)}
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
        snapshot, extra = self._any(snapshot=True)
        self._on_its_way = Call({snapshot.partition("@")[0]: extra})
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
            self._control.delete_volume(call.imports)  # cut off, and says so
            del found[call.imports]
        allowed = [before]
        if call is not None:
            after = {**before, **call.after}
            allowed.append({name: extra for name, extra in after.items() if extra is not None})
        shown = {name: info.size for name, info in found.items()}
        shown |= {info.snapshot: info.size for info in snapshots}
        for state in allowed:
            if shown == {name: extra.size for name, extra in state.items()}:
                self._volumes = state
                break
        else:
            raise Violation(f"volumes {shown}; allowed: {allowed}")
        self._on_its_way = None
        for name, extra in self._volumes.items():
            if not is_snapshot(name):  # what those hold is told by their clones
                self._verify(name, extra)

    def _verify(self, name: str, extra: Extra) -> None:
        content = bytearray(extra.size)
        for piece in self._control.read_content(name).pieces:
            content[piece.offset : piece.offset + len(piece.data)] = piece.data
        stamps = sequences(extra.number, 0, bytes(content))
        n_sectors = extra.n_imported // SECTOR
        if not (stamps[:n_sectors] == 1).all() or stamps[n_sectors:].any():
            raise Violation(f"volume {name} has not the content that was imported: {extra}")


def is_snapshot(name: str) -> bool:
    """Tell whether it is the name of a snapshot."""
    return "@" in name


def _is_extra(info: VolumeInfo) -> bool:
    return info.name.startswith(PREFIX)
