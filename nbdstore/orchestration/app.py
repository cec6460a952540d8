"""What should run: applications and their volumes, as values that make sense.

Owns the checks that hold on every platform, and the names; knows no platform. A replica has a
number from 0 on, and volumes of its own, since a filesystem on a block device has one writer::

    project "shop", app "db", volume "data"      replica shop-db-0 has the volume shop-db-data-0
                                                 replica shop-db-1 has the volume shop-db-data-1
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Final

from nbdstore.errors import InvalidArgument
from nbdstore.sizes import parse_size

NAME: Final = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", re.ASCII)
"""A label of DNS (RFC 1035), short enough that names made of three of them are labels in turn."""
MAX_LABEL: Final = 63
ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
MAX_PORT: Final = 65535
MAX_REPLICAS: Final = 1000
"""Of one application: a bridge of Linux, such as Docker's networks are, has 1023 ports."""
DRIVER: Final = "nbdstore"

_SHORT: Final = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 2, 3, 3
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 60


def shown(value: object) -> str:
    """Write a value for a message: never long, though a few lines of YAML may be gigabytes."""
    return _SHORT.repr(value)


def checked_name(name: str, of: str) -> str:
    """Return a name that every platform takes.

    Raises:
        InvalidArgument: it is none; `of` says whose name it was to be.
    """
    if not NAME.fullmatch(name):
        raise InvalidArgument(
            f"{shown(name)} is no name for {of}: give up to 40 lower-case letters, digits and '-', "
            "beginning with a letter"
        )
    return name


@dataclasses.dataclass(frozen=True)
class Volume:
    """Block storage of each replica of an application.

    Arguments:
        name: tells apart the volumes of one application.
        path: where the application finds it.
        size: bytes, or text such as ``10G``; may be left out with `clone`.
        fs: ``ext4`` or ``xfs``, made when the volume is first used; "" leaves it to the driver.
        clone: the snapshot that a new volume starts from: ``VOLUME@SNAPSHOT``, and on Kubernetes
            the name of a VolumeSnapshot.
        driver: Docker's volume driver, or Kubernetes' storage class.
        options: further options of Docker's driver.
        read_only: the application may not write.
    """

    name: str
    path: str
    size: int | str = 0
    fs: str = ""
    clone: str = ""
    driver: str = DRIVER
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    read_only: bool = False

    def __post_init__(self) -> None:
        checked_name(self.name, "a volume")
        if not self.path.startswith("/") or ":" in self.path:
            raise InvalidArgument(
                f"volume {self.name}: {shown(self.path)} is no path in a container: begin it "
                "with '/'"
            )
        if self.size_bytes < 0 or (self.driver == DRIVER and not self.size_bytes + len(self.clone)):
            raise InvalidArgument(f"volume {self.name} has no size: give one, such as size='10G'")

    @property
    def size_bytes(self) -> int:
        """Return the size in bytes; 0 = that of the clone's origin, or what the driver wants."""
        return parse_size(self.size) if isinstance(self.size, str) else self.size


@dataclasses.dataclass(frozen=True)
class ContainerApp:
    """An application: an image, run as a number of replicas.

    Arguments:
        name: tells apart the applications of one project.
        image: as the platform knows it.
        command: what the image is given to run (its CMD), as words or as a shell would read it;
            nothing leaves it to the image.
        volumes: block storage of each replica.
        env: environment variables.
        ports: ports on the outside to ports of the application.
        replicas: how many run; 0 keeps the application's data and runs nothing.
    """

    name: str
    image: str
    command: Sequence[str] | str = ""
    volumes: Sequence[Volume] = ()
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ports: Mapping[int, int] = dataclasses.field(default_factory=dict)
    replicas: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "volumes", tuple(self.volumes))
        checked_name(self.name, "an application")
        if not self.image or self.image != self.image.strip():
            raise InvalidArgument(f"application {self.name}: {shown(self.image)} is no image")
        if not 0 <= self.replicas <= MAX_REPLICAS:
            raise InvalidArgument(
                f"application {self.name} cannot have {shown(self.replicas)} replicas: give 0 to "
                f"{MAX_REPLICAS}"
            )
        for what, values in (
            ("name", [volume.name for volume in self.volumes]),
            ("path", [volume.path for volume in self.volumes]),
        ):
            for value in values:
                if values.count(value) > 1:
                    raise InvalidArgument(
                        f"application {self.name} has two volumes with the {what} {shown(value)}"
                    )
        self._check_command()
        self._check_env()
        self._check_ports()

    def _check_command(self) -> None:
        try:
            words = self.words
        except ValueError as error:
            raise InvalidArgument(
                f"application {self.name}: the command cannot be read as a shell would ({error}): "
                f"{shown(self.command)}; give it as a list of words"
            ) from error
        for text in (*words, *self.env.values()):
            if "\0" in text:
                raise InvalidArgument(
                    f"application {self.name}: {shown(text)} holds a zero byte, which no program "
                    "can be given in its command or environment"
                )

    def _check_env(self) -> None:
        for name in self.env:
            if not ENV_NAME.fullmatch(name):
                raise InvalidArgument(
                    f"application {self.name}: {shown(name)} is no name of an environment variable"
                )

    def _check_ports(self) -> None:
        for port in [*self.ports, *self.ports.values()]:
            if not 0 < port <= MAX_PORT:
                raise InvalidArgument(f"application {self.name}: {shown(port)} is no port")

    @property
    def words(self) -> list[str]:
        """Return the command as words."""
        return shlex.split(self.command) if isinstance(self.command, str) else list(self.command)


def replica_name(project: str, app: str, ordinal: int) -> str:
    """Name a replica; see the module."""
    return f"{project}-{app}-{ordinal}"


def volume_name(project: str, app: str, volume: str, ordinal: int) -> str:
    """Name the volume of a replica; see the module."""
    return f"{project}-{app}-{volume}-{ordinal}"


def check_names(project: str, app: ContainerApp) -> None:
    """Raise InvalidArgument if names that are made of several would be too long for DNS."""
    for volume in ("", *(volume.name for volume in app.volumes)):
        name = volume_name(project, app.name, volume, max(app.replicas, 1))
        if len(name) > MAX_LABEL:
            raise InvalidArgument(
                f"'{name}' has more than {MAX_LABEL} characters: choose shorter names for the "
                "project, the application or the volume"
            )
