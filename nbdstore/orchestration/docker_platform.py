"""Applications on a Docker engine, through its API.

Owns what a replica is there: a container, a network of the project in which replicas find each
other by the application's name, and volumes of the driver. A container carries in its labels whose
it is, and a digest of what it was made from; it is replaced when that differs, its volumes never.

`apply` looks first (images, volumes that do not fit), then makes volumes, then containers, each
step such that it can be repeated::

    container  absent               create, start
               of another one       AlreadyExists
               another digest       stop, remove, create, start
               same, not running    start
               same, running        nothing

A volume's options count when it is created; Docker ignores them from then on. If what is asked
differs from what there is, `apply` says so and which command helps, before it changes anything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any, Final

from nbdstore.errors import AlreadyExists, InvalidArgument, NotFound, PlatformError
from nbdstore.orchestration.app import DRIVER, ContainerApp, Volume, replica_name, volume_name
from nbdstore.orchestration.docker_errors import docker_errors, ignoring_missing, import_docker
from nbdstore.orchestration.platform import ContainerStorage, LogLine, ReplicaStatus
from nbdstore.sizes import format_size, parse_size

PROJECT: Final = "nbdstore.project"
APP: Final = "nbdstore.app"
ORDINAL: Final = "nbdstore.ordinal"
DIGEST: Final = "nbdstore.digest"
CALL_TIMEOUT_S: Final = 180
"""A volume driver has 120 s to mount a volume, and a container must wait for all of its own."""
STOP_TIMEOUT_S: Final = 30
"""Seconds that an application gets to stop before it is killed."""
RESTART_POLICY: Final = {"Name": "unless-stopped"}


Json = dict[str, Any]


class DockerPlatform:
    """A Docker engine.

    Arguments:
        url: its address; None is as DOCKER_HOST and Docker's other variables say.
    """

    def __init__(self, url: str | None = None) -> None:
        docker = import_docker()
        with docker_errors("reach the engine"):
            if url is None:
                self._client = docker.from_env(timeout=CALL_TIMEOUT_S)
            else:
                self._client = docker.DockerClient(base_url=url, timeout=CALL_TIMEOUT_S)
            self._api = self._client.api
            try:
                self._api.ping()
            except BaseException:
                self._client.close()
                raise

    def close(self) -> None:
        self._client.close()

    # Platform; see there

    def apply(self, project: str, apps: Sequence[ContainerApp]) -> None:
        for app in apps:
            _check_ports(app)
        images = {app.name: self._image(app) for app in apps}
        for app in apps:
            self._check_made(project, app)
        self._make_network(project)
        for app in apps:
            for ordinal in range(app.replicas):
                for volume in app.volumes:
                    self._make_volume(project, app, volume, ordinal)
                self._make_replica(project, app, ordinal, images[app.name])
            for container in reversed(self._listed(project, [app.name])):
                if _ordinal(container) >= app.replicas:
                    self._remove(container["Id"], _name_of(container))

    def remove(self, project: str, apps: Sequence[str] | None, *, delete_volumes: bool) -> None:
        for container in reversed(self._listed(project, apps)):
            self._remove(container["Id"], _name_of(container))
        if not self._listed(project, None):
            self._remove_network(project)
        if delete_volumes:
            for name in self._volumes_of(project, apps):
                with docker_errors(f"delete volume {name}"):
                    self._api.remove_volume(name)

    def replicas(self, project: str) -> list[tuple[ReplicaStatus, str]]:
        found = []
        for item in self._listed(project, None):
            with ignoring_missing():
                container = self._inspect(item["Id"])
                found.append((_status(container), str(container["Config"]["Image"])))
        return found

    def logs(self, project: str, app: str | None, *, follow: bool) -> Iterator[LogLine]:
        listed = self._listed(project, None if app is None else [app])
        if not follow:
            return (line for item in listed for line in self._lines(item, follow=False))
        return self._followed(listed)

    def containers(self) -> list[ContainerStorage]:
        """See `Platform`. What a container was given is its limit, or what it uses without one."""
        with docker_errors("list the containers"):
            listed = self._api.containers(size=True)
        given = []
        for item in listed:
            with ignoring_missing():
                host_config = self._inspect(item["Id"])["HostConfig"]
                limit = (host_config.get("StorageOpt") or {}).get("size")
                n_bytes = parse_size(limit) if limit else item.get("SizeRw", 0)
                given.append(ContainerStorage(_name_of(item), n_bytes))
        return given

    # Images and networks

    def _image(self, app: ContainerApp) -> str:
        """Return the id of an application's image, pulled if it is not there."""
        for _ in range(2):
            with ignoring_missing(), docker_errors(f"look for image {app.image}"):
                return str(self._api.inspect_image(app.image)["Id"])
            with docker_errors(f"pull image {app.image} of application {app.name}"):
                self._client.images.pull(app.image)
        raise NotFound(f"Docker pulled image {app.image} and does not know it: name it in full")

    def _make_network(self, project: str) -> None:
        with docker_errors("list the networks"):
            found = [item for item in self._api.networks([project]) if item["Name"] == project]
        if not found:
            with docker_errors(f"make network {project}"):
                labels = {PROJECT: project}
                self._api.create_network(project, check_duplicate=True, labels=labels)
        elif (found[0]["Labels"] or {}).get(PROJECT) != project:
            raise AlreadyExists(
                f"there is a network '{project}' that is not of this project: rename the project, "
                f"or remove it with 'docker network rm {project}'"
            )

    def _remove_network(self, project: str) -> None:
        with docker_errors("list the networks"):
            found = self._api.networks(filters={"label": f"{PROJECT}={project}"})
        for network in found:
            with ignoring_missing(), docker_errors(f"remove network {project}"):
                self._api.remove_network(network["Id"])

    # Volumes

    def _check_made(self, project: str, app: ContainerApp) -> None:
        """Raise what forbids to use the containers and volumes of these names that are there.

        Raises:
            AlreadyExists: one is another application's, whose names make the same name.
            InvalidArgument: a volume is not what is asked for.
        """
        for ordinal in range(app.replicas):
            name = replica_name(project, app.name, ordinal)
            with ignoring_missing():
                _check_owner("container", name, self._inspect(name)["Config"], project, app.name)
            for volume in app.volumes:
                name = volume_name(project, app.name, volume.name, ordinal)
                found = self._volume(name)
                if found is not None:
                    # Made by hand, it has no labels, and is who made it to give away.
                    if PROJECT in (found["Labels"] or {}):
                        _check_owner("volume", name, found, project, app.name)
                    _check_volume(name, volume, found)

    def _volume(self, name: str) -> Json | None:
        with ignoring_missing(), docker_errors(f"look at volume {name}"):
            return dict(self._api.inspect_volume(name))
        return None

    def _make_volume(self, project: str, app: ContainerApp, volume: Volume, ordinal: int) -> None:
        name = volume_name(project, app.name, volume.name, ordinal)
        if self._volume(name) is None:
            labels = {PROJECT: project, APP: app.name}
            with docker_errors(f"create volume {name}"):
                self._api.create_volume(name, volume.driver, driver_options(volume), labels)

    def _volumes_of(self, project: str, apps: Sequence[str] | None) -> list[str]:
        with docker_errors("list the volumes"):
            listed = self._api.volumes({"label": f"{PROJECT}={project}"})["Volumes"] or []
        return [
            str(item["Name"])
            for item in sorted(listed, key=lambda item: str(item["Name"]))
            if apps is None or item["Labels"].get(APP) in apps
        ]

    # Containers

    def _listed(self, project: str, apps: Sequence[str] | None) -> list[Json]:
        """List containers of the project, by application and number."""
        with docker_errors("list the containers"):
            listed = self._api.containers(all=True, filters={"label": f"{PROJECT}={project}"})
        mine = [item for item in listed if apps is None or item["Labels"][APP] in apps]
        order = list(apps or ())
        return sorted(
            mine,
            key=lambda item: (
                order.index(item["Labels"][APP]) if apps else 0,
                item["Labels"][APP],
                _ordinal(item),
            ),
        )

    def _inspect(self, container: str) -> Json:
        with docker_errors(f"look at container {container}"):
            return dict(self._api.inspect_container(container))

    def _make_replica(self, project: str, app: ContainerApp, ordinal: int, image_id: str) -> None:
        name = replica_name(project, app.name, ordinal)
        config = container_config(project, app, ordinal)
        digest = hashlib.sha256(json.dumps([config, image_id], sort_keys=True).encode()).hexdigest()
        config["Labels"][DIGEST] = digest
        found: Json | None = None
        with ignoring_missing():
            found = self._inspect(name)
        if found is not None:
            _check_owner("container", name, found["Config"], project, app.name)
            labels = found["Config"]["Labels"]
            if labels.get(DIGEST) != digest or found["State"]["Dead"]:
                self._remove(found["Id"], name)
                found = None
        if found is None:
            with docker_errors(f"create container {name}"):
                found = self._api.create_container_from_config(config, name)
        elif found["State"]["Running"] and not found["State"]["Paused"]:
            return
        self._start(found["Id"], name)

    def _start(self, container: str, name: str) -> None:
        if self._inspect(container)["State"]["Paused"]:
            with docker_errors(f"unpause container {name}"):
                self._api.unpause(container)
            return
        with docker_errors(f"start container {name}"):
            self._api.start(container)

    def _remove(self, container: str, name: str) -> None:
        with ignoring_missing():
            with docker_errors(f"stop container {name}"):
                self._api.stop(container, timeout=STOP_TIMEOUT_S)
            with docker_errors(f"remove container {name}"):
                self._api.remove_container(container)

    # Logs

    def _lines(self, item: Json, *, follow: bool) -> Iterator[LogLine]:
        name = _name_of(item)
        with docker_errors(f"read the log of {name}"):
            stream = self._api.logs(item["Id"], stream=True, follow=follow)
            rest = b""
            for piece in stream:
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    yield LogLine(name, line.decode(errors="replace"))
            if rest:
                yield LogLine(name, rest.decode(errors="replace"))

    def _followed(self, listed: Sequence[Json]) -> Iterator[LogLine]:
        """Yield lines of several containers as they come, until all have ended."""
        queue: SimpleQueue[LogLine | PlatformError | None] = SimpleQueue()

        def read(item: Json) -> None:
            try:
                for line in self._lines(item, follow=True):
                    queue.put(line)
                queue.put(None)
            except PlatformError as error:
                queue.put(error)

        # Daemons: whoever stops reading has no way to end them, and the process may end.
        for item in listed:
            Thread(target=read, args=(item,), daemon=True).start()
        open_streams = len(listed)
        while open_streams:
            got = queue.get()
            if isinstance(got, PlatformError):
                raise got
            if got is None:
                open_streams -= 1
            else:
                yield got


