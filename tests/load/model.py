"""What a volume may hold, as its clients know it: the oracle of the load and the kill tests.

For each sector the model knows which write it holds for sure (the last one that was acknowledged),
and which change is on its way to it. No two changes in flight share a sector, though they share
blocks, and none begins where a read is on its way; so a read finds in each sector the one or the
other, and so does whoever looks after the server was killed:

- what was acknowledged is there;
- what was on its way is there or not, for each block as a whole;
- what a read has returned stays: it was with the kernel already.

The value of a sector is the sequence number of the write, or 0 for zeroes, whoever made them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from tests.load.stamps import SECTOR, Sequences, sequences, stamped


class Violation(AssertionError):
    """A volume holds what it must not hold."""


@dataclass(frozen=True, eq=False)
class Change:
    """A write, trim or zeroing of the sectors [first, stop); `value` is what they hold after it."""

    first: int
    stop: int
    value: int

    @property
    def sectors(self) -> slice:
        return slice(self.first, self.stop)


@dataclass(frozen=True, eq=False)
class Look:
    """A read of sectors that is on its way, and what it may find: `before` or `after`."""

    first: int
    before: Sequences
    after: Sequences

    @property
    def sectors(self) -> slice:
        return slice(self.first, self.first + len(self.before))


class VolumeModel:
    """One volume.

    Arguments:
        number: stamped into every sector.
        n_bytes: its size, a multiple of the block size.
        block_size: of the pool: what is torn apart never, even if it was not acknowledged.
    """

    def __init__(self, number: int, n_bytes: int, block_size: int) -> None:
        self.number: Final = number
        self.n_sectors: Final = n_bytes // SECTOR
        self.sectors_per_block: Final = block_size // SECTOR
        self.in_flight: set[Change] = set()
        self._settled: Sequences = np.zeros(self.n_sectors, np.uint64)
        self._coming: Sequences = np.zeros(self.n_sectors, np.uint64)
        self._is_coming = np.zeros(self.n_sectors, np.bool_)
        self._was_seen = np.zeros(self.n_sectors, np.bool_)
        self._n_readers = np.zeros(self.n_sectors, np.int32)
        self._sequence = 0

    # --- Changes ---

    def is_free(self, first: int, stop: int) -> bool:
        """Whether a change of [first, stop) may begin."""
        return not (self._is_coming[first:stop].any() or self._n_readers[first:stop].any())

    def begin_write(self, first: int, stop: int) -> tuple[Change, bytes]:
        """A write of [first, stop) is sent; return the content to send."""
        self._sequence += 1
        content = stamped(self.number, first, stop - first, self._sequence)
        return self._begin(Change(first, stop, self._sequence)), content

    def begin_zero(self, first: int, stop: int) -> Change:
        """A request that zeroes exactly [first, stop) is sent."""
        return self._begin(Change(first, stop, 0))

    def begin_trim(self, first: int, stop: int) -> Change:
        """A trim is sent, which zeroes the whole blocks of [first, stop)."""
        per_block = self.sectors_per_block
        inner_first, inner_stop = -(-first // per_block) * per_block, stop // per_block * per_block
        return self._begin(Change(inner_first, max(inner_first, inner_stop), 0))

    def _begin(self, change: Change) -> Change:
        assert self.is_free(change.first, change.stop)
        self._coming[change.sectors] = change.value
        self._is_coming[change.sectors] = True
        self.in_flight.add(change)
        return change

    def acknowledged(self, change: Change) -> None:
        """The reply has come: from now on the sectors hold this."""
        self._settled[change.sectors] = change.value
        self._forget(change)

    def _forget(self, change: Change) -> None:
        self.in_flight.remove(change)
        self._is_coming[change.sectors] = False
        self._was_seen[change.sectors] = False

    # --- Reads ---

    def begin_look(self, first: int, stop: int) -> Look:
        """A read of [first, stop), or a question about it, is sent."""
        self._n_readers[first:stop] += 1
        before = self._settled[first:stop].copy()
        is_coming = self._is_coming[first:stop]
        return Look(first, before, np.where(is_coming, self._coming[first:stop], before))

    def end_look(self, look: Look) -> None:
        """The reply has come, or never will."""
        self._n_readers[look.sectors] -= 1

    def verify(self, look: Look, content: bytes) -> None:
        """Raise Violation or Garbage unless a read found what it may find."""
        found = sequences(self.number, look.first, content)
        self._compare(look.first, found, look.before, look.after)
        # A change that has come to its end since then is settled, and its `after` with it.
        is_news = (found != look.before) & self._is_coming[look.sectors]
        self._was_seen[look.sectors] |= is_news

    def verify_zeroes(self, look: Look, first: int, stop: int) -> None:
        """Raise Violation unless [first, stop), part of a look, may read as zeroes."""
        part = slice(first - look.first, stop - look.first)
        before, after = look.before[part], look.after[part]
        self._compare(first, np.zeros(stop - first, np.uint64), before, after)

    def _compare(self, first: int, found: Sequences, before: Sequences, after: Sequences) -> None:
        wrong = np.flatnonzero((found != before) & (found != after))
        if len(wrong):
            at = int(wrong[0])
            raise Violation(
                f"volume {self.number}, sector {first + at} ({len(wrong)} such sectors) holds "
                f"write {found[at]}; allowed: {sorted({int(before[at]), int(after[at])})}"
            )

    # --- Crashes ---

    def recovered(self, content: bytes) -> None:
        """Take note of what the whole volume holds after a crash; it stays that way.

        Raises Violation or Garbage if it must not hold that.
        """
        found = sequences(self.number, 0, content)
        assert len(found) == self.n_sectors, "look at the whole volume"
        before = np.where(self._was_seen, self._coming, self._settled)
        after = np.where(self._is_coming, self._coming, self._settled)
        self._compare(0, found, before, after)
        for change in self.in_flight:
            self._check_blocks(change, found)
        self._settled = found
        self._is_coming[:] = self._was_seen[:] = False
        self._n_readers[:] = 0
        self.in_flight.clear()

    def _check_blocks(self, change: Change, found: Sequences) -> None:
        """Each block shows a change whole, or not at all."""
        per_block = self.sectors_per_block
        sectors = np.arange(change.first, change.stop)
        # Where the old and the new value are the same, the sector tells nothing.
        sectors = sectors[self._settled[sectors] != change.value]
        is_new = found[sectors] == change.value
        blocks = sectors // per_block
        mixed = (blocks[1:] == blocks[:-1]) & (is_new[1:] != is_new[:-1])
        if mixed.any():
            block = int(blocks[1:][mixed][0])
            raise Violation(
                f"volume {self.number}, block {block} is torn: write {change.value} of sectors "
                f"[{change.first}, {change.stop}) is there in part"
            )
