"""Keeps the cached prefixes of tenants apart."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator

from kvarn.v1 import cluster_pb2, inference_pb2
from serve_app.request.handler import Request, RequestHandler
from serve_app.routing import Caller


class TenantSalts:
    """A dispatcher whose requests share cached prefixes only within their tenant.

    Args:
        dispatcher: takes the requests on.
    """

    def __init__(self, dispatcher: RequestHandler) -> None:
        self._dispatcher = dispatcher

    def generate(
        self, request: Request, timeout_s: float | None, caller: Caller
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """As the dispatcher's; the request's own salt keeps apart within the tenant."""
        request.cache_salt = tenant_salt(caller.tenant, request.cache_salt)
        return self._dispatcher.generate(request, timeout_s, caller)

    async def encode(self, request: Request, caller: Caller) -> list[int]:
        """As the dispatcher's: token ids are the same for every tenant."""
        return await self._dispatcher.encode(request, caller)

    async def explain(
        self, request: cluster_pb2.ExplainRouteRequest, caller: Caller
    ) -> cluster_pb2.ExplainRouteResponse:
        """As the dispatcher's, of a request salted in the same way."""
        request.cache_salt = tenant_salt(caller.tenant, request.cache_salt)
        return await self._dispatcher.explain(request, caller)


def tenant_salt(tenant: str, own: str) -> str:
    """A salt that no other tenant's requests can have, whatever salt of their own they bring."""
    return hashlib.sha256(f"{len(tenant)}:{tenant}{own}".encode()).hexdigest()
