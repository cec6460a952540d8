"""The OpenAPI document: valid, served, complete, and true of what a served pool answers."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from nbdstore.control.api import application
from nbdstore.control.backup_stream import BackupWriter, Begin, Data, ResumeToken
from nbdstore.control.events import Event
from nbdstore.control.problems import CLASSES
from nbdstore.control.stream import Piece, StreamWriter
from tests.control.documented import DOCUMENTED
from tests.control.memory_pool import BLOCK, Bench
from tests.control.real_pool import Served

VOLUME = {"name": "db", "size": 64 * BLOCK}


def content() -> bytes:
    writer = StreamWriter()
    buffers = writer.header(64 * BLOCK) + writer.data(Piece(0, b"x" * BLOCK)) + writer.end()
    return b"".join(buffers)


BEGIN = Begin(
    volume="db",
    snapshot="monday",
    uuid="b3bd1ea2-5ee1-4e5b-bd0e-7f3d2a4f5c11",
    size=64 * BLOCK,
    created="2026-01-01T00:00:00+00:00",
)
TOKEN = ResumeToken(uuid=BEGIN.uuid, base=None, start=BLOCK).encode()


def backup() -> bytes:
    writer = BackupWriter()
    frames = writer.begin(BEGIN) + writer.part(Data(0, [b"x" * BLOCK])) + writer.end()
    return b"".join(frames)


# In an order in which each does what it should.
CALLS: list[tuple[str, str, Any, int]] = [
    ("GET", "/healthz", None, 200),
    ("GET", "/v1/openapi.json", None, 200),
    ("GET", "/metrics", None, 200),
    ("GET", "/v1/pool", None, 200),
    ("POST", "/v1/pool/grow", {"capacity": 2 << 30}, 200),
    ("POST", "/v1/pool/checkpoint", None, 200),
    ("GET", "/v1/capacity", None, 200),
    ("GET", "/v1/connections", None, 200),
    ("POST", "/v1/volumes", VOLUME | {"allow": ["a"]}, 201),
    ("GET", "/v1/volumes", None, 200),
    ("GET", "/v1/volumes/db", None, 200),
    ("PATCH", "/v1/volumes/db", {"size": 128 * BLOCK, "allow": []}, 200),
    ("PUT", "/v1/volumes/db/data", content(), 200),
    ("GET", "/v1/volumes/db/data", None, 200),
    ("PUT", "/v1/volumes/db/lease", {"holder": "node-1"}, 200),
    ("GET", "/v1/leases", None, 200),
    ("DELETE", "/v1/volumes/db/lease?holder=node-1&epoch=1", None, 204),
    ("POST", "/v1/volumes/db/lease/break", None, 204),
    ("DELETE", "/v1/connections/4711", None, 204),
    ("POST", "/v1/scrub", {"volume": "db", "id": "mine"}, 202),
    ("POST", "/v1/scrub", {"volume": "db", "id": "mine"}, 200),
    ("GET", "/v1/operations/mine?wait=60", None, 200),
    ("GET", "/v1/operations", None, 200),
    ("DELETE", "/v1/operations/mine", None, 200),
    ("POST", "/v1/snapshots", {"snapshots": ["db@a"]}, 201),
    ("GET", "/v1/snapshots?volume=db&unique=1", None, 200),
    ("GET", "/v1/snapshots/db@a", None, 200),
    ("GET", "/v1/space", None, 200),
    ("GET", "/v1/diff?newer=db&older=db@a", None, 200),
    ("GET", "/v1/snapshots/db@a/stream", None, 200),
    ("POST", "/v1/volumes/whole/receive", backup(), 200),
    ("GET", f"/v1/resumed-stream?token={TOKEN}", None, 200),
    ("POST", "/v1/volumes/half/receive", backup()[:-1], 400),
    ("GET", "/v1/volumes/half/receive", None, 200),
    ("DELETE", "/v1/volumes/half/receive", None, 204),
    ("POST", "/v1/snapshots/db@a/clone", {"name": "copy"}, 201),
    ("POST", "/v1/volumes/copy/flatten", {"id": "flat"}, 202),
    ("POST", "/v1/volumes/copy/flatten", {"id": "flat"}, 200),
    ("GET", "/v1/operations/flat?wait=60", None, 200),
    ("POST", "/v1/snapshots/db@a/rollback", {"fence": True}, 200),
    ("DELETE", "/v1/snapshots/db@a", None, 204),
    ("DELETE", "/v1/volumes/db?fence=1&snapshots=1", None, 204),
    ("GET", "/v1/trash", None, 200),
    ("POST", "/v1/trash/db/restore", {"name": "back"}, 200),
    ("DELETE", "/v1/volumes/back", None, 204),
    ("DELETE", "/v1/trash/back", None, 204),
    ("DELETE", "/v1/volumes/copy?now=1", None, 204),
]


def test_it_is_valid() -> None:
    OpenAPIV31SpecValidator(DOCUMENTED.document).validate()


def test_every_route_is_documented_and_every_documented_route_is_there() -> None:
    served = {
        (route.method, route.resource.canonical)
        for route in application(Bench().operations).router.routes()
        if route.resource and route.method != "HEAD"
    }
    assert served == DOCUMENTED.operations()


def test_every_route_says_what_it_does() -> None:
    for path, methods in DOCUMENTED.document["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"].endswith("."), (method, path)


def test_every_code_is_listed_with_its_meaning() -> None:
    text = DOCUMENTED.document["info"]["description"]
    for code, cls in CLASSES.items():
        assert f"| `{code}` | {cls.http_status} | " in text
        assert cls.__doc__


@pytest.mark.parametrize("template", sorted(DOCUMENTED.operations()), ids=" ".join)
def test_every_route_is_called_here(template: tuple[str, str]) -> None:
    called = [DOCUMENTED.find(method, path) for method, path, _, _ in CALLS]
    called_templates = {("GET", "/v1/events")} | {
        (method, found[0]) for (method, *_), found in zip(CALLS, called, strict=True) if found
    }
    assert template in called_templates


def test_a_served_pool_answers_as_documented(served: Served) -> None:
    for method, path, body, status in CALLS:
        response = served.call(method, path, body)
        assert response.status == status, (method, path, response.content)
        DOCUMENTED.check(method, path, status, response.headers, response.value)
        assert status == 204 or response.content, (method, path)


def test_the_events_of_a_served_pool_are_as_documented(served: Served) -> None:
    connection = served.connect()
    connection.request("GET", "/v1/events")
    response = connection.getresponse()
    assert response.readline() == b"\n"
    served.call("POST", "/v1/volumes", VOLUME)
    event = json.loads(response.readline())
    connection.close()
    assert set(event) == {field.name for field in dataclasses.fields(Event)}
    DOCUMENTED.check("GET", "/v1/events", 200, response.headers, None)


def test_the_served_document_is_this_one(served: Served) -> None:
    assert json.loads(served.call("GET", "/v1/openapi.json").content) == DOCUMENTED.document


def test_looking_may_be_by_head(served: Served) -> None:
    response = served.call("HEAD", "/v1/pool")
    assert (response.status, response.content) == (200, b"")


@pytest.mark.parametrize(
    "wrong",
    [
        {"state": "ok"},
        {"state": "ok", "version": 7},
        {"state": "ok", "version": "1", "more": True},
    ],
)
def test_what_is_not_documented_is_found(wrong: dict[str, Any]) -> None:
    schema = {"$ref": "#/components/schemas/Health"}
    DOCUMENTED.check_schema(schema, {"state": "ok", "version": "1"})
    with pytest.raises(Exception, match=r"required|not of type|not documented"):
        DOCUMENTED.check_schema(schema, wrong)
