"""Answers to requests of agents, whole or as server-sent events."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response

from serve_app.openai.api import EventStream, admitted, admitted_stream, gone, unless_gone
from serve_app.openai.chat_completions import DeltaRendering
from serve_app.openai.choices import ChatDelta
from serve_app.openai.responses import Head
from serve_app.request.event_relay import EventRelay
from serve_app.request.request_errors import RequestError
from serve_app.routing import Caller
from serve_app.security.access import Access

logger = logging.getLogger(__name__)
RequestT = TypeVar("RequestT", contravariant=True)


class AgentService(Protocol[RequestT]):
    """Handles the requests of one protocol, which have one choice each."""

    async def complete(self, wanted: RequestT, head: Head, caller: Caller) -> dict[str, Any]:
        """Return the whole answer."""

    def events(
        self, wanted: RequestT, head: Head, caller: Caller, relay: EventRelay | None
    ) -> AsyncGenerator[str, None]:
        """Yield the answer as server-sent events, except for those that `relay` writes."""


class EventRendering(DeltaRendering, Protocol):
    """Renders one answer as server-sent events."""

    def failed(self, error: RequestError | None) -> str:
        """Return the events for a failure of an answer that has begun; None means that the server failed."""


async def answer(
    service: AgentService[RequestT], request: Request, wanted: Any, head: Head, access: Access
) -> Response:
    """Return the response to `wanted`, which the client gets unless it disconnects first."""
    response: Response
    if wanted.stream:
        stream = partial(service.events, wanted, head, relay=EventRelay.of(request.scope))
        response = EventStream(admitted_stream(access, request, 1, stream))
    else:
        complete = partial(service.complete, wanted, head)
        made = await unless_gone(request, admitted(access, request, 1, complete))
        if made is None:
            return gone()
        response = Response(compact_json(made), media_type="application/json")
    response.headers["request-id"] = head.request_id
    return response


async def rendered(
    deltas: AsyncGenerator[ChatDelta, None], rendering: EventRendering
) -> AsyncGenerator[str, None]:
    """Yield the events of `deltas`; once a stream has begun, an error is an event too."""
    has_begun = False
    async with aclosing(deltas):
        try:
            async for delta in deltas:
                if events := rendering.add(delta):
                    has_begun = True
                    yield events
        except RequestError as error:
            if not has_begun:
                raise
            yield rendering.failed(error)
        except Exception:
            if not has_begun:
                raise
            logger.exception("a request failed")
            yield rendering.failed(None)


def event_text(kind: str, data: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"event: {kind}\ndata: {compact_json(data)}\n\n"


def compact_json(value: Any) -> str:
    """Return JSON text without white space."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
