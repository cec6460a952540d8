"""The API as anybody may call it: plain HTTP, right and wrong."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import socket
import zlib
from typing import Any

import pytest

from nbdstore import unix_socket
from nbdstore.control import bodies, endpoint
from nbdstore.control.endpoint import MAX_CONNECTIONS
from nbdstore.control.stream import Piece, StreamWriter
from tests.control.conftest import READ_TOKEN, TOKEN, Answering
from tests.control.documented import DOCUMENTED
from tests.control.memory_pool import BLOCK, MemoryConnection

VOLUME = {"name": "db", "size": 64 * BLOCK}


def call(
    answering: Answering,
    method: str,
    path: str,
    body: bytes | dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
    *,
    tcp: bool = False,
) -> tuple[int, Any, http.client.HTTPMessage]:
    """Call the API and return status, JSON (or None) and headers."""
    if tcp:
        connection = http.client.HTTPConnection(answering.http_url.removeprefix("http://"))
    else:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = unix_socket.connect(answering.listeners.path, 30)
    payload = json.dumps(body).encode() if isinstance(body, dict) else body
    connection.request(method, path, payload, headers or {})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    value = json.loads(content) if content and is_json(response.headers) else None
    DOCUMENTED.check(method, path, response.status, response.headers, value)
    return response.status, value, response.headers


def is_json(headers: http.client.HTTPMessage) -> bool:
    return headers.get_content_subtype() in ("json", "problem+json")


class TestCalls:
    def test_a_volume_s_life(self, answering: Answering) -> None:
        status, volume, headers = call(answering, "POST", "/v1/volumes", VOLUME)
        assert (status, volume["name"]) == (201, "db")
        location = headers["Location"]
        assert call(answering, "GET", location)[1] == volume
        status, volume, _ = call(answering, "PATCH", location, {"name": "web", "allow": ["a"]})
        assert (status, volume["name"], volume["allow"]) == (200, "web", ["a"])
        assert call(answering, "GET", location)[0] == 404
        assert call(answering, "GET", "/v1/volumes")[1] == {"volumes": [volume]}
        assert call(answering, "DELETE", "/v1/volumes/web")[:2] == (204, None)
        assert call(answering, "GET", "/v1/volumes")[1] == {"volumes": []}

    def test_the_pool(self, answering: Answering) -> None:
        assert call(answering, "GET", "/v1/pool")[1]["capacity"] == 1 << 30
        assert (
            call(answering, "POST", "/v1/pool/grow", {"capacity": 2 << 30})[1]["capacity"]
            == 2 << 30
        )
        assert call(answering, "POST", "/v1/pool/checkpoint")[0] == 200
        assert answering.bench.pool.n_checkpoints == 1

    def test_capacity(self, answering: Answering) -> None:
        assert call(answering, "GET", "/v1/capacity")[1]["n_blocks"] == (1 << 30) // BLOCK

    def test_connections(self, answering: Answering) -> None:
        answering.bench.server.connections.append(MemoryConnection("db"))
        _, answer, _ = call(answering, "GET", "/v1/connections")
        assert [item["peer"] for item in answer["connections"]] == ["192.0.2.7:4711"]

    def test_health_follows_the_pool(self, answering: Answering) -> None:
        assert call(answering, "GET", "/healthz")[0] == 200
        answering.bench.pool.state = "failed"
        status, answer, _ = call(answering, "GET", "/healthz")
        assert (status, answer["state"]) == (503, "failed")


MISTAKES = [
    ("GET", "/v1/volumes/nope", None, 404, "not-found", "no volume 'nope'"),
    ("GET", "/v1/volumes/", None, 404, "not-found", "no volume ''"),
    ("GET", "/v1/volumes//data", None, 404, "not-found", "no volume ''"),
    ("GET", "/v1/nope", None, 404, "unknown-path", "no /v1/nope"),
    ("GET", "/v1/volumes/../../etc/passwd", None, 404, "unknown-path", ""),
    ("PUT", "/v1/pool", None, 405, "unknown-method", "use GET"),
    ("POST", "/v1/volumes", b"{", 400, "invalid-argument", "not JSON"),
    ("POST", "/v1/volumes", {"name": "x"}, 400, "invalid-argument", "'size' is missing"),
    ("POST", "/v1/volumes", VOLUME | {"sise": 1}, 400, "invalid-argument", "'sise'"),
    ("POST", "/v1/volumes", VOLUME | {"size": 0}, 400, "invalid-argument", "0 bytes"),
    ("POST", "/v1/volumes", VOLUME | {"name": "taken"}, 409, "already-exists", "'taken' exists"),
    ("POST", "/v1/volumes", b"x" * (bodies.MAX_BODY + 1), 413, "body-too-large", "over 64 KiB"),
    ("POST", "/v1/pool/grow", {"capacity": 1}, 400, "invalid-argument", "already"),
    ("POST", "/v1/pool/checkpoint", {"now": True}, 400, "invalid-argument", "'now'"),
    ("GET", "/v1/pool?now=1", None, 400, "invalid-argument", "'now'"),
    ("PUT", "/v1/volumes/db/data?overwrite=maybe", b"", 400, "invalid-argument", "true or false"),
    ("PUT", "/v1/volumes/db/data?overwrit=1", b"", 400, "invalid-argument", "'overwrit'"),
    ("PATCH", "/v1/volumes/taken", {"size": "1G"}, 400, "invalid-argument", "number of bytes"),
    ("PUT", "/v1/volumes/db/data", b"", 400, "invalid-argument", "cut off"),
    (
        "PUT",
        "/v1/volumes/db/data",
        b"raw bytes, many of them!",
        400,
        "invalid-argument",
        "not a data",
    ),
    ("DELETE", "/v1/volumes/busy", None, 409, "busy", "192.0.2.7:4711"),
]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "detail"),
    MISTAKES,
    ids=[f"{mistake[0]} {mistake[1]} {str(mistake[2])[:30]}" for mistake in MISTAKES],
)
def test_mistakes_are_problems(
    answering: Answering,
    method: str,
    path: str,
    body: bytes | dict[str, Any] | None,
    status: int,
    code: str,
    detail: str,
) -> None:
    for name in ("taken", "busy"):
        answering.run(answering.bench.operations.create_volume, name, 64 * BLOCK)
    answering.bench.server.connections.append(MemoryConnection("busy"))
    found, problem, headers = call(answering, method, path, body)
    assert (found, problem["status"], problem["code"]) == (status, status, code)
    assert detail in problem["detail"]
    assert headers.get_content_type() == "application/problem+json"
    assert set(answering.bench.pool.volumes) == {"taken", "busy"}


class TestTcp:
    @pytest.mark.parametrize(
        "headers",
        [{}, {"Authorization": TOKEN}, {"Authorization": "Bearer x"}, {"Authorization": "B\xe9"}],
        ids=str,
    )
    def test_without_the_token_nothing_is_told(
        self, answering: Answering, headers: dict[str, str]
    ) -> None:
        for path in ("/v1/pool", "/v1/nope", "/"):
            status, problem, found = call(answering, "GET", path, None, headers, tcp=True)
            assert (status, problem["code"]) == (401, "unauthorized")
            assert found["WWW-Authenticate"] == "Bearer"

    def test_with_the_token(self, answering: Answering) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert call(answering, "GET", "/v1/pool", None, headers, tcp=True)[0] == 200

    def test_a_token_that_may_only_look(self, answering: Answering) -> None:
        headers = {"Authorization": f"Bearer {READ_TOKEN}"}
        for method, template in DOCUMENTED.operations() - {("GET", "/v1/events")}:  # endless
            names = template.replace("{name}", "db").replace("{snapshot}", "db@a")
            path = re.sub(r"{\w+}", "1", names)
            status, problem, _ = call(answering, method, path, None, headers, tcp=True)
            if method == "GET":
                assert status in (200, 400, 404), path  # 400: a query is missing
            else:
                assert (status, problem["code"]) == (403, "forbidden"), path
                assert "the token of prometheus may only look" in problem["detail"]
        assert call(answering, "HEAD", "/v1/pool", None, headers, tcp=True)[0] == 200

    def test_health_needs_none(self, answering: Answering) -> None:
        assert call(answering, "GET", "/healthz", tcp=True)[0] == 200

    def test_a_crowd_does_not_take_all_descriptors(self, answering: Answering) -> None:
        """Nobody asks them for the token before they send something."""
        host, _, port = answering.http_url.removeprefix("http://").rpartition(":")
        crowd = [socket.create_connection((host, int(port))) for _ in range(MAX_CONNECTIONS)]
        with socket.create_connection((host, int(port))) as refused:
            refused.settimeout(30)
            with contextlib.suppress(ConnectionResetError):
                assert refused.recv(1) == b""
        assert call(answering, "GET", "/healthz")[0] == 200, "over the unix socket"
        for sock in crowd:
            sock.close()
        call(answering, "GET", "/healthz")
        assert call(answering, "GET", "/healthz", tcp=True)[0] == 200

    @pytest.mark.parametrize(
        "sent", [b"", b"GET /healthz HTTP/1.1\r\n", b"GET /v1/pool HTTP/1.1\r\nHost: x\r\n\r\n"]
    )
    def test_who_says_nothing_does_not_stay(
        self, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, sent: bytes
    ) -> None:
        """Before the first request, in the middle of it, and after it."""
        monkeypatch.setattr(endpoint, "HEAD_TIMEOUT_S", 0.2)
        answering = request.getfixturevalue("answering")
        host, _, port = answering.http_url.removeprefix("http://").rpartition(":")
        with socket.create_connection((host, int(port))) as silent:
            silent.settimeout(30)
            silent.sendall(sent)
            with contextlib.suppress(ConnectionResetError):
                while silent.recv(1 << 16):
                    pass

    def test_a_head_may_come_in_pieces(self, answering: Answering) -> None:
        host, _, port = answering.http_url.removeprefix("http://").rpartition(":")
        with socket.create_connection((host, int(port))) as caller:
            caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n":
                caller.sendall(bytes([byte]))
            assert caller.makefile("rb").readline().split()[1] == b"200"

    def test_a_head_without_end_is_refused(self, answering: Answering) -> None:
        host, _, port = answering.http_url.removeprefix("http://").rpartition(":")
        with socket.create_connection((host, int(port))) as caller:
            caller.sendall(b"GET /healthz HTTP/1.1\r\nX: " + b"x" * (64 << 10))
            assert caller.makefile("rb").readline().split()[1] == b"400"

    def test_nothing_is_unpacked_for_strangers(self, answering: Answering) -> None:
        body = zlib.compress(json.dumps(VOLUME).encode())
        found = call(answering, "POST", "/v1/volumes", body, {"Content-Encoding": "deflate"})
        assert found[0] == 400
        assert "not JSON" in found[1]["detail"]


class TestImports:
    def stream(self, *, end: bool) -> bytes:
        writer = StreamWriter()
        buffers = writer.header(VOLUME["size"]) + writer.data(Piece(0, b"x" * BLOCK))
        return b"".join(buffers + (writer.end() if end else []))

    def test_whole(self, answering: Answering) -> None:
        status, volume, _ = call(answering, "PUT", "/v1/volumes/db/data", self.stream(end=True))
        assert (status, volume["mapped"]) == (200, BLOCK)

    def test_cut_off_leaves_no_volume(self, answering: Answering) -> None:
        status, problem, _ = call(answering, "PUT", "/v1/volumes/db/data", self.stream(end=False))
        assert (status, problem["code"]) == (400, "invalid-argument")
        assert answering.bench.pool.volumes == {}

    def test_a_client_that_leaves_leaves_no_volume(self, answering: Answering) -> None:
        body = self.stream(end=False)
        with unix_socket.connect(answering.listeners.path, 30) as sock:
            sock.sendall(
                b"PUT /v1/volumes/db/data HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\n"
            )
            sock.sendall(body)
            answering.run(until, lambda: "db" in answering.bench.pool.volumes)
        answering.run(until, lambda: "db" not in answering.bench.pool.volumes)


async def until(condition: Any) -> None:
    """Return when the condition holds; the test's own timeout ends what never comes true."""
    while not condition():
        await asyncio.sleep(0)
