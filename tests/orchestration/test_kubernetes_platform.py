"""Applications on Kubernetes: what is applied, and failures in the middle; see `api_server`."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes
import kubernetes_validate
import pytest

from nbdstore.errors import AlreadyExists, InvalidArgument, PlatformError
from nbdstore.orchestration import ContainerApp, Orchestration, Volume, kubernetes_platform
from nbdstore.orchestration.kubernetes_platform import KubernetesPlatform, parse_quantity
from nbdstore.orchestration.manifests import manifests
from tests.orchestration.api_server import SCHEMA_VERSIONS, ApiServer

DATA = Volume("data", "/data", size="10G", fs="xfs")
DATABASE = ContainerApp(
    "db",
    "postgres:16",
    command="postgres -c fsync=on",
    volumes=[DATA, Volume("old", "/old", clone="nightly", read_only=True)],
    env={"POSTGRES_PASSWORD": "secret"},
    ports={5432: 5432},
    replicas=2,
)
WEB = ContainerApp("web", "web:1", ports={80: 8080, 443: 8443}, replicas=3)
WORKER = ContainerApp("worker", "web:1", replicas=0)


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with ApiServer() as api:
        yield api


@pytest.fixture
def platform(api: ApiServer) -> Iterator[KubernetesPlatform]:
    configuration = kubernetes.client.Configuration(host=api.url)
    configuration.retries = False
    platform = KubernetesPlatform(configuration, "shop")
    yield platform
    platform.close()


def start(platform: KubernetesPlatform, *apps: ContainerApp) -> Orchestration:
    orchestration = Orchestration(platform, name="shop")
    for app in apps:
        orchestration.add_container_app(app)
    orchestration.start()
    return orchestration


def contents(api: ApiServer) -> dict[tuple[str, str, str], Any]:
    """Return what objects there are, without their versions."""
    found = copy.deepcopy(api.objects)
    for item in found.values():
        del item["metadata"]["resourceVersion"]
    return found


def pod(name: str, app: str, phase: str, **container: Any) -> dict[str, Any]:
    labels = {
        "app.kubernetes.io/managed-by": "nbdstore",
        "app.kubernetes.io/part-of": "shop",
        "app.kubernetes.io/name": app,
    }
    status = {"restartCount": 1, "name": app, **container}
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {"containers": [{"name": app, "image": "postgres:16"}]},
        "status": {"phase": phase, "containerStatuses": [status]},
    }


@pytest.mark.parametrize("version", SCHEMA_VERSIONS)
@pytest.mark.parametrize("app", [DATABASE, WEB, WORKER], ids=lambda app: app.name)
def test_manifests_are_what_the_published_schemas_allow(app: ContainerApp, version: str) -> None:
    objects = manifests("shop", app)
    for item in objects:
        kubernetes_validate.validate(item, version, strict=True)
    workload = objects[-1]
    workload["spec"]["replica"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(workload, version, strict=True)


def test_claims_have_the_names_that_a_stateful_set_looks_for() -> None:
    objects = manifests("shop", DATABASE)
    claims = [item for item in objects if item["kind"] == "PersistentVolumeClaim"]
    assert [claim["metadata"]["name"] for claim in claims] == [
        *("data-shop-db-0", "old-shop-db-0", "data-shop-db-1", "old-shop-db-1"),
    ]
    assert claims[0]["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "nbdstore-xfs",
        "resources": {"requests": {"storage": str(10 << 30)}},
    }
    assert claims[1]["spec"]["dataSource"]["name"] == "nightly"
    stateful_set = objects[-1]
    assert stateful_set["metadata"]["name"] == "shop-db"
    assert stateful_set["spec"]["serviceName"] == "shop-db-replicas"


def test_start_is_idempotent_and_stop_keeps_the_claims(
    api: ApiServer, platform: KubernetesPlatform
) -> None:
    shop = start(platform, DATABASE, WEB)
    objects = copy.deepcopy(api.objects)
    assert api.names("statefulsets") == ["shop-db"]
    assert api.names("deployments") == ["shop-web"]
    assert api.names("services") == ["shop-db", "shop-db-replicas", "shop-web"]
    shop.start()
    assert api.objects == objects
    shop.scale("db", 3)
    assert "data-shop-db-2" in api.names("persistentvolumeclaims")
    assert api.objects["shop", "statefulsets", "shop-db"]["spec"]["replicas"] == 3
    shop.stop()
    assert {kind for _, kind, _ in api.objects} == {"persistentvolumeclaims"}
    shop.stop(delete_volumes=True)
    assert api.objects == {}


def test_a_larger_volume_replaces_the_stateful_set_and_keeps_its_pods(
    api: ApiServer, platform: KubernetesPlatform
) -> None:
    start(platform, ContainerApp("db", "db:1", volumes=[DATA]))
    api.expect()
    start(platform, ContainerApp("db", "db:1", volumes=[Volume("data", "/data", "20G", "xfs")]))
    assert api.calls == [
        "PATCH persistentvolumeclaims/data-shop-db-0",
        "DELETE statefulsets/shop-db",
        "PATCH statefulsets/shop-db",
    ]
    claim = api.objects["shop", "persistentvolumeclaims", "data-shop-db-0"]
    assert claim["spec"]["resources"]["requests"]["storage"] == str(20 << 30)


def test_an_application_is_what_it_should_be_and_no_more_what_it_was(
    api: ApiServer, platform: KubernetesPlatform
) -> None:
    for app, deployments, sets, services in (
        (ContainerApp("db", "db:1"), ["shop-db"], [], []),
        (ContainerApp("db", "db:1", volumes=[DATA]), [], ["shop-db"], ["shop-db-replicas"]),
        (
            ContainerApp("db", "db:1", volumes=[DATA], ports={80: 80}),
            *([], ["shop-db"], ["shop-db", "shop-db-replicas"]),
        ),
        (ContainerApp("db", "db:1", ports={80: 80}), ["shop-db"], [], ["shop-db"]),
    ):
        start(platform, app)
        assert api.names("deployments") == deployments
        assert api.names("statefulsets") == sets
        assert api.names("services") == services
    assert api.names("persistentvolumeclaims") == ["data-shop-db-0"]


def test_ports_are_those_of_a_service_with_an_address() -> None:
    """A service without one names its pods, and maps no ports."""
    objects = manifests("shop", ContainerApp("db", "db:1", volumes=[DATA], ports={15432: 5432}))
    services = [item["spec"] for item in objects if item["kind"] == "Service"]
    assert [spec.get("clusterIP") for spec in services] == [None, "None"]
    assert services[0]["ports"][0]["port"] == 15432
    assert services[0]["ports"][0]["targetPort"] == 5432


def test_a_service_that_had_no_address_gets_one(
    api: ApiServer, platform: KubernetesPlatform
) -> None:
    app = ContainerApp("web", "web:1", ports={80: 8080})
    start(platform, app)
    api.objects["shop", "services", "shop-web"]["spec"]["clusterIP"] = "None"
    start(platform, app)
    assert "clusterIP" not in api.objects["shop", "services", "shop-web"]["spec"]


def test_a_size_that_the_cluster_writes_another_way_is_the_same_size(
    api: ApiServer, platform: KubernetesPlatform
) -> None:
    app = ContainerApp("db", "db:1", volumes=[Volume("data", "/data", size=5 * 10**9)])
    start(platform, app)
    claim = api.objects["shop", "persistentvolumeclaims", "data-shop-db-0"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "5G"
    api.expect()
    start(platform, app)
    assert api.calls == []


def test_what_does_not_go_away_is_told(
    api: ApiServer, platform: KubernetesPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_platform, "GOING_TIMEOUT_S", 0)
    start(platform, ContainerApp("db", "db:1", volumes=[DATA]))
    api.lingers = 1000
    larger = ContainerApp("db", "db:1", volumes=[Volume("data", "/data", "20G", "xfs")])
    with pytest.raises(PlatformError, match="kubectl describe statefulset shop-db"):
        start(platform, larger)
    # It goes at last: what was begun is completed.
    api.objects["shop", "statefulsets", "shop-db"]["metadata"]["lingers"] = 0
    start(platform, larger)
    assert "deletionTimestamp" not in api.objects["shop", "statefulsets", "shop-db"]["metadata"]


def test_another_filesystem_of_a_claim_is_refused_in_a_line(
    api: ApiServer, platform: KubernetesPlatform
) -> None:
    start(platform, ContainerApp("db", "db:1", volumes=[DATA]))
    api.expect()
    other = ContainerApp("db", "db:1", volumes=[Volume("data", "/data", "10G", "ext4")])
    with pytest.raises(PlatformError, match=r"storageClassName: Forbidden.*immutable$"):
        start(platform, other)
    assert api.calls == []


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_second_start_completes_what_any_failure_interrupted(
    api: ApiServer, platform: KubernetesPlatform, done: bool
) -> None:
    larger = ContainerApp("db", "db:2", volumes=[Volume("data", "/data", "20G", "xfs")])
    smaller = ContainerApp("db", "db:1", volumes=[DATA], replicas=2)
    for before, after in (([], [smaller, WEB]), ([smaller], [larger])):
        api.objects.clear()
        start(platform, *before)
        api.expect()
        start(platform, *after)
        n_calls, whole = len(api.calls), contents(api)
        for fails in range(1, n_calls + 1):
            api.expect()
            api.objects.clear()
            start(platform, *before)
            api.expect(fails, done=done)
            with pytest.raises(PlatformError, match="do it again"):
                start(platform, *after)
            api.expect()
            start(platform, *after)
            assert contents(api) == whole


def test_what_the_cluster_refuses_is_refused_before_anything_is_made(
    api: ApiServer, platform: KubernetesPlatform
) -> None:
    api.refuses = "shop-db"
    with pytest.raises(PlatformError, match="forbidden: exceeded quota"):
        start(platform, WEB, DATABASE)
    assert api.objects == {}


def test_objects_of_others_are_left_alone(api: ApiServer, platform: KubernetesPlatform) -> None:
    api.objects["shop", "services", "shop-web"] = {"metadata": {"name": "shop-web"}, "spec": {}}
    with pytest.raises(AlreadyExists, match="kubectl delete service shop-web"):
        start(platform, WEB)
    assert api.names("deployments") == []


@pytest.mark.parametrize(
    ("project", "app"),
    [
        ("shop-db", ContainerApp("a", "db:1", volumes=[Volume("data", "/data", size="1G")])),
        ("shop", ContainerApp("db-a-replicas", "db:1", ports={80: 80})),
    ],
)
def test_names_that_fall_together_with_those_of_another_application_are_refused(
    api: ApiServer, platform: KubernetesPlatform, project: str, app: ContainerApp
) -> None:
    data = Volume("data", "/data", size="1G")
    start(platform, ContainerApp("db-a", "db:1", volumes=[data]))
    before = contents(api)
    with (
        Orchestration(platform, name=project) as other,
        pytest.raises(AlreadyExists, match="is of application db-a of project shop: rename the"),
    ):
        other.add_container_app(app)
        other.start()
    assert contents(api) == before


def test_status_and_logs_are_those_of_the_pods(
    api: ApiServer, platform: KubernetesPlatform
) -> None:
    shop = start(platform, DATABASE)
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    for made in (
        pod("shop-db-0", "db", "Running", state={"running": {}}),
        pod("shop-db-1", "db", "Pending", state=waiting),
    ):
        api.objects["shop", "pods", made["metadata"]["name"]] = made
        api.logs[made["metadata"]["name"]] = "a line\nanother"
    (status,) = shop.status()
    assert (status.wanted, status.running) == (2, 1)
    assert [(item.ordinal, item.state, item.message) for item in status.replicas] == [
        (0, "running", ""),
        (1, "ImagePullBackOff", "no such image"),
    ]
    lines = [(line.replica, line.text) for line in shop.logs("db")]
    assert lines == [(name, text) for name in api.logs for text in ("a line", "another")]
    with pytest.raises(InvalidArgument, match="2 pods: the log of one can be followed"):
        shop.logs("db", follow=True)


def test_the_platforms_containers_are_counted_with_what_they_were_given(
    api: ApiServer, platform: KubernetesPlatform
) -> None:
    for name, phase, resources in (
        ("a", "Running", {"limits": {"ephemeral-storage": "2Gi"}}),
        ("b", "Running", {"requests": {"ephemeral-storage": "1G"}}),
        ("c", "Running", {}),
        ("d", "Succeeded", {"limits": {"ephemeral-storage": "2Gi"}}),
    ):
        made = pod(name, "db", phase)
        made["spec"]["containers"][0]["resources"] = resources
        api.objects["shop", "pods", name] = made
    assert [container.bytes for container in platform.containers()] == [2 << 30, 10**9, 0]


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("1024", 1024),
        ("1k", 1000),
        ("1Ki", 1024),
        ("1.5G", 15 * 10**8),
        ("2e3", 2000),
        ("1E", 10**18),
    ],
)
def test_quantities(text: str, n_bytes: int) -> None:
    assert parse_quantity(text) == n_bytes


def test_a_cluster_that_is_away_is_told() -> None:
    configuration = kubernetes.client.Configuration(host="http://127.0.0.1:1")
    configuration.retries = False
    with pytest.raises(PlatformError, match="the cluster does not answer"):
        start(KubernetesPlatform(configuration), WEB)


@pytest.mark.parametrize("namespace", ["", "shop"])
def test_the_namespace_is_that_of_the_context_or_the_default(
    api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, namespace: str
) -> None:
    context = {"cluster": "c", "user": "u"} | ({"namespace": namespace} if namespace else {})
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "c", "cluster": {"server": api.url}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "here", "context": context}],
    }
    path = tmp_path / "config"
    path.write_text(json.dumps(content))
    monkeypatch.setattr(kubernetes.config.kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    platform = KubernetesPlatform()
    start(platform, WORKER)
    platform.close()
    assert list(api.objects) == [(namespace or "default", "deployments", "shop-worker")]


def test_without_a_configuration_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/none")
    monkeypatch.setattr(kubernetes.config.kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", "/none")
    with pytest.raises(InvalidArgument, match="no Kubernetes cluster is configured"):
        KubernetesPlatform()
