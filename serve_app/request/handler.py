"""What the servers of a gateway need of whatever takes their requests on."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from kvarn.v1 import cluster_pb2, inference_pb2
from serve_app.routing import Caller

Request = inference_pb2.GenerateRequest | inference_pb2.GenerateOnceRequest


class RequestHandler(Protocol):
    """The dispatcher, or what stands before it."""

    def generate(
        self, request: Request, timeout_s: float | None, caller: Caller
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """Yield the output of `request` from `caller`, of which at most `timeout_s` seconds are left.

        Raises:
            RequestError: with the sentence for the caller.
        """

    async def encode(self, request: Request, caller: Caller) -> list[int]:
        """The token ids of a prompt that several requests from `caller` share, of which `request` is one.

        Raises:
            RequestError: with the sentence for the caller.
        """

    async def explain(
        self, request: cluster_pb2.ExplainRouteRequest, caller: Caller
    ) -> cluster_pb2.ExplainRouteResponse:
        """Where a request from `caller` would go now, and every replica's terms.

        Raises:
            RequestError: with the sentence for the caller.
        """
