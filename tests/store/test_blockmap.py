"""The map of a volume in memory: leaves come, change, freeze, are written, and go."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from nbdstore.store import layout
from nbdstore.store.blockmap import (
    DIRTY,
    FROZEN,
    HOLE,
    KIND,
    RESIDENT,
    STORED,
    UNIFORM,
    BlockMap,
)
from nbdstore.store.nodes import MapCounts, level_sizes
from nbdstore.store.superblock import NULL, Pointer

BLOCK = 4096
FANOUT = BLOCK // 16


class Tree:
    """A map, and the blocks of its tree as a dict: what a checkpoint does, without a pool."""

    def __init__(self, n_blocks: int, block_size: int = BLOCK) -> None:
        self.counts = MapCounts()
        self.block_size = block_size
        self.map = BlockMap(n_blocks, block_size, self.counts)
        self.stored: dict[int, bytes] = {}
        self.root: Pointer = NULL
        self.next_slot = 1

    def store(self, node: bytes) -> Pointer:
        """Write a node as a checkpoint would."""
        assert len(node) == self.block_size
        if not any(node):
            return NULL
        slot, self.next_slot = self.next_slot, self.next_slot + 1
        self.stored[slot] = node
        return layout.pack_location(slot, 1), slot * 7

    def read(self, location: int, checksum: int, _what: str) -> bytes:
        slot = location & layout.SLOT_MASK
        assert checksum == slot * 7
        return self.stored[slot]

    def free(self, *locations: int) -> None:
        """What a checkpoint replaces was there, and is not used again."""
        for location in locations:
            if location & layout.SLOT_MASK not in (layout.HOLE, layout.PROVISIONED):
                del self.stored[location & layout.SLOT_MASK]

    def load_nodes(self, leaves: np.ndarray) -> None:
        for node in self.map.nodes.missing(leaves).tolist():
            location, checksum = self.map.nodes.pointer(node)
            self.map.nodes.install(node, self.read(location, checksum, ""))

    def load(self, start: int, stop: int) -> None:
        missing = self.map.missing(start, stop)
        self.load_nodes(missing)
        for leaf, pointer in zip(
            missing.tolist(), self.map.nodes.leaf_pointers(missing), strict=True
        ):
            self.map.install(leaf, self.read(*pointer, ""))

    def checkpoint(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Write everything dirty; `meanwhile` comes between freezing and writing."""
        leaves = self.map.freeze()
        meanwhile()
        self.load_nodes(leaves)
        for leaf in leaves.tolist():
            node = self.map.frozen_leaf(leaf)
            pointer = self.store(node) if isinstance(node, bytes) else (node, 0)
            self.free(self.map.leaf_written(leaf, pointer))
        nodes = self.map.nodes
        for level in range(nodes.depth - 1):
            if not (dirty := sorted(nodes.dirty[level])):
                continue
            pointers = [self.store(nodes.node_bytes(level, node)) for node in dirty]
            self.free(*nodes.written(level, dirty, pointers))
        nodes.dirty[-1].clear()
        self.root = nodes.root

    def reopened(self) -> BlockMap:
        """A new process reads the tree that the last checkpoint wrote."""
        other = Tree(self.map.n_blocks, self.block_size)
        other.stored = self.stored
        slots = layout.slots_of(other.map.load_levels(self.root, self.read))
        assert sorted(slots.tolist()) == sorted(self.stored)  # no node is lost, none is left
        other.load(0, self.map.n_blocks)
        return other.map

    def set(self, block: int, slot: int) -> None:
        self.load(block, block + 1)
        self.map.make_writable(np.array([block], np.int64))
        self.map.entries[block] = (layout.pack_location(slot, 1) if slot else 0, slot)

    def locations(self) -> list[int]:
        self.load(0, self.map.n_blocks)
        return (self.map.locations(0, self.map.n_blocks) & layout.NP_SLOT_MASK).tolist()


def kind(tree: Tree, leaf: int) -> tuple[int, bool]:
    state = tree.map.state_bytes[leaf]
    return state & KIND, bool(state & DIRTY)