def driver_options(volume: Volume) -> dict[str, str]:
    """Return the options that a volume driver is given; see `docker volume create --help`."""
    own = {"size": str(volume.size_bytes or ""), "fs": volume.fs, "clone": volume.clone}
    given = own if volume.driver == DRIVER else {}
    return {key: value for key, value in (given | dict(volume.options)).items() if value}


def container_config(project: str, app: ContainerApp, ordinal: int) -> Json:
    """Return what the engine's API wants to know to create a container."""
    ports = {f"{inside}/tcp": [{"HostPort": str(port)}] for port, inside in app.ports.items()}
    mounts = [
        {
            "Type": "volume",
            "Source": volume_name(project, app.name, volume.name, ordinal),
            "Target": volume.path,
            "ReadOnly": volume.read_only,
            # An image's files at the path are not copied into block storage.
            "VolumeOptions": {"NoCopy": True, "DriverConfig": {"Name": volume.driver}},
        }
        for volume in app.volumes
    ]
    return {
        "Image": app.image,
        "Cmd": app.words or None,
        "Env": [f"{name}={value}" for name, value in app.env.items()],
        "Labels": {PROJECT: project, APP: app.name, ORDINAL: str(ordinal)},
        "ExposedPorts": {port: {} for port in ports},
        "HostConfig": {
            "Mounts": mounts,
            "PortBindings": ports,
            "RestartPolicy": RESTART_POLICY,
            "NetworkMode": project,
        },
        "NetworkingConfig": {"EndpointsConfig": {project: {"Aliases": [app.name]}}},
    }


