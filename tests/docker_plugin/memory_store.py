"""A store and an agent that remember what they were asked for: every moment can be looked at.

Real ones, with a real engine, are in tests/docker.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nbdstore.agent.requests import AttachmentStatus, MountRequest
from nbdstore.control.model import SnapshotInfo, VolumeInfo
from nbdstore.errors import AlreadyExists, NotFound


class Killed(BaseException):
    """Stands in for SIGKILL: nothing catches it."""


class MemoryStore:
    """The volumes of a store. ``dies`` names the call after (or before) which the caller dies."""

    def __init__(self) -> None:
        self.volumes: dict[str, VolumeInfo] = {}
        self.dies: tuple[str, str] | None = None
        self.failure: Exception | None = None
        self._n_made = 0

    def volume(self, name: str) -> VolumeInfo:
        if self.failure:
            raise self.failure
        if name not in self.volumes:
            raise NotFound(f"no volume {name}")
        return self.volumes[name]

    def create_volume(self, name: str, size: int) -> VolumeInfo:
        self._die("create", "before")
        if name in self.volumes:
            raise AlreadyExists(f"there is a volume {name}")
        self._n_made += 1
        self.volumes[name] = VolumeInfo(
            id=self._n_made,
            uuid=f"uuid-{self._n_made}",
            name=name,
            size=size,
            block_size=4096,
            mapped=0,
            reserved=0,
            epoch=0,
            created="",
            written=False,
        )
        self._die("create", "after")
        return self.volumes[name]

    def update_volume(self, name: str, **changes: Any) -> VolumeInfo:
        told = {key: value for key, value in changes.items() if value is not None}
        self.volumes[name] = dataclasses.replace(self.volumes[name], **told)
        return self.volumes[name]

    def delete_volume(self, name: str, *, now: bool = False) -> None:
        self._die("delete", "before")
        del self.volumes[name]
        self._die("delete", "after")

    def snapshots(self, volume: str) -> list[SnapshotInfo]:
        return []

    def _die(self, call: str, moment: str) -> None:
        if self.dies == (call, moment):
            self.dies = None
            raise Killed


class MemoryAgent:
    """What is mounted, as (volume, path)."""

    def __init__(self) -> None:
        self.mounted: set[tuple[str, str]] = set()
        self.failure: Exception | None = None

    def mount(self, request: MountRequest) -> AttachmentStatus:
        if self.failure:
            raise self.failure
        self.mounted.add((request.volume, request.path))
        return self.status()[0]

    def umount(self, volume: str, path: str = "", *, force: bool = False) -> None:
        if self.failure:
            raise self.failure
        if (volume, path) not in self.mounted:
            raise NotFound(f"volume {volume} is not attached")
        self.mounted.discard((volume, path))

    def status(self) -> list[AttachmentStatus]:
        if self.failure:
            raise self.failure
        return [
            AttachmentStatus(
                volume=volume,
                path="/dev/nbd0",
                device="nbd0",
                driver="kernel",
                state="attached",
                message="",
                size=1 << 30,
                read_only=False,
                holder="here",
                epoch=1,
                since="",
                filesystem="ext4",
                explicit=False,
                mounts=[{"path": path, "by": "docker", "read_only": False}],
            )
            for volume, path in sorted(self.mounted)
        ]