# -- shapes --------------------------------------------------------------------------------------

SHAPES = [
    (1, 256, [1, 1]),
    (256, 256, [256, 1]),
    (257, 256, [257, 2, 1]),
    (65536, 256, [65536, 256, 1]),
    (65537, 256, [65537, 257, 2, 1]),
    (4096, 4096, [4096, 1]),
    (4097, 4096, [4097, 2, 1]),
]


@pytest.mark.parametrize(("n_blocks", "fanout", "expected"), SHAPES)
def test_levels_have_an_entry_per_node_below(
    n_blocks: int, fanout: int, expected: list[int]
) -> None:
    assert level_sizes(n_blocks, fanout) == expected


@pytest.mark.parametrize("block_size", [4096, 65536])
@pytest.mark.parametrize("n_blocks", [1, 255, 256, 257, 4096, 4097, 70_000])
def test_a_new_map_is_all_holes_and_costs_nothing(block_size: int, n_blocks: int) -> None:
    tree = Tree(n_blocks, block_size)
    assert tree.locations() == [0] * n_blocks
    assert (tree.counts.n_resident, tree.counts.n_dirty, tree.counts.n_nodes) == (0, 0, 0)
    assert tree.map.nodes.root == NULL
    tree.checkpoint()
    assert not tree.stored


# -- states --------------------------------------------------------------------------------------


def test_a_leaf_goes_through_its_states() -> None:
    tree = Tree(3 * FANOUT)
    assert kind(tree, 1) == (HOLE, False)
    tree.set(FANOUT + 5, 77)
    assert kind(tree, 1) == (RESIDENT, True)
    tree.checkpoint()
    assert kind(tree, 1) == (RESIDENT, False)
    assert tree.map.evict(10) == 1
    assert kind(tree, 1) == (STORED, False)
    assert tree.map.missing(0, 3 * FANOUT).tolist() == [1]
    tree.load(FANOUT, FANOUT + 1)
    assert kind(tree, 1) == (RESIDENT, False)
    tree.map.set_provisioned(np.array([1]), 3)
    assert kind(tree, 1) == (UNIFORM, True)
    tree.checkpoint()
    assert kind(tree, 1) == (UNIFORM, False)
    tree.map.set_hole(np.array([1]))
    assert kind(tree, 1) == (HOLE, True)
    tree.checkpoint()
    assert kind(tree, 1) == (HOLE, False)
    assert not tree.stored
    assert (tree.counts.n_resident, tree.counts.n_dirty) == (0, 0)


def test_a_leaf_in_which_only_holes_are_left_is_one() -> None:
    tree = Tree(2 * FANOUT)
    tree.set(5, 77)
    tree.checkpoint()
    tree.set(5, 0)
    tree.checkpoint()
    assert kind(tree, 0) == (HOLE, False)
    assert tree.root == NULL
    assert not tree.stored
    assert tree.counts.n_resident == 0


@pytest.mark.parametrize("checkpoint", [False, True])
def test_one_block_of_a_uniform_leaf_may_change(checkpoint: bool) -> None:
    tree = Tree(2 * FANOUT)
    tree.map.set_provisioned(np.array([0, 1]), 9)
    if checkpoint:
        tree.checkpoint()
    tree.set(300, 42)
    found = tree.map.locations(0, 2 * FANOUT)
    assert int(found[300]) & layout.SLOT_MASK == 42
    assert layout.is_provisioned(found).sum() == 2 * FANOUT - 1
    assert (found[layout.is_provisioned(found)] >> layout.NP_SLOT_BITS == 9).all()
    assert kind(tree, 0) == (UNIFORM, not checkpoint)
    assert kind(tree, 1) == (RESIDENT, True)


def test_a_short_last_leaf_is_never_longer_than_the_volume() -> None:
    tree = Tree(FANOUT + 10)
    tree.map.set_provisioned(np.array([1]), 1)
    tree.set(FANOUT + 3, 5)
    tree.checkpoint()
    (leaf,) = [node for node in tree.stored.values() if b"\5" in node[:160]][:1]
    assert any(leaf[:160]) and not any(leaf[160:])


