"""What a container platform must be able to do, and what it tells.

Owns the seam between `orchestration` and the platforms, the choice of a platform by its name, and
the rule that makes repeating safe: `apply` brings the platform from whatever state it is in - also
one that another `apply` left half done - to what is asked, and changes nothing if it is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

from nbdstore.errors import InvalidArgument
from nbdstore.orchestration.app import ContainerApp

PLATFORMS: Final = ("docker", "kubernetes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicaStatus:
    """One replica.

    state: "running", or the platform's word for what it is instead. restarts: how often the
    platform has started it again. message: why it does not run, as far as the platform knows.
    """

    name: str
    app: str
    ordinal: int
    state: str
    since: str
    restarts: int
    message: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AppStatus:
    """An application: what is wanted, what there is.

    wanted: replicas that should run; None = the application was not added here, and runs.
    """

    name: str
    image: str
    wanted: int | None
    running: int
    replicas: list[ReplicaStatus]

    def to_json(self) -> dict[str, Any]:
        """Return a dict of plain JSON values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class LogLine:
    """A line that a replica wrote."""

    replica: str
    text: str


@dataclasses.dataclass(frozen=True)
class ContainerStorage:
    """A running container of the platform, and the bytes of storage it was given beside volumes."""

    name: str
    bytes: int


class Platform(Protocol):
    """Run the applications of a project. Every call may raise any `NbdstoreError`."""

    def apply(self, project: str, apps: Sequence[ContainerApp]) -> None:
        """Bring the applications to what they should be; see the module.

        Other applications of the project stay as they are.
        """

    def remove(self, project: str, apps: Sequence[str] | None, *, delete_volumes: bool) -> None:
        """Stop and remove the replicas of some applications, or of all of the project (None).

        Their volumes stay, unless `delete_volumes`. What is not there is no error.
        """

    def replicas(self, project: str) -> list[tuple[ReplicaStatus, str]]:
        """List the replicas of a project that there are, each with its image."""

    def logs(self, project: str, app: str | None, *, follow: bool) -> Iterator[LogLine]:
        """Yield what replicas have written; with `follow`, and what they write from now on."""

    def containers(self) -> list[ContainerStorage]:
        """List the running containers of the platform, whoever started them."""

    def close(self) -> None:
        """Let go of the connection."""


def open_platform(name: str) -> Platform:
    """Connect to a platform, as its own environment variables and configuration say.

    Raises:
        InvalidArgument: there is no such platform, or its client library is not installed.
    """
    # Imported late: each brings a client library that is installed only where it is used.
    if name == "docker":
        from nbdstore.orchestration.docker_platform import DockerPlatform

        return DockerPlatform()
    if name == "kubernetes":
        from nbdstore.orchestration.kubernetes_platform import KubernetesPlatform

        return KubernetesPlatform()
    raise InvalidArgument(f"there is no platform '{name}': choose {' or '.join(PLATFORMS)}")
