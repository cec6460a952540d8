"""The control API of a server: HTTP + JSON over the operations on its pool.

Owns the routes, who may call them, and how errors look on the wire (`problems`); what a call does
is in `operations`. Sizes are bytes in every body::

    GET    /healthz                    200 while the pool acknowledges writes, else 503; no token
    GET    /v1/pool                    PoolInfo
    POST   /v1/pool/grow               {"capacity"} -> PoolInfo
    POST   /v1/pool/checkpoint         PoolInfo
    GET    /v1/capacity                CapacityReport
    GET    /v1/connections             {"connections": [AttachmentInfo...]}
    DELETE /v1/connections/{id}        204; also if there is none
    GET    /v1/volumes                 {"volumes": [VolumeInfo...]}
    POST   /v1/volumes                 {"name", "size", "allow"?} -> 201 VolumeInfo
    GET    /v1/volumes/{name}          VolumeInfo
    PATCH  /v1/volumes/{name}          {"size"?, "name"?, "allow"?, "force"?} -> VolumeInfo
    DELETE /v1/volumes/{name}          204; ?fence=1
    GET    /v1/leases                  {"leases": [LeaseInfo...]}, without tokens
    PUT    /v1/volumes/{name}/lease    {"holder", "force"?} -> LeaseInfo
    DELETE /v1/volumes/{name}/lease    204; ?holder=H, &epoch=N; also if that is not held
    POST   /v1/volumes/{name}/lease/break   204; also if there is none
    GET    /v1/volumes/{name}/data     a data stream (`stream`)
    PUT    /v1/volumes/{name}/data     a data stream -> VolumeInfo; ?overwrite=1

Over its unix socket whoever may open the socket (mode 0600) may call everything; over TCP a bearer
token is demanded on all but /healthz.
"""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import quote

from aiohttp import ClientPayloadError, web
from aiohttp.typedefs import Middleware

from nbdstore import __version__
from nbdstore.control import bodies, problems, stream
from nbdstore.control.model import Record
from nbdstore.control.operations import Operations
from nbdstore.control.stream import Buffer, StreamReader, StreamWriter
from nbdstore.errors import ControlError, InvalidArgument, NbdstoreError, NotFound, Unauthorized
from nbdstore.sizes import format_size

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger(__name__)

NAME = "{name:[^{}/]*}"
"""A name may be empty in a path: that is a volume which is not there, not a path which is not."""


def application(operations: Operations, *, token: str | None = None) -> web.Application:
    """Build the API; with `token`, callers must present it as ``Authorization: Bearer``."""
    routes = _Routes(operations)
    app = web.Application(
        middlewares=[_problems, _bearer(token)] if token is not None else [_problems],
        client_max_size=bodies.MAX_BODY,
    )
    app.add_routes(
        [
            web.get("/healthz", routes.healthz),
            web.get("/v1/pool", routes.pool),
            web.post("/v1/pool/grow", routes.grow),
            web.post("/v1/pool/checkpoint", routes.checkpoint),
            web.get("/v1/capacity", routes.capacity),
            web.get("/v1/connections", routes.connections),
            web.delete("/v1/connections/{id:[0-9]{1,18}}", routes.disconnect),
            web.get("/v1/leases", routes.leases),
            web.get("/v1/volumes", routes.volumes),
            web.post("/v1/volumes", routes.create),
            web.get(f"/v1/volumes/{NAME}", routes.volume),
            web.patch(f"/v1/volumes/{NAME}", routes.update),
            web.delete(f"/v1/volumes/{NAME}", routes.delete),
            web.put(f"/v1/volumes/{NAME}/lease", routes.acquire_lease),
            web.delete(f"/v1/volumes/{NAME}/lease", routes.release_lease),
            web.post(f"/v1/volumes/{NAME}/lease/break", routes.break_lease),
            web.get(f"/v1/volumes/{NAME}/data", routes.read_content, allow_head=False),
            web.put(f"/v1/volumes/{NAME}/data", routes.write_content),
        ]
    )
    app.on_response_prepare.append(_sign)
    return app