# -- freezing ------------------------------------------------------------------------------------


def test_what_changes_after_the_freeze_is_not_written_but_stays_dirty() -> None:
    tree = Tree(4 * FANOUT)
    for leaf in range(4):
        tree.set(leaf * FANOUT, 10 + leaf)

    def meanwhile() -> None:
        assert all(tree.map.state_bytes[leaf] & FROZEN for leaf in range(4))
        tree.set(0, 99)
        tree.map.set_hole(np.array([1]))
        tree.map.set_provisioned(np.array([2]), 1)

    tree.checkpoint(meanwhile)
    before = tree.reopened().locations(0, 4 * FANOUT) & layout.NP_SLOT_MASK
    assert [int(before[leaf * FANOUT]) for leaf in range(4)] == [10, 11, 12, 13]
    assert [kind(tree, leaf) for leaf in range(4)] == [
        (RESIDENT, True),
        (HOLE, True),
        (UNIFORM, True),
        (RESIDENT, False),
    ]
    assert not tree.map.frozen
    tree.checkpoint()
    after = tree.reopened().locations(0, 4 * FANOUT) & layout.NP_SLOT_MASK
    assert [int(after[leaf * FANOUT]) for leaf in range(4)] == [99, 0, layout.PROVISIONED, 13]


@pytest.mark.parametrize("before", [HOLE, UNIFORM, RESIDENT])
@pytest.mark.parametrize("after", [HOLE, UNIFORM, RESIDENT])
def test_every_kind_is_kept_as_it_was_frozen(before: int, after: int) -> None:
    tree = Tree(2 * FANOUT)
    tree.set(0, 7)
    tree.checkpoint()

    def make(kind_: int, slot: int) -> None:
        if kind_ == HOLE:
            tree.map.set_hole(np.array([0]))
        elif kind_ == UNIFORM:
            tree.map.set_provisioned(np.array([0]), slot)
        else:
            tree.set(0, slot)

    make(before, 20)
    expected = tree.locations()
    tree.checkpoint(lambda: make(after, 30))
    stored = tree.reopened().locations(0, 2 * FANOUT)
    assert (stored & layout.NP_SLOT_MASK).tolist() == expected
    expected = tree.locations()
    tree.checkpoint()
    assert (tree.reopened().locations(0, 2 * FANOUT) & layout.NP_SLOT_MASK).tolist() == expected


def test_an_abandoned_freeze_leaves_all_dirty_that_was() -> None:
    tree = Tree(4 * FANOUT)
    for leaf in range(4):
        tree.set(leaf * FANOUT, 10 + leaf)
    leaves = tree.map.freeze()
    tree.set(0, 99)  # after the freeze
    tree.free(tree.map.leaf_written(1, tree.store(tree.map.frozen_leaf(1))))  # type: ignore[arg-type]
    tree.map.abandon_freeze(leaves)
    assert [kind(tree, leaf)[1] for leaf in range(4)] == [True, False, True, True]
    assert tree.counts.n_dirty == 3
    assert not any(state & FROZEN for state in tree.map.states.tolist())
    tree.checkpoint()
    found = tree.reopened().locations(0, 4 * FANOUT) & layout.NP_SLOT_MASK
    assert [int(found[leaf * FANOUT]) for leaf in range(4)] == [99, 11, 12, 13]


# -- evicting ------------------------------------------------------------------------------------


def test_dirty_leaves_are_never_evicted() -> None:
    tree = Tree(10 * FANOUT)
    for leaf in range(10):
        tree.set(leaf * FANOUT, 1 + leaf)
    assert tree.map.evict(100) == 0
    tree.checkpoint()
    tree.set(0, 50)
    assert tree.map.evict(100) == 9
    assert tree.counts.n_resident == 1
    assert [tree.locations()[leaf * FANOUT] for leaf in range(10)] == [50, *range(2, 11)]


