"""A platform that runs nothing: what it was asked for is looked at by the tests of its callers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nbdstore.orchestration import ContainerApp, LogLine, ReplicaStatus
from nbdstore.orchestration.platform import ContainerStorage


class RememberingPlatform:
    """Remember what was applied; raise ``failure`` instead if there is one."""

    def __init__(self) -> None:
        self.applied: list[ContainerApp] = []
        self.failure: Exception | None = None

    def apply(self, project: str, apps: Sequence[ContainerApp]) -> None:
        if self.failure:
            raise self.failure
        self.applied = list(apps)

    def remove(self, project: str, apps: Sequence[str] | None, *, delete_volumes: bool) -> None:
        self.applied = [app for app in self.applied if apps is not None and app.name not in apps]

    def replicas(self, project: str) -> list[tuple[ReplicaStatus, str]]:
        return []

    def logs(self, project: str, app: str | None, *, follow: bool) -> Iterator[LogLine]:
        return iter(())

    def containers(self) -> list[ContainerStorage]:
        return []

    def close(self) -> None:
        pass