def _check_ports(app: ContainerApp) -> None:
    if app.ports and app.replicas > 1:
        port = next(iter(app.ports))
        raise InvalidArgument(
            f"application {app.name} has {app.replicas} replicas, and only one container of a host "
            f"can have port {port}: give one replica or no ports"
        )


def _check_owner(kind: str, name: str, found: Json, project: str, app: str) -> None:
    """Raise AlreadyExists unless what was found is of this application, as its labels say."""
    labels = found["Labels"] or {}
    if (labels.get(PROJECT), labels.get(APP)) == (project, app):
        return
    owner = "not of this project"
    if PROJECT in labels:
        owner = f"of application {labels.get(APP)} of project {labels[PROJECT]}"
    and_data = " and its data" if kind == "volume" else ""
    remove = "docker volume rm" if kind == "volume" else "docker rm"
    raise AlreadyExists(
        f"there is a {kind} '{name}' that is {owner}: rename the project or the application, or "
        f"remove it{and_data} with '{remove} {name}'"
    )


def _check_volume(name: str, volume: Volume, found: Json) -> None:
    """Raise InvalidArgument unless the volume `found` will do for `volume`."""
    if found["Driver"].removesuffix(":latest") != volume.driver:
        raise InvalidArgument(
            f"there is a volume '{name}' of driver {found['Driver']}, not {volume.driver}: "
            f"rename the volume, or remove it and its data with 'docker volume rm {name}'"
        )
    wanted, options = driver_options(volume), found["Options"] or {}
    # What its driver says now, or else what it was created with.
    size = str((found.get("Status") or {}).get("size_bytes") or options.get("size", ""))
    if volume.size_bytes and size and parse_size(size) < volume.size_bytes:
        raise InvalidArgument(
            f"volume {name} has {format_size(parse_size(size))}, and should have "
            f"{format_size(volume.size_bytes)}: 'nbdstore volume resize {name} {volume.size_bytes}'"
        )
    for key in sorted(wanted.keys() - {"size"}):
        if key in options and options[key] != wanted[key]:
            raise InvalidArgument(
                f"volume {name} was created with {key}={options[key]}, and now {key}={wanted[key]} "
                f"is asked for: a volume keeps what it was created with; 'docker volume rm {name}' "
                "removes it and its data"
            )


def _status(container: Mapping[str, Any]) -> ReplicaStatus:
    state, labels = container["State"], container["Config"]["Labels"]
    message = state["Error"]
    if not message and state["Status"] in ("exited", "restarting"):
        message = f"exited with status {state['ExitCode']}"
    return ReplicaStatus(
        name=container["Name"].removeprefix("/"),
        app=labels[APP],
        ordinal=int(labels[ORDINAL]),
        state=state["Status"],
        since=state["StartedAt"],
        restarts=container["RestartCount"],
        message=message,
    )


def _name_of(item: Json) -> str:
    return str(item["Names"][0]).removeprefix("/")


def _ordinal(item: Json) -> int:
    return int(item["Labels"][ORDINAL])
