"""Routes of the control API: a table that serves calls, and that the OpenAPI document is made from.

A class of routes has a method for each, marked by `route`, which says all that a caller must know:
method, path, what goes in, what comes out. The mark is obeyed, so it is true: a body or query of
another shape is refused before the method is called, and an answer of another type or status is a
bug. Knows nothing of what the routes do.

::

    class LampRoutes:
        @route("PUT", "/v1/lamps/{name}", body={"on": "flag"}, answer=LampInfo)
        async def switch(self, call: Call) -> LampInfo:
            \"\"\"Switch a lamp. (The summary; what follows is the description.)\"\"\"
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeAlias, TypeVar

from aiohttp import web

from nbdstore.control import bodies
from nbdstore.control.bodies import Shape
from nbdstore.control.model import Record
from nbdstore.errors import Forbidden, InvalidArgument


class Access(enum.Enum):
    """Who may call a route: anybody, who holds a token that may look, or one that may change."""

    OPEN = "open"
    READ = "read"
    ADMIN = "admin"


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who calls: what the token is good for, and its name for the log."""

    access: Access
    name: str


OWNER = Caller(Access.ADMIN, "the owner")
"""Who may open the unix socket in the pool's directory."""
MAX_DIGITS = 18
"""Of a number in a path; no number of ours is as long."""
CALLER: ContextVar[Caller] = ContextVar("caller", default=OWNER)
"""Who makes the request that is being served; set by the authentication."""


@dataclasses.dataclass(frozen=True)
class Media:
    """A body that is no JSON object; its route's method reads or writes it itself."""

    content_type: str
    description: str


@dataclasses.dataclass(frozen=True)
class Listing:
    """An object with one member, a list of records."""

    member: str
    record: type[Record]


Answer: TypeAlias = type[Record] | Listing | Media | None
"""None: 204, nothing comes back."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer with another status than the route's first, or with headers."""

    content: Record | Sequence[Record]
    status: int
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


Result: TypeAlias = Record | Sequence[Record] | Reply | web.StreamResponse | None


@dataclasses.dataclass(frozen=True)
class Call:
    """One request, its body and query read as the route says."""

    request: web.Request
    body: dict[str, Any]
    query: dict[str, Any]

    @property
    def caller(self) -> Caller:
        """Who calls."""
        return CALLER.get()

    def __getitem__(self, parameter: str) -> str:
        """Return a parameter of the path; a name may be empty."""
        return self.request.match_info[parameter]

    def number(self, parameter: str) -> int:
        """Return a parameter of the path that is a number; InvalidArgument if it is none."""
        text = self[parameter]
        if not (text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS):
            raise InvalidArgument(f"'{text:.40}' is no {parameter}: give a number")
        return int(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
    """What a caller must know of a route.

    body: a shape (JSON), Media, or None. headers: those that mean something beside the usual.
    statuses: of success; the first is the usual one. operation: its name in the OpenAPI document.
    """

    method: str
    path: str
    access: Access
    body: Shape | Media | None
    query: Shape
    headers: tuple[str, ...]
    answer: Answer
    statuses: tuple[int, ...]
    operation: str
    summary: str
    description: str

    @property
    def parameters(self) -> list[str]:
        """The names of the parameters in the path."""
        return re.findall(r"{(\w+)}", self.path)


Method = TypeVar("Method", bound=Callable[..., Awaitable[Result]])
Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


def route(
    method: str,
    path: str,
    *,
    answer: Answer,
    body: Shape | Media | None = None,
    query: Shape | None = None,
    headers: tuple[str, ...] = (),
    statuses: tuple[int, ...] | None = None,
    access: Access | None = None,
) -> Callable[[Method], Method]:
    """Mark a method as a route; see `Route`. Looking wants READ, all else ADMIN, unless told."""

    def mark(function: Method) -> Method:
        summary, _, description = (inspect.getdoc(function) or "").partition("\n\n")
        entry = Route(
            method=method,
            path=path,
            access=access or (Access.READ if method == "GET" else Access.ADMIN),
            body=body,
            query=query or {},
            headers=headers,
            answer=answer,
            statuses=statuses or ((200,) if answer else (204,)),
            operation=function.__name__,
            summary=" ".join(summary.split()),
            description=" ".join(description.split()),
        )
        function.route = entry  # type: ignore[attr-defined]
        return function

    return mark


def routes_of(*objects: object) -> Iterator[tuple[Route, Callable[[Call], Awaitable[Result]]]]:
    """Yield the routes of objects, as they are written in their classes, with the bound methods."""
    for thing in objects:
        for name, member in vars(type(thing)).items():
            if isinstance(entry := getattr(member, "route", None), Route):
                yield entry, getattr(thing, name)


def resources(objects: Iterable[object]) -> list[web.RouteDef]:
    """Return what aiohttp needs to serve the routes of `objects`; GET comes with HEAD."""
    return [_definition(entry, _served(entry, method)) for entry, method in routes_of(*objects)]


def _definition(entry: Route, served: Handler) -> web.RouteDef:
    # A name may be empty in a path: that is a volume which is not there, not a path which is not.
    path = re.sub(r"{(\w+)}", r"{\1:[^{}/]*}", entry.path)
    if entry.method == "GET":
        return web.get(path, served, allow_head=not isinstance(entry.answer, Media))
    return web.route(entry.method, path, served)


def _served(entry: Route, method: Callable[[Call], Awaitable[Result]]) -> Handler:
    async def serve(request: web.Request) -> web.StreamResponse:
        if entry.access is Access.ADMIN:
            _demand_admin(request)
        shape = {} if entry.body is None else entry.body
        body = {} if isinstance(shape, Media) else bodies.parse(await request.read(), shape)
        query = bodies.parse_query(request.query, entry.query)
        return _answered(entry, await method(Call(request, body, query)))

    return serve


def _demand_admin(request: web.Request) -> None:
    caller = CALLER.get()
    if caller.access is not Access.ADMIN:
        raise Forbidden(
            f"the token of {caller.name} may only look: "
            f"{request.method} {request.path} wants an admin token"
        )


def _answered(entry: Route, result: Result) -> web.StreamResponse:
    """Turn what a method returned into the response that its route promises."""
    if isinstance(result, web.StreamResponse):
        assert isinstance(entry.answer, Media), entry.path
        return result
    if entry.answer is None:
        assert result is None, entry.path
        return web.Response(status=204)
    assert result is not None, entry.path
    reply = result if isinstance(result, Reply) else Reply(result, entry.statuses[0])
    assert reply.status in entry.statuses, f"{entry.path}: {reply.status}"
    return web.json_response(
        _as_json(entry, reply.content), status=reply.status, headers=dict(reply.headers)
    )


def _as_json(entry: Route, content: Record | Sequence[Record]) -> dict[str, Any]:
    if isinstance(entry.answer, Listing):
        assert isinstance(content, Sequence), entry.path
        return {entry.answer.member: [record.to_json() for record in content]}
    assert isinstance(entry.answer, type), entry.path
    assert isinstance(content, entry.answer), f"{entry.path}: {content!r:.80}"
    return content.to_json()
