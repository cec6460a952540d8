"""A real Kubernetes control plane: etcd, kube-apiserver, and the controllers that keep objects.

It has no nodes: pods are made, and wait for ever. The programs come from make-cluster.sh.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final

from tests.children import Children

START_TIMEOUT_S: Final = 60.0
CONTROLLERS: Final = (
    *("statefulset", "deployment", "replicaset", "garbagecollector"),
    *("pvc-protection", "persistentvolume-binder", "namespace"),
)


def program_directory() -> Path:
    """Name the directory of the programs, which outlives a run of the tests."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nbdstore-tests" / "kubernetes"


class Cluster:
    """A control plane that is running when it is made, and ends with `children`.

    ``kubeconfig`` is a file for its clients, whose namespace is ``shop``.
    """

    def __init__(self, children: Children, directory: Path) -> None:
        self._children = children
        self._directory = directory
        self._token = secrets.token_hex()
        etcd, peers, self._port = free_ports(3)
        self._url = f"https://127.0.0.1:{self._port}"
        self.kubeconfig = directory / "kubeconfig"
        self._start_etcd(etcd, peers)
        self._start_server(etcd)
        self._write_kubeconfig()
        self._start_controllers()

    def _start_etcd(self, port: int, peers: int) -> None:
        self._children.start(
            *("etcd", "--data-dir", str(self._directory / "etcd"), "--unsafe-no-fsync"),
            *("--listen-client-urls", f"http://127.0.0.1:{port}"),
            *("--advertise-client-urls", f"http://127.0.0.1:{port}"),
            *("--listen-peer-urls", f"http://127.0.0.1:{peers}"),
            log="etcd.log",
        )

    def _start_server(self, etcd: int) -> None:
        key, tokens = self._directory / "accounts.key", self._directory / "tokens.csv"
        self._children.run("openssl", "genrsa", "-out", key, "2048")
        tokens.write_text(f"{self._token},admin,admin,system:masters\n")
        server = self._children.start(
            *(str(program_directory() / "kube-apiserver"), "--authorization-mode", "RBAC"),
            *("--etcd-servers", f"http://127.0.0.1:{etcd}", "--bind-address", "127.0.0.1"),
            *("--advertise-address", "127.0.0.1", "--secure-port", str(self._port)),
            *("--cert-dir", str(self._directory / "certs")),
            *("--service-cluster-ip-range", "10.0.0.0/24", "--token-auth-file", str(tokens)),
            *("--service-account-issuer", "https://kubernetes.default.svc"),
            *("--service-account-key-file", str(key)),
            *("--service-account-signing-key-file", str(key)),
            # Pods would wait for accounts, which a controller makes that does not run here.
            *("--disable-admission-plugins", "ServiceAccount"),
            log="kube-apiserver.log",
        )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            assert server.poll() is None, "kube-apiserver has ended: see its log"
            assert time.monotonic() < deadline_s, "kube-apiserver is not ready: see its log"
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            self.get("/readyz")
        except OSError:
            return False
        return True

    def _start_controllers(self) -> None:
        self._children.start(
            *(str(program_directory() / "kube-controller-manager"), "--leader-elect=false"),
            *("--kubeconfig", str(self.kubeconfig), "--port=0", "--secure-port=0"),
            f"--controllers={','.join(CONTROLLERS)}",
            log="kube-controller-manager.log",
        )

    def _write_kubeconfig(self) -> None:
        ca = str(self._directory / "certs" / "apiserver.crt")
        cluster = {"server": self._url, "certificate-authority": ca}
        context = {"cluster": "test", "user": "admin", "namespace": "shop"}
        value = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": context}],
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "admin", "user": {"token": self._token}}],
        }
        self.kubeconfig.write_text(json.dumps(value))

    def get(self, path: str) -> str:
        """GET a path of the API; raise OSError if it cannot be had."""
        return self._call("GET", path, None)

    def create(self, path: str, value: dict[str, Any]) -> None:
        """POST an object to a path of the API."""
        self._call("POST", path, value)

    def _call(self, method: str, path: str, value: dict[str, Any] | None) -> str:
        body = None if value is None else json.dumps(value).encode()
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, body, headers, method=method)
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            return str(answer.read().decode())


def free_ports(count: int) -> list[int]:
    """Name ports of 127.0.0.1 that nobody listens at now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(item.getsockname()[1]) for item in sockets]
    for item in sockets:
        item.close()
    return ports
