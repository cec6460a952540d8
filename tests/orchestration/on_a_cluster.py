"""Applications on a real Kubernetes control plane: `make kubernetes-test`, and not in CI.

CI has the stand-in of `api_server`, since the programs take minutes to make. What the real ones do
otherwise than that, these tests show.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nbdstore.errors import PlatformError
from nbdstore.orchestration import ContainerApp, Orchestration, Volume
from nbdstore.orchestration.kubernetes_platform import KubernetesPlatform
from tests.children import Children
from tests.orchestration.cluster import Cluster, program_directory

pytestmark = [
    pytest.mark.requires("etcd", "openssl"),
    pytest.mark.requires(
        *(str(program_directory() / name) for name in ("kube-apiserver", "kube-controller-manager"))
    ),
    pytest.mark.timeout(180),
]

PATIENCE_S = 30.0
BASES = {
    "persistentvolumeclaims": "/api/v1",
    "services": "/api/v1",
    "pods": "/api/v1",
    "statefulsets": "/apis/apps/v1",
    "deployments": "/apis/apps/v1",
}
DATA = Volume("data", "/data", size="10G", fs="xfs")
DATABASE = ContainerApp(
    "db", "postgres:16", volumes=[DATA], env={"A": "1"}, ports={15432: 5432}, replicas=2
)
WEB = ContainerApp("web", "web:1", ports={80: 8080}, replicas=3)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("cluster")
    with Children(directory) as children:
        cluster = Cluster(children, directory)
        cluster.create("/api/v1/namespaces", {"metadata": {"name": "shop"}})
        storage_class = {"metadata": {"name": "nbdstore-xfs"}, "allowVolumeExpansion": True}
        # Claims are bound to the volumes that are there: the driver is not.
        storage_class["provisioner"] = "kubernetes.io/no-provisioner"
        cluster.create("/apis/storage.k8s.io/v1/storageclasses", storage_class)
        yield cluster


def add_persistent_volume(cluster: Cluster, ordinal: int) -> None:
    """Give the claim of a replica what it can be bound to, once."""
    spec = {
        "capacity": {"storage": "100Gi"},
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "nbdstore-xfs",
        "hostPath": {"path": "/none"},
        "claimRef": {"namespace": "shop", "name": f"data-shop-db-{ordinal}"},
    }
    value = {"metadata": {"generateName": "volume-"}, "spec": spec}
    cluster.create("/api/v1/persistentvolumes", value)


@pytest.fixture
def platform(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesPlatform]:
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(cluster.kubeconfig)
    )
    for ordinal in range(3):
        add_persistent_volume(cluster, ordinal)
    platform = KubernetesPlatform()
    yield platform
    platform.remove("shop", None, delete_volumes=True)
    wait_until(lambda: not objects(cluster, "persistentvolumeclaims", "pods"))
    platform.close()


def objects(cluster: Cluster, *plurals: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the objects of some kinds that there are."""
    return {
        (plural, item["metadata"]["name"]): item
        for plural in plurals
        for item in json.loads(cluster.get(f"{BASES[plural]}/namespaces/shop/{plural}"))["items"]
    }


