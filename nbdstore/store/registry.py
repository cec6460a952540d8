"""The volumes and snapshots of an open pool, and what each administrative change does to them.

Owns the tables by id and by name, and what continues from what.  The same code applies a change
when it is made and when recovery finds it in the journal, so that both end in the same state.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from nbdstore.store.blockmap import BlockMap
from nbdstore.store.catalogue import SnapshotInfo, VolumeInfo
from nbdstore.store.image import Image, Services
from nbdstore.store.mapmemory import load_map_now, load_nodes_now
from nbdstore.store.snapshot import Snapshot
from nbdstore.store.volume import Volume


class Registry:
    """All volumes and snapshots of one pool.

    Attributes:
        by_id: all volumes, those in the trash and the deleted ones that are not empty yet included.
        by_name: those that have a name.
        snapshots: all snapshots, by id.
        epochs: the epochs of all snapshots, by id; 0 for snapshot 0, which is none.  A volume is
            added after the epoch of what it continues from, a snapshot after its volume.
    """

    def __init__(self) -> None:
        self.by_id: dict[int, Volume] = {}
        self.by_name: dict[str, Volume] = {}
        self.snapshots: dict[int, Snapshot] = {}
        self.epochs = {0: 0}

    def add(self, services: Services, info: VolumeInfo, blocks: BlockMap) -> Volume:
        """Take up a volume that exists."""
        volume = Volume(services, info, blocks)
        volume.kept_epoch = self.epochs[info.parent]
        self.by_id[info.id] = volume
        if not info.deleted and not info.trashed:
            self.by_name[info.name] = volume
        services.memory.register(info.id, lambda: volume.map)
        services.core.slots.n_set_aside += info.n_provisioned
        return volume

    # -- snapshots --------------------------------------------------------------------------

    def add_snapshot(self, services: Services, info: SnapshotInfo) -> Snapshot:
        """Take up a snapshot that exists."""
        volume = self.by_id[info.volume]
        snapshot = Snapshot(services, info, volume)
        volume.snapshots[info.name] = snapshot
        snapshot.kept_epoch = self.epochs[info.parent]
        self.snapshots[info.id] = snapshot
        self.epochs[info.id] = info.epoch
        return snapshot

    def remove_snapshot(self, snapshot: Snapshot) -> None:
        """Forget a snapshot that exists no more; what continued from it does from its parent."""
        for heir in self.heirs(snapshot):
            heir.info.parent = snapshot.info.parent
            heir.kept_epoch = snapshot.kept_epoch
        del self.snapshots[snapshot.id], self.epochs[snapshot.id]
        del snapshot.volume.snapshots[snapshot.info.name]
        snapshot.removed()

    def heirs(self, snapshot: Snapshot) -> list[Image]:
        """What continues from `snapshot`: snapshots and volumes, deleted ones included."""
        images: list[Image] = [*self.snapshots.values(), *self.by_id.values()]
        return [image for image in images if image.info.parent == snapshot.id]

    def origin(self, volume: Volume) -> Snapshot | None:
        """The snapshot of another volume that a clone began as; None for what is no clone."""
        parent = volume.info.parent
        while parent:
            snapshot = self.snapshots[parent]
            if snapshot.volume is not volume:
                return snapshot
            parent = snapshot.info.parent
        return None

    # -- changes ----------------------------------------------------------------------------

    def apply(
        self,
        services: Services,
        volume_id: int,
        change: dict[str, Any],
        seq: int,
        prepared: BlockMap | None = None,
    ) -> None:
        """Do what the ADMIN group `change` of record `seq` says.

        Arguments:
            prepared: the map that a clone or a rollback begins with, if it is in memory already.
        """
        op = change["op"]
        if op == "grow":
            services.core.slots.grow(change["n_slots"])
            return
        if op == "create":
            info = VolumeInfo.from_json(change["volume"])
            services.checkpointer.next_id = max(services.checkpointer.next_id, info.id + 1)
            blocks = prepared or load_map_now(services.core, info.root, info.size, info.name)[0]
            self.add(services, info, blocks)
        elif op == "rollback":
            self._roll_back(services, self.by_id[volume_id], change, seq, prepared)
        else:
            self._change(services, self.by_id[volume_id], op, change)
        if volume_id in self.by_id:
            self.by_id[volume_id].last_seq = seq

    def _change(self, services: Services, volume: Volume, op: str, change: dict[str, Any]) -> None:
        info = volume.info
        if op == "resize":
            _resize(volume, change["size"])
        elif op == "rename":
            self._take_name(volume)
            info.name = change["name"]
            if not info.trashed:
                self.by_name[info.name] = volume
        elif op == "properties":
            info.properties = change["properties"]
        elif op == "trash":
            info.trashed = change["at"]
            self._take_name(volume)
        elif op == "restore":
            info.trashed = 0
            info.name = change["name"]
            self.by_name[info.name] = volume
        elif op == "delete":
            info.deleted = True
            self._take_name(volume)
        elif op == "flatten":
            info.parent = 0
            info.n_own = info.n_mapped
            volume.kept_epoch = 0
        elif op == "remove":
            volume.map.retire()
            del self.by_id[info.id]
            services.committer.forget(volume)
            services.memory.unregister(info.id)
        else:
            raise AssertionError(f"journal: unknown change {op!r} of a known format version")

    def _take_name(self, volume: Volume) -> None:
        """Take `volume`, if it is there, out of what can be found by name."""
        if self.by_name.get(volume.name) is volume:
            del self.by_name[volume.name]

    def _roll_back(
        self,
        services: Services,
        volume: Volume,
        change: dict[str, Any],
        seq: int,
        prepared: BlockMap | None,
    ) -> None:
        """Give the volume the map of a snapshot, and what it held to a deleted volume."""
        snapshot = self.snapshots[change["snapshot"]]
        services.checkpointer.next_id = max(services.checkpointer.next_id, change["discard"] + 1)
        info, source = volume.info, snapshot.info
        blocks = prepared or load_map_now(services.core, source.root, source.size, info.name)[0]
        discarded = replace(info, id=change["discard"], deleted=True, properties={})
        services.core.slots.n_set_aside -= info.n_provisioned  # it goes with the map
        self.add(services, discarded, volume.map).last_seq = seq
        services.core.slots.n_set_aside += source.n_provisioned
        volume.map = blocks
        volume.kept_epoch = source.epoch
        info.parent, info.size, info.root = source.id, source.size, source.root
        info.n_mapped, info.n_provisioned = source.n_mapped, source.n_provisioned
        info.n_own = 0


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
    gone = old.nodes.slots_from(volume.map.nodes.depth, volume.kept_epoch)
    volume.services.checkpointer.drop(gone)