def test_eviction_takes_turns() -> None:
    tree = Tree(10 * FANOUT)
    for leaf in range(10):
        tree.set(leaf * FANOUT, 1 + leaf)
    tree.checkpoint()
    gone: list[set[int]] = []
    for _ in range(10):
        assert tree.map.evict(3) == 3
        gone.append(set(tree.map.missing(0, 10 * FANOUT).tolist()))
        tree.load(0, 10 * FANOUT)
    assert all(one.isdisjoint(other) for one, other in itertools.pairwise(gone))
    assert set().union(*gone) == set(range(10))


def test_nodes_of_level_1_come_and_go() -> None:
    tree = Tree(3 * FANOUT * FANOUT)
    places = [node * FANOUT * FANOUT for node in range(3)]
    for place in places:
        tree.set(place, 5)
    tree.checkpoint()
    assert tree.counts.n_nodes == 3
    tree.map.evict(10)
    assert tree.map.nodes.evict(2) == 2
    assert tree.counts.n_nodes == 1
    for place in places:
        tree.load(place, place + 1)
        assert int(tree.map.locations(place, place + 1)[0]) & layout.SLOT_MASK == 5
    assert tree.counts.n_nodes == 3
    tree.set(places[1], 0)
    tree.checkpoint()
    assert tree.counts.n_nodes == 2
    tree.reopened()


# -- resizing ------------------------------------------------------------------------------------

HEIGHTS = [1, 200, FANOUT, FANOUT + 1, FANOUT * FANOUT, FANOUT * FANOUT + 1, 300 * FANOUT * FANOUT]


