"""Writing a volume: free slots, then one journal record, then the map.

Owns the write path.  A batch of writes goes to slots that nothing reaches (one pwritev per run of
them), then one record maps them, then the map in memory is switched: nothing reachable is ever
overwritten, and what is acknowledged is with the kernel, so a killed server loses none of it.

`now` never waits: it either does the whole batch, or nothing and says what it would have waited
for; `write` waits and tries again.  Sub-block writes merge with what the block holds.  Between
the reading of that and the writing there is no await (or the block's location is compared), so
two of them on one block cannot lose each other's bytes.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from xxhash import xxh3_64_intdigest

from nbdstore.errors import NoSpace
from nbdstore.store import layout, records
from nbdstore.store.blockmap import KIND, STORED, WRITABLE
from nbdstore.store.host import Buffer
from nbdstore.store.layout import I64, U64, SlotSequence

if TYPE_CHECKING:
    from nbdstore.store.volume import Volume

_PIECE_BYTES: Final = 4 << 20  # of one waiting write: each piece is a record of its own
_HOST_POLL_S: Final = 1.0  # nobody tells us when the host's filesystem has space again
_RECORD_BYTES_PER_BLOCK: Final = 24
_FEW: Final = 24  # blocks; at 32 scalars and arrays cost the same (see _apply_few)


class Wait(enum.Enum):
    """What a write would have to wait for."""

    MAP = "leaves of the map to be read"
    DATA = "a block to be read and merged"
    JOURNAL = "a checkpoint to make room"
    SPACE = "free slots"


OldBlock = tuple[int, Buffer]
"""A block read beforehand: its location then, and what it held."""


class Writing:
    """The write path of one volume."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._core = volume.core
        self._size = volume.block_size
        self._shift = self._size.bit_length() - 1

    def now(self, writes: Sequence[tuple[int, Buffer]]) -> bool:
        """Do all of `writes` ((offset, data), in order) as one record, if that needs no waiting.

        Returns False, having done nothing, if it does.

        Raises:
            WriteFailed: the disk refused; nothing was done.
            PoolFailed: the pool has stopped.
        """
        return self.attempt(writes, {}) is None

    def attempt(
        self, writes: Sequence[tuple[int, Buffer]], old: Mapping[int, OldBlock]
    ) -> Wait | None:
        """Like :meth:`now`; return what would have to be waited for, None if all is done.

        Arguments:
            old: blocks to merge with that were read beforehand, by number.
        """
        self._core.check_alive()
        self._volume.check_there()  # here, since it may have been deleted while this waited
        size, mask, shift = self._size, self._size - 1, self._shift
        end = self._volume.info.size
        if writes and len(writes[0][1]) > size:
            first, stop = self._run_of(writes)
            if stop - first > _FEW and stop << shift <= end:
                return self._apply_run(first, stop, [data for _, data in writes])
        pending: dict[int, Buffer] = {}
        n_blocks, is_plain = 0, True
        for offset, data in writes:
            length = len(data)
            if offset + length > end:
                raise self._volume.beyond_end(offset, length)
            if offset & mask or length & mask:
                wait = self._merge(pending, offset, memoryview(data), old)
                if wait is not None:
                    return wait
                is_plain = False
            elif length == size:
                pending[offset >> shift] = data
            else:
                blocks = range(offset >> shift, (offset + length) >> shift)
                pending.update(zip(blocks, layout.split(memoryview(data), size), strict=True))
            n_blocks += length >> shift
        if len(pending) <= _FEW:
            return self._apply_few(pending) if pending else None
        if is_plain and n_blocks == len(pending):  # no block is merged, or written twice
            return self._apply(pending, [data for _, data in writes])
        return self._apply(pending, [*pending.values()])

    # -- sub-block writes -------------------------------------------------------------------

    def _merge(
        self,
        pending: dict[int, Buffer],
        offset: int,
        data: memoryview,
        old: Mapping[int, OldBlock],
    ) -> Wait | None:
        """Split an unaligned write into whole blocks, merged with what they hold."""
        size = self._size
        while data:
            block, start = offset >> self._shift, offset & (size - 1)
            part = data[: size - start]
            if len(part) == size:
                pending[block] = part
            else:
                merged = self._current(block, pending, old)
                if isinstance(merged, Wait):
                    return merged
                merged[start : start + len(part)] = part
                pending[block] = merged
            offset += len(part)
            data = data[len(part) :]
        return None

    def _current(
        self, block: int, pending: dict[int, Buffer], old: Mapping[int, OldBlock]
    ) -> bytearray | Wait:
        """Return a copy of what `block` holds, after the writes that are pending."""
        if block in pending:
            return bytearray(pending[block])
        blocks = self._volume.map
        if blocks.state_bytes[block >> blocks.leaf_shift] & KIND == STORED:
            return Wait.MAP
        if block in old and blocks.words[2 * block] == old[block][0]:
            return bytearray(old[block][1])
        found = self._volume.reading.block_now(block)
        if found is None:
            return Wait.DATA
        return bytearray(found) if isinstance(found, int) else found

    # -- whole blocks -----------------------------------------------------------------------

    def _run_of(self, writes: Sequence[tuple[int, Buffer]]) -> tuple[int, int]:
        """The blocks `[first, stop)` that `writes` fill in order; (0, 0) if they do not."""
        start = at = writes[0][0]
        mask = self._size - 1
        for offset, data in writes:
            if offset != at or (offset | len(data)) & mask:
                return 0, 0
            at += len(data)
        return start >> self._shift, at >> self._shift

    def _has_room(self, n_blocks: int) -> bool:
        """Whether the record of a write fits the journal, and what it makes dirty the memory."""
        return not self._volume.services.memory.is_crowded and self._fits_journal(
            n_blocks * _RECORD_BYTES_PER_BLOCK
        )

    def _fits_journal(self, n_bytes: int) -> bool:
        journal = self._core.journal
        return journal.room_for(n_bytes + 64, journal.size >> 3)

    def _goes_inline(self, n_blocks: int) -> bool:
        """Whether the record of a write shall have its blocks, too: see Committer.wants_inline."""
        return self._volume.services.committer.wants_inline(
            self._volume, n_blocks
        ) and self._fits_journal(n_blocks * (_RECORD_BYTES_PER_BLOCK + 8 + self._size))

    def _apply(self, pending: dict[int, Buffer], whole: list[Buffer]) -> Wait | None:
        """Write `pending`, the same bytes as `whole`: a batch of many blocks."""
        blocks_map = self._volume.map
        blocks = np.fromiter(pending, np.int64, len(pending))
        leaves = blocks >> blocks_map.leaf_shift
        if bool((blocks_map.states[leaves] & KIND == STORED).any()):
            return Wait.MAP
        if not self._has_room(len(pending)):
            return Wait.JOURNAL
        blocks_map.make_writable(blocks)
        n_leaves = int(np.count_nonzero(leaves[1:] != leaves[:-1])) + 1  # at most
        return self._put(blocks, n_leaves, [*pending.values()], whole)

    def _apply_run(self, first: int, stop: int, whole: list[Buffer]) -> Wait | None:
        """Write `whole` to blocks `[first, stop)`: as :meth:`_apply`, with less to be gathered.

        One write of 128 KiB takes 19 us, each of four in a batch 10, and the copying of it, which
        is 24 into fresh pages of the page cache, 10 where they are there (2-core VM, Python 3.11).
        """
        blocks_map = self._volume.map
        first_leaf, stop_leaf = blocks_map.leaf_range(first, stop)
        states = blocks_map.state_bytes[first_leaf:stop_leaf].tolist()
        is_writable = states.count(WRITABLE) == len(states)
        if not is_writable and STORED in [state & KIND for state in states]:
            return Wait.MAP
        if not self._has_room(stop - first):
            return Wait.JOURNAL
        if not is_writable:
            blocks_map.make_writable(np.arange(first, stop))
        views: list[Buffer] = []
        for data in whole:
            views += layout.split(memoryview(data), self._size)
        return self._put_run(first, stop, len(states), views, whole)

    def _put_run(
        self, first: int, stop: int, n_leaves: int, views: list[Buffer], whole: list[Buffer]
    ) -> Wait | None:
        """Like :meth:`_put`, to blocks `[first, stop)`, and to slots in a row if those are next."""
        core, volume, n = self._core, self._volume, stop - first
        replaced = volume.run_of_own(first, stop)
        entries = volume.map.entries[first:stop]
        old = entries[:, 0].copy()
        slot = core.take_run(n, 0 if replaced else volume.n_filling(old), n_leaves)
        if not slot:
            return self._put(np.arange(first, stop), n_leaves, views, whole)
        slots = range(slot, slot + n)
        if not self._store(slots, [(0, n)], whole):
            return Wait.SPACE
        checksums = [*map(xxh3_64_intdigest, views)]
        location = layout.pack_location(slot, volume.info.epoch)
        mapping = np.empty((n, 3), np.uint64)
        mapping[:, 0] = np.arange(first, stop)
        mapping[:, 1] = np.arange(location, location + n, dtype=np.uint64)
        mapping[:, 2] = checksums
        seq = core.append(records.map_group(volume.id, mapping))
        entries[:] = mapping[:, 1:]
        volume.services.committer.wrote(volume, seq, slots, checksums)
        if replaced:
            core.slots.free_later(np.arange(replaced, replaced + n), seq)
        else:
            volume.release(old, seq, n_mapped=n)
        return None

    def _put(
        self, blocks: I64, n_leaves: int, views: list[Buffer], whole: list[Buffer]
    ) -> Wait | None:
        """Write `views`, the same bytes as `whole`, to `blocks`, which lie in dirty leaves."""
        core, volume = self._core, self._volume
        old = volume.map.entries[blocks, 0]
        slots = core.take_slots(len(blocks), volume.n_filling(old), n_leaves)
        if slots is None:
            return Wait.SPACE
        runs = layout.runs(slots)
        if not self._store(slots, runs, whole if len(runs) == 1 else views):
            return Wait.SPACE
        self._switch(blocks, slots, [*map(xxh3_64_intdigest, views)], old)
        return None

    def _store(self, slots: SlotSequence, runs: list[tuple[int, int]], views: list[Buffer]) -> bool:
        """Write `views` to `slots`; False, with the slots given back, if the host has no space.

        There is one view for each slot, or there is only one run.
        """
        core, size = self._core, self._size
        try:
            if len(runs) == 1:
                core.data.pwritev(views, int(slots[0]) * size)
            else:
                for start, stop in runs:
                    core.data.pwritev(views[start:stop], int(slots[start]) * size)
        except BaseException as error:
            core.slots.give_back(np.array(slots, np.int64))
            if not isinstance(error, NoSpace):
                raise
            core.slots.begin_anew(core.data.held)
            core.host_full = True
            return False
        core.host_full = False
        return True

    def _switch(self, blocks: I64, slots: I64, checksums: list[int], old: U64) -> None:
        """Journal the new places of `blocks`, then switch the map and free the old places."""
        volume = self._volume
        mapping = np.empty((len(blocks), 3), np.uint64)
        mapping[:, 0] = blocks
        mapping[:, 1] = slots
        mapping[:, 1] |= np.uint64(volume.info.epoch << layout.SLOT_BITS)
        mapping[:, 2] = checksums
        seq = self._core.append(records.map_group(volume.id, mapping))
        volume.map.entries[blocks] = mapping[:, 1:]
        volume.services.committer.wrote(volume, seq, slots, checksums)
        volume.release(old, seq, n_mapped=len(blocks))

    def _apply_few(self, pending: dict[int, Buffer]) -> Wait | None:
        """Like :meth:`_apply` without arrays, each of whose small calls costs half a microsecond.

        One block takes 14 us instead of 35, 8 take 24 instead of 39, of which the two system
        calls are 5 to 8 (2-core VM, Python 3.11).
        """
        core, volume = self._core, self._volume
        blocks_map = volume.map
        words, states, leaf_shift = blocks_map.words, blocks_map.state_bytes, blocks_map.leaf_shift
        old: list[int] = []
        for block in pending:
            if states[block >> leaf_shift] != WRITABLE:
                return self._apply(pending, [*pending.values()])
            old.append(words[2 * block])
        n = len(old)
        if not self._has_room(n):
            return Wait.JOURNAL
        slots = core.take_few_slots(n, volume.n_filling_few(old))
        if slots is None:
            return Wait.SPACE
        views = [*pending.values()]
        if not self._store(slots, layout.runs_of_few(slots), views):
            return Wait.SPACE
        epoch = volume.info.epoch << layout.SLOT_BITS
        checksums = [*map(xxh3_64_intdigest, views)]
        mapping: list[int] = []
        for block, slot, checksum in zip(pending, slots, checksums, strict=True):
            mapping += (block, epoch | slot, checksum)
        groups = [records.map_group_of_few(volume.id, mapping)]
        is_inline = self._goes_inline(n)
        if is_inline:
            groups.append(records.data_group(slots, views))
        seq = core.append(*groups)
        for at in range(0, 3 * n, 3):
            block = mapping[at]
            words[2 * block], words[2 * block + 1] = mapping[at + 1], mapping[at + 2]
        volume.services.committer.wrote(volume, seq, slots, checksums, is_inline=is_inline)
        volume.release_few(old, seq)
        return None

    # -- waiting ----------------------------------------------------------------------------

    async def write(self, offset: int, data: Buffer) -> None:
        """Write `data` at byte `offset`, waiting as need be; `data` must not change meanwhile.

        Raises:
            NoSpace: the pool was full for longer than the options allow.
            WriteFailed, ReadFailed, Corruption, PoolFailed: of the disk, or of a block to merge.
        """
        view = memoryview(data)
        at = 0
        while at < len(view):
            # Pieces end at block boundaries, so that only the write's own ends are merged.
            end = min(len(view), at + _PIECE_BYTES - ((offset + at) & (self._size - 1)))
            await self._write_piece(offset + at, view[at:end])
            at = end

    async def _write_piece(self, offset: int, data: memoryview) -> None:
        first, stop = offset >> self._shift, ((offset + len(data) - 1) >> self._shift) + 1
        hold = Hold(self._volume)
        try:
            while (wait := await self._attempt(offset, data)) is not None:
                await self.wait_for(wait, hold, first, stop)
        finally:
            hold.end()

    async def wait_for(self, wait: Wait, hold: Hold, start: int, stop: int) -> None:
        """Wait for what an attempt to write to blocks `[start, stop)` would have waited for."""
        if wait is Wait.MAP:
            await self._volume.load(start, stop)
        elif wait is Wait.JOURNAL:
            await hold.wait_for_journal()
        elif wait is Wait.SPACE:
            await hold.wait_for_slots()

    async def _attempt(self, offset: int, data: memoryview) -> Wait | None:
        """Try, and once more with the blocks to merge if those must be read from the disk."""
        wait = self.attempt([(offset, data)], {})
        if wait is not Wait.DATA:
            return wait
        # While we read, the blocks may move; their locations tell, as no slot that is freed from
        # here on can come back into use before the pin ends.
        with self._core.slots.pinned(self._core.journal.seq):
            old = await self._read_ends(offset, len(data))
            return self.attempt([(offset, data)], old)

    async def _read_ends(self, offset: int, length: int) -> dict[int, OldBlock]:
        """Read the first and the last block of a write, with their locations at that time."""
        found: dict[int, OldBlock] = {}
        for block in {offset >> self._shift, (offset + length - 1) >> self._shift}:
            await self._volume.load(block, block + 1)
            self._volume.check_blocks(block, block + 1)
            location = self._volume.map.words[2 * block]
            (segment,) = await self._volume.reading.read(block << self._shift, self._size)
            found[block] = (location, bytes(segment))  # bytes(n) is n zeros
        return found


