"""Interface between the gateway's servers and the dispatcher."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from kvarn.v1 import cluster_pb2, inference_pb2
from serve_app.routing import Caller

Request = inference_pb2.GenerateRequest | inference_pb2.GenerateOnceRequest


class RequestHandler(Protocol):
    """The dispatcher, or a wrapper around it."""

    def generate(
        self, request: Request, timeout_s: float | None, caller: Caller
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """Yield the output of `request` from `caller`, whose deadline is `timeout_s` seconds away.

        Raises:
            RequestError: with the sentence for the caller.
        """

    async def encode(self, request: Request, caller: Caller) -> list[int]:
        """Return the token ids of a prompt that several requests from `caller` share; `request` is one of them.

        Raises:
            RequestError: with the sentence for the caller.
        """

    async def explain(
        self, request: cluster_pb2.ExplainRouteRequest, caller: Caller
    ) -> cluster_pb2.ExplainRouteResponse:
        """Return where a request from `caller` would go now, and the cost terms of every replica.

        Raises:
            RequestError: with the sentence for the caller.
        """
