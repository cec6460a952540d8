"""Where everything lies in a pool's files: a second, simple reader of the format.

Owns nothing of the store: it follows pointers from the superblock by what the format's docstrings
say, so that a test can damage a chosen structure, and that the format is read twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from nbdstore.store.layout import LOST, PROVISIONED, SLOT_MASK
from nbdstore.store.superblock import COPY_SIZE, Superblock, decode

Entry = tuple[int, int]


@dataclass(frozen=True)
class Place:
    """A block of the data file.

    Attributes:
        kind: "data", "leaf", "node", "catalogue", "catalogue node", "free map", "free map node".
        volume, number: whose it is, snapshots' among them, which share places with their volumes;
            the number counts blocks, leaves or nodes.
        depth: of a node: levels above the leaves, from 1.
        copy: of the catalogue: 0 or 1.
    """

    kind: str
    slot: int
    volume: str = ""
    number: int = 0
    depth: int = 0
    copy: int = 0


class Anatomy:
    """All blocks that are reachable from the newest superblock; journal not looked at."""

    def __init__(
        self, files: Path | Mapping[str, bytes | bytearray], *, journal_live: bool = False
    ) -> None:
        """Read a pool: its directory, or its files by name.

        Arguments:
            journal_live: what the journal says may have freed blocks, and given others their slots.
        """
        self._journal_live = journal_live
        if isinstance(files, Path):
            files = {name: (files / name).read_bytes() for name in ("super", "data")}
        raw = bytes(files["super"])
        copies = [decode(raw[at : at + COPY_SIZE], "super") for at in (0, COPY_SIZE)]
        self.superblock: Superblock = max(copies, key=lambda s: s.generation)
        self.block_size = self.superblock.block_size
        self._data = bytes(files["data"])
        self.places: list[Place] = []
        self.catalogue = self._read_catalogue()
        self._read_free_map()
        names = {volume["id"]: volume["name"] for volume in self.catalogue["volumes"]}
        for volume in self.catalogue["volumes"]:
            self._read_image(volume, volume["name"])
        for snapshot in self.catalogue["snapshots"]:
            self._read_image(snapshot, f"{names[snapshot['volume']]}@{snapshot['name']}")

    def of_kind(self, kind: str) -> list[Place]:
        return [place for place in self.places if place.kind == kind]

    # -- following pointers -----------------------------------------------------------------

    def _block(self, entry: Entry) -> bytes:
        slot = entry[0] & SLOT_MASK
        raw = self._data[slot * self.block_size : (slot + 1) * self.block_size]
        assert xxhash.xxh3_64_intdigest(raw) == entry[1], f"slot {slot}"
        return raw

    def _is_there(self, entry: Entry) -> bool:
        try:
            self._block(entry)
        except AssertionError:
            if not self._journal_live:
                raise
            return False
        return True

    def _entries(self, raw: bytes) -> list[Entry]:
        return [(a, b) for a, b in np.frombuffer(raw, "<u8").reshape(-1, 2).tolist()]

    def _heights(self, n_leaves: int) -> int:
        """Levels of nodes above `n_leaves` blocks, at least one."""
        fanout, depth = self.block_size // 16, 1
        while n_leaves > fanout:
            n_leaves = -(-n_leaves // fanout)
            depth += 1
        return depth

    def _below(self, root: Entry, depth: int, place: Place) -> Iterator[tuple[int, Entry]]:
        """Yield (number, entry) of what hangs below `depth` levels of nodes."""
        nodes = [(0, root)] if root[0] & SLOT_MASK not in (0, LOST) else []
        for level in range(depth, 0, -1):
            below: list[tuple[int, Entry]] = []
            for number, entry in nodes:
                slot = entry[0] & SLOT_MASK
                self.places.append(
                    Place(f"{place.kind}node", slot, place.volume, number, level, place.copy)
                )
                found = self._entries(self._block(entry))
                first = number * len(found)
                below += [
                    (first + i, e) for i, e in enumerate(found) if e[0] & SLOT_MASK not in (0, LOST)
                ]
            nodes = below
        yield from nodes

    def _read_catalogue(self) -> dict[str, Any]:
        n_bytes = self.superblock.catalogue_bytes
        n_blocks = -(-n_bytes // self.block_size)
        depth = self._heights(2 * n_blocks)
        copies: list[bytes] = []
        for copy, root in enumerate((self.superblock.catalogue, self.superblock.catalogue_copy)):
            raw = b""
            for number, entry in self._below(root, depth, Place("catalogue ", 0, copy=copy)):
                if number >= n_blocks:
                    continue  # the other copy's
                slot = entry[0] & SLOT_MASK
                self.places.append(Place("catalogue", slot, number=number, copy=copy))
                raw += self._block(entry)
            copies.append(raw)
        assert copies[0] == copies[1]
        found: dict[str, Any] = json.loads(copies[0][:n_bytes])
        return found

    def _read_free_map(self) -> None:
        n_blocks = -(-self.superblock.n_slots // (8 * self.block_size))
        depth = self._heights(n_blocks)
        for number, entry in self._below(self.superblock.free_map, depth, Place("free map ", 0)):
            self.places.append(Place("free map", entry[0] & SLOT_MASK, number=number))
            self._block(entry)

    def _read_image(self, volume: dict[str, Any], name: str) -> None:
        fanout = self.block_size // 16
        n_leaves = -(-volume["size"] // (fanout * self.block_size))
        location, checksum = (int(word, 16) for word in volume["root"])
        depth = self._heights(n_leaves) if n_leaves > 1 else 0
        for leaf, entry in self._below((location, checksum), depth, Place("", 0, name)):
            if entry[0] & SLOT_MASK == PROVISIONED:
                continue
            self.places.append(Place("leaf", entry[0] & SLOT_MASK, name, leaf))
            for index, block in enumerate(self._entries(self._block(entry))):
                slot = block[0] & SLOT_MASK
                if slot not in (0, LOST, PROVISIONED) and self._is_there(block):
                    self.places.append(Place("data", slot, name, leaf * fanout + index))
