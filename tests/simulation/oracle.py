"""What a volume may hold: the oracle of many clients that write at once.

Owns the history of one volume since it was last known for sure, and two questions: may a read
have seen this, and may a crash have left this.  tests/store/crash_model.py asks the second one
for one client whose changes have an order; here requests of many connections are in flight at
once, are lost and sent again, and the order of their effects is not known.  What is known:

- a request takes effect at some time after it was sent, and before its acknowledgement is
  received; if it is never acknowledged, then at any time, in part, or not at all, but not after
  the server has learned that every connection that it was sent over is gone ("gone");
- so a request is overwritten for sure by another one that was sent after the first was gone, from
  the moment on at which that other one is acknowledged ("dead");
- and by whatever a later read has seen instead of it.

So each cell of 512 bytes has candidates, and each candidate a span of time in which it may be what
the cell holds: from its sending to its death.  A read has seen what a candidate wrote whose span
meets the time of the read.  A crash leaves each volume as it was at one moment at or after its last
flush (design: durability): there must be a moment that lies in a span of every cell at once.

Content tells where it comes from: each cell is filled with one number that names the request and
the cell.  Time is the number of the last event in the world's trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

CELL: Final = 512
_WORDS: Final = CELL // 8
_CELL_BITS: Final = 24
NEVER: Final = 1 << 62

Stamps = npt.NDArray[np.uint64]
"""What cells hold, one number each; 0 = zeros."""


class Wrong(AssertionError):
    """The system under test did what it must not."""


def stamp(serial: int, first: int, stop: int) -> Stamps:
    """What request `serial` writes to cells `[first, stop)`."""
    return np.arange(first, stop, dtype=np.uint64) + np.uint64(serial << _CELL_BITS)


def content(stamps: Stamps) -> bytes:
    """The bytes of cells with `stamps`."""
    return np.repeat(stamps.astype("<u8"), _WORDS).tobytes()


def stamps_of(raw: bytes) -> Stamps:
    """Read the cells of `raw`, each of which must be whole."""
    words = np.frombuffer(raw, "<u8").reshape(-1, _WORDS)
    torn = np.flatnonzero((words != words[:, :1]).any(axis=1))
    if len(torn):
        raise Wrong(f"{len(torn)} sectors are torn, first number {torn[0]} of {len(words)}")
    return words[:, 0].astype(np.uint64)


def describe(value: int) -> str:
    """Say what a cell holds."""
    if not value:
        return "zeros"
    return f"request {value >> _CELL_BITS} for cell {value & ((1 << _CELL_BITS) - 1)}"


class Effect:
    """What one request does to cells `[first, stop)`: a change, sent once or several times.

    Attributes:
        serial: what its data says; 0 for zeros.
        whole: it is done at one moment, to all of its cells.
        start: when it was sent first.
        acked: when its first acknowledgement was received.
        gone: when nothing that was sent of it could have an effect any more.
    """

    __slots__ = ("acked", "first", "gone", "n_sent", "serial", "settled", "start", "stop", "whole")

    def __init__(self, serial: int, first: int, stop: int, start: int, *, whole: bool) -> None:
        self.serial = serial
        self.first = first
        self.stop = stop
        self.whole = whole
        self.start = start
        self.acked = NEVER
        self.gone = NEVER
        self.n_sent = 0
        self.settled = False

    def value(self, cell: int) -> int:
        return self.serial << _CELL_BITS | cell if self.serial else 0

    def sent(self) -> None:
        """It is on its way over one more connection."""
        self.n_sent += 1

    def settle(self, now: int) -> None:
        """Its sender will not send it again."""
        self.settled = True
        self._look(now)

    def over(self, now: int) -> None:
        """One of its sendings was answered, or its connection closed by the server."""
        self.n_sent -= 1
        self._look(now)

    def _look(self, now: int) -> None:
        if self.settled and not self.n_sent and self.gone == NEVER:
            self.gone = now

    def __repr__(self) -> str:
        times = ", ".join(
            f"{name} {'never' if at == NEVER else at}"
            for name, at in (
                ("sent", self.start),
                ("acknowledged", self.acked),
                ("gone", self.gone),
            )
        )
        what = f"request {self.serial}" if self.serial else "zeros"
        return f"<{what} for cells [{self.first}, {self.stop}): {times}>"


class Candidate:
    """An effect on one cell.

    Attributes:
        dead: from when on the cell cannot hold it.
        buried: it is overwritten by something that no crash may take back.
    """

    __slots__ = ("buried", "dead", "effect", "value")

    def __init__(self, effect: Effect | None, value: int) -> None:
        self.effect = effect
        self.value = value
        self.dead = NEVER
        self.buried = False

    @property
    def start(self) -> int:
        return self.effect.start if self.effect else -1

    @property
    def gone(self) -> int:
        return self.effect.gone if self.effect else -1

    def __repr__(self) -> str:
        end = "" if self.dead == NEVER else f", dead {self.dead}"
        return f"{self.effect or 'base'}{end}{', buried' if self.buried else ''}"


class History:
    """One volume since a moment when it was known.

    Arguments:
        base: what it held then.
    """

    def __init__(self, base: Stamps) -> None:
        self.base = base
        self.durable = -1
        """What was acknowledged before this survives every crash."""
        self._cells: dict[int, list[Candidate]] = {}
        self._effects: dict[int, Effect] = {}
        """Of whole effects that may be there in part: those not acknowledged."""
        self._reads: dict[int, int] = {}

    @property
    def n_cells(self) -> int:
        return len(self.base)

    def grow(self, n_cells: int) -> None:
        """The volume has become larger, by zeros."""
        more = np.zeros(max(0, n_cells - self.n_cells), np.uint64)
        self.base = np.concatenate([self.base, more])

    def cut(self, n_cells: int) -> None:
        """The volume has become smaller."""
        self.base = self.base[:n_cells]
        self._cells = {cell: found for cell, found in self._cells.items() if cell < n_cells}

    def _there(self, first: int, stop: int) -> range:
        """The cells `[first, stop)` that the volume has, and not only had."""
        return range(first, min(stop, self.n_cells))

    def _candidates(self, cell: int) -> list[Candidate]:
        found = self._cells.get(cell)
        if found is None:
            found = self._cells[cell] = [Candidate(None, int(self.base[cell]))]
        return found

    # --- Changes -----------------------------------------------------------------------------

    def begin(self, effect: Effect) -> None:
        """A change is sent for the first time."""
        if effect.whole:
            self._effects[effect.serial] = effect
        horizon = min([self.durable, *self._reads.values()])
        for cell in self._there(effect.first, effect.stop):
            found = self._candidates(cell)
            if any(c.dead <= horizon for c in found):
                found[:] = [c for c in found if c.dead > horizon]
            found.append(Candidate(effect, effect.value(cell)))

    def acknowledge(self, effect: Effect, now: int, *, durable: bool = False) -> None:
        """A change was acknowledged; `durable` with FUA."""
        effect.acked = min(effect.acked, now)
        self._effects.pop(effect.serial, None)
        for cell in self._there(effect.first, effect.stop):
            for candidate in self._candidates(cell):
                if candidate.gone < effect.start:
                    candidate.dead = min(candidate.dead, effect.acked)
                    candidate.buried |= durable

    def flushed(self, start: int) -> None:
        """A flush that was sent at `start` was acknowledged."""
        self.durable = max(self.durable, start)

    # --- Reads -------------------------------------------------------------------------------

    def begin_read(self, start: int) -> None:
        """A read was sent."""
        self._reads[start] = start

    def end_read(self, start: int) -> None:
        """It was answered, or is given up."""
        del self._reads[start]

    def check_read(self, first: int, found: Stamps, start: int, now: int) -> None:
        """A read of cells from `first` on, sent at `start`, has `found` something just now.

        Raises:
            Wrong: it cannot have been there.
        """
        for cell in self._there(first, first + len(found)):
            value = int(found[cell - first])
            candidates = self._candidates(cell)
            if not any(c.value == value and c.start < now and c.dead > start for c in candidates):
                raise Wrong(self._explain(cell, value, f"read from {start} to {now}"))
            for candidate in candidates:
                if candidate.value != value and candidate.gone < start:
                    candidate.dead = min(candidate.dead, now)

    def check_zeros(self, first: int, stop: int, start: int, now: int) -> None:
        """A block status said that cells `[first, stop)` read as zeros."""
        for cell in self._there(first, stop):
            if cell in self._cells or self.base[cell]:
                candidates = self._candidates(cell)
                if not any(not c.value and c.start < now and c.dead > start for c in candidates):
                    raise Wrong(self._explain(cell, 0, f"block status from {start} to {now}"))

    def _explain(self, cell: int, value: int, what: str) -> str:
        lines = [f"{what}: cell {cell} holds {describe(value)}, which is none of"]
        lines += [f"  {candidate!r}" for candidate in self._candidates(cell)]
        return "\n".join(lines)

    # --- Crashes -----------------------------------------------------------------------------

    def check_crash(self, found: Stamps, now: int, *, lossless: bool) -> None:
        """Assert that recovery may have `found` this after a crash.

        Arguments:
            lossless: the process was killed, or ended properly: everything acknowledged is there.
        """
        if len(found) < self.n_cells:
            raise Wrong(f"{self.n_cells} cells have become {len(found)}")
        self._check_untouched(found)
        earliest = now if lossless else self.durable
        spans = {
            cell: self._spans(candidates, int(found[cell]), earliest, now)
            for cell, candidates in self._cells.items()
        }
        for cell, choices in spans.items():
            if not choices:
                why = f"crash, durable up to {earliest}"
                raise Wrong(self._explain(cell, int(found[cell]), why))
        if spans and not _meet(spans.values()):
            raise Wrong(self._explain_mixture(found, spans))
        for effect in self._effects.values():
            self._check_whole(effect, found)

    def check_moment(self, found: Stamps, start: int, now: int) -> None:
        """Assert that `found` is what the volume held at one moment from `start` to `now`.

        Whatever was acknowledged before `start` is in it, flushed or not.  A read from `start` on
        must be going on, so that nothing of that time was forgotten.
        """
        if len(found) != self.n_cells:
            raise Wrong(f"{len(found)} cells, not {self.n_cells}")
        self._check_untouched(found)
        spans = {
            cell: [
                (max(c.start, start), min(c.dead, now))
                for c in candidates
                if c.value == int(found[cell]) and c.start <= now and c.dead >= start
            ]
            for cell, candidates in self._cells.items()
        }
        for cell, choices in spans.items():
            if not choices:
                raise Wrong(self._explain(cell, int(found[cell]), f"from {start} to {now}"))
        if spans and not _meet(spans.values()):
            raise Wrong(self._explain_mixture(found, spans))

    def _check_untouched(self, found: Stamps) -> None:
        untouched = np.ones(len(found), np.bool_)
        untouched[[*self._cells]] = False
        base = np.zeros(len(found), np.uint64)
        base[: self.n_cells] = self.base
        wrong = np.flatnonzero(untouched & (base != found))
        if len(wrong):
            cell = int(wrong[0])
            raise Wrong(
                f"crash: {len(wrong)} cells that nobody wrote have changed; cell {cell} holds "
                f"{describe(int(found[cell]))} instead of {describe(int(base[cell]))}"
            )

    @staticmethod
    def _spans(
        candidates: Iterable[Candidate], value: int, earliest: int, now: int
    ) -> list[tuple[int, int]]:
        """When the cell may have held `value`: spans (from, to), both included."""
        return [
            (max(c.start, earliest), min(c.dead, now))
            for c in candidates
            if c.value == value and not c.buried and c.start <= now and c.dead >= earliest
        ]

    def _check_whole(self, effect: Effect, found: Stamps) -> None:
        """Assert that a change that was never acknowledged is there whole or not at all."""
        cells = self._there(effect.first, effect.stop)
        there = [cell for cell in cells if self._is_seen(effect, cell, int(found[cell]))]
        if not there:
            return
        for cell in cells:
            value = int(found[cell])
            if not any(
                c.value == value and not c.gone < effect.start for c in self._candidates(cell)
            ):
                what = f"{effect!r} is in cell {there[0]}, but not in cell {cell}"
                raise Wrong(self._explain(cell, value, f"crash: torn: {what}"))

    def _is_seen(self, effect: Effect, cell: int, value: int) -> bool:
        """Tell whether `value` is in `cell` by `effect`, and not by what was there before it."""
        return value == effect.value(cell) and not any(
            c.value == value and c.effect is not effect for c in self._candidates(cell)
        )

    def _explain_mixture(self, found: Stamps, spans: dict[int, list[tuple[int, int]]]) -> str:
        newest = max(spans, key=lambda cell: min(start for start, _ in spans[cell]))
        oldest = min(spans, key=lambda cell: max(stop for _, stop in spans[cell]))
        lines = ["crash: a mixture of times, which the volume never was"]
        for cell in (newest, oldest):
            lines.append(self._explain(cell, int(found[cell]), f"at {spans[cell]}"))
        return "\n".join(lines).replace("which is none of", "of")


def _meet(spans: Iterable[Sequence[tuple[int, int]]]) -> bool:
    """Tell whether one moment lies in at least one span of each."""
    ends: list[tuple[int, int]] = []
    n = 0
    for choices in spans:
        n += 1
        ends += _ends(choices)
    held = 0
    for _, change in sorted(ends):
        held -= change
        if held == n:
            return True
    return False


def _ends(choices: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The ends of the union of spans: (moment, -1) where it begins, (moment, 1) where it ends."""
    stop = -2
    for first, last in sorted(choices):
        if first > stop:
            if stop > -2:
                yield stop, 1
            yield first, -1
        stop = max(stop, last)
    if stop > -2:
        yield stop, 1


def zero_stamps(n_cells: int) -> Stamps:
    """A volume that nobody has written."""
    return np.zeros(n_cells, np.uint64)
