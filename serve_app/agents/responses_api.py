"""Route of OpenAI's Responses API."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from serve_app.agents.answering import answer, rendered
from serve_app.agents.output_blocks import Logprobs, OutputBlocks
from serve_app.agents.responses_rendering import ResponseEvents, ResponseObjects, whole_response
from serve_app.agents.responses_requests import ResponsesRequest
from serve_app.openai.bodies import BodyRoute
from serve_app.openai.chat_completions import ChatService
from serve_app.openai.error_responses import ErrorResponse
from serve_app.openai.responses import Head
from serve_app.request.event_relay import EventRelay
from serve_app.routing import Caller
from serve_app.security.access import Access

_DESCRIBED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}},
    "4XX": {"model": ErrorResponse},
    "5XX": {"model": ErrorResponse},
}


class ResponsesService:
    """Handles requests for responses.

    Args:
        chat: generates the answers.
    """

    def __init__(self, chat: ChatService) -> None:
        self._chat = chat

    async def complete(self, wanted: ResponsesRequest, head: Head, caller: Caller) -> dict[str, Any]:
        """Return the whole response.

        Raises:
            RequestError: with the sentence for the caller.
        """
        output = OutputBlocks()
        async with aclosing(self._chat.deltas(wanted.chat, head, caller)) as deltas:
            async for delta in deltas:
                output.take(delta)
        return whole_response(self._objects(wanted, head), output.blocks, delta)

    def events(
        self, wanted: ResponsesRequest, head: Head, caller: Caller, relay: EventRelay | None
    ) -> AsyncGenerator[str, None]:
        """Yield the response as server-sent events, except for those that `relay` writes.

        Raises:
            RequestError: with the sentence for the caller.
        """
        rendering = ResponseEvents(self._objects(wanted, head))
        deltas = self._chat.deltas(wanted.chat, head, caller, relay=relay, rendering=rendering)
        return rendered(deltas, rendering)

    def _objects(self, wanted: ResponsesRequest, head: Head) -> ResponseObjects:
        def logprobs(positions: Logprobs) -> list[dict[str, Any]]:
            return [one.model_dump() for one in self._chat.logprobs(wanted.chat, positions)]

        return ResponseObjects(head, wanted, logprobs)


def responses_api(model_name: str, service: ResponsesService, access: Access) -> APIRouter:
    """Build the router of OpenAI's Responses API.

    Args:
        model_name: the served model.
        service: handles the requests.
        access: authenticates callers and applies their rate limits.
    """
    router = APIRouter(prefix="/v1/responses", tags=["openai"], route_class=BodyRoute)

    @router.post("", response_model=None, responses=_DESCRIBED)
    async def create_response(request: Request, wanted: ResponsesRequest) -> Response:
        """Create a response."""
        request_id = request.state.request_id
        head = Head(request_id, f"resp_{request_id}", int(time.time()), wanted.model or model_name)
        return await answer(service, request, wanted, head, access)

    return router
