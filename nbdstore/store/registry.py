"""The volumes of an open pool, and what each administrative change does to them.

Owns the tables by id and by name.  The same code applies a change when it is made and when
recovery finds it in the journal, so that both end in the same state.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nbdstore.store.blockmap import BlockMap
from nbdstore.store.catalogue import VolumeInfo
from nbdstore.store.image import Services
from nbdstore.store.mapmemory import load_nodes_now
from nbdstore.store.volume import Volume


class Registry:
    """All volumes of one pool.

    Attributes:
        by_id: all of them, the deleted ones that are not empty yet included.
        by_name: those that have a name.
    """

    def __init__(self) -> None:
        self.by_id: dict[int, Volume] = {}
        self.by_name: dict[str, Volume] = {}

    def add(self, services: Services, info: VolumeInfo, blocks: BlockMap) -> Volume:
        """Take up a volume that exists."""
        volume = Volume(services, info, blocks)
        self.by_id[info.id] = volume
        if not info.deleted:
            self.by_name[info.name] = volume
        services.memory.register(info.id, lambda: volume.map)
        return volume

    def apply(self, services: Services, volume_id: int, change: dict[str, Any], seq: int) -> None:
        """Do what the ADMIN group `change` of record `seq` says."""
        op = change["op"]
        if op == "grow":
            services.core.slots.grow(change["n_slots"])
            return
        if op == "create":
            info = VolumeInfo.from_json(change["volume"])
            services.checkpointer.next_id = max(services.checkpointer.next_id, info.id + 1)
            n_blocks = -(-info.size // services.core.block_size)
            blocks = BlockMap(n_blocks, services.core.block_size, services.memory.counts)
            self.add(services, info, blocks)
        else:
            self._change(services, self.by_id[volume_id], op, change)
        if volume_id in self.by_id:
            self.by_id[volume_id].last_seq = seq

    def _change(self, services: Services, volume: Volume, op: str, change: dict[str, Any]) -> None:
        info = volume.info
        if op == "resize":
            _resize(volume, change["size"])
        elif op == "rename":
            del self.by_name[info.name]
            info.name = change["name"]
            self.by_name[info.name] = volume
        elif op == "properties":
            info.properties = change["properties"]
        elif op == "delete":
            info.deleted = True
            del self.by_name[info.name]
        elif op == "remove":
            volume.map.retire()
            del self.by_id[info.id]
            services.committer.forget(volume)
            services.memory.unregister(info.id)
        else:
            raise AssertionError(f"journal: unknown change {op!r} of a known format version")


def _resize(volume: Volume, size: int) -> None:
    """Give the volume a map for `size` bytes; what lies beyond is holes already."""
    old = volume.map
    n_blocks = -(-size // volume.block_size)
    volume.info.size = size
    if n_blocks == old.n_blocks:
        return
    # If one leaf is left, its pointer becomes the root.
    load_nodes_now(volume.core, old, np.zeros(1, np.int64), volume.name)
    volume.map = old.resized(n_blocks)
    volume.services.checkpointer.drop(old.nodes.slots_from(volume.map.nodes.depth))
