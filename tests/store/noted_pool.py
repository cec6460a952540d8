"""A pool as the control API sees it in a short play: what it asks for is noted before it is made.

Owns the noting of each change, so that the real operations of the control API - leases, limits,
scrubs, receiving - are plays like any other: whatever they ask the store to do, and in whichever
order, a crash leaves one of the states that this leads through.

What changes nothing goes to the real pool.  A change that is not noted here is found out at the end
of each play, when what is there is compared with what was noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

from nbdstore.store import Snapshot, Volume
from tests.store.short_plays import OTHER_NAME, Play, emptied
from tests.store.short_states import BLOCK, State, told


class NotedVolume:
    """A volume whose changes are noted.

    Attributes:
        real: the volume.
    """

    def __init__(self, play: Play, volume: Volume) -> None:
        self._play = play
        self.real = volume

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    @property
    def known_as(self) -> str:
        """Its name in the play."""
        return "v" if self.real.name == OTHER_NAME else self.real.name

    @property
    def state(self) -> State:
        """What it holds now."""
        return self._play.state_of(self.known_as)

    async def write(self, offset: int, data: memoryview | bytes | bytearray) -> None:
        after = self.state.written(offset, bytes(data))
        await self._play.do(self.real.write(offset, data), after, name=self.known_as)

    async def write_zeroes(self, offset: int, length: int) -> None:
        assert offset % BLOCK == length % BLOCK == 0
        after = self.state.cleared(offset, length)
        await self._play.do(self.real.write_zeroes(offset, length), after, name=self.known_as)

    async def flush(self) -> None:
        await self.real.flush()
        self._play.durable(self.known_as)


class NotedPool:
    """A pool whose changes are noted."""

    def __init__(self, play: Play) -> None:
        self._play = play
        self._volumes: dict[int, NotedVolume] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._play.pool, name)

    def _noted(self, volume: Volume) -> NotedVolume:
        """Always the same one of a volume: some are compared by what they are."""
        return self._volumes.setdefault(volume.id, NotedVolume(self._play, volume))

    @property
    def volumes(self) -> dict[str, NotedVolume]:
        return {name: self._noted(volume) for name, volume in self._play.pool.volumes.items()}

    async def create_volume(
        self,
        name: str,
        size: int,
        properties: dict[str, Any] | None = None,
        *,
        uuid: UUID | None = None,
    ) -> NotedVolume:
        empty = State(size, "H" * (size // BLOCK), bytes(size), properties=told(properties or {}))
        making = self._play.pool.create_volume(name, size, properties, uuid=uuid)
        await self._play.do(making, empty, name=name)
        self._play.durable(name)
        return self._noted(self._play.pool.volumes[name])

    async def set_properties(self, volume: NotedVolume, properties: dict[str, Any]) -> None:
        after = replace(volume.state, properties=told(properties))
        setting = self._play.pool.set_properties(volume.real, properties)
        await self._change(volume, setting, after)

    async def resize_volume(self, volume: NotedVolume, size: int, *, force: bool = False) -> None:
        old = volume.state
        tail = [old.cleared(size, old.size - size)] if size < old.size else []
        resizing = self._play.pool.resize_volume(volume.real, size, force=force)
        await self._change(volume, resizing, *tail, (tail or [old])[-1].resized(size))

    async def rollback(self, volume: NotedVolume, snapshot: Snapshot) -> None:
        after = volume.state.holding(self._play.state_of(snapshot.name))
        await self._change(volume, self._play.pool.rollback(volume.real, snapshot), after)
        await emptied(self._play)

    async def delete_volume(self, volume: NotedVolume) -> None:
        assert not volume.real.snapshots
        await self._change(volume, self._play.pool.delete_volume(volume.real), None)
        await emptied(self._play)

    async def _change(self, volume: NotedVolume, change: Any, *states: State | None) -> None:
        name = volume.known_as  # a volume that is deleted has none afterwards
        await self._play.do(change, *states, name=name)
        self._play.durable(name)

    async def create_snapshots(
        self, wanted: Sequence[tuple[NotedVolume, str]], *, uuids: Sequence[str]
    ) -> list[Snapshot]:
        (((volume, own_name),), (uuid,)) = wanted, uuids
        name = f"{volume.known_as}@{own_name}"
        held = replace(volume.state.held(), properties=uuid)
        making = self._play.pool.create_snapshots([(volume.real, own_name)], uuids=uuids)
        await self._play.do(making, held, name=name)
        self._play.durable(name)
        self._play.durable(volume.known_as)  # what a snapshot holds
        return [volume.real.snapshots[own_name]]

    def changes(self, older: Any, newer: Any, *, offset: int = 0) -> Any:
        real = [getattr(image, "real", image) for image in (older, newer)]
        return self._play.pool.changes(*real, offset=offset)
