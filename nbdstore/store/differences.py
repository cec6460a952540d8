"""Where images differ: what changed between two of them, and what one holds alone.

Owns the walk over two or more trees at once.  It descends only where their pointers differ: equal
locations are the same block, whatever is above them, since what a snapshot holds is not used anew
while it exists.  So the cost goes with what has changed, not with what there is; it is done in
slices, with the event loop let in between.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from nbdstore.store import layout
from nbdstore.store.blockmap import DIRTY, HOLE, KIND, RESIDENT, STORED, BlockMap, Leaves
from nbdstore.store.layout import I64, U64, Bools
from nbdstore.store.slotset import SlotSet

if TYPE_CHECKING:
    from nbdstore.store.image import Image
    from nbdstore.store.snapshot import Snapshot

_SLICE_LEAVES: Final = 64  # 16384 entries each, about 1 ms
_SLICE_NODES: Final = 64  # of level 1, 16384 pointers each


@dataclass(frozen=True, slots=True)
class Change:
    """Bytes `[offset, offset + length)` that are not the same any more.

    Attributes:
        is_data: the newer image holds data there, not zeros.
    """

    offset: int
    length: int
    is_data: bool


async def unlike_leaves(
    image: Image,
    others: Sequence[Image],
    first: int = 0,
    stop: int | None = None,
    *,
    born_after: int | None = None,
) -> AsyncIterator[Leaves]:
    """Yield the leaves in `[first, stop)` that `image` has alone, in slices, ascending.

    A leaf that changed in the memory of one of `others` since its last checkpoint counts as
    unlike there.  When a slice is yielded, the pointers to its leaves are in memory, in all.

    Arguments:
        born_after: leave out what a checkpoint has written up to that epoch, and holes: no block
            that was born later is there.  The image has to be one that does not change.
    """
    at, end = first, image.map.n_leaves if stop is None else min(stop, image.map.n_leaves)
    shift = image.map.nodes.shift
    while at < end:
        node_stop = min(-(-end >> shift), (at >> shift) + _SLICE_NODES)
        nodes = _nodes_alone(image, others, at >> shift, node_stop)
        if born_after is not None and image.map.nodes.depth > 1:
            born = image.map.nodes.locations(1, nodes)
            nodes = nodes[layout.holds_slot_of_after(born, born_after)]
        for node in nodes.tolist():
            low, high = max(node << shift, at), min((node + 1) << shift, end)
            await _load_nodes([image, *others], np.arange(low, high))
            found = _leaves_alone(image, others, low, high)
            if born_after is not None:
                born = image.map.nodes.locations(0, found)
                found = found[layout.holds_slot_of_after(born, born_after)]
            for part in range(0, len(found), _SLICE_LEAVES):
                chosen = found[part : part + _SLICE_LEAVES]
                await _load_nodes([image, *others], chosen)
                yield chosen
        at = node_stop << shift
        await image.core.host.sleep(0)


async def _load_nodes(images: Sequence[Image], leaves: Leaves) -> None:
    """Return with the pointers to `leaves` in memory in all `images`, and no await after that."""
    while missing := [image for image in images if len(_missing_nodes(image.map, leaves))]:
        for image in missing:
            await _load_nodes_of(image, leaves[leaves < image.map.n_leaves])


async def _load_nodes_of(image: Image, leaves: Leaves) -> None:
    await image.services.memory.load_nodes(image.current_map, leaves, image.name)


def _missing_nodes(blocks: BlockMap, leaves: Leaves) -> I64:
    return blocks.nodes.missing(leaves[leaves < blocks.n_leaves])


def _nodes_alone(image: Image, others: Sequence[Image], first: int, stop: int) -> I64:
    """The nodes of level 1 in `[first, stop)` that none of `others` may have, not empty ones."""
    shift = image.map.nodes.shift
    nodes = np.arange(first, stop)
    for other in others:
        nodes = nodes[_nodes_unlike(image.map, other.map, nodes)]
    if not others:
        used = np.flatnonzero(image.map.states[first << shift : stop << shift])
        nodes = np.unique(used >> shift) + first
    return nodes


def _leaves_alone(image: Image, others: Sequence[Image], first: int, stop: int) -> Leaves:
    """The leaves in `[first, stop)` that none of `others` may have, not empty ones."""
    leaves = np.arange(first, min(stop, image.map.n_leaves))  # it may have been shrunk
    for other in others:
        leaves = leaves[_leaves_unlike(image.map, other.map, leaves)]
    if not others:
        leaves = leaves[image.map.states[first:stop] != HOLE]
    return leaves


def _nodes_unlike(blocks: BlockMap, other: BlockMap, nodes: I64) -> Bools:
    """Tell of which of `nodes` (of level 1, ascending) the two may not have the same."""
    if not len(nodes):
        return np.zeros(0, np.bool_)
    mine, theirs = blocks.nodes.locations(1, nodes), other.nodes.locations(1, nodes)
    unlike: Bools = mine != theirs
    if blocks.nodes.depth == 1 or other.nodes.depth == 1:
        unlike[:] = True  # there is nothing above the leaves to compare
    for changed in (blocks, other):
        unlike |= np.isin(nodes, np.fromiter(changed.nodes.dirty[0], np.int64))
        if changed.n_dirty:
            shift = changed.nodes.shift
            first, stop = int(nodes[0]) << shift, (int(nodes[-1]) + 1) << shift
            dirty = np.flatnonzero(changed.states[first:stop] & DIRTY) + first
            unlike |= np.isin(nodes, dirty >> shift)
    return unlike


def _leaves_unlike(blocks: BlockMap, other: BlockMap, leaves: Leaves) -> Bools:
    """Tell of which of `leaves` the two may not have the same; their nodes are in memory."""
    unlike: Bools = blocks.nodes.locations(0, leaves) != other.nodes.locations(0, leaves)
    for changed in (blocks, other):
        inside = leaves < changed.n_leaves
        unlike[inside] |= changed.states[leaves[inside]] & DIRTY != 0
    return unlike


# -- what a snapshot holds alone --------------------------------------------------------------


async def blocks_alone(snapshot: Snapshot, heirs: Sequence[Image]) -> AsyncIterator[I64]:
    """Yield the slots of the blocks that only `snapshot` holds: what deleting it would free.

    A block that an heir did not hold when it was looked at, it will never hold again, unless it is
    rolled back.  So what its heirs give up meanwhile, and this may have yielded or not, is all that
    there is beside.

    Arguments:
        heirs: what continues from it.

    Raises:
        Corruption, ReadFailed: of a leaf or node.
    """
    core, memory, floor = snapshot.core, snapshot.services.memory, snapshot.kept_epoch
    async for leaves in unlike_leaves(snapshot, heirs, born_after=floor):
        # All is looked at without an await, then read; until then no leaf is overwritten.
        mine = _pointers(snapshot.map, leaves)
        looked = [_look(heir.map, leaves) for heir in heirs]
        with core.slots.pinned(core.journal.seq):
            held = await memory.read_leaves(mine, f"map of {snapshot.name}, leaf")
            alone = layout.holds_slot_of_after(held, floor)
            for heir, (theirs, stored) in zip(heirs, looked, strict=True):
                on_disk = await memory.read_leaves(stored, f"map of {heir.name}, leaf")
                alone &= (held != theirs) & (held != on_disk)
        yield layout.slots_of(held[alone])
        await core.host.sleep(0)


async def find_dead_nodes(snapshot: Snapshot, heirs: Sequence[Image], dead: SlotSet) -> None:
    """Add to `dead` the slots of the nodes that only `snapshot` has.

    Arguments:
        heirs: what continues from it.  Their trees are looked at as they are on disk, where no
            node may change meanwhile.

    Raises:
        Corruption, ReadFailed: of a node.
    """
    floor = snapshot.kept_epoch
    async for leaves in unlike_leaves(snapshot, heirs, born_after=floor):
        mine = _pointers(snapshot.map, leaves)[:, 0]
        alone = layout.holds_slot_of_after(mine, floor)
        for heir in heirs:
            alone &= mine != _pointers(heir.map, leaves)[:, 0]
        dead.add(layout.slots_of(mine[alone]))
    dead.add(snapshot.map.nodes.slots_unlike([heir.map.nodes for heir in heirs], floor))


def _pointers(blocks: BlockMap, leaves: Leaves) -> U64:
    """The entries of `leaves`, uint64, shape (n, 2); 0 where the map has no such leaf."""
    found = np.zeros((len(leaves), 2), np.uint64)
    inside = leaves < blocks.n_leaves
    found[inside] = blocks.nodes.levels[0][leaves[inside]]
    return found


def _look(blocks: BlockMap, leaves: Leaves) -> tuple[U64, U64]:
    """What `leaves` hold now, whose nodes are in memory.

    Returns the locations in those that are in memory, uint64, shape (n, fanout), and the entries
    of those that are not, shape (n, 2); 0 for what is in the other one, or nowhere.
    """
    locations = np.zeros((len(leaves), blocks.fanout), np.uint64)
    kinds = np.zeros(len(leaves), np.uint8)
    inside = leaves < blocks.n_leaves
    kinds[inside] = blocks.states[leaves[inside]] & KIND
    resident = kinds == RESIDENT
    entries = blocks.entries.reshape(-1, blocks.fanout, 2)
    locations[resident] = entries[leaves[resident], :, 0]
    pointers = _pointers(blocks, leaves)
    pointers[kinds != STORED] = 0
    return locations, pointers


async def current_locations(image: Image, leaves: Leaves) -> U64:
    """The locations in `leaves` now: uint64, shape (n, fanout), 0 beyond the image's end."""
    fanout = image.map.fanout
    found = np.zeros((len(leaves), fanout), np.uint64)
    for start, stop in layout.runs(leaves):
        first = int(leaves[start]) * fanout
        last = min(first + (stop - start) * fanout, image.map.n_blocks)
        if first < last:
            await image.load(first, last)
            last = min(last, image.map.n_blocks)  # it may have been shrunk
        if first < last:
            found[start:stop].reshape(-1)[: last - first] = image.map.locations(first, last)
    return found


