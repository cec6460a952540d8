"""Applications as Kubernetes objects.

Owns what is applied; knows neither a cluster nor the client library. An application becomes::

    with volumes       StatefulSet PROJECT-APP, a Service PROJECT-APP-replicas without an address,
                       that gives each replica a name, and for each replica that runs and each
                       volume the PersistentVolumeClaim that the StatefulSet looks for:
                       VOLUME-PROJECT-APP-ORDINAL
    without volumes    Deployment PROJECT-APP
    with ports         Service PROJECT-APP

Claims are made beside the StatefulSet, not by it alone: so their size can be raised later. Objects
say whose they are in the labels that Kubernetes recommends, and claims are never owned by what uses
them: deleting a StatefulSet deletes no data.
"""

from __future__ import annotations

from typing import Any, Final

from nbdstore.orchestration.app import ContainerApp, Volume, replica_name

Json = dict[str, Any]

MANAGER: Final = "nbdstore"
MANAGED_BY: Final = "app.kubernetes.io/managed-by"
PROJECT: Final = "app.kubernetes.io/part-of"
APP: Final = "app.kubernetes.io/name"
SNAPSHOT_GROUP: Final = "snapshot.storage.k8s.io"


def object_name(project: str, app: ContainerApp) -> str:
    """Name the objects of an application."""
    return f"{project}-{app.name}"


def labels(project: str, app: str) -> dict[str, str]:
    """Return the labels that every object of an application has."""
    return {MANAGED_BY: MANAGER, PROJECT: project, APP: app}


def selector(project: str, app: str | None = None) -> str:
    """Return what selects the objects of a project, or of one of its applications."""
    wanted = {MANAGED_BY: MANAGER, PROJECT: project} | ({APP: app} if app is not None else {})
    return ",".join(f"{key}={value}" for key, value in wanted.items())


def manifests(project: str, app: ContainerApp) -> list[Json]:
    """Return the objects of an application, each after those that it needs."""
    found = [
        claim(project, app, volume, ordinal)
        for ordinal in range(app.replicas)
        for volume in app.volumes
    ]
    if app.ports:
        found.append(service(project, app))
    if app.volumes:
        found.append(replicas_service(project, app))
    found.append(stateful_set(project, app) if app.volumes else deployment(project, app))
    return found


def claim(project: str, app: ContainerApp, volume: Volume, ordinal: int) -> Json:
    """Return the claim of a replica's volume, under the name that its StatefulSet looks for."""
    name = f"{volume.name}-{replica_name(project, app.name, ordinal)}"
    return _object("v1", "PersistentVolumeClaim", project, app, name, _claim_spec(volume))


def _claim_spec(volume: Volume) -> Json:
    spec: Json = {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": storage_class(volume),
        "resources": {"requests": {"storage": str(volume.size_bytes)}},
    }
    if volume.clone:
        origin = {"apiGroup": SNAPSHOT_GROUP, "kind": "VolumeSnapshot", "name": volume.clone}
        spec["dataSource"] = origin
    return spec


def storage_class(volume: Volume) -> str:
    """Name the storage class, which on Kubernetes decides the filesystem: ``nbdstore-xfs``."""
    return f"{volume.driver}-{volume.fs}" if volume.fs else volume.driver


def service(project: str, app: ContainerApp) -> Json:
    """Return the service by whose address, and at whose ports, the application is reached."""
    ports = [
        {"name": f"port-{port}", "port": port, "targetPort": inside, "protocol": "TCP"}
        for port, inside in app.ports.items()
    ]
    spec = {"selector": labels(project, app.name), "ports": ports}
    return _object("v1", "Service", project, app, object_name(project, app), spec)


def replicas_service(project: str, app: ContainerApp) -> Json:
    """Return the service that gives replicas which differ names of their own.

    It is not the one with the ports: without an address there is nothing that maps them.
    """
    spec = {"selector": labels(project, app.name), "clusterIP": "None"}
    return _object("v1", "Service", project, app, replicas_service_name(project, app), spec)


def replicas_service_name(project: str, app: ContainerApp) -> str:
    """Name the service of a StatefulSet, which Kubernetes does not let it change."""
    return f"{object_name(project, app)}-replicas"


def stateful_set(project: str, app: ContainerApp) -> Json:
    """Return the workload whose replicas keep their names and volumes."""
    name = object_name(project, app)
    templates = [
        {
            "metadata": {"name": volume.name, "labels": labels(project, app.name)},
            "spec": _claim_spec(volume),
        }
        for volume in app.volumes
    ]
    spec = _workload_spec(project, app) | {
        "serviceName": replicas_service_name(project, app),
        "volumeClaimTemplates": templates,
    }
    return _object("apps/v1", "StatefulSet", project, app, name, spec)


def deployment(project: str, app: ContainerApp) -> Json:
    """Return the workload whose replicas are all alike."""
    name = object_name(project, app)
    return _object("apps/v1", "Deployment", project, app, name, _workload_spec(project, app))


def _workload_spec(project: str, app: ContainerApp) -> Json:
    mine = labels(project, app.name)
    return {
        "replicas": app.replicas,
        "selector": {"matchLabels": mine},
        "template": {"metadata": {"labels": mine}, "spec": {"containers": [_container(app)]}},
    }


def _container(app: ContainerApp) -> Json:
    container: Json = {"name": app.name, "image": app.image}
    if app.words:
        container["args"] = app.words
    if app.env:
        container["env"] = [{"name": name, "value": value} for name, value in app.env.items()]
    if app.ports:
        container["ports"] = [
            {"containerPort": inside, "protocol": "TCP"}
            for inside in dict.fromkeys(app.ports.values())
        ]
    if app.volumes:
        container["volumeMounts"] = [
            {"name": volume.name, "mountPath": volume.path}
            | ({"readOnly": True} if volume.read_only else {})
            for volume in app.volumes
        ]
    return container


def _object(
    version: str, kind: str, project: str, app: ContainerApp, name: str, spec: Json
) -> Json:
    metadata = {"name": name, "labels": labels(project, app.name)}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}
