"""What the snapshots of a pool must be after a crash; a part of crash_model.py's oracle.

A snapshot exists as a whole or not at all.  It holds what the volume held at one moment between the
request and its answer: all that was acknowledged by then, flushed or not, and nothing that came
later.  Those of one request have one moment, and are there all or none.

The moments that come into question are those at which a checkpoint began.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.store.crash_model import Change, History

Key = tuple[int, str]
"""Of a snapshot: the id of its volume, and its name."""


# -- marks -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Snapping:
    """A request for snapshots has begun."""

    wanted: tuple[Key, ...]


@dataclass(frozen=True, eq=False)
class Snapped:
    """It has ended: they were `made`, or the request was refused."""

    begun: Snapping
    made: bool


@dataclass(frozen=True)
class Dropping:
    """The deletion of a snapshot has begun; `gone` tells how it ended, None = not yet."""

    key: Key
    gone: bool | None = None


# -- the model ---------------------------------------------------------------------------------

Moment = dict[int, tuple[int, tuple["Change", ...]]]
"""By volume: how many changes were acknowledged, and what was being done that takes several steps,
so that it may have been done before that was known."""


@dataclass(eq=False)
class Creation:
    """Snapshots that were asked for since the last crash.

    Attributes:
        left: those that have not been deleted since.
        is_done: they were made.
    """

    begun: Snapping
    left: set[Key]
    moments: list[Moment] = field(default_factory=list)
    is_done: bool = False


class SnapshotModel:
    """All snapshots of a pool, fed with marks.

    Attributes:
        known: what those hold that were there at the start.
        volumes_going: volumes whose deletion has begun; their snapshots go before them.
    """

    def __init__(self) -> None:
        self.known: dict[Key, bytes] = {}
        self.volumes_going: set[int] = set()
        self._creations: list[Creation] = []
        self._going: set[Key] = set()

    def feed(self, mark: Snapping | Snapped | Dropping) -> None:
        """Take note of what happened."""
        if isinstance(mark, Snapping):
            self._creations.append(Creation(mark, set(mark.wanted)))
        elif isinstance(mark, Snapped):
            creation = next(c for c in self._creations if c.begun is mark.begun)
            creation.is_done = mark.made
            if not mark.made:
                self._creations.remove(creation)
        elif mark.gone is None:
            self._going.add(mark.key)
        else:
            self._going.discard(mark.key)
            if mark.gone:
                self._forget(mark.key)

    def _forget(self, key: Key) -> None:
        self.known.pop(key, None)
        for creation in self._creations:
            creation.left.discard(key)

    def volume_gone(self, volume: int) -> None:
        """A volume was deleted."""
        keys = [*self.known, *(key for c in self._creations for key in c.left)]
        for key in keys:
            if key[0] == volume:
                self._forget(key)

    def checkpoint_began(self, histories: Mapping[int, History]) -> None:
        """What is acknowledged now may be what the snapshots hold that are on their way."""
        for creation in self._creations:
            if not creation.is_done:
                volumes = [volume for volume, _ in creation.begun.wanted if volume in histories]
                creation.moments.append({number: _now(histories[number]) for number in volumes})

    # -- after a crash ----------------------------------------------------------------------

    def check(self, found: Mapping[Key, bytes], histories: Mapping[int, History]) -> None:
        """Assert that what recovery found may be.

        A snapshot that is there vouches for its volume: what it holds is durable.
        """
        left = dict(found)
        for key, content in self.known.items():
            if not self._may_be_gone(key) or key in left:
                assert key in left, f"snapshot {key} is gone"
                assert left.pop(key) == content, f"snapshot {key} is another one"
        for creation in self._creations:
            there = {key: left.pop(key) for key in creation.begun.wanted if key in left}
            sure = {key for key in creation.left if not self._may_be_gone(key)}
            if creation.is_done or there:
                assert sure <= there.keys(), f"snapshots {sure - there.keys()} are gone"
            if there:
                _check_moment(creation, there, histories)
        assert not left, f"snapshots {[*left]} come from nowhere"

    def _may_be_gone(self, key: Key) -> bool:
        return key in self._going or key[0] in self.volumes_going


def _now(history: History) -> tuple[int, tuple[Change, ...]]:
    alone = [c for c in history.in_flight if not c.whole or c.size is not None]
    return len(history.changes), tuple(alone)


def _check_moment(
    creation: Creation, there: Mapping[Key, bytes], histories: Mapping[int, History]
) -> None:
    """Assert that the snapshots `there` are all of one moment, and what is durable since then."""
    for moment in reversed(creation.moments):
        if all(_is_of(moment, key, raw, histories) for key, raw in there.items()):
            for volume, _ in there:
                history = histories[volume]
                history.n_durable = max(history.n_durable, moment[volume][0])
            return
    raise AssertionError(
        f"snapshots {[*there]} are of none of {len(creation.moments)} moments: "
        f"{[{v: n for v, (n, _) in moment.items()} for moment in creation.moments]}"
    )


def _is_of(moment: Moment, key: Key, found: bytes, histories: Mapping[int, History]) -> bool:
    if key[0] not in moment:
        return False
    return histories[key[0]].may_be_at(*moment[key[0]], found)