@pytest.mark.parametrize("old", HEIGHTS)
@pytest.mark.parametrize("new", HEIGHTS)
@pytest.mark.parametrize("state", ["dirty", "clean", "evicted"])
def test_resizing_keeps_what_is_below_both_sizes(old: int, new: int, state: str) -> None:
    tree = Tree(old)
    kept = min(old, new)
    places = sorted({0, kept - 1, kept // 2})
    for place in places:
        tree.set(place, place + 1)
    if state != "dirty" or new < old:
        tree.checkpoint()
    if state == "evicted":
        tree.map.evict(1 << 30)
        tree.map.nodes.evict(1 << 30)
    if new < old:
        assert tree.map.ends_before(new) or state == "evicted"
    tree.load_nodes(np.zeros(1, np.int64))
    before = tree.map
    tree.map = before.resized(new)
    tree.free(*before.nodes.slots_from(tree.map.nodes.depth, 0).tolist())
    for _ in range(2):
        for place in places:
            tree.load(place, place + 1)
            assert int(tree.map.locations(place, place + 1)[0]) & layout.SLOT_MASK == place + 1
        tree.checkpoint()
        tree.reopened()
    tree.set(new - 1, 9)
    tree.checkpoint()
    assert int(tree.reopened().locations(new - 1, new)[0]) & layout.SLOT_MASK == 9
    counts = [int((tree.map.states & KIND == RESIDENT).sum()), tree.map.nodes.n_resident]
    assert [tree.counts.n_resident, tree.counts.n_nodes] == counts
    assert tree.counts.n_dirty == 0


def test_a_map_ends_where_the_last_of_its_blocks_is() -> None:
    tree = Tree(1000)
    assert tree.map.ends_before(1)
    tree.set(600, 5)
    assert tree.map.ends_before(601)
    assert not tree.map.ends_before(600)
    assert not tree.map.ends_before(300)
    tree.checkpoint()
    tree.set(600, 0)
    assert tree.map.ends_before(601)
    assert not tree.map.ends_before(300)  # level 1 points to the leaf until a checkpoint
    tree.checkpoint()
    assert tree.map.ends_before(1)
    tree.map.set_provisioned(np.array([3]), 1)
    assert not tree.map.ends_before(900)


# -- against a model -----------------------------------------------------------------------------


class MapAgainstList(RuleBasedStateMachine):
    """All of it at random; the model is a list of slots."""

    @initialize(
        n_blocks=st.sampled_from([1, 100, 256, 257, 2000, 70_000]),
        block_size=st.sampled_from([4096, 65536]),
    )
    def make(self, n_blocks: int, block_size: int) -> None:
        self.tree = Tree(n_blocks, block_size)
        self.model = np.zeros(n_blocks, np.int64)
        self.stored = self.model.copy()
        self.slot = 1 << 30

    def some_blocks(self, seed: int) -> np.ndarray:
        rng = random.Random(seed)
        n = len(self.model)
        start = rng.randrange(n)
        return np.unique([min(n - 1, start + rng.randrange(600)) for _ in range(5)])

    @rule(seed=st.integers(0, 1 << 16))
    def write(self, seed: int) -> None:
        self.change(self.some_blocks(seed))

    def change(self, blocks: np.ndarray) -> None:
        for leaf in self.tree.map.missing_of(blocks).tolist():
            self.tree.load(leaf << self.tree.map.leaf_shift, (leaf << self.tree.map.leaf_shift) + 1)
        self.tree.map.make_writable(blocks)
        slots = np.arange(self.slot, self.slot + len(blocks))
        self.slot += len(blocks)
        self.tree.map.entries[blocks, 0] = slots
        self.tree.map.entries[blocks, 1] = 1
        self.model[blocks] = slots

    @rule(seed=st.integers(0, 1 << 16), provisioned=st.booleans())
    def make_uniform(self, seed: int, provisioned: bool) -> None:
        found = self.tree.map
        leaves = np.unique(self.some_blocks(seed) >> found.leaf_shift)
        for leaf in leaves.tolist():
            self.tree.load(leaf * found.fanout, leaf * found.fanout + 1)
            self.model[leaf * found.fanout : (leaf + 1) * found.fanout] = (
                layout.PROVISIONED if provisioned else 0
            )
        if provisioned:
            found.set_provisioned(leaves, 1)
        else:
            found.set_hole(leaves)

    @rule(seed=st.one_of(st.none(), st.integers(0, 1 << 16)))
    def checkpoint(self, seed: int | None) -> None:
        self.stored = self.model.copy()
        blocks = None if seed is None else self.some_blocks(seed)
        self.tree.checkpoint(lambda: None if blocks is None else self.change(blocks))

    @rule(n=st.integers(1, 5))
    def evict(self, n: int) -> None:
        self.tree.map.evict(n)
        self.tree.map.nodes.evict(n)

    @precondition(lambda self: hasattr(self, "tree"))
    @rule()
    def reopen(self) -> None:
        found = self.tree.reopened().locations(0, len(self.model))
        assert ((found & layout.NP_SLOT_MASK) == self.stored.view(np.uint64)).all()

    @rule(n_blocks=st.sampled_from([100, 256, 257, 2000, 70_000]))
    def grow(self, n_blocks: int) -> None:
        if n_blocks > len(self.model):
            self.tree.load_nodes(np.zeros(1, np.int64))
            self.tree.map = self.tree.map.resized(n_blocks)
            self.model = np.concatenate(
                [self.model, np.zeros(n_blocks - len(self.model), np.int64)]
            )
            self.checkpoint(None)

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "tree"):
            found = self.tree.map
            counts = found.states & KIND
            assert self.tree.counts.n_resident == int((counts == RESIDENT).sum())
            assert self.tree.counts.n_dirty == int((found.states & DIRTY != 0).sum())
            known = np.repeat(counts != STORED, found.fanout)[: len(self.model)]
            for leaf in np.flatnonzero(counts != STORED).tolist()[:20]:
                start, stop = leaf * found.fanout, min((leaf + 1) * found.fanout, len(self.model))
                now = found.locations(start, stop) & layout.NP_SLOT_MASK
                assert (now == self.model[start:stop].view(np.uint64)).all()
            assert known.shape == self.model.shape


TestMapAgainstList = MapAgainstList.TestCase
TestMapAgainstList.settings = settings(deadline=None, max_examples=30, stateful_step_count=30)
