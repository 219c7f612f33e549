"""Routes of Anthropic's Messages API."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serve_app.agents.answering import answer, rendered
from serve_app.agents.messages_errors import MessageErrorResponse
from serve_app.agents.messages_rendering import MessageEvents, whole_message
from serve_app.agents.messages_requests import CountTokensRequest, MessagesRequest
from serve_app.agents.output_blocks import OutputBlocks
from serve_app.openai.bodies import BodyRoute
from serve_app.openai.chat_completions import ChatService
from serve_app.openai.responses import Head
from serve_app.request.event_relay import EventRelay
from serve_app.routing import Caller
from serve_app.security.access import Access

PATH = "/v1/messages"
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": MessageErrorResponse},
    "5XX": {"model": MessageErrorResponse},
}
_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


class MessagesService:
    """Handles requests for messages.

    Args:
        chat: generates the answers.
        context_tokens: returns the longest context of any replica, 0 while there is none.
    """

    def __init__(self, chat: ChatService, context_tokens: Callable[[], int]) -> None:
        self._chat = chat
        self._context_tokens = context_tokens

    async def complete(self, wanted: MessagesRequest, head: Head, caller: Caller) -> dict[str, Any]:
        """Return the whole message.

        Raises:
            RequestError: with the sentence for the caller.
        """
        output = OutputBlocks()
        async with aclosing(self._chat.deltas(wanted.chat, head, caller, self._context_tokens)) as deltas:
            async for delta in deltas:
                output.take(delta)
        return whole_message(head, wanted, output.blocks, delta, self._context_tokens)

    def events(
        self, wanted: MessagesRequest, head: Head, caller: Caller, relay: EventRelay | None
    ) -> AsyncGenerator[str, None]:
        """Yield the message as server-sent events, except for those that `relay` writes.

        Raises:
            RequestError: with the sentence for the caller.
        """
        rendering = MessageEvents(head, wanted, self._context_tokens)
        deltas = self._chat.deltas(wanted.chat, head, caller, self._context_tokens, relay, rendering)
        return rendered(deltas, rendering)

    async def count(self, wanted: CountTokensRequest, head: Head, caller: Caller) -> int:
        """Return the number of tokens of a prompt.

        Raises:
            RequestError: with the sentence for the caller.
        """
        return await self._chat.count(wanted.chat, head, caller)


def messages_api(model_name: str, service: MessagesService, access: Access) -> APIRouter:
    """Build the router of Anthropic's Messages API.

    Args:
        model_name: the served model.
        service: handles the requests.
        access: authenticates callers and applies their rate limits.
    """
    router = APIRouter(prefix=PATH, tags=["anthropic"], route_class=BodyRoute)

    @router.post("", response_model=None, responses={**_STREAMED, **_ERRORS})
    async def create_message(request: Request, wanted: MessagesRequest) -> Response:
        """Create a message."""
        return await answer(service, request, wanted, _head(request, wanted.model or model_name), access)

    @router.post("/count_tokens", response_model=dict[str, int], responses=_ERRORS)
    async def count_tokens(request: Request, wanted: CountTokensRequest) -> Response:
        """Count the tokens of a prompt without answering it."""
        with access.admitted(request.headers) as caller:
            count = await service.count(wanted, _head(request, wanted.model or model_name), caller)
        return JSONResponse({"input_tokens": count})

    return router


def _head(request: Request, model_name: str) -> Head:
    request_id = request.state.request_id
    return Head(request_id, f"msg_{request_id}", int(time.time()), model_name)
