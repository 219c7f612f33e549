"""Routes of OpenAI's API."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from serve_app.openai.bodies import BodyRoute
from serve_app.openai.chat_completions import ChatService
from serve_app.openai.completions import CompletionService
from serve_app.openai.error_responses import FAILED, ErrorResponse, body, error_body
from serve_app.openai.responses import Head
from serve_app.openai.schema import ChatCompletionRequest, CompletionRequest, Sampling
from serve_app.request.disconnects import UntilDisconnect
from serve_app.request.event_relay import EventRelay, event_text
from serve_app.request.request_errors import ModelNotFoundError, RequestError
from serve_app.routing import Caller
from serve_app.security.access import Access

logger = logging.getLogger(__name__)
RequestT = TypeVar("RequestT", bound=Sampling, contravariant=True)
T = TypeVar("T")
CLIENT_CLOSED_REQUEST = 499  # nginx's code; the client that would read it is gone
_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}}
_DONE = "data: [DONE]\n\n"


class Service(Protocol[RequestT]):
    """Handles one kind of request, as a whole or as a stream."""

    async def complete(self, request: RequestT, head: Head, caller: Caller) -> BaseModel:
        """Return the whole response."""

    def stream(
        self, request: RequestT, head: Head, caller: Caller, relay: EventRelay | None
    ) -> AsyncGenerator[str, None]:
        """Yield the response in chunks, as JSON, except for those that `relay` writes."""


def openai_api(
    model_names: Sequence[str],
    max_model_len: Callable[[], int],
    chat: ChatService,
    completions: CompletionService,
    access: Access,
) -> APIRouter:
    """Build the router of OpenAI's API.

    Args:
        model_names: the served model, then its LoRA adapters.
        max_model_len: returns the longest context of any replica in tokens, 0 before the first one.
        chat: handles chat completions.
        completions: handles text completions.
        access: authenticates callers and applies their rate limits.
    """
    router = APIRouter(prefix="/v1", tags=["openai"], route_class=BodyRoute)
    base, *adapters = model_names
    created = int(time.time())

    def described(name: str) -> dict[str, object]:
        model = Model(id=name, created=created, object="model", owned_by="kvarn").to_dict()
        parent = {"parent": base} if name in adapters else {}
        return {**model, **parent, "max_model_len": max_model_len() or None}

    @router.post("/chat/completions", response_model=None, responses=_responses(ChatCompletion))
    async def create_chat_completion(request: Request, wanted: ChatCompletionRequest) -> Response:
        """Create a chat completion."""
        head = _head("chatcmpl", request, wanted.model or base)
        return await _answer(chat, request, wanted, head, access)

    @router.post("/completions", response_model=None, responses=_responses(Completion))
    async def create_completion(request: Request, wanted: CompletionRequest) -> Response:
        """Create text completions."""
        head = _head("cmpl", request, wanted.model or base)
        return await _answer(completions, request, wanted, head, access)

    @router.get("/models", responses=_ERRORS)
    async def list_models() -> dict[str, Any]:
        """List the served model and its LoRA adapters."""
        return {"object": "list", "data": [described(name) for name in model_names]}

    @router.get("/models/{name:path}", responses=_ERRORS)
    async def retrieve_model(name: str) -> dict[str, object]:
        """Describe the served model or one of its LoRA adapters."""
        if name not in model_names:
            raise ModelNotFoundError(f"The model {name[:128]!r} is not served here: use {base!r}.")
        return described(name)

    return router


class EventStream(StreamingResponse):
    """Server-sent events from a generator, which is closed as soon as the client disconnects.

    The response begins with the first event: what the generator raises before it is an error with its own status.
    """

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            with UntilDisconnect(receive):
                await self.stream_response(send)

    async def stream_response(self, send: Send) -> None:
        event: str | None = await anext(self._events)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while event is not None:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            event = await anext(self._events, None)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _answer(
    service: Service[RequestT], request: Request, wanted: RequestT, head: Head, access: Access
) -> Response:
    if wanted.stream:
        stream = partial(service.stream, wanted, head, relay=EventRelay.of(request.scope))
        return EventStream(_events(admitted_stream(access, request, wanted.generations, stream)))
    complete = partial(service.complete, wanted, head)
    answer = await unless_gone(request, admitted(access, request, wanted.generations, complete))
    if answer is None:
        return gone()
    return Response(answer.model_dump_json(exclude_unset=True), media_type="application/json")


async def admitted(
    access: Access, request: Request, generations: int, answer: Callable[[Caller], Awaitable[T]]
) -> T:
    """Return what `answer` returns for the request's caller, whose rate limits it is subject to.

    Raises:
        RequestError: with the sentence for the caller.
    """
    with access.admitted(request.headers, generations) as caller:
        return await answer(caller)


async def admitted_stream(
    access: Access, request: Request, generations: int, stream: Callable[[Caller], AsyncGenerator[T, None]]
) -> AsyncGenerator[T, None]:
    """Yield what `stream` yields for the request's caller, whose rate limits it is subject to.

    Raises:
        RequestError: with the sentence for the caller.
    """
    with access.admitted(request.headers, generations) as caller:
        async with aclosing(stream(caller)) as items:
            async for item in items:
                yield item


async def _events(chunks: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """Yield all chunks as server-sent events; once a stream has begun, an error is an event too."""
    has_begun = False
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                has_begun = True
                yield event_text(chunk)
        except RequestError as error:
            if not has_begun:
                raise
            yield event_text(json.dumps(error_body(error)))
        except Exception:
            if not has_begun:
                raise
            logger.exception("a request failed")
            yield event_text(json.dumps(body(FAILED, "server_error")))
        yield _DONE


async def unless_gone(request: Request, answer: Awaitable[T]) -> T | None:
    """Return the result of `answer`, or cancel it and return None if the client disconnects first."""
    with UntilDisconnect(request.receive):
        return await answer
    return None


def gone() -> Response:
    """Return the response that a client no longer reads."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _head(prefix: str, request: Request, model_name: str) -> Head:
    request_id = request.state.request_id
    return Head(request_id, f"{prefix}-{request_id}", int(time.time()), model_name)


def _responses(answer: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": answer, "content": {"text/event-stream": {}}}, **_ERRORS}
