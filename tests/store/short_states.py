"""The states that volumes go through in a short play, and which of them a crash may leave.

The history of a volume is the list of its states.  After a crash it is in one of them, at or after
the last that was durable; if only the process died, at or after the last that was acknowledged.
A state is a size, the bytes, which blocks hold data, zeros that have space set aside, or nothing,
and what is kept with a volume.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

BLOCK: Final = 4096
FIRST: Final = 254 * BLOCK
"""The volume's first block that is used; its leaf of the map ends with block 255."""


@dataclass(frozen=True)
class State:
    """What a volume holds from its first used block on.

    Attributes:
        kinds: a letter for each block: Data, Zeros with space set aside, or a Hole.
        in_trash: it has no name; for a volume alone.
        renamed: it has its other name.
        properties: of a volume, as JSON, if it has any; of a snapshot that was received, its uuid.
    """

    size: int
    kinds: str
    content: bytes
    in_trash: bool = False
    renamed: bool = False
    properties: str = ""

    @property
    def start(self) -> int:
        return FIRST if self.size > FIRST else 0

    def written(self, offset: int, data: bytes) -> State:
        """After a write of bytes `[offset, ...)` of the volume."""
        at = offset - self.start
        content = self.content[:at] + data + self.content[at + len(data) :]
        return replace(self, content=content, kinds=self._marked("D", at, len(data)))

    def cleared(self, offset: int, length: int, kind: str = "H") -> State:
        """After whole blocks became holes, or zeros with space set aside."""
        at = offset - self.start
        content = self.content[:at] + bytes(length) + self.content[at + length :]
        return replace(self, content=content, kinds=self._marked(kind, at, length))

    def merged(self, offset: int, length: int) -> State:
        """After a part of a block was zeroed, which is a write where there is data."""
        if self.kinds[(offset - self.start) // BLOCK] != "D":
            return self
        return self.written(offset, bytes(length))

    def resized(self, size: int) -> State:
        n_blocks = (size - self.start) // BLOCK
        content = self.content[: size - self.start].ljust(size - self.start, b"\0")
        kinds = self.kinds[:n_blocks].ljust(n_blocks, "H")
        return replace(self, size=size, kinds=kinds, content=content)

    def held(self) -> State:
        """What a snapshot of it holds, and a clone of that."""
        return State(self.size, self.kinds, self.content)

    def holding(self, other: State) -> State:
        """The same volume with what `other` holds."""
        return replace(self, size=other.size, kinds=other.kinds, content=other.content)

    def _marked(self, kind: str, at: int, length: int) -> str:
        first, stop = at // BLOCK, -(-(at + length) // BLOCK)
        return self.kinds[:first] + kind * (stop - first) + self.kinds[stop:]


@dataclass
class History:
    """The states of one volume in their order; None = there is no such volume.

    Attributes:
        n_acknowledged, n_durable: the states before these are over, whoever dies.
    """

    states: list[State | None]
    n_acknowledged: int = 0
    n_durable: int = 0

    @property
    def now(self) -> State | None:
        return self.states[-1]

    def acknowledge(self) -> None:
        self.n_acknowledged = len(self.states) - 1

    def flushed(self) -> None:
        self.n_durable = self.n_acknowledged


Found = dict[str, State]

Known = dict[str, tuple[list[State | None], int, int]]
"""What the user of a pool knew at a moment: of each volume, the fields of its history."""


def told(properties: Mapping[str, Any]) -> str:
    """Properties, as a state tells them."""
    return json.dumps(properties, sort_keys=True) if properties else ""


def judge(found: Found, known: Known, *, killed: bool) -> None:
    """Assert that each volume is in a state that it may be in."""
    for name, (states, n_acknowledged, n_durable) in known.items():
        allowed = states[n_acknowledged if killed else n_durable :]
        assert found.get(name) in allowed, (
            f"volume {name}: {_told(found.get(name))} is none of {[*map(_told, allowed)]}"
        )


def _told(state: State | None) -> str:
    if state is None:
        return "none"
    runs = [(bytes([b]), len([*g])) for b, g in itertools.groupby(state.content)]
    where = (" in the trash" if state.in_trash else "") + (" renamed" if state.renamed else "")
    return f"{state.kinds} {runs}{where} {state.properties}"
