"""The control API of a server: HTTP + JSON over the operations on its pool.

Joins the classes of routes, decides who is let in, and owns how errors look on the wire
(`problems`). What a call does is in `operations`; each route is specified where it is written, and
``GET /v1/openapi.json`` tells all of them::

    pool_routes        /healthz, /metrics, /v1/pool, /v1/capacity, /v1/connections
    volume_routes      /v1/volumes, and the content of volumes
    lease_routes       /v1/leases, and the lease of a volume
    operation_routes   /v1/operations, what starts them (/v1/scrub), and /v1/events
    openapi            /v1/openapi.json

Over its unix socket whoever may open the socket (mode 0600) may call everything; over TCP a bearer
token (`tokens`) is demanded on all but /healthz. Sizes are bytes in every body.
"""

from __future__ import annotations

import logging

from aiohttp import web
from aiohttp.typedefs import Middleware

from nbdstore import __version__
from nbdstore.control import bodies, problems
from nbdstore.control.backup_routes import BackupRoutes
from nbdstore.control.lease_routes import LeaseRoutes
from nbdstore.control.openapi import OpenApiRoutes
from nbdstore.control.operation_routes import OperationRoutes
from nbdstore.control.operations import Operations
from nbdstore.control.pool_routes import PoolRoutes
from nbdstore.control.routing import CALLER, Handler, resources
from nbdstore.control.snapshot_routes import SnapshotRoutes
from nbdstore.control.space_routes import SpaceRoutes
from nbdstore.control.tokens import Tokens
from nbdstore.control.volume_routes import VolumeRoutes
from nbdstore.errors import (
    BodyTooLarge,
    NbdstoreError,
    Unauthorized,
    UnknownMethod,
    UnknownPath,
)
from nbdstore.sizes import exact_size

OPEN_PATHS = ("/healthz",)
"""What may be asked without a token."""

log = logging.getLogger(__name__)


def application(operations: Operations, *, tokens: Tokens | None = None) -> web.Application:
    """Build the API; with `tokens`, callers must present one as ``Authorization: Bearer``."""
    app = web.Application(
        middlewares=[_problems, _bearer(tokens)] if tokens is not None else [_problems],
        client_max_size=bodies.MAX_BODY,
    )
    app.add_routes(resources(route_objects(operations)))
    app.on_response_prepare.append(_sign)

    async def end_streams(_app: web.Application) -> None:
        operations.events.close()

    app.on_shutdown.append(end_streams)
    return app


def route_objects(operations: Operations) -> list[object]:
    """Make all there is to serve: the objects whose routes are the API."""
    served: list[object] = [
        PoolRoutes(operations),
        VolumeRoutes(operations),
        LeaseRoutes(operations),
        OperationRoutes(operations),
        SnapshotRoutes(operations),
        BackupRoutes(operations),
        SpaceRoutes(operations),
    ]
    return [*served, OpenApiRoutes(served)]


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
        return _problem(BodyTooLarge(f"the request body is over {exact_size(bodies.MAX_BODY)}"))
    except web.HTTPNotFound:
        return _problem(UnknownPath(f"there is no {request.path} in this API"))
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        wrong = UnknownMethod(f"{request.method} {request.path} is not known: use {allowed}")
        return _problem(wrong, headers={"Allow": allowed})
    except web.HTTPException:
        raise
    except ConnectionError:
        log.info("%s %s: the caller left before the end", request.method, request.path)
        return web.Response()  # for nobody
    except Exception as error:
        log.exception("%s %s failed: this is a bug", request.method, request.path)
        return _problem(error)


def _problem(error: Exception, *, headers: dict[str, str] | None = None) -> web.Response:
    problem = problems.to_json(error)
    if isinstance(error, Unauthorized):
        headers = {"WWW-Authenticate": "Bearer"}
    return web.json_response(
        problem, status=problem["status"], headers=headers, content_type=problems.CONTENT_TYPE
    )


def _bearer(tokens: Tokens) -> Middleware:
    @web.middleware
    async def demand_token(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in OPEN_PATHS:
            return await handler(request)
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        scheme, _, secret = given.partition(b" ")
        caller = tokens.find(secret) if scheme.lower() == b"bearer" else None
        if caller is None:
            wrong = "is wrong" if given else "is missing"
            raise Unauthorized(
                f"the token for this control address {wrong}: give its file with --token-file, or "
                "send 'Authorization: Bearer TOKEN'"
            )
        before = CALLER.set(caller)
        try:
            return await handler(request)
        finally:
            CALLER.reset(before)

    return demand_token