class Hold:
    """One request's wait for space, by the pool's rule: held, not failed, up to a time."""

    def __init__(self, volume: Volume) -> None:
        self._core = volume.core
        self._services = volume.services
        self._waited_s = 0.0
        self._step = 0
        self._counted = False

    async def wait_for_journal(self) -> None:
        """Wait for the checkpoint that makes room in the journal and in the map's memory.

        Raises:
            NoSpace: there is no space for it, and the rule is to wait no longer.
        """
        try:
            await self._services.checkpointer.join()
        except NoSpace:
            await self._pause()

    async def wait_for_slots(self) -> None:
        """Wait for a change that may have brought free slots.

        Raises:
            NoSpace: the rule is not to wait, or to wait no longer.
        """
        core = self._core
        while True:
            step, self._step = self._step, (self._step + 1) % 4
            if step in (0, 2) and core.slots.n_quarantined:
                # What was freed lately, or what the checkpoint replaced, may be enough.
                return await self._services.committer.settle()
            if step == 1 and core.map_counts.n_dirty:
                # What is kept for a checkpoint may be enough.
                return await self.wait_for_journal()
            if step == 3:
                return await self._pause()

    async def _pause(self) -> None:
        core = self._core
        core.check_alive()
        reclaiming = core.reclaim is not None and core.reclaim()
        limit = core.options.full_timeout_s
        if (core.options.on_full == "error" and not reclaiming) or (
            limit and self._waited_s >= limit
        ):
            raise core.no_space()
        if not self._counted:
            self._counted = True
            core.begin_hold()
        before = core.host.monotonic()
        await core.wait_for_change(min(_HOST_POLL_S, limit or _HOST_POLL_S))
        self._waited_s += core.host.monotonic() - before

    def end(self) -> None:
        """The request went on, or failed."""
        if self._counted:
            self._core.end_hold()
