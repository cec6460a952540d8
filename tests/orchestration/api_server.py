"""A small stand-in for a Kubernetes API server, over real HTTP.

A real one takes minutes to make; `make kubernetes-test` does, and tests with it (on_a_cluster).
This one keeps objects, answers as the real one does to what `kubernetes_platform` asks - list by
labels, get, server-side apply with dry run, delete - and refuses what the schemas do not allow
(the PyPI package kubernetes-validate), a change of an immutable field, and a call that a test
breaks. As the real one it gives each write a new version, writes sizes in its own way, and keeps a
StatefulSet whose pods are to stay until a controller has let go of them: here, until it was looked
at ``lingers`` times. It runs no controllers: pods are what a test puts there.
"""

from __future__ import annotations

import functools
import http.server
import json
import re
import threading
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import kubernetes_validate
import yaml

from tests.closing import Closing

SCHEMA_VERSIONS = ("1.30", "1.34")
Json = dict[str, Any]
PATH = re.compile(r"/(?:api/v1|apis/apps/v1)/namespaces/(\w+)/(\w+)(?:/([\w-]+))?(/log)?")
SIZE = re.compile('"storage": "([0-9]+)"')
IMMUTABLE = {
    "PersistentVolumeClaim": ("storageClassName", "dataSource"),
    "StatefulSet": ("volumeClaimTemplates", "serviceName"),
    "Service": ("clusterIP",),
}


@functools.cache  # reading the schemas takes long, and the same is applied again and again
def schema_fault(item: str) -> str:
    """Say what the published schemas do not allow; nothing if they allow it all."""
    try:
        kubernetes_validate.validate(json.loads(item), SCHEMA_VERSIONS[-1], strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error.message)
    return ""


class Refused(Exception):
    """The API's answer to what it does not do."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ApiServer(Closing):
    """Serve on a port of 127.0.0.1.

    ``objects`` are by (namespace, plural kind, name); ``calls`` are those that change something, as
    "PATCH statefulsets/shop-db"; ``logs`` by pod; ``refuses`` is the name that a quota forbids.
    """

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], Json] = {}
        self.logs: dict[str, str] = {}
        self.calls: list[str] = []
        self.fails: tuple[int, bool] | None = None
        self.refuses = ""
        self.lingers = 2
        self.version = 0
        api = self

        class Handler(_Handler):
            server_api = api

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def expect(self, fails: int | None = None, *, done: bool = False) -> None:
        """Begin to count; break call number `fails`: before it is done, or with `done` after it."""
        self.calls = []
        self.fails = None if fails is None else (fails, done)

    def names(self, plural: str) -> list[str]:
        return sorted(name for _, kind, name in self.objects if kind == plural)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # What the API does

    def listed(self, namespace: str, plural: str, selector: str) -> Json:
        wanted = [pair.split("=") for pair in selector.split(",")] if selector else []
        items = [
            item
            for (space, kind, _), item in sorted(self.objects.items())
            if (space, kind) == (namespace, plural)
            and all((item["metadata"].get("labels") or {}).get(key) == it for key, it in wanted)
        ]
        return {"kind": "List", "apiVersion": "v1", "items": items}

    def found(self, key: tuple[str, str, str]) -> Json:
        try:
            found = self.objects[key]
        except KeyError:
            raise Refused(404, f'{key[1]} "{key[2]}" not found') from None
        left = found["metadata"].get("lingers")
        if left == 0:
            del self.objects[key]
        elif left is not None:
            found["metadata"]["lingers"] = left - 1
        return found

    def delete(self, key: tuple[str, str, str], policy: str) -> Json:
        found = self.found(key)
        if policy == "Orphan":
            found["metadata"] |= {"deletionTimestamp": "now", "lingers": self.lingers}
        else:
            del self.objects[key]
        return found

    def apply(self, key: tuple[str, str, str], item: Json, *, dry_run: bool) -> Json:
        if fault := schema_fault(json.dumps(item)):
            raise Refused(422, f"{key[1]} {key[2]} is invalid: {fault}")
        if key[2] == self.refuses:
            raise Refused(403, f"{key[1]} {key[2]} is forbidden: exceeded quota")
        item = json.loads(SIZE.sub(_in_words, json.dumps(item)))
        old = self.objects.get(key)
        for field in IMMUTABLE.get(item["kind"], ()):
            if old and old["spec"].get(field) != item["spec"].get(field):
                raise Refused(
                    422, f"spec.{field}: Forbidden: field is immutable\n  and a long list"
                )
        if dry_run:
            return item
        self.version += 1
        item["metadata"]["resourceVersion"] = str(self.version)
        self.objects[key] = item
        return item


def _in_words(match: re.Match[str]) -> str:
    n_bytes = int(match[1])
    return f'"storage": "{n_bytes // 10**9}G"' if n_bytes % 10**9 == 0 else match[0]


class _Handler(http.server.BaseHTTPRequestHandler):
    server_api: ApiServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _answer(self) -> None:
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        api, breaks = self.server_api, False
        if self.command != "GET" and "dryRun" not in query:
            api.calls.append(f"{self.command} {'/'.join(url.path.split('/')[-2:])}")
            breaks = api.fails is not None and api.fails[0] == len(api.calls)
        if breaks and api.fails and not api.fails[1]:
            self.close_connection = True
            return
        try:
            status, answer = 200, self._do(url.path, query, body)
        except Refused as error:
            status, answer = error.status, {"kind": "Status", "message": str(error)}
        if breaks:
            self.close_connection = True
            return
        content = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _do(self, path: str, query: dict[str, str], body: bytes) -> Json | str:
        match = PATH.fullmatch(path)
        if match is None:
            raise Refused(404, f"no such path: {path}")
        namespace, plural, name, log = match.groups()
        api = self.server_api
        if name is None:
            return api.listed(namespace, plural, query.get("labelSelector", ""))
        key = (namespace, plural, name)
        if log:
            return api.logs[name]
        if self.command == "PATCH":
            assert self.headers["Content-Type"] == "application/apply-patch+yaml"
            assert query["fieldManager"]
            return api.apply(key, yaml.safe_load(body), dry_run=query.get("dryRun") == "All")
        if self.command == "DELETE":
            return api.delete(key, json.loads(body)["propagationPolicy"])
        return api.found(key)

    do_GET = do_PATCH = do_DELETE = _answer  # noqa: N815

    def log_message(self, *words: Any) -> None:
        """Say nothing: the tests look at what was done."""
