"""The HTTP application of a gateway: probes, and the routers of whatever else it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fastapi import APIRouter, FastAPI, Response

from serve_app.tracing import TraceContext


def http_app(routers: Iterable[APIRouter]) -> FastAPI:
    """One application of all `routers`."""
    app = FastAPI(title="KVarN serving", openapi_url="/openapi.json", docs_url=None, redoc_url=None)
    app.add_middleware(TraceContext)
    for router in routers:
        app.include_router(router)
    return app


def probes(is_ready: Callable[[], bool]) -> APIRouter:
    """What load balancers and Kubernetes ask.

    Args:
        is_ready: whether the gateway has a replica that takes requests.
    """
    router = APIRouter(tags=["probes"])

    @router.get("/livez", status_code=204)
    async def livez() -> None:
        """The gateway answers."""

    @router.get("/readyz", status_code=204, responses={503: {"description": "No replica takes requests."}})
    async def readyz() -> Response:
        """The gateway answers and has a replica that takes requests."""
        return Response(status_code=204 if is_ready() else 503)

    return router
