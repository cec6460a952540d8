"""Which sequences of operations are tried: all short ones of some, and what matters of the others.

Owns the whole table of operations, and the choice.  All sequences of what one does to data, volumes
and snapshots are tried (short_plays.py's), up to three.  What an administrator does beside
(short_administration.py's) and what is received (short_receives.py's) is tried alone in each pool,
in the pool that is `used` before and after each single operation, and in sequences of three with
those of its family and the few that change what a record of it in the journal, or its place in a
checkpoint, meets: `NEAR`.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Collection, Iterator
from typing import Final

from tests.store.short_administration import ADMINISTRATION
from tests.store.short_plays import OPERATIONS, Play, Sequence
from tests.store.short_receives import RECEIVES

ALL: Final[dict[str, Callable[[Play], Awaitable[None]]]] = OPERATIONS | ADMINISTRATION | RECEIVES


# -- what makes sense --------------------------------------------------------------------------

BASES: Final[dict[str, set[str]]] = {
    "fresh": {"v"},
    "used": {"v", "w"},
    "snapped": {"v", "w", "v@s", "w@s", "c", "shared"},
}
"""Where a play begins, and what is there.

"shared" is what a clone shares with its origin, "trash" says that w is in it, "lease" that v had
one, "half" that r is half received.
"""

NEEDS: Final[dict[str, tuple[set[str], set[str]]]] = {
    "create": (set(), {"w"}),
    "delete": ({"w"}, set()),
    "trash": ({"w"}, {"trash"}),
    "restore": ({"trash"}, set()),
    "expire": ({"trash"}, set()),
    "snapshot": (set(), {"v@s", "w@s"}),
    "drop": ({"v@s"}, {"shared"}),
    "clone": ({"v@s"}, {"c"}),
    "unclone": ({"c"}, set()),
    "flatten": ({"c", "shared"}, set()),
    "rollback": ({"v@s"}, set()),
    "send": ({"v@s"}, set()),
    "break": ({"lease"}, set()),
    "receive": (set(), {"r@b"}),
    "receive-part": (set(), {"r@b"}),
    "resume": ({"half"}, set()),
    "abort": ({"half"}, set()),
}
"""What must be there before an operation, and what must not."""

SIZES: Final = {"shrink": 1, "shrink-beside": 1, "grow": 6, "grow-beside": 6}
"""Blocks that the first volume has afterwards, beginning with the first that is used."""


def makes_sense(base: str, sequence: Sequence) -> bool:
    """Tell whether each operation can be done, and does something."""
    there, n_blocks = set(BASES[base]), 4
    n_blocks_then = n_blocks
    for name in sequence:
        if not can_be_done(name, there):
            return False
        if name in SIZES:
            if n_blocks == SIZES[name]:
                return False
            n_blocks = SIZES[name]
        if n_blocks == 1 and name in ("write", "part", "across"):
            return False  # beyond the end
        if name == "snapshot":
            n_blocks_then = n_blocks
        elif name == "rollback":
            n_blocks = n_blocks_then
        _after(name, there)
    return True


def can_be_done(name: str, there: set[str]) -> bool:
    """Tell whether an operation can be done when what is `there` is there."""
    needed, hindering = NEEDS.get(name, (set(), set()))
    return needed <= there and not hindering & there


def _after(name: str, there: set[str]) -> None:
    """Note what is there after an operation."""
    if name == "snapshot":
        volumes = {"v"} if "trash" in there else there & {"v", "w"}
        there |= {f"{volume}@s" for volume in volumes}
    received = {"r@b" if "r@a" in there else "r@a"}
    come = {"create": {"w"}, "trash": {"trash"}, "clone": {"c", "shared"}, "lease": {"lease"}}
    come |= {"receive": received, "resume": received, "receive-part": {"half"}}
    there |= come.get(name, set())
    gone = {"delete": {"w", "w@s", "trash"}, "expire": {"w", "w@s", "trash"}, "restore": {"trash"}}
    gone |= {"drop": {"v@s"}, "unclone": {"c", "shared"}, "flatten": {"shared"}}
    gone |= {"break": {"lease"}, "receive": {"half"}, "resume": {"half"}, "abort": {"half"}}
    there -= gone.get(name, set())


# -- what is tried -----------------------------------------------------------------------------

NEAR: Final = ("write", "checkpoint", "kill", "snapshot", "trash")
FAMILIES: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("used", ("rename", "limit", "lease", "break")),
    ("used", ("scrub", "scrub-part")),
    ("used", ("enlarge",)),
    ("used", ("shrink-beside", "grow-beside")),
    ("used", ("send",)),
    ("used", tuple(RECEIVES)),
    ("snapped", ("expire",)),
)
"""The operations that are not tried in all sequences: where they begin, and with each other."""
RESTRICTED: Final = {name for _, family in FAMILIES for name in family}
assert ALL.keys() - OPERATIONS.keys() == RESTRICTED


def _candidates(base: str, length: int) -> Iterator[Sequence]:
    """The sequences of `length` that are tried if they make sense, each once."""
    yield from itertools.product(OPERATIONS, repeat=length)
    tables = [(*NEAR, *family) for begins, family in FAMILIES if begins == base]
    if length == 1 or (length, base) == (2, "used"):
        tables = [tuple(ALL)]
    for table in tables:
        for sequence in itertools.product(table, repeat=length):
            if not RESTRICTED.isdisjoint(sequence):
                yield sequence


def sequences(
    length: int, share: tuple[int, int] = (0, 1), having: Collection[str] = ()
) -> list[tuple[str, Sequence]]:
    """All sequences of `length` that are tried, or every n-th, from the i-th on.

    Arguments:
        having: only those with one of these operations; empty = all.
    """
    found = [
        (base, sequence)
        for base in BASES
        for sequence in _candidates(base, length)
        if (not having or not set(having).isdisjoint(sequence)) and makes_sense(base, sequence)
    ]
    return found[share[0] :: share[1]]