async def _sign(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = f"nbdstore/{__version__}"


@web.middleware
async def _problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every failure as a problem; log those that are not the caller's."""
    try:
        return await handler(request)
    except NbdstoreError as error:
        return _problem(error)
    except web.HTTPRequestEntityTooLarge:
        return _problem(InvalidArgument(f"the request body is over {bodies.MAX_BODY} bytes"))
    except web.HTTPNotFound:
        return _problem(NotFound(f"there is no {request.path} in this API"))
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        wrong = InvalidArgument(f"{request.method} {request.path} is not known: use {allowed}")
        return _problem(wrong, status=405, headers={"Allow": allowed})
    except web.HTTPException:
        raise
    except ConnectionError:
        log.info("%s %s: the caller left before the end", request.method, request.path)
        return web.Response()  # for nobody
    except Exception as error:
        log.exception("%s %s failed: this is a bug", request.method, request.path)
        return _problem(error)


def _problem(
    error: Exception, *, status: int | None = None, headers: dict[str, str] | None = None
) -> web.Response:
    problem = problems.to_json(error)
    if isinstance(error, Unauthorized):
        headers = {"WWW-Authenticate": "Bearer"}
    return web.json_response(
        problem | ({"status": status} if status else {}),
        status=status or problem["status"],
        headers=headers,
        content_type=problems.CONTENT_TYPE,
    )


def _bearer(token: str) -> Middleware:
    expected = b"Bearer " + token.encode()

    @web.middleware
    async def demand_token(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        # compare_digest takes the same time wherever the first difference is.
        if request.path != "/healthz" and not hmac.compare_digest(given, expected):
            wrong = "is wrong" if given else "is missing"
            raise Unauthorized(f"the token of this control address {wrong}: give it a token file")
        return await handler(request)

    return demand_token


def _json(record: Record, *, status: int = 200, location: str | None = None) -> web.Response:
    headers = {"Location": location} if location else None
    return web.json_response(record.to_json(), status=status, headers=headers)


async def _body(request: web.Request, **shape: str) -> dict[str, Any]:
    return bodies.parse(await request.read(), shape)


def _query(request: web.Request, *known: str) -> dict[str, str]:
    """Return the query's members; InvalidArgument if one is not known."""
    for name in request.query:
        if name not in known:
            raise InvalidArgument(f"'{name}' is not known here: give {', '.join(known)}")
    return dict(request.query)


class _Routes:
    """One method per route: read the request, call the operation, answer."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    async def healthz(self, _request: web.Request) -> web.StreamResponse:
        state = self._operations.pool().state
        status = 503 if state == "failed" else 200
        return web.json_response({"state": state, "version": __version__}, status=status)

    async def pool(self, _request: web.Request) -> web.StreamResponse:
        return _json(self._operations.pool())

    async def grow(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, capacity="bytes")
        return _json(await self._operations.grow_pool(body["capacity"]))

    async def checkpoint(self, request: web.Request) -> web.StreamResponse:
        await _body(request)
        return _json(await self._operations.checkpoint())

    async def capacity(self, _request: web.Request) -> web.StreamResponse:
        return _json(self._operations.capacity())

    async def connections(self, _request: web.Request) -> web.StreamResponse:
        listing = [record.to_json() for record in self._operations.attachments()]
        return web.json_response({"connections": listing})

    async def disconnect(self, request: web.Request) -> web.StreamResponse:
        await self._operations.disconnect(int(request.match_info["id"]))
        return web.Response(status=204)

    async def leases(self, _request: web.Request) -> web.StreamResponse:
        listing = [record.to_json() for record in self._operations.leases.list()]
        return web.json_response({"leases": listing})

    async def acquire_lease(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, holder="text", force="flag?")
        info = await self._operations.leases.acquire(
            request.match_info["name"], body["holder"], force=body.get("force", False)
        )
        return _json(info)

    async def release_lease(self, request: web.Request) -> web.StreamResponse:
        query = _query(request, "holder", "epoch")
        if "holder" not in query:
            raise InvalidArgument("say whose lease ends: ?holder=HOLDER")
        epoch = query.get("epoch")
        if epoch is not None and not re.fullmatch("[0-9]{1,18}", epoch):
            raise InvalidArgument(f"'{epoch:.40}' is no epoch of a lease: give its number")
        await self._operations.leases.release(
            request.match_info["name"], query["holder"], int(epoch) if epoch else None
        )
        return web.Response(status=204)

    async def break_lease(self, request: web.Request) -> web.StreamResponse:
        await _body(request)
        await self._operations.leases.break_(request.match_info["name"])
        return web.Response(status=204)

    async def volumes(self, _request: web.Request) -> web.StreamResponse:
        listing = [record.to_json() for record in self._operations.volumes()]
        return web.json_response({"volumes": listing})

    async def create(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, name="text", size="bytes", allow="names?")
        info = await self._operations.create_volume(
            body["name"], body["size"], body.get("allow", ())
        )
        log.info("volume %s created, %s", info.name, format_size(info.size))
        return _json(info, status=201, location=f"/v1/volumes/{quote(info.name, safe='')}")

    async def volume(self, request: web.Request) -> web.StreamResponse:
        return _json(self._operations.volume(request.match_info["name"]))

    async def update(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        body = await _body(request, size="bytes?", name="text?", allow="names?", force="flag?")
        info = await self._operations.update_volume(
            name,
            size=body.get("size"),
            new_name=body.get("name"),
            allow=body.get("allow"),
            force=body.get("force", False),
        )
        changes = ", ".join(f"{key} {value}" for key, value in body.items())
        log.info("volume %s changed: %s", name, changes)
        return _json(info)

    async def delete(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        query = _query(request, "fence")
        await self._operations.delete_volume(name, fence=query.get("fence") == "1")
        log.info("volume %s deleted", name)
        return web.Response(status=204)

    async def read_content(self, request: web.Request) -> web.StreamResponse:
        """Send a volume. Once the first byte went out, a failure ends the stream as FAILED."""
        size, pieces = self._operations.read_content(request.match_info["name"])
        response = web.StreamResponse(headers={"Content-Type": stream.CONTENT_TYPE})
        await response.prepare(request)
        writer = StreamWriter()
        await _send(response, writer.header(size))
        try:
            async for piece in pieces:
                await _send(response, writer.data(piece))
            await _send(response, writer.end())
        except NbdstoreError as error:
            log.error("sending volume %s failed: %s", request.match_info["name"], error)
            await _send(response, writer.failed(error))
        await response.write_eof()
        return response

    async def write_content(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        reader = StreamReader()
        pieces = _received(request, reader)
        # The first step reads the header, and with it the size that a new volume gets.
        first = await anext(pieces, None)
        if reader.size is None:
            raise InvalidArgument("the request body is not a data stream: it has no header")
        info = await self._operations.write_content(
            name,
            reader.size,
            _resumed(first, pieces),
            overwrite=request.query.get("overwrite") == "1",
        )
        log.info("volume %s imported, %s of data", name, format_size(info.mapped))
        return _json(info)


async def _send(response: web.StreamResponse, buffers: list[Buffer]) -> None:
    for buffer in buffers:
        await response.write(buffer)


async def _received(request: web.Request, reader: StreamReader) -> AsyncIterator[stream.Piece]:
    """Yield the pieces of a request's body; InvalidArgument if it is damaged or cut off."""
    try:
        async for chunk in request.content.iter_any():
            for piece in reader.feed(chunk):
                yield piece
        reader.end()
    except (ControlError, ClientPayloadError) as error:
        raise InvalidArgument(f"the import was not sent whole: {error}") from error


async def _resumed(
    first: stream.Piece | None, rest: AsyncIterator[stream.Piece]
) -> AsyncIterator[stream.Piece]:
    if first is not None:
        yield first
    async for piece in rest:
        yield piece
