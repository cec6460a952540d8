"""Snapshots made and deleted, volumes cloned, rolled back and flattened.

Owns the course of these changes.

A snapshot is made and deleted by a checkpoint (checkpoint.py): it holds what the volume held at
the moment of the checkpoint's freeze, its tree is the one that the checkpoint writes, and it exists
from the flip of the superblock on, whatever crash comes before or after.  Freezing stops nobody:
writes go on into the volume's next epoch.  Several volumes have one moment.

What is whose follows from birth epochs: of an image, everything born after its parent's epoch is
its own.  A volume that overwrites or trims what is not its own frees nothing.  Deleting a snapshot
frees what is its own and is not in its heir - what continues from it - at the same place; what is
in the heir is the heir's from then on.  Therefore a snapshot with two heirs cannot be deleted: each
would take the blocks of both for its own.  Volumes that were cloned from it are heirs, and after a
rollback to an older snapshot both the next snapshot and the volume continue from that.

Between the freeze and the flip it is not known whether a crash leaves the snapshot there or not:
what the volume gives up meanwhile that the snapshot would hold is kept aside, as undecided.

============  ========================================  =======================================
a crash       leaves                                    repair
============  ========================================  =======================================
create        the snapshot, or none and a skipped epoch none needed
delete        the snapshot whole, or none of it         none needed
clone         the clone, or none                        none needed: one journal record
rollback      the volume as it was, or as the snapshot  what it held is freed, as of any
              is                                        deleted volume, after the next start
flatten       a clone that holds more of its own        called again, it goes on
============  ========================================  =======================================
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final
from uuid import UUID

from nbdstore.errors import AlreadyExists, Busy, InvalidArgument, NoSpace, NotFound
from nbdstore.sizes import exact_size
from nbdstore.store import catalogue, layout
from nbdstore.store.administration import Administration, check_properties, check_staying
from nbdstore.store.blockmap import BlockMap
from nbdstore.store.catalogue import SnapshotInfo, VolumeInfo
from nbdstore.store.checkpoint import Frozen
from nbdstore.store.core import Core
from nbdstore.store.differences import blocks_alone, find_dead_nodes
from nbdstore.store.flattening import own_everything
from nbdstore.store.image import Image, Services
from nbdstore.store.layout import U64
from nbdstore.store.mapmemory import load_map
from nbdstore.store.registry import Registry
from nbdstore.store.slotset import SlotSet
from nbdstore.store.snapshot import Snapshot
from nbdstore.store.volume import Undecided, Volume

_SHOWN: Final = 5  # names in a message


class Snapshots:
    """Makes these changes in one pool."""

    def __init__(
        self, services: Services, registry: Registry, administration: Administration
    ) -> None:
        self._services = services
        self._core = services.core
        self._checkpointer = services.checkpointer
        self._registry = registry
        self._administration = administration
        self._deleting = asyncio.Lock()

    # -- snapshots --------------------------------------------------------------------------

    async def create(
        self, wanted: Sequence[tuple[Volume, str]], uuids: Sequence[str] | None
    ) -> list[Snapshot]:
        """See Pool.create_snapshots."""
        for _, name in wanted:
            catalogue.check_name(name, "snapshot")
        if uuids is None:
            uuids = [str(self._core.host.new_uuid()) for _ in wanted]
        if len({volume.id for volume, _ in wanted}) < len(wanted):
            raise InvalidArgument("the same volume is named twice: give each one once")
        return await self._administration.alone(self._create(wanted, uuids))

    async def _create(
        self, wanted: Sequence[tuple[Volume, str]], uuids: Sequence[str]
    ) -> list[Snapshot]:
        async with self._administration.turn(), self._checkpointer.lock:
            for volume, name in wanted:
                self._check_new(volume, name)
            now = int(self._core.host.time())
            cut = _Cut(self._services, self._registry, wanted, uuids, now)
            await self._checkpointer.run_locked(change=cut)
            return cut.made

    def _check_new(self, volume: Volume, name: str) -> None:
        volume.check_there()
        check_staying(volume)
        if name in volume.snapshots:
            raise AlreadyExists(
                f"snapshot {volume.name}@{name} exists already: choose another name"
            )
        if volume.info.epoch >= layout.MAX_EPOCH:
            raise InvalidArgument(
                f"volume {volume.name} has had {layout.MAX_EPOCH} snapshots, which is the limit: "
                "copy it into a new volume"
            )

    async def delete(self, snapshot: Snapshot) -> None:
        """See Pool.delete_snapshot."""
        await self._discarded(snapshot)
        await self._administration.alone(self._delete(snapshot))

    async def _discarded(self, snapshot: Snapshot) -> None:
        """Wait until no deleted volume continues from `snapshot`, such as a rollback leaves.

        This may take long, and more space than there is: so whoever waits can go away.
        """
        for heir in self._registry.heirs(snapshot):
            if isinstance(heir, Volume) and heir.is_gone:
                await self._administration.emptied(heir)

    async def _delete(self, snapshot: Snapshot) -> None:
        async with self._deleting:  # each may be what continues from the other
            while not await self._try_to_delete(snapshot):
                pass  # what continues from it is another image now, which changes no more

    async def _try_to_delete(self, snapshot: Snapshot) -> bool:
        """Delete `snapshot`; False, having done nothing, if its heirs changed on the way.

        Finding what it holds alone may take long.  Meanwhile other changes take their turns, and
        checkpoints are written: only clients' writes leave its heirs what they are.
        """
        with contextlib.ExitStack() as stack:
            async with self._administration.turn():
                heirs = self._registry.heirs(snapshot)
                self._check_deletable(snapshot, heirs)
                stack.enter_context(snapshot.going())
                removal = _Removal(self._services, self._registry, snapshot, heirs)
                stack.callback(removal.forget)
            try:
                await _open([snapshot, *heirs])
                await removal.find_dead()
            except NotFound:
                if removal.is_true:
                    raise
                return False
            async with self._administration.turn(), self._checkpointer.lock:
                if not removal.is_true:
                    return False
                await self._checkpointer.run_locked(change=removal)
                return True

    def _check_deletable(self, snapshot: Snapshot, heirs: list[Image]) -> None:
        snapshot.check_there()
        if any(isinstance(heir, Volume) and heir.is_gone for heir in heirs):
            raise Busy(
                f"snapshot {snapshot.name}: what continued from it was deleted, and is not freed "
                "yet: try again in a moment"
            )
        clones = [heir.name for heir in heirs if _is_clone(heir, snapshot)]
        if clones:
            raise Busy(
                f"snapshot {snapshot.name} has clones: {_listing(clones)}: flatten them, or "
                "delete them (and empty the trash)"
            )
        if len(heirs) > 1:
            raise Busy(
                f"snapshot {snapshot.name}: {' and '.join(heir.name for heir in heirs)} both "
                "continue from it: delete snapshots among those first"
            )

    async def n_bytes_alone(self, snapshot: Snapshot) -> int:
        """See Pool.bytes_alone."""
        with snapshot.in_use():
            while True:
                heirs = self._registry.heirs(snapshot)
                try:
                    await _open([snapshot, *heirs])
                    found = [len(slots) async for slots in blocks_alone(snapshot, heirs)]
                    return sum(found) * snapshot.block_size
                except NotFound:
                    if heirs == self._registry.heirs(snapshot):
                        raise

    def clones_of(self, volume: Volume) -> list[str]:
        """The names of what was cloned from snapshots of `volume`."""
        return [
            heir.name
            for snapshot in volume.snapshots.values()
            for heir in self._registry.heirs(snapshot)
            if _is_clone(heir, snapshot) and not heir.is_gone
        ]

    def require_deletable(self, volume: Volume) -> None:
        """See Pool.require_deletable."""
        check_staying(volume)
        if clones := self.clones_of(volume):
            raise Busy(
                f"snapshots of volume {volume.name} have clones: {_listing(clones)}: flatten or "
                "delete those first (and empty the trash)"
            )
        for snapshot in volume.snapshots.values():
            with snapshot.going():
                pass  # nobody reads it, or this would be Busy

    async def delete_volume(self, volume: Volume) -> None:
        """See Pool.delete_volume."""
        self.require_deletable(volume)
        # The newest first: nothing but the volume, or nothing, continues from it.  One may have
        # been on its way.
        volume.is_going = True
        try:
            while not await self._administration.delete(volume):
                for newest in [*volume.snapshots.values()][-1:]:
                    await self._delete_if_there(newest)
        finally:
            volume.is_going = False

    async def _delete_if_there(self, snapshot: Snapshot) -> None:
        try:
            await self.delete(snapshot)
        except NotFound:
            if not snapshot.is_gone:
                raise  # what is missing is something else

    # -- volumes from snapshots -------------------------------------------------------------

    async def clone(
        self, snapshot: Snapshot, name: str, properties: dict[str, Any], uuid: UUID | None = None
    ) -> Volume:
        """See Pool.clone."""
        catalogue.check_name(name)
        check_properties(name, properties)
        return await self._administration.alone(self._clone(snapshot, name, properties, uuid))

    async def _clone(
        self, snapshot: Snapshot, name: str, properties: dict[str, Any], uuid: UUID | None
    ) -> Volume:
        async with self._administration.turn():
            snapshot.check_staying()
            check_staying(snapshot.volume)
            self._administration.check_new(name)
            self._administration.check_new_uuid(uuid)
            host, source = self._core.host, snapshot.info
            self._check_space(source)
            info = VolumeInfo(
                self._checkpointer.next_id,
                name,
                source.size,
                uuid=str(uuid or host.new_uuid()),
                created=int(host.time()),
                epoch=source.epoch + 1,
                parent=source.id,
                root=source.root,
                n_mapped=source.n_mapped,
                n_provisioned=source.n_provisioned,
                written=source.n_mapped > 0,
                properties=dict(properties),
            )
            async with self._map_of(snapshot, name) as blocks:
                return await self._administration.add(info, blocks)

    @contextlib.asynccontextmanager
    async def _map_of(self, snapshot: Snapshot, name: str) -> AsyncIterator[BlockMap]:
        """A map for volume `name` that begins as `snapshot`; if it is not to be, not counted."""
        source = snapshot.info
        blocks = await load_map(self._core, source.root, source.size, name)
        try:
            yield blocks
        except BaseException:
            if not any(volume.map is blocks for volume in self._registry.by_id.values()):
                blocks.retire()
            raise

    def _check_space(self, source: SnapshotInfo) -> None:
        """Refuse what would have more space set aside than there is."""
        if source.n_provisioned and not self._core.may_set_aside(source.n_provisioned):
            raise NoSpace(
                f"snapshot {source.name} has "
                f"{exact_size(source.n_provisioned * self._core.block_size)} set aside "
                "(NO_HOLE), which the pool has not left: trim, delete or enlarge it"
            )

    async def rollback(self, volume: Volume, snapshot: Snapshot) -> None:
        """See Pool.rollback."""
        await self._administration.alone(self._rollback(volume, snapshot))

    async def _rollback(self, volume: Volume, snapshot: Snapshot) -> None:
        async with self._administration.turn():
            volume.check_there()
            check_staying(volume)
            snapshot.check_staying()
            if snapshot.volume is not volume:
                raise InvalidArgument(
                    f"{snapshot.name} is not a snapshot of volume {volume.name}: clone it instead"
                )
            await volume.flush()
            source, discard = snapshot.info, self._checkpointer.next_id
            async with self._checkpointer.lock:  # no checkpoint may be writing its map
                self._check_space(source)
                change = {"op": "rollback", "snapshot": source.id, "discard": discard}
                async with self._map_of(snapshot, volume.name) as blocks:
                    await self._administration.change(volume.id, change, blocks)
        self._administration.empty(self._registry.by_id[discard])

    # -- flatten ----------------------------------------------------------------------------

    async def flatten(self, volume: Volume, progress: Callable[[int], None]) -> None:
        """See Pool.flatten."""
        self._check_flattenable(volume)
        if volume.info.parent:
            await own_everything(volume, progress)
            await self._administration.alone(self._cut_off(volume))

    def _check_flattenable(self, volume: Volume) -> None:
        volume.check_there()
        if volume.snapshots:
            raise Busy(
                f"volume {volume.name} has snapshots, which share what it shares "
                f"({', '.join([*volume.snapshots][:5])}): delete them first"
            )

    async def _cut_off(self, volume: Volume) -> None:
        async with self._administration.turn(), self._checkpointer.lock:
            self._check_flattenable(volume)
            await self._checkpointer.run_locked()  # writes the last of its own nodes
            await self._administration.change(volume.id, {"op": "flatten"})


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _is_clone(heir: Image, snapshot: Snapshot) -> bool:
    """Tell whether `heir` of `snapshot` is a volume that was cloned from it, or its snapshot."""
    volume = heir.volume if isinstance(heir, Snapshot) else heir
    return volume is not snapshot.volume


class _Cut:
    """Snapshots that come, all of one moment; a Change of a checkpoint."""

    def __init__(
        self,
        services: Services,
        registry: Registry,
        wanted: Sequence[tuple[Volume, str]],
        uuids: Sequence[str],
        created: int,
    ) -> None:
        self._services = services
        self._registry = registry
        self._wanted = wanted
        self._uuids = uuids
        self._created = created
        self._infos: list[SnapshotInfo] = []
        self._undecided: list[Undecided] = []
        self.made: list[Snapshot] = []

    def begin(self, frozen: Frozen) -> None:
        for (volume, name), uuid in zip(self._wanted, self._uuids, strict=True):
            then, now = frozen.volumes[volume.id].info, volume.info
            info = SnapshotInfo(
                self._services.checkpointer.take_id(),
                volume.id,
                name,
                then.size,
                uuid,
                self._created,
                then.epoch,
                parent=then.parent,
                n_mapped=then.n_mapped,
                n_provisioned=then.n_provisioned,
                n_own=then.n_own,
            )
            self._infos.append(info)
            frozen.snapshots[info.id] = info
            undecided = Undecided(volume.kept_epoch)
            self._undecided.append(undecided)
            volume.on_given_up = undecided.add
            volume.kept_epoch = info.epoch
            for changed in (then, now):
                changed.parent, changed.epoch, changed.n_own = info.id, info.epoch + 1, 0

    async def complete(self, frozen: Frozen) -> None:
        for info in self._infos:
            info.root = frozen.volumes[info.volume].info.root

    def end(self, *, made: bool) -> None:
        parts = zip(self._wanted, self._infos, self._undecided, strict=True)
        for (volume, _), info, undecided in parts:
            volume.on_given_up = None
            if made:
                self.made.append(self._registry.add_snapshot(self._services, info))
                continue
            # The epoch stays: what was written since then says that it was born in the next one.
            volume.info.parent = info.parent
            volume.kept_epoch = self._registry.epochs[info.parent]
            volume.info.n_own += info.n_own - len(undecided.slots)
            _free(self._services.core, undecided)


class _Removal:
    """A snapshot that goes; a Change of a checkpoint.

    What only the snapshot holds is found beforehand.  It becomes more when its heir gives up what
    it shares, and never less, so that what the heir has given up since the search began is added.
    That holds as long as the same images continue from the same: a snapshot that is made of the
    heir, a rollback or another size of it make what was found worthless (`is_true`).

    To be made by the holder of the turn, who alone may take a volume's `on_given_up`.

    Arguments:
        heirs: what continues from it, one or none.
    """

    def __init__(
        self, services: Services, registry: Registry, snapshot: Snapshot, heirs: Sequence[Image]
    ) -> None:
        self._services = services
        self._registry = registry
        self._snapshot = snapshot
        self._heirs = list(heirs)
        self._volumes = [heir for heir in heirs if isinstance(heir, Volume)]
        self._floor = snapshot.kept_epoch
        self._dead = SlotSet(services.core.slots)
        self._undecided: list[Undecided] = []
        self._n_kept = 0
        self._maps = [volume.map for volume in self._volumes]
        for volume in self._volumes:
            volume.on_given_up = self._given_up

    @property
    def is_true(self) -> bool:
        """What was found is so: its surroundings are as they were when the search began."""
        return (
            self._registry.heirs(self._snapshot) == self._heirs
            and self._snapshot.kept_epoch == self._floor
            and all(volume.on_given_up == self._given_up for volume in self._volumes)
            and all(now.map is then for now, then in zip(self._volumes, self._maps, strict=True))
        )

    async def find_dead(self) -> None:
        """Find the blocks that only the snapshot holds.

        Raises:
            Corruption, ReadFailed: of a leaf or node.
            NotFound: the snapshot or its heir was deleted.
        """
        async for slots in blocks_alone(self._snapshot, self._heirs):
            self._dead.add(slots)

    def _given_up(self, locations: U64) -> None:
        own = layout.holds_slot_of_after(locations, self._floor)
        self._dead.add(layout.slots_of(locations[own]))

    def forget(self) -> None:
        """It is over, however it went."""
        for volume in self._volumes:
            if volume.on_given_up == self._given_up:  # else it is a snapshot's that is being made
                volume.on_given_up = None

    def begin(self, frozen: Frozen) -> None:
        frozen.dead = self._dead
        del frozen.snapshots[self._snapshot.id]
        for heir in self._heirs:
            _frozen_info(frozen, heir).parent = self._snapshot.info.parent
        for volume in self._volumes:
            undecided = Undecided(self._floor)
            self._undecided.append(undecided)
            volume.on_given_up = undecided.add

    async def complete(self, frozen: Frozen) -> None:
        self._n_kept = self._snapshot.info.n_own - len(self._dead)
        await find_dead_nodes(self._snapshot, self._heirs, self._dead)
        for heir in self._heirs:
            _frozen_info(frozen, heir).n_own += self._n_kept

    def end(self, *, made: bool) -> None:
        for volume in self._volumes:
            volume.on_given_up = None
        if not made:
            return
        self._registry.remove_snapshot(self._snapshot)
        for heir in self._heirs:
            heir.info.n_own += self._n_kept
        for volume, undecided in zip(self._volumes, self._undecided, strict=True):
            volume.info.n_own -= len(undecided.slots)
            _free(self._services.core, undecided)


async def _open(images: Sequence[Image]) -> None:
    """Return with the maps of all in memory."""
    for image in images:
        await image.open()


def _frozen_info(frozen: Frozen, image: Image) -> VolumeInfo | SnapshotInfo:
    """What the catalogue will say of `image`."""
    if isinstance(image, Snapshot):
        return frozen.snapshots[image.id]
    return frozen.volumes[image.id].info


def _free(core: Core, undecided: Undecided) -> None:
    """Nothing holds these slots any more; a read that was planned before now may use them yet."""
    core.slots.free_later(undecided.slots, core.journal.seq + 1)
