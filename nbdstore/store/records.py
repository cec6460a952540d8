"""What a journal record says: the changes of one batch, as groups of numbers.

Owns the format of a record's payload; where records lie and how they are sealed is the
journal's (journal.py), what a change means to a map is the volume's and recovery's.

A payload is a sequence of groups.  A group is a header of 16 bytes - u16 op, u16 zero,
u32 volume id, u32 count, u32 length of the body in bytes - and a body padded to 8 bytes:

=========  ==============================================================================
op         body
=========  ==============================================================================
MAP        count x (u64 block, u64 location, u64 checksum): the block now lies there
CLEAR      count x (u64 start, u64 stop): blocks `[start, stop)` are holes
PROVISION  count x (u64 start, u64 stop): they read as zeros and have space set aside
DATA       count x u64 slot, then count whole blocks: what those slots hold, so that the
           journal alone makes a small flush durable; volume is 0.  It may stand in the
           record that maps them, behind that, or in a later one
ADMIN      count bytes of JSON: an object with "op" and what it needs (catalogue.py)
=========  ==============================================================================

Groups apply in order.  One record applies whole or not at all.
"""

from __future__ import annotations

import enum
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from nbdstore.errors import Corruption
from nbdstore.store.host import Buffer
from nbdstore.store.layout import U64

_GROUP: Final = struct.Struct("<HHIII")


class Op(enum.IntEnum):
    """What a group does."""

    MAP = 1
    CLEAR = 2
    PROVISION = 3
    DATA = 4
    ADMIN = 5


@dataclass(frozen=True)
class Group:
    """One group, parsed.

    Attributes:
        op, volume, count: as in the header.
        body: the bytes of the body, without padding.
    """

    op: Op
    volume: int
    count: int
    body: memoryview

    def mapping(self) -> U64:
        """The entries of a MAP group: uint64, shape (count, 3): block, location, checksum."""
        return np.frombuffer(self.body, "<u8").reshape(self.count, 3)

    def ranges(self) -> list[tuple[int, int]]:
        """The block ranges `[start, stop)` of a CLEAR or PROVISION group."""
        return [(a, b) for a, b in np.frombuffer(self.body, "<u8").reshape(self.count, 2).tolist()]

    def data(self, block_size: int) -> dict[int, memoryview]:
        """The blocks of a DATA group, by slot."""
        slots = np.frombuffer(self.body, "<u8", self.count).tolist()
        at = 8 * self.count
        return {
            slot: self.body[at + i * block_size : at + (i + 1) * block_size]
            for i, slot in enumerate(slots)
        }

    def admin(self) -> dict[str, Any]:
        """The object of an ADMIN group."""
        found = json.loads(bytes(self.body))
        assert isinstance(found, dict)  # the record's checksum says that we wrote it
        return found


def map_group(volume: int, mapping: U64) -> bytes:
    """Encode a MAP group; `mapping` is uint64, shape (n, 3): block, location, checksum."""
    body = mapping.tobytes()
    return _GROUP.pack(Op.MAP, 0, volume, len(mapping), len(body)) + body


def map_group_of_few(volume: int, mapping: Sequence[int]) -> bytes:
    """Like :func:`map_group`; `mapping` is flat: block, location, checksum, block, ..."""
    n_words = len(mapping)
    return _GROUP.pack(Op.MAP, 0, volume, n_words // 3, 8 * n_words) + struct.pack(
        f"<{n_words}Q", *mapping
    )


def range_group(op: Op, volume: int, ranges: Sequence[tuple[int, int]]) -> bytes:
    """Encode a CLEAR or PROVISION group of block ranges `[start, stop)`."""
    body = np.array(ranges, "<u8").tobytes()
    return _GROUP.pack(op, 0, volume, len(ranges), len(body)) + body


def data_group(slots: Sequence[int], blocks: Sequence[Buffer]) -> bytes:
    """Encode a DATA group: `blocks[i]` is what slot `slots[i]` holds."""
    body = b"".join([struct.pack(f"<{len(slots)}Q", *slots), *blocks])
    return _GROUP.pack(Op.DATA, 0, 0, len(blocks), len(body)) + body


def admin_group(volume: int, change: dict[str, Any]) -> bytes:
    """Encode an ADMIN group."""
    body = json.dumps(change, separators=(",", ":")).encode()
    padded = body.ljust(len(body) + -len(body) % 8, b" ")
    return _GROUP.pack(Op.ADMIN, 0, volume, len(padded), len(padded)) + padded


def parse(payload: memoryview, where: str) -> Iterator[Group]:
    """Yield the groups of `payload`, whose record's checksum was right.

    Raises:
        Corruption: the groups do not fit the payload, which only a bug of the writer explains.
    """
    at = 0
    while at < len(payload):
        if at + _GROUP.size > len(payload):
            raise Corruption(where, "a group header", f"{len(payload) - at} bytes")
        op, _, volume, count, length = _GROUP.unpack_from(payload, at)
        at += _GROUP.size
        if op not in Op.__members__.values() or at + length > len(payload):
            raise Corruption(where, "a known group within the record", f"op {op}, {length} bytes")
        yield Group(Op(op), volume, count, payload[at : at + length])
        at += length
