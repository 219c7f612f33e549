"""Isolation of tenants in the prefix cache."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator

from kvarn.v1 import cluster_pb2, inference_pb2
from serve_app.request.handler import Relay, Request, RequestHandler
from serve_app.routing import Caller


class TenantSalts:
    """Request handler that salts the cache, so that requests share cached prefixes only within their tenant.

    Args:
        dispatcher: handles the salted requests.
    """

    def __init__(self, dispatcher: RequestHandler) -> None:
        self._dispatcher = dispatcher

    def generate(
        self, request: Request, timeout_s: float | None, caller: Caller, relay: Relay | None = None
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """Generate as the dispatcher does; the request's own salt separates requests within the tenant."""
        request.cache_salt = tenant_salt(caller.tenant, request.cache_salt)
        return self._dispatcher.generate(request, timeout_s, caller, relay)

    async def encode(self, request: Request, caller: Caller) -> list[int]:
        """Encode as the dispatcher does: token ids are the same for every tenant."""
        return await self._dispatcher.encode(request, caller)

    async def explain(
        self, request: cluster_pb2.ExplainRouteRequest, caller: Caller
    ) -> cluster_pb2.ExplainRouteResponse:
        """Explain as the dispatcher does, with the salt that `generate` would use."""
        request.cache_salt = tenant_salt(caller.tenant, request.cache_salt)
        return await self._dispatcher.explain(request, caller)


def tenant_salt(tenant: str, own: str) -> str:
    """Return a salt that no other tenant's requests can have, whatever their own salts are."""
    return hashlib.sha256(f"{len(tenant)}:{tenant}{own}".encode()).hexdigest()
