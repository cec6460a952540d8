"""Run applications on a platform: add them, start, look, scale, stop.

Owns which applications are meant; how they are brought about is the platform's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from nbdstore.errors import AlreadyExists, InvalidArgument, NotFound
from nbdstore.orchestration.app import ContainerApp, check_names, checked_name, volume_name
from nbdstore.orchestration.manifests import manifests
from nbdstore.orchestration.platform import (
    AppStatus,
    LogLine,
    Platform,
    ReplicaStatus,
    open_platform,
)


class Orchestration:
    """The applications of one project on one platform.

    Arguments:
        platform: "docker", "kubernetes", or a platform.
        name: of the project; what other projects run is left alone.

    Raises:
        InvalidArgument: there is no such platform, or the name is none.
        PlatformError: the platform does not answer.
    """

    def __init__(self, platform: str | Platform = "docker", *, name: str = "nbdstore") -> None:
        self.name = checked_name(name, "a project")
        self.platform = open_platform(platform) if isinstance(platform, str) else platform
        self.apps: dict[str, ContainerApp] = {}

    def add_container_app(self, app: ContainerApp) -> ContainerApp:
        """Add an application; nothing runs before `start`.

        Raises:
            AlreadyExists: there is one of that name.
            InvalidArgument: its names are too long, or what is made for it would have the name of
                what is made for another one, on any platform: "db" with a volume "a-b" and "db-a"
                with a volume "b" would write to one volume.
        """
        if app.name in self.apps:
            raise AlreadyExists(f"there are two applications '{app.name}': rename one")
        check_names(self.name, app)
        self._check_names_differ(app)
        self.apps[app.name] = app
        return app

    def _check_names_differ(self, app: ContainerApp) -> None:
        mine = made_names(self.name, app)
        for other in self.apps.values():
            for kind, name in sorted(mine & made_names(self.name, other)):
                raise InvalidArgument(
                    f"applications '{other.name}' and '{app.name}' would both have the {kind} "
                    f"'{name}': rename one of them, or its volume"
                )

    def start(self) -> list[AppStatus]:
        """Make all applications run as they were added; return how they are then.

        Done again it changes nothing. What has changed since - image, command, environment, ports,
        volumes - is replaced, one replica after the other, with its data. After a failure a second
        start completes what the first had begun.
        """
        self.platform.apply(self.name, list(self.apps.values()))
        return self.status()

    def status(self) -> list[AppStatus]:
        """Tell how the applications are; also those of the project that were not added here."""
        found: dict[str, list[tuple[ReplicaStatus, str]]] = {name: [] for name in self.apps}
        for replica, image in self.platform.replicas(self.name):
            found.setdefault(replica.app, []).append((replica, image))
        return [self._status(name, replicas) for name, replicas in found.items()]

    def _status(self, name: str, found: list[tuple[ReplicaStatus, str]]) -> AppStatus:
        app = self.apps.get(name)
        return AppStatus(
            name=name,
            image=app.image if app else found[0][1],
            wanted=app.replicas if app else None,
            running=sum(replica.state == "running" for replica, _ in found),
            replicas=[replica for replica, _ in found],
        )

    def scale(self, name: str, replicas: int) -> AppStatus:
        """Run an application as `replicas` replicas from now on.

        A replica that goes leaves its volumes, and finds them again when it comes back.

        Raises:
            NotFound: no application of that name was added.
        """
        app = self.apps.get(name)
        if app is None:
            raise NotFound(f"there is no application '{name}': add it first")
        app = dataclasses.replace(app, replicas=replicas)
        check_names(self.name, app)
        self.platform.apply(self.name, [app])
        self.apps[name] = app
        return next(status for status in self.status() if status.name == name)

    def stop(self, *, delete_volumes: bool = False) -> None:
        """Stop the applications that were added. Their volumes stay, unless `delete_volumes`."""
        self.platform.remove(self.name, list(self.apps), delete_volumes=delete_volumes)

    def stop_all(self, *, delete_volumes: bool = False) -> None:
        """Stop everything of the project, also what was not added here."""
        self.platform.remove(self.name, None, delete_volumes=delete_volumes)

    def logs(self, name: str | None = None, *, follow: bool = False) -> Iterator[LogLine]:
        """Yield the lines that an application, or all of the project, have written.

        With `follow` also those to come, until the replicas end.
        """
        return self.platform.logs(self.name, name, follow=follow)

    def close(self) -> None:
        """Let go of the platform; what runs goes on."""
        self.platform.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def made_names(project: str, app: ContainerApp) -> set[tuple[str, str]]:
    """Return (kind, name) of what any platform makes for an application, for its first replica.

    The number of a replica comes last: names of others fall together if those of the first do.
    """
    app = dataclasses.replace(app, replicas=1)
    objects = {(item["kind"], item["metadata"]["name"]) for item in manifests(project, app)}
    volumes = {("volume", volume_name(project, app.name, it.name, 0)) for it in app.volumes}
    return objects | volumes
