"""The OpenAPI document of the control API, made from the routes that serve it.

Owns the translation: routes -> operations, records (`model`) -> schemas by the types of their
fields, shapes of requests (`bodies`) -> schemas, the exception tree -> the codes of problems.
Nothing is written twice, so the document cannot say what the server does not do.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web

from nbdstore import __version__
from nbdstore.control import bodies, problems
from nbdstore.control.bodies import Shape
from nbdstore.control.model import Record
from nbdstore.control.routing import (
    Access,
    Answer,
    Call,
    Listing,
    Media,
    Route,
    route,
    routes_of,
)

OPENAPI_VERSION = "3.1.0"
DOCUMENT = Media("application/json", "An OpenAPI 3.1 document.")
DESCRIPTION = """\
Change and look at a pool of nbdstore while a server holds it.

Sizes are bytes; times are ISO 8601 with zone. Over the unix socket `control.sock` in the pool's
directory no token is needed; over TCP every path but `/healthz` wants a bearer token: `read` tokens
are good for GET, `admin` tokens for everything. A client must ignore members that it does not know.

Every failure is `application/problem+json` (RFC 9457) with a `code` that does not change between
versions, and a `detail` for people:

"""
_PLAIN: dict[type, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    type(None): {"type": "null"},
}


class OpenApiRoutes:
    """Serves the document about the routes of `others`, and itself."""

    def __init__(self, others: Sequence[object]) -> None:
        self._others = others
        self._document: dict[str, Any] | None = None

    @route("GET", "/v1/openapi.json", answer=DOCUMENT)
    async def openapi(self, _call: Call) -> web.StreamResponse:
        """Describe this API as an OpenAPI document."""
        if self._document is None:
            self._document = document(*self._others, self)
        return web.json_response(self._document)


def document(*objects: object) -> dict[str, Any]:
    """Return the OpenAPI document of the routes of `objects`."""
    schemas: dict[str, Any] = {"Problem": _problem_schema()}
    paths: dict[str, dict[str, Any]] = {}
    for thing in objects:
        subject = type(thing).__name__.removesuffix("Routes").lower()
        for entry, _ in routes_of(thing):
            paths.setdefault(entry.path, {})[entry.method.lower()] = {
                "tags": [subject],
                **_operation(entry, schemas),
            }
    return {
        "openapi": OPENAPI_VERSION,
        "info": {
            "title": "nbdstore control API",
            "version": __version__,
            "description": DESCRIPTION + _codes_table(),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "responses": {
                "Problem": {
                    "description": "It failed; the code says how.",
                    "content": {problems.CONTENT_TYPE: {"schema": _ref("Problem")}},
                }
            },
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}],
    }


def _operation(entry: Route, schemas: dict[str, Any]) -> dict[str, Any]:
    """Describe one route; what its records are goes to `schemas`."""
    content = _content(entry.answer, schemas)
    responses: dict[str, Any] = {
        str(status): {"description": entry.summary, **content} for status in entry.statuses
    }
    operation: dict[str, Any] = {
        "operationId": entry.operation,
        "summary": entry.summary,
        "description": f"{entry.description}\n\nAccess: {entry.access.value}.".strip(),
        "responses": responses | {"default": {"$ref": "#/components/responses/Problem"}},
    }
    if entry.access is Access.OPEN:
        operation["security"] = []
    if parameters := _parameters(entry):
        operation["parameters"] = parameters
    if entry.body is not None:
        operation["requestBody"] = _request_body(entry.body)
    return operation


def _parameters(entry: Route) -> list[dict[str, Any]]:
    in_path: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in entry.parameters
    ]
    in_query: list[dict[str, Any]] = [
        {
            "name": name,
            "in": "query",
            "required": not kind.endswith("?"),
            "schema": _query_schema(kind),
        }
        for name, kind in entry.query.items()
    ]
    in_header: list[dict[str, Any]] = [
        {"name": name, "in": "header", "required": False, "schema": {"type": "string"}}
        for name in entry.headers
    ]
    return in_path + in_query + in_header


def _query_schema(kind: str) -> dict[str, Any]:
    schema = dict(bodies.kind_of(kind).schema)
    return {"type": "string", "enum": ["0", "1"]} if schema["type"] == "boolean" else schema


def _request_body(body: Shape | Media) -> dict[str, Any]:
    if isinstance(body, Media):
        content = {body.content_type: {"schema": {"description": body.description}}}
        return {"required": True, "content": content}
    required = [name for name, kind in body.items() if not kind.endswith("?")]
    schema = {
        "type": "object",
        "properties": {name: dict(bodies.kind_of(kind).schema) for name, kind in body.items()},
        "required": required,
        "additionalProperties": False,
    }
    return {"required": bool(required), "content": {"application/json": {"schema": schema}}}


def _content(answer: Answer, schemas: dict[str, Any]) -> dict[str, Any]:
    if answer is None:
        return {}
    if isinstance(answer, Media):
        schema: dict[str, Any] = {"description": answer.description}
        return {"content": {answer.content_type: {"schema": schema}}}
    if isinstance(answer, Listing):
        items = {"type": "array", "items": _schema_of(answer.record, schemas)}
        schema = {
            "type": "object",
            "properties": {answer.member: items},
            "required": [answer.member],
        }
    else:
        schema = _schema_of(answer, schemas)
    return {"content": {"application/json": {"schema": schema}}}


def _schema_of(kind: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """Translate the type of a field; records become references into `schemas`."""
    if kind is Any:
        return {}
    if kind in _PLAIN:
        return dict(_PLAIN[kind])
    if isinstance(kind, type) and issubclass(kind, Record):
        if kind.__name__ not in schemas:
            schemas[kind.__name__] = {}  # it may refer to itself
            schemas[kind.__name__] = _record_schema(kind, schemas)
        return _ref(kind.__name__)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema_of(argument, schemas) for argument in arguments]}
    if origin is list:
        return {"type": "array", "items": _schema_of(arguments[0], schemas)}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _schema_of(arguments[1], schemas)}
    raise TypeError(f"no schema is known for {kind!r}")


def _record_schema(record: type[Record], schemas: dict[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(record)
    names = [field.name for field in dataclasses.fields(record)]
    return {
        "type": "object",
        "description": " ".join((record.__doc__ or "").split()),
        "properties": {name: _schema_of(hints[name], schemas) for name in names},
        # A server always sends all of its version; clients fill in what an older one lacks.
        "required": names,
    }


def _problem_schema() -> dict[str, Any]:
    text = {"type": "string"}
    return {
        "type": "object",
        "description": "A failure (RFC 9457). Newer servers may have codes that are not here.",
        "properties": {
            "type": text,
            "title": text,
            "status": {"type": "integer"},
            "code": {"type": "string", "enum": sorted(problems.CLASSES)},
            "detail": text,
        },
        "required": ["type", "title", "status", "code", "detail"],
    }


def _codes_table() -> str:
    rows = [
        f"| `{code}` | {cls.http_status} | {_first_line(cls)} |"
        for code, cls in sorted(problems.CLASSES.items())
    ]
    return "\n".join(["| Code | Status | Meaning |", "|---|---|---|", *rows]) + "\n"


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").partition("\n")[0]


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
