"""Applications on a Kubernetes cluster, through its API.

Owns how the objects of `manifests` get there: by server-side apply, which creates or changes an
object to what it should be and may be repeated. All objects are tried with a dry run first, so what
the cluster refuses is refused before anything is changed, and what it would not change is left
alone (an API server may give an object a new version for nothing).

What Kubernetes does not change in place: a StatefulSet's claim templates and the name of its
service, and whether a service has an address. If they differ, the object is deleted and made anew
once it is gone; a StatefulSet's pods are left running (propagation "Orphan") and adopted. The
claims themselves can grow, once they are bound.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from types import ModuleType
from typing import Any, Final

from nbdstore.errors import AlreadyExists, InvalidArgument, PlatformError
from nbdstore.orchestration import manifests
from nbdstore.orchestration.app import ContainerApp
from nbdstore.orchestration.manifests import Json
from nbdstore.orchestration.platform import ContainerStorage, LogLine, ReplicaStatus

CALL_TIMEOUT_S: Final = 60
QUANTITY: Final = re.compile(r"([0-9.]+(?:[eE][0-9]+)?)(m|[kKMGTPE]i?)?", re.ASCII)
APPLY: Final = "application/apply-patch+yaml"

PATHS: Final = {
    "PersistentVolumeClaim": "/api/v1/namespaces/{}/persistentvolumeclaims",
    "Service": "/api/v1/namespaces/{}/services",
    "StatefulSet": "/apis/apps/v1/namespaces/{}/statefulsets",
    "Deployment": "/apis/apps/v1/namespaces/{}/deployments",
    "Pod": "/api/v1/namespaces/{}/pods",
}
WORKLOADS: Final = ("StatefulSet", "Deployment")
BOOKS: Final = ("managedFields", "resourceVersion", "generation")
GOING_TIMEOUT_S: Final = 60
GOING_POLL_S: Final = 0.2


def import_kubernetes() -> ModuleType:
    """Return the client library.

    Raises:
        InvalidArgument: it is not installed.
    """
    try:
        import kubernetes
    except ImportError as error:
        raise InvalidArgument(
            "Kubernetes' client library is not installed: pip install 'nbdstore[kubernetes]'"
        ) from error
    return kubernetes


class KubernetesPlatform:
    """A namespace of a cluster.

    Arguments:
        configuration: of the client library; None is that of a pod or of ``~/.kube/config``.
        namespace: None is the context's.
    """

    def __init__(self, configuration: Any = None, namespace: str | None = None) -> None:
        kubernetes = import_kubernetes()
        self._exceptions = kubernetes.client.exceptions
        if configuration is None:
            configuration, found = _configuration(kubernetes)
            namespace = namespace or found
        self._client = kubernetes.client.ApiClient(configuration)
        self._namespace = namespace or "default"

    def close(self) -> None:
        self._client.close()

    # Platform; see there

    def apply(self, project: str, apps: Sequence[ContainerApp]) -> None:
        wanted = [(app, manifests.manifests(project, app)) for app in apps]
        for_change = [[item for item in items if self._would_change(item)] for _, items in wanted]
        for (app, items), changed in zip(wanted, for_change, strict=True):
            for item in changed:
                self._make_way(item)
                self._apply(item)
            self._prune(project, app, items)

    def remove(self, project: str, apps: Sequence[str] | None, *, delete_volumes: bool) -> None:
        kinds = [*WORKLOADS, "Service", *(["PersistentVolumeClaim"] if delete_volumes else [])]
        for kind in kinds:
            for item in self._list(kind, manifests.selector(project)):
                if apps is None or item["metadata"]["labels"][manifests.APP] in apps:
                    self._delete(kind, item["metadata"]["name"])

    def replicas(self, project: str) -> list[tuple[ReplicaStatus, str]]:
        listed = self._list("Pod", manifests.selector(project))
        places: dict[str, int] = {}
        found = []
        for pod in sorted(listed, key=lambda pod: str(pod["metadata"]["name"])):
            app = pod["metadata"]["labels"][manifests.APP]
            places[app] = places.get(app, -1) + 1
            found.append((_status(pod, app, places[app]), pod["spec"]["containers"][0]["image"]))
        return found

    def logs(self, project: str, app: str | None, *, follow: bool) -> Iterator[LogLine]:
        pods = self._list("Pod", manifests.selector(project, app))
        if follow and len(pods) != 1:
            raise InvalidArgument(
                f"{len(pods)} pods: the log of one can be followed; name its application, or use "
                f"'kubectl logs --follow --selector {manifests.selector(project, app)}'"
            )
        return (line for pod in pods for line in self._lines(pod["metadata"]["name"], follow))

    def containers(self) -> list[ContainerStorage]:
        """See `Platform`; of the namespace. What a container was given is its limit for ephemeral
        storage, or what it requested; without either nothing was promised to it."""
        return [
            ContainerStorage(f"{pod['metadata']['name']}/{container['name']}", _given(container))
            for pod in self._list("Pod", "")
            if pod.get("status", {}).get("phase") == "Running"
            for container in pod["spec"]["containers"]
        ]

    # Objects

    def _path(self, kind: str, name: str = "") -> str:
        path = PATHS[kind].format(self._namespace)
        return f"{path}/{name}" if name else path

    def _get(self, kind: str, name: str) -> Json | None:
        with self._errors(f"look at {kind} {name}", missing_is_fine=True):
            return self._call("GET", self._path(kind, name))
        return None

    def _list(self, kind: str, selector: str) -> list[Json]:
        with self._errors(f"list objects of kind {kind}"):
            query = {"labelSelector": selector} if selector else {}
            return list(self._call("GET", self._path(kind), query).get("items") or [])

    def _would_change(self, item: Json) -> bool:
        """Return whether an object is not there as it should be; raise if it cannot be."""
        found = self._get(item["kind"], item["metadata"]["name"])
        _check_owner(item, found)
        if found is not None and (_is_going(found) or _must_be_replaced(item, found)):
            return True
        return _essence(self._apply(item, dry_run=True)) != _essence(found)

    def _make_way(self, item: Json) -> None:
        """Delete what cannot be changed to what it should be, and wait until nothing goes away."""
        kind, name = item["kind"], item["metadata"]["name"]
        found = self._get(kind, name)
        if found is not None and not _is_going(found) and _must_be_replaced(item, found):
            self._delete(kind, name, propagation="Orphan")
            found = self._get(kind, name)
        deadline_s = time.monotonic() + GOING_TIMEOUT_S
        while found is not None and _is_going(found):
            if time.monotonic() > deadline_s:
                raise PlatformError(
                    f"{kind} {name} is being deleted, and not gone after {GOING_TIMEOUT_S} s: "
                    f"'kubectl describe {kind.lower()} {name}' tells what holds it; do it again "
                    "when it is gone"
                )
            time.sleep(GOING_POLL_S)
            found = self._get(kind, name)

    def _apply(self, item: Json, *, dry_run: bool = False) -> Json:
        """Create or change an object, or only try to; return what it is then."""
        name = item["metadata"]["name"]
        query = {"fieldManager": manifests.MANAGER, "force": "true"}
        if dry_run:
            query["dryRun"] = "All"
        path = self._path(item["kind"], name)
        with self._errors(f"apply {item['kind']} {name}"):
            return self._call("PATCH", path, query, item, content_type=APPLY)

    def _delete(self, kind: str, name: str, *, propagation: str = "Background") -> None:
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": propagation}
        with self._errors(f"delete {kind} {name}", missing_is_fine=True):
            self._call("DELETE", self._path(kind, name), body=body)

    def _prune(self, project: str, app: ContainerApp, items: Sequence[Json]) -> None:
        """Delete what an application was before: a workload of the other kind, other services."""
        wanted = {(item["kind"], item["metadata"]["name"]) for item in items}
        for kind in (*WORKLOADS, "Service"):
            for item in self._list(kind, manifests.selector(project, app.name)):
                if (kind, item["metadata"]["name"]) not in wanted:
                    self._delete(kind, item["metadata"]["name"])

    def _call(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        body: Json | None = None,
        *,
        content_type: str = "application/json",
    ) -> Json:
        response = self._send(method, path, query, body, content_type=content_type)
        return dict(json.loads(response.read()))

    def _send(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        body: Json | None = None,
        *,
        content_type: str = "application/json",
    ) -> Any:
        """Return the answer's head, its content unread; raise the client's ApiException if bad."""
        request = self._client.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params={"Accept": "application/json", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        answer = self._client.call_api(*request, _request_timeout=CALL_TIMEOUT_S)
        if not 200 <= answer.status < 300:
            answer.read()
            self._client.response_deserialize(answer, {})
        return answer

    def _lines(self, pod: str, follow: bool) -> Iterator[LogLine]:
        query = {"follow": "true"} if follow else {}
        with self._errors(f"read the log of {pod}"):
            answer = self._send("GET", self._path("Pod", pod) + "/log", query)
            rest = b""
            for piece in answer.response.stream():
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    yield LogLine(pod, line.decode(errors="replace"))
            if rest:
                yield LogLine(pod, rest.decode(errors="replace"))

    @contextlib.contextmanager
    def _errors(self, doing: str, *, missing_is_fine: bool = False) -> Iterator[None]:
        """Turn what the client library raises into PlatformError."""
        import urllib3.exceptions

        try:
            yield
        except self._exceptions.ApiException as error:
            if missing_is_fine and error.status == 404:
                return
            raise PlatformError(f"Kubernetes cannot {doing}: {_reason(error)}") from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise PlatformError(
                f"cannot {doing}: the cluster does not answer ({error}): do it again, which "
                "completes what was begun"
            ) from error


def _configuration(kubernetes: ModuleType) -> tuple[Any, str | None]:
    """Return the client's configuration and the namespace, from a pod or ``~/.kube/config``."""
    configuration = kubernetes.client.Configuration()
    config = kubernetes.config
    loaders: list[Callable[[], Any]] = [
        lambda: config.load_incluster_config(client_configuration=configuration),
        lambda: config.load_kube_config(client_configuration=configuration),
    ]
    for load in loaders:
        with contextlib.suppress(config.ConfigException):
            load()
            with contextlib.suppress(config.ConfigException):
                context = config.list_kube_config_contexts()[1]["context"]
                return configuration, context.get("namespace")  # a context may be without
            return configuration, None
    raise InvalidArgument(
        "no Kubernetes cluster is configured: set KUBECONFIG, or run inside a cluster"
    )


