"""What the OpenAPI document says of a response, held against the response itself."""

from __future__ import annotations

import json
import re
from http.client import HTTPMessage
from typing import Any

from openapi_schema_validator import OAS31Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from nbdstore.control import openapi
from nbdstore.control.api import route_objects
from tests.control.memory_pool import Bench

ADDRESS = "urn:nbdstore:api"
"""By which schemas outside the document refer to it."""


class Documented:
    """The document of the API, as a judge of responses."""

    def __init__(self) -> None:
        self.document = openapi.document(*route_objects(Bench().operations))
        resource = Resource(contents=self.document, specification=DRAFT202012)
        self._registry: Any = Registry().with_resource(ADDRESS, resource)

    def operations(self) -> set[tuple[str, str]]:
        """All (method, path template) that are documented."""
        return {
            (method.upper(), path)
            for path, methods in self.document["paths"].items()
            for method in methods
        }

    def find(self, method: str, path: str) -> tuple[str, dict[str, Any]] | None:
        """Find the path template and the operation that a request is for; None if none is."""
        for template, methods in self.document["paths"].items():
            pattern = re.sub(r"{\w+}", "[^/]*", template)
            if re.fullmatch(pattern, path.partition("?")[0]) and method.lower() in methods:
                return template, methods[method.lower()]
        return None

    def check(self, method: str, path: str, status: int, headers: HTTPMessage, value: Any) -> None:
        """Fail if a response is not what the document promises; `value` is its JSON."""
        found = self.find("GET" if method == "HEAD" else method, path)
        if found is None or (status >= 400 and str(status) not in found[1]["responses"]):
            response = self.document["components"]["responses"]["Problem"]
        else:
            responses = found[1]["responses"]
            assert str(status) in responses, f"{method} {path}: {status} is not documented"
            response = responses[str(status)]
        content = response.get("content", {})
        if not content:
            assert value is None
            return
        kind = headers.get_content_type()
        assert kind in content, f"{method} {path}: {kind} is not documented"
        if method != "HEAD":
            self.check_schema(content[kind]["schema"], value)

    def check_schema(self, schema: dict[str, Any], value: Any) -> None:
        """Fail if a value does not fit a schema, or has members that the schema does not tell."""
        in_document = json.loads(json.dumps(schema).replace('"#/', f'"{ADDRESS}#/'))
        OAS31Validator(in_document, registry=self._registry).validate(value)
        self._check_members(schema, value)

    def _check_members(self, schema: dict[str, Any], value: Any) -> None:
        if "$ref" in schema:
            schema = self.document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        for option in schema.get("anyOf", ()):
            self._check_members(option, value)
        if isinstance(value, list):
            for item in value:
                self._check_members(schema.get("items", {}), item)
        if isinstance(value, dict) and "properties" in schema:
            unknown = set(value) - set(schema["properties"])
            assert not unknown, f"not documented: {unknown}"
            for name, member in value.items():
                self._check_members(schema["properties"][name], member)


DOCUMENTED = Documented()
