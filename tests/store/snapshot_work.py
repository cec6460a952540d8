"""What administrators do with snapshots, clones and the trash, at random; a part of a workload.

Every snapshot is read as soon as it was made, and compared with that whenever it is read again;
whether it is of the right moment is the model's question (snapshot_model.py).
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any, Final

from nbdstore.errors import AlreadyExists, Busy, NoSpace, NotFound, ReadFailed, WriteFailed
from nbdstore.store.snapshot import Snapshot
from tests.store.crash_model import Administered, Change, Failed, Flushed, Refused
from tests.store.snapshot_model import Dropping, Key, Snapped, Snapping

if TYPE_CHECKING:
    from nbdstore.store import Volume
    from tests.store.workload import Client, Workload

REFUSALS: Final = (NoSpace, WriteFailed, ReadFailed, Busy, NotFound, AlreadyExists)
MOST: Final = 6
"""Snapshots of a pool: what they hold has to fit."""


class SnapshotWork:
    """The snapshots of one workload.

    Attributes:
        known: what they hold.
    """

    def __init__(self, world: Workload) -> None:
        self._world = world
        self._disk = world.disk
        self._pool = world.pool
        self.known: dict[Key, bytes] = {}
        self._wanted: list[Key] = []
        self._n_names = 0
        self._watch_trash()

    def _watch_trash(self) -> None:
        """The pool deletes what is in the trash when it needs the space."""
        trash = self._pool._trash
        delete = trash._delete

        def marked(volume: Volume, why: str) -> None:
            self._disk.mark(Administered(volume.id, None, begun=True))
            delete(volume, why)

        trash._delete = marked  # type: ignore[method-assign]

    async def run(self, rng: random.Random) -> None:
        """Do something now and then."""
        actions = (
            *(self._create, self._create, self._create, self._delete, self._delete),
            *(self._read, self._clone, self._roll_back, self._flatten, self._trash),
        )
        while True:
            await asyncio.sleep(rng.choice((0.005, 0.02, 0.1)))
            await rng.choice(actions)(rng)

    def _clients(self) -> list[Client]:
        return [c for c in self._world.clients.values() if not c.volume.info.deleted]

    def _snapshots(self) -> list[Snapshot]:
        return [*self._pool._registry.snapshots.values()]

    def _a_snapshot(self, rng: random.Random) -> Snapshot | None:
        """One that is known."""
        found = [s for s in self._snapshots() if key_of(s) in self.known]
        return rng.choice(found) if found else None

    # -- snapshots --------------------------------------------------------------------------

    async def _create(self, rng: random.Random) -> None:
        clients = self._clients()
        if not clients or len(self._snapshots()) >= MOST:
            return
        chosen = rng.sample(clients, rng.randint(1, len(clients)))
        self._n_names += 1
        name = f"s{self._n_names}-{rng.randrange(1000)}"
        begun = Snapping(tuple((client.volume.id, name) for client in chosen))
        self._wanted += begun.wanted
        self._disk.mark(begun)
        try:
            made = await self._pool.create_snapshots([(c.volume, name) for c in chosen])
        except REFUSALS:
            self._disk.mark(Snapped(begun, made=False))
            self._world.n_refused += 1
            return
        self._disk.mark(Snapped(begun, made=True))
        self._world.figures["snapshots made"] += len(made)
        for snapshot in made:
            await self._learn(snapshot)

    async def _learn(self, snapshot: Snapshot) -> None:
        try:
            self.known[key_of(snapshot)] = await self._world.settings.spread.read(snapshot)
        except (ReadFailed, NotFound):
            pass  # then nobody looks at it again

    async def _read(self, rng: random.Random) -> None:
        snapshot = self._a_snapshot(rng)
        if snapshot is not None:
            expected = self.known[key_of(snapshot)]
            try:
                found = await self._world.settings.spread.read(snapshot)
            except (ReadFailed, NotFound):
                return
            assert found == expected, f"snapshot {snapshot.name} has changed"

    async def _delete(self, rng: random.Random) -> None:
        snapshots = self._snapshots()
        if not snapshots:
            return
        snapshot = rng.choice(snapshots)
        self._disk.mark(Dropping(key_of(snapshot)))
        try:
            await self._pool.delete_snapshot(snapshot)
            self._world.figures["snapshots deleted"] += 1
        except REFUSALS:
            self._world.n_refused += 1
        self._disk.mark(Dropping(key_of(snapshot), gone=snapshot.is_gone))

    def lost(self, volume: Volume) -> None:
        """To be called when a volume could not be deleted: some of its snapshots may be gone."""
        for key in {*self.known, *self._wanted}:
            if key[0] == volume.id and key[1] not in volume.snapshots:
                self._disk.mark(Dropping(key, gone=True))

    # -- volumes ----------------------------------------------------------------------------

    async def _clone(self, rng: random.Random) -> None:
        snapshot = self._a_snapshot(rng)
        name = self._world._name()
        if (
            snapshot is None
            or len(self._clients()) > self._world.settings.max_volumes
            or name in self._pool.volumes
        ):
            return
        content = self.known[key_of(snapshot)]
        about: dict[str, Any] = {"name": name, "properties": {}, "content": content}
        self._disk.mark(Administered(None, about, begun=True))
        try:
            volume = await self._pool.clone(snapshot, name)
        except REFUSALS:
            self._disk.mark(Refused(None, about))
            return
        self._disk.mark(Administered(volume.id, about, begun=False))
        self._world._add(volume, bytearray(content))
        self._world.figures["clones"] += 1

    async def _roll_back(self, rng: random.Random) -> None:
        snapshot = self._a_snapshot(rng)
        if snapshot is None or snapshot.volume.id not in self._world.clients:
            return
        client = self._world.clients[snapshot.volume.id]
        async with client.busy:
            content = self.known[key_of(snapshot)]
            change = Change(((0, content),), size=len(content))
            client.begin(change)
            try:
                await self._pool.rollback(client.volume, snapshot)
            except REFUSALS:
                self._disk.mark(Failed(client.volume.id, change))
                return
            client.acknowledge(change)
            self._disk.mark(Flushed(client.volume.id, client.n_acknowledged))
            self._world.figures["rollbacks"] += 1

    async def _flatten(self, rng: random.Random) -> None:
        clones = [c for c in self._clients() if c.volume.info.parent and not c.volume.snapshots]
        if clones:
            try:
                await self._pool.flatten(rng.choice(clones).volume)
                self._world.figures["clones flattened"] += 1
            except REFUSALS:
                self._world.n_refused += 1

    async def _trash(self, rng: random.Random) -> None:
        """Put a volume into the trash, or take it out again."""
        clients = self._clients()
        if not clients:
            return
        client, world = rng.choice(clients), self._world
        async with client.busy:
            volume = client.volume
            if volume.info.deleted:
                return
            about = world._about(client)
            if not volume.info.trashed:
                about["name"] = trash_name(volume)
                await world._change(client, about, self._pool.trash_volume(volume))
                world.figures["volumes in the trash"] += 1
            elif (name := world._name()) not in self._pool.volumes:
                about["name"] = name
                await world._change(client, about, self._pool.restore_volume(volume, name))


def key_of(snapshot: Snapshot) -> Key:
    """How the model knows a snapshot."""
    return snapshot.volume.id, snapshot.info.name


def trash_name(volume: Volume) -> str:
    """What stands for the name of a volume in the trash."""
    return f"trash:{volume.id}"
