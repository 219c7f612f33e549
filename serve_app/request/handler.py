"""Interface between the gateway's servers and the dispatcher."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from kvarn.v1 import cluster_pb2, engine_pb2, inference_pb2
from serve_app.routing import Caller

MAX_NAME_CHARACTERS = 128  # of request_id, cache_salt and session_id
Request = inference_pb2.GenerateRequest | inference_pb2.GenerateOnceRequest


class Relay(Protocol):
    """Sends plain deltas to the caller in the turn of the event loop in which they arrive."""

    def take(self, delta: engine_pb2.EngineDelta, completion_tokens: int) -> bool:
        """Send `delta`, after which the output has `completion_tokens` tokens; return False if that is not possible.

        A delta that is not taken is yielded by `generate` instead, and so are the first one of each replica, those
        after it until they have been dealt with, and the last one.
        """


class RequestHandler(Protocol):
    """The dispatcher, or a wrapper around it."""

    def generate(
        self, request: Request, timeout_s: float | None, caller: Caller, relay: Relay | None = None
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """Yield the output of `request` from `caller`, whose deadline is `timeout_s` seconds away.

        With a `relay`, what it takes is not yielded. Asking for the next response means that all of the last one has
        been sent.

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
