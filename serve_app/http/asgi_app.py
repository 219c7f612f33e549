"""HTTP application of a gateway: health probes, API routers, and error responses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route
from starlette.types import ASGIApp

from serve_app.http.error_shapes import failed_at, invalid_at, rejected_at
from serve_app.http.head_requests import HeadAsGet
from serve_app.observability.tracing import TraceContext
from serve_app.openai.bodies import InvalidBodyError
from serve_app.openai.schema import problem
from serve_app.request.request_errors import BadRequestError, RequestError


def http_app(
    routers: Iterable[APIRouter], on_rejection: Callable[[str], None] = lambda reason: None
) -> FastAPI:
    """Build one application from all `routers`.

    Args:
        routers: the routes.
        on_rejection: called with the reason of each body rejected before a route sees it.
    """
    app = FastAPI(title="KVarN serving", openapi_url=None, docs_url=None, redoc_url=None)
    app.add_route("/openapi.json", _described, include_in_schema=False)
    app.add_middleware(HeadAsGet)
    app.add_middleware(TraceContext)
    app.state.on_rejection = on_rejection
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(RequestError, _rejected)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(InvalidBodyError, _invalid_body)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _failed)
    return app


def with_cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Let web pages from `origins` call `app`; preflight requests, which carry no key, do not reach it."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["retry-after", "x-request-id"],
    )


def probes(is_ready: Callable[[], bool]) -> APIRouter:
    """Build the liveness and readiness probes of load balancers and Kubernetes.

    Args:
        is_ready: returns whether the gateway has a replica that accepts requests.
    """
    router = APIRouter(tags=["probes"])

    @router.get("/livez", status_code=204)
    async def livez() -> None:
        """The gateway answers."""

    @router.get("/readyz", status_code=204, responses={503: {"description": "No replica accepts requests."}})
    async def readyz() -> Response:
        """The gateway answers and has a replica that accepts requests."""
        return Response(status_code=204 if is_ready() else 503)

    return router


async def _rejected(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return rejected_at(request.url.path, error)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    request.app.state.on_rejection(BadRequestError.reason)
    sentence, param = problem(error.errors(), error.body)
    return invalid_at(request.url.path, sentence, param=param)


async def _invalid_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, InvalidBodyError)
    request.app.state.on_rejection(BadRequestError.reason)
    return invalid_at(request.url.path, error.sentence, error.status_code, error.param)


async def _no_route(request: Request, error: Exception) -> Response:
    """Respond to unknown paths and methods, and to OPTIONS."""
    assert isinstance(error, HTTPException)
    allow = {"allow": ", ".join(_methods_at(request))} if error.status_code == 405 else {}
    if allow and request.method == "OPTIONS":
        return Response(status_code=204, headers=allow)
    found = f"{request.method} {request.url.path[:128]}: {error.detail}."
    if error.status_code == 404:
        found += f" Served are {_served(request.app)}."
    response = invalid_at(request.url.path, found, error.status_code)
    response.headers.update({**(error.headers or {}), **allow})
    return response


def _methods_at(request: Request) -> list[str]:
    """Return the methods of a path, which has at least one route."""
    methods = {"OPTIONS"}
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    if "GET" in methods:
        methods.add("HEAD")
    return sorted(methods)


async def _described(request: Request) -> Response:
    """Return the OpenAPI document, which takes more than 100 ms to build once."""
    return JSONResponse(await asyncio.to_thread(request.app.openapi))


def _served(app: FastAPI) -> str:
    """List the methods and paths of all routes; HEAD goes where GET does."""
    routes = [route for route in app.routes if isinstance(route, Route)]
    names = [
        f"{method} {route.path_format}"
        for route in routes
        for method in sorted(route.methods or ())
        if method != "HEAD"
    ]
    return ", ".join(names[:-1]) + f" and {names[-1]}"


async def _failed(request: Request, error: Exception) -> Response:
    return failed_at(request.url.path)
