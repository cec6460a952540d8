"""What a pool must be after a crash: the oracle of the power-loss tests.

Owns the history of each volume as a test saw it, and the question whether what recovery made of
a crash is allowed: a volume is as it was at one moment at or after its last acknowledged flush,
which is a prefix of its acknowledged writes, and then perhaps a part of what was on its way.

A history is a list of changes in the order of their acknowledgement.  A test takes care that this
is the order in which the store did them: changes that take several records (trim, write_zeroes,
resize) have the volume for themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from tests.store.snapshot_model import Dropping, Key, Snapped, Snapping, SnapshotModel

SECTOR: Final = 512


@dataclass(frozen=True, eq=False)
class Change:
    """What one request does to the content of a volume.

    Attributes:
        pieces: (offset, data) of each write, in order; of zeroing, the data is a length.
        size: the new size, if the request changes it.
        whole: it is there whole or not at all; else each of its pieces is.
    """

    pieces: tuple[tuple[int, bytes | int], ...] = ()
    size: int | None = None
    whole: bool = True

    def apply(self, content: bytearray) -> None:
        for offset, data in self.pieces:
            raw = bytes(data) if isinstance(data, int) else data
            content[offset : offset + len(raw)] = raw
        if self.size is not None:
            del content[self.size :]
            content.extend(bytes(self.size - len(content)))


# -- the marks that a workload leaves in the log of the disk -----------------------------------


@dataclass(frozen=True, eq=False)
class Begun:
    volume: int
    change: Change


@dataclass(frozen=True, eq=False)
class Acknowledged:
    volume: int
    change: Change


@dataclass(frozen=True, eq=False)
class Failed:
    """The request was refused: it has done nothing."""

    volume: int
    change: Change


@dataclass(frozen=True)
class Flushed:
    """All that was acknowledged before number `n_changes` of the volume is durable."""

    volume: int
    n_changes: int


@dataclass(frozen=True)
class Administered:
    """An administrative change was `begun`, or else done: name and properties, None = deleted."""

    volume: int | None
    about: Any
    begun: bool


@dataclass(frozen=True)
class Refused:
    """An administrative change that has begun was refused: it has done nothing."""

    volume: int | None
    about: Any


@dataclass
class History:
    """One volume, as far as a test saw it before the crash."""

    base: bytes
    about: Any
    changes: list[Change] = field(default_factory=list)
    n_durable: int = 0
    in_flight: list[Change] = field(default_factory=list)
    about_in_flight: list[Any] = field(default_factory=list)

    def content(self) -> bytearray:
        """The content after all changes."""
        found = bytearray(self.base)
        for change in self.changes:
            change.apply(found)
        return found

    def may_be_at(self, n_changes: int, alone: tuple[Change, ...], found: bytes) -> bool:
        """Tell whether `found` is the content after `n_changes`, or amid `alone` after them.

        Arguments:
            alone: what is on its way that has the volume for itself, in order.
        """
        state = bytearray(self.base)
        for change in self.changes[:n_changes]:
            change.apply(state)
        for change in alone:
            if state == found or (not change.whole and _in_parts(state, change, found)):
                return True
            change.apply(state)
        return state == found

    def why_not(self, found: bytes, *, everything: bool = False) -> str | None:
        """Say why `found` is not what may be there after a crash; None if it may.

        Arguments:
            everything: of what was acknowledged must be there.
        """
        n_sure = len(self.changes) if everything else self.n_durable
        state = bytearray(self.base)
        for change in self.changes[:n_sure]:
            change.apply(state)
        rest, alone = self.changes[n_sure:], self.in_flight
        if not all(change.whole for change in self.in_flight):  # these have the volume alone
            rest, alone = [*rest, *self.in_flight], []
        for change in rest:
            if state == found:
                return None
            after = bytearray(state)
            change.apply(after)
            if not change.whole and _in_parts(state, change, found):
                return None
            state = after
        if state == found:
            return None
        for change in alone:
            after = bytearray(state)
            change.apply(after)
            if after == found:
                return None
        return self._explain(bytes(state), found)

    def _explain(self, last: bytes, found: bytes) -> str:
        sizes = f"size {len(found)}, last {len(last)}"
        wrong = [
            at
            for at in range(0, min(len(last), len(found)), SECTOR)
            if found[at : at + SECTOR] != last[at : at + SECTOR]
        ]
        return (
            f"not a prefix: {len(self.changes)} changes, {self.n_durable} of them durable, "
            f"{len(self.in_flight)} in flight; {sizes}; {len(wrong)} sectors differ from the last "
            f"state, first at {wrong[:5]}"
        )


def _in_parts(before: bytearray, change: Change, found: bytes) -> bool:
    """Tell whether `found` is as `before`, but for some pieces of `change`, each of them whole."""
    if len(found) != len(before):
        return False
    expected = bytearray(before)
    for offset, data in change.pieces:
        raw = bytes(data) if isinstance(data, int) else data
        if found[offset : offset + len(raw)] == raw:
            expected[offset : offset + len(raw)] = raw
    return expected == found


class Model:
    """All volumes of a pool, fed with marks."""

    def __init__(self) -> None:
        self.volumes: dict[int, History] = {}
        self.creating: list[Any] = []
        self.snapshots = SnapshotModel()

    def checkpoint_began(self) -> None:
        """Take note of the moment of which snapshots may be."""
        self.snapshots.checkpoint_began(self.volumes)

    def feed(self, mark: Any) -> None:
        """Take note of what happened."""
        if isinstance(mark, Snapping | Snapped | Dropping):
            self.snapshots.feed(mark)
            return
        if isinstance(mark, Administered):
            self._administer(mark)
            return
        if isinstance(mark, Refused):
            waiting = self.volumes[mark.volume].about_in_flight if mark.volume else self.creating
            waiting.remove(mark.about)
            if mark.volume and None not in waiting:  # nobody else is deleting it
                self.snapshots.volumes_going.discard(mark.volume)
            return
        history = self.volumes[mark.volume]
        if isinstance(mark, Flushed):
            history.n_durable = max(history.n_durable, mark.n_changes)
        elif isinstance(mark, Begun):
            history.in_flight.append(mark.change)
        else:
            history.in_flight.remove(mark.change)
            if isinstance(mark, Acknowledged):
                history.changes.append(mark.change)

    def _administer(self, mark: Administered) -> None:
        if mark.volume is None:
            self.creating.append(mark.about)
        elif mark.volume not in self.volumes:
            self.creating.remove(mark.about)
            self.volumes[mark.volume] = History(_new_content(mark.about), mark.about)
        elif mark.begun:
            self.volumes[mark.volume].about_in_flight.append(mark.about)
            if mark.about is None:
                self.snapshots.volumes_going.add(mark.volume)
        else:
            if mark.about is None:
                self.snapshots.volume_gone(mark.volume)
            history = self.volumes[mark.volume]
            history.about_in_flight.remove(mark.about)
            history.about = mark.about

    # -- after a crash ----------------------------------------------------------------------

    def check(
        self, found: dict[str, tuple[int, dict[str, Any], bytes]], *, everything: bool = False
    ) -> None:
        """Assert that what recovery found - by name: id, properties, content - may be.

        Arguments:
            everything: of what was acknowledged must be there: only a process has died.
        """
        by_id = {
            number: (name, about, raw)
            for name, (number, about, raw) in found.items()
            if "@" not in name
        }
        self.snapshots.check(snapshots_in(found), self.volumes)
        for number, history in self.volumes.items():
            names = [about and about["name"] for about in (history.about, *history.about_in_flight)]
            if number not in by_id:
                assert None in names, f"volume {number} {names} is gone"
                continue
            name, properties, raw = by_id.pop(number)
            assert name in names, f"volume {number} is called {name}, not one of {names}"
            allowed = [
                about["properties"] for about in (history.about, *history.about_in_flight) if about
            ]
            assert properties in allowed, f"volume {name}: properties {properties}, not {allowed}"
            why = history.why_not(raw, everything=everything)
            assert why is None, f"volume {name} ({number}): {why}"
        for name, _, raw in by_id.values():
            made = [about for about in self.creating if about["name"] == name]
            assert made, f"volume {name} comes from nowhere"
            assert raw == _new_content(made[0]), f"new volume {name} holds something else"


def snapshots_in(found: dict[str, tuple[int, dict[str, Any], bytes]]) -> dict[Key, bytes]:
    """The snapshots in what recovery found, ``VOLUME@NAME`` with the volume's id as properties."""
    return {
        (about["volume"], name.partition("@")[2]): raw
        for name, (_, about, raw) in found.items()
        if "@" in name
    }


def _new_content(about: Any) -> bytes:
    """What a volume holds when it is made: a clone's `content`, or `size` zeros."""
    return about["content"] if "content" in about else bytes(about["size"])