def _check_owner(item: Json, found: Json | None) -> None:
    """Raise AlreadyExists if the object that is there is not of this application."""
    if found is None:
        return
    of = found["metadata"].get("labels") or {}
    if all(of.get(key) == value for key, value in item["metadata"]["labels"].items()):
        return
    owner = "not of this project"
    if of.get(manifests.MANAGED_BY) == manifests.MANAGER:
        owner = f"of application {of.get(manifests.APP)} of project {of.get(manifests.PROJECT)}"
    kind, name = item["kind"], item["metadata"]["name"]
    raise AlreadyExists(
        f"there is a {kind} '{name}' that is {owner}: rename the project or the application, or "
        f"delete it with 'kubectl delete {kind.lower()} {name}'"
    )


def _is_going(found: Json) -> bool:
    """Return whether an object was deleted, and is there until something lets go of it."""
    return "deletionTimestamp" in found["metadata"]


def _essence(found: Json | None) -> Json | None:
    """Return an object without the cluster's books on it, which change by themselves."""
    if found is None:
        return None
    metadata = {key: it for key, it in found["metadata"].items() if key not in BOOKS}
    return {key: it for key, it in found.items() if key != "status"} | {"metadata": metadata}


def _must_be_replaced(item: Json, found: Json) -> bool:
    """Return whether Kubernetes refuses to change an object in place; see the module."""
    wanted, there = item["spec"], found["spec"]
    if item["kind"] == "Service":
        return bool(wanted.get("clusterIP") == "None") != bool(there.get("clusterIP") == "None")
    if item["kind"] != "StatefulSet":
        return False
    templates = [it.get("volumeClaimTemplates") or [] for it in (wanted, there)]
    claimed = [[_claimed(it) for it in listed] for listed in templates]
    return claimed[0] != claimed[1] or bool(wanted["serviceName"] != there["serviceName"])


