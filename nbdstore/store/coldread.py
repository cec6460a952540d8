"""One read on its way from the disk: what has come of it, and what is still awaited.

Owns the buffers of a read that the page cache could not serve, and the comparing of its blocks
with their checksums; how it is waited for is told in misses.py.  A read goes on where it stopped:
what was taken from the page cache once is neither copied nor verified again, so that most of a
long read is done by the time its last block comes.

On Linux a read that misses the page cache with RWF_NOWAIT starts the disk, and the kernel's
readahead, just as one that waits (mm/filemap.c, since 5.9): so looking is asking, too.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from xxhash import xxh3_64_intdigest

from nbdstore.store import layout

if TYPE_CHECKING:
    from nbdstore.store.core import Core
    from nbdstore.store.reading import Run, Segment, Stretch

_MOST_RUNS: Final = 64  # asked for on the loop: 4 us each
_SIZE_OF_FEW: Final = 65536  # up to here a bytearray, zeroed, is made sooner than an array


class Progress(enum.Enum):
    """What a look at a read found."""

    DONE = "all of it has come"
    ADVANCED = "some has come, the rest is awaited"
    AWAITED = "nothing has come since the last look"
    IN_DOUBT = "looking does not do: it must be read by the way that waits"


class ColdRead:
    """Blocks of an image that are being read.

    Arguments:
        core: of the pool.
        stretches: what is to be read, relative to the first block.
        checksums: of all blocks.
        tell: says of a block, by its number relative to the first, which one it is.

    Attributes:
        segments: the content, once it is done.
        n_bytes: how much is read.
        n_looks: how many there were of which nothing came.
        is_abandoned: nobody wants it any more.
    """

    def __init__(
        self,
        core: Core,
        stretches: Sequence[Stretch],
        checksums: Sequence[int],
        tell: Callable[[int], str],
    ) -> None:
        self._core = core
        self._size = core.block_size
        self._checksums = checksums
        self._tell = tell
        self._parts: list[tuple[memoryview, int, int]] = []  # buffer, slot, number of first block
        self._at = 0  # the part that is awaited
        self._n_taken = 0  # bytes of it that have come; its whole blocks among them are verified
        self._pin = 0
        self.segments: list[Segment] = []
        self.n_bytes = 0
        self.n_looks = 0
        self.is_abandoned = False
        for start, stop, runs in stretches:
            self._add(start, stop, runs)

    def _add(self, start: int, stop: int, runs: list[Run]) -> None:
        size = self._size
        length = (stop - start) * size
        if not runs:
            self.segments.append(length)
            return
        few = length <= _SIZE_OF_FEW
        buffer = memoryview(bytearray(length)) if few else np.empty(length, np.uint8).data
        self.segments.append(buffer)
        self.n_bytes += length
        if len(runs) == 1:
            self._parts.append((buffer, runs[0][2], start))
            return
        for first, end, slot in runs:
            part = buffer[(first - start) * size : (end - start) * size]
            self._parts.append((part, slot, first))

    def begin(self) -> None:
        """From here to :meth:`end` what is to be read stays where it is, whatever is written."""
        self._pin = self._core.journal.seq
        self._core.slots.pin(self._pin)
        if 1 < len(self._parts) <= _MOST_RUNS:
            self._ask_for_all()

    def end(self) -> None:
        """It is done, or will not be."""
        self._core.slots.unpin(self._pin)

    def _ask_for_all(self) -> None:
        """Let the device work on all parts at once."""
        for buffer, slot, _ in self._parts:
            self._core.data.will_need(slot * self._size, len(buffer))

    def look(self) -> Progress:
        """Take what has come, and verify it; never waits.

        Raises:
            ReadFailed: the disk returned an error.
        """
        size, data = self._size, self._core.data
        if len(self._parts) > _MOST_RUNS:
            return Progress.IN_DOUBT
        found = Progress.AWAITED
        while self._at < len(self._parts):
            buffer, slot, first = self._parts[self._at]
            taken = self._n_taken
            n_bytes = data.preadv_cached(buffer[taken:] if taken else buffer, slot * size + taken)
            if n_bytes == 0:
                return Progress.IN_DOUBT
            if n_bytes < 0:
                self.n_looks += found is Progress.AWAITED
                return found
            self._n_taken = taken - taken % size
            if not self._is_intact(buffer, first, self._n_taken, taken + n_bytes):
                return Progress.IN_DOUBT
            self._n_taken = taken + n_bytes
            found = Progress.ADVANCED
            if self._n_taken == len(buffer):
                self._at += 1
                self._n_taken = 0
        return Progress.DONE

    def _is_intact(self, buffer: memoryview, first: int, start: int, stop: int) -> bool:
        """Compare the whole blocks in bytes `[start, stop)` of a part; `start` is where one begins.

        Arguments:
            first: number of the part's first block.
        """
        size = self._size
        if stop == size and len(buffer) == size:
            return xxh3_64_intdigest(buffer) == self._checksums[first]
        checksums = self._checksums[first + start // size : first + stop // size]
        return layout.checksums(buffer[start : stop - stop % size], size) == checksums

    def read(self) -> None:
        """In a thread: read and verify what is missing, waiting for the disk.

        Raises:
            Corruption: a block is not what was written, even past the page cache.
            ReadFailed: the disk returned an error.
        """
        if len(self._parts) > _MOST_RUNS:
            self._ask_for_all()
        size = self._size
        for buffer, slot, first in self._parts[self._at :]:
            n_verified = self._n_taken // size
            self._n_taken = 0
            part = buffer[n_verified * size :]
            self._core.data.preadv(part, (slot + n_verified) * size)
            for number, block in enumerate(layout.split(part, size), n_verified):
                expected = self._checksums[first + number]
                if xxh3_64_intdigest(block) != expected:
                    what = self._tell(first + number)
                    block[:] = self._core.reread_block(slot + number, expected, what)