# -- what changed -----------------------------------------------------------------------------


async def changes(
    older: Image | None, newer: Image, offset: int = 0, length: int | None = None
) -> AsyncIterator[Change]:
    """Yield what is not the same in `newer` as in `older`, ascending, adjacent ones merged.

    Holes, zeros with space set aside, and what lies beyond the end of `older` are the same: zeros.

    Arguments:
        older: None = an empty one, so that all that `newer` holds has changed.
        offset, length: bytes of `newer` to look at; None = up to its end.

    Raises:
        NotFound: one of them was deleted.
        Corruption, ReadFailed: of a leaf or node.
    """
    others = [] if older is None else [older]
    images = [newer, *others]
    for image in images:
        await image.open()
    end = newer.size if length is None else offset + length
    size = newer.block_size
    last: Change | None = None
    leaf_bytes = newer.map.fanout * size
    async for leaves in unlike_leaves(newer, others, offset // leaf_bytes, -(-end // leaf_bytes)):
        now = await current_locations(newer, leaves)
        before = np.zeros_like(now)
        for other in others:
            before = await current_locations(other, leaves)
        _check_there(images)
        for start, stop, is_data in _runs_unlike(leaves, _content(before), _content(now)):
            low, high = max(start * size, offset), min(stop * size, end)
            if low >= high:
                continue
            if last and last.offset + last.length == low and last.is_data == is_data:
                last = Change(last.offset, high - last.offset, is_data)
                continue
            if last:
                yield last
            last = Change(low, high - low, is_data)
    _check_there(images)
    if last:
        yield last


def _check_there(images: Sequence[Image]) -> None:
    """Raise NotFound if one was deleted: it is being emptied, and what it held is not told."""
    for image in images:
        image.check_there()


def _content(locations: U64) -> U64:
    """Locations, with 0 for all that reads as zeros."""
    return np.where(layout.is_provisioned(locations), np.uint64(0), locations)


def _runs_unlike(leaves: Leaves, before: U64, now: U64) -> list[tuple[int, int, bool]]:
    """The runs `(start, stop, is_data)` of blocks whose locations are not the same."""
    fanout = now.shape[1]
    kinds = ((before != now) * (1 + (now != 0))).astype(np.int8)  # 0 same, 1 zeros now, 2 data now
    found: list[tuple[int, int, bool]] = []
    for leaf, row in zip(leaves.tolist(), kinds, strict=True):
        cuts = (np.flatnonzero(np.diff(row)) + 1).tolist()
        for start, stop in itertools.pairwise([0, *cuts, fanout]):
            if row[start]:
                base = leaf * fanout
                found.append((base + start, base + stop, bool(row[start] == 2)))
    return found