def _claimed(template: Json) -> tuple[str, str, int, str | None]:
    """Return what a claim template asks for; a cluster adds defaults, and writes sizes its way."""
    spec = template["spec"]
    return (
        template["metadata"]["name"],
        spec["storageClassName"],
        parse_quantity(spec["resources"]["requests"]["storage"]),
        (spec.get("dataSource") or {}).get("name"),
    )


def _status(pod: Json, app: str, place: int) -> ReplicaStatus:
    """Tell how a pod is. A pod of a Deployment has no number: its place among its like is told."""
    status = pod.get("status") or {}
    (container, *_) = status.get("containerStatuses") or [{}]
    state = str(status.get("phase", "Pending")).lower()
    message = str(status.get("message") or status.get("reason") or "")
    for kind in ("waiting", "terminated"):
        if found := (container.get("state") or {}).get(kind):
            state = str(found.get("reason") or kind)
            message = str(found.get("message") or message)
    tail = pod["metadata"]["name"].rpartition("-")[2]
    return ReplicaStatus(
        name=pod["metadata"]["name"],
        app=app,
        ordinal=int(tail) if tail.isdigit() else place,
        state=state,
        since=str(status.get("startTime", "")),
        restarts=int(container.get("restartCount", 0)),
        message=message,
    )


def _given(container: Json) -> int:
    resources = container.get("resources") or {}
    for kind in ("limits", "requests"):
        if quantity := (resources.get(kind) or {}).get("ephemeral-storage"):
            return parse_quantity(str(quantity))
    return 0


def parse_quantity(text: str) -> int:
    """Read a quantity of bytes as Kubernetes writes it: ``2Gi`` is 2^31, ``2G`` 2 x 10^9."""
    match = QUANTITY.fullmatch(text)
    if match is None:
        raise PlatformError(f"Kubernetes told '{text}' where a quantity belongs")
    number, unit = match.groups()
    if unit is None:
        return int(Decimal(number))
    if unit == "m":
        return int(Decimal(number) / 1000)
    base = 1024 if unit.endswith("i") else 1000
    return int(Decimal(number) * base ** ("KMGTPE".index(unit[0].upper()) + 1))


def _reason(error: Any) -> str:
    """Return what the API's answer says, or else the HTTP reason."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        # What follows the first line compares the objects as a program would print them.
        return str(json.loads(error.body)["message"]).partition("\n")[0]
    return f"{error.status} {error.reason}"