def wait_until(true: Callable[[], object]) -> None:
    """Wait for what controllers do by themselves."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def start(platform: KubernetesPlatform, *apps: ContainerApp) -> Orchestration:
    orchestration = Orchestration(platform, name="shop")
    for app in apps:
        orchestration.add_container_app(app)
    orchestration.start()
    return orchestration


def is_bound(cluster: Cluster, name: str) -> bool:
    claim = objects(cluster, "persistentvolumeclaims").get(("persistentvolumeclaims", name))
    return claim is not None and claim["status"]["phase"] == "Bound"


def versions(cluster: Cluster) -> dict[tuple[str, str], str]:
    kinds = ("persistentvolumeclaims", "services")
    found = objects(cluster, *kinds)
    described = {key: str(item["metadata"]["resourceVersion"]) for key, item in found.items()}
    # Controllers write into the status of these, which is not part of their generation.
    for key, item in objects(cluster, "statefulsets", "deployments").items():
        described[key] = f"{item['metadata']['uid']} {item['metadata']['generation']}"
    return described


def test_start_again_changes_nothing_and_what_changes_is_only_that(
    cluster: Cluster, platform: KubernetesPlatform
) -> None:
    shop = start(platform, DATABASE, WEB)
    wait_until(lambda: is_bound(cluster, "data-shop-db-0") and is_bound(cluster, "data-shop-db-1"))
    first = versions(cluster)
    assert sorted(first) == [
        ("deployments", "shop-web"),
        ("persistentvolumeclaims", "data-shop-db-0"),
        ("persistentvolumeclaims", "data-shop-db-1"),
        ("services", "shop-db"),
        ("services", "shop-db-replicas"),
        ("services", "shop-web"),
        ("statefulsets", "shop-db"),
    ]
    shop.start()
    assert versions(cluster) == first
    start(platform, dataclasses.replace(DATABASE, image="postgres:17", env={"A": "2"}), WEB)
    second = versions(cluster)
    assert [key for key in first if first[key] != second[key]] == [("statefulsets", "shop-db")]
    shop.scale("web", 1)
    third = versions(cluster)
    assert [key for key in first if second[key] != third[key]] == [("deployments", "shop-web")]
    shop.scale("db", 3)
    assert ("persistentvolumeclaims", "data-shop-db-2") in versions(cluster)


def test_pods_use_the_claims_and_are_told(cluster: Cluster, platform: KubernetesPlatform) -> None:
    shop = start(platform, DATABASE, WEB)
    wait_until(lambda: len(objects(cluster, "pods")) == 4)
    pod = objects(cluster, "pods")["pods", "shop-db-0"]
    (volume,) = [item for item in pod["spec"]["volumes"] if item["name"] == "data"]
    assert volume["persistentVolumeClaim"]["claimName"] == "data-shop-db-0"
    states = {status.name: [it.state for it in status.replicas] for status in shop.status()}
    assert states == {"db": ["pending"], "web": ["pending"] * 3}
    shop.stop()
    wait_until(lambda: not objects(cluster, "pods"))
    assert {kind for kind, _ in versions(cluster)} == {"persistentvolumeclaims"}


def test_a_larger_volume_grows_its_claim_and_keeps_the_pod(
    cluster: Cluster, platform: KubernetesPlatform
) -> None:
    database = dataclasses.replace(DATABASE, replicas=1)
    start(platform, database)
    wait_until(lambda: is_bound(cluster, "data-shop-db-0") and objects(cluster, "pods"))
    before = objects(cluster, "pods", "statefulsets")
    larger = dataclasses.replace(database, volumes=[dataclasses.replace(DATA, size="20G")])
    start(platform, larger)
    after = objects(cluster, "pods", "statefulsets", "persistentvolumeclaims")
    claim = after["persistentvolumeclaims", "data-shop-db-0"]
    assert claim["spec"]["resources"]["requests"]["storage"] == str(20 << 30)
    uids = [
        [found[key]["metadata"]["uid"] for found in (before, after)]
        for key in (("statefulsets", "shop-db"), ("pods", "shop-db-0"))
    ]
    assert uids[0][0] != uids[0][1]
    assert uids[1][0] == uids[1][1]
    wait_until(lambda: owner(cluster) == uids[0][1])
    before_second = versions(cluster)
    start(platform, larger)
    assert versions(cluster) == before_second


def owner(cluster: Cluster) -> str:
    metadata = objects(cluster, "pods")["pods", "shop-db-0"]["metadata"]
    return str((metadata.get("ownerReferences") or [{"uid": ""}])[0]["uid"])


def test_an_application_gets_and_loses_volumes_and_ports(
    cluster: Cluster, platform: KubernetesPlatform
) -> None:
    bare = ContainerApp("db", "db:1", ports={80: 80})
    for app in (bare, DATABASE, bare, dataclasses.replace(DATABASE, ports={})):
        start(platform, app)
        services = {name for kind, name in objects(cluster, "services") if kind == "services"}
        wanted = {"shop-db"} if app.ports else set()
        assert services == wanted | ({"shop-db-replicas"} if app.volumes else set())
        workloads = objects(cluster, "statefulsets", "deployments")
        assert list(workloads) == [("statefulsets" if app.volumes else "deployments", "shop-db")]


def test_what_the_cluster_refuses_is_told_in_a_line_before_anything_is_made(
    cluster: Cluster, platform: KubernetesPlatform
) -> None:
    start(platform, DATABASE)
    wait_until(lambda: is_bound(cluster, "data-shop-db-0"))
    before = versions(cluster)
    smaller = dataclasses.replace(DATABASE, volumes=[dataclasses.replace(DATA, size="5G")])
    with pytest.raises(PlatformError, match="data-shop-db-0") as told:
        start(platform, WEB, smaller)
    assert "\n" not in str(told.value)
    assert versions(cluster) == before
