"""Text completions: one or more prompts, one or more choices per prompt."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from openai.types import Completion
from openai.types.completion_choice import CompletionChoice, Logprobs

from kvarn.v1 import inference_pb2
from serve_app.openai import responses
from serve_app.openai.choices import Usage, encode_once, generate_all
from serve_app.openai.logprobs import TextLogprobs, Vocabulary
from serve_app.openai.requests import completion_prompts, completion_sampling, one_per_prompt, valid_unicode
from serve_app.openai.responses import Head
from serve_app.openai.schema import CompletionRequest
from serve_app.request.event_relay import EventRelay, event_text
from serve_app.request.handler import RequestHandler
from serve_app.request.request_errors import counting_rejections
from serve_app.routing import Caller


@dataclass
class TextState:
    """Accumulated state of one choice."""

    shown: TextLogprobs
    text: list[str] = field(default_factory=list)
    logprobs: list[inference_pb2.PositionLogprobs] = field(default_factory=list)
    finish_reason: int = inference_pb2.FINISH_REASON_UNSPECIFIED
    usage: inference_pb2.Usage = field(default_factory=inference_pb2.Usage)


class CompletionService:
    """Handles text completion requests.

    Args:
        dispatcher: generates the outputs.
        vocabulary: the model's.
        on_rejection: called with the reason of each request rejected before it reaches the dispatcher.
    """

    def __init__(
        self, dispatcher: RequestHandler, vocabulary: Vocabulary, on_rejection: Callable[[str], None]
    ) -> None:
        self._dispatcher = dispatcher
        self._vocabulary = vocabulary
        self._on_rejection = on_rejection

    async def complete(self, request: CompletionRequest, head: Head, caller: Caller) -> Completion:
        """Return all choices as one response.

        Raises:
            RequestError: with the sentence for the caller.
        """
        with request.naming_fields():
            requests, choices = await self._requests(request, head, caller), request.n or 1
            states = [TextState(TextLogprobs(self._vocabulary)) for _ in range(len(requests) * choices)]
            async with aclosing(generate_all(self._dispatcher, requests, choices, caller)) as pieces:
                async for index, piece in pieces:
                    state = states[index]
                    state.text.append(piece.text)
                    state.logprobs += piece.logprobs
                    state.finish_reason = piece.finish_reason
                    state.usage = piece.usage
        made = [self._choice(request, index, state) for index, state in enumerate(states)]
        return responses.completion(head, made, _counted(request, states))

    async def stream(
        self, request: CompletionRequest, head: Head, caller: Caller, relay: EventRelay | None
    ) -> AsyncGenerator[str, None]:
        """Yield all choices in chunks, as JSON; a `relay` writes plain ones.

        Raises:
            RequestError: with the sentence for the caller.
        """
        with request.naming_fields():
            requests, choices = await self._requests(request, head, caller), request.n or 1
            states = [TextState(TextLogprobs(self._vocabulary)) for _ in range(len(requests) * choices)]
            chunks = responses.CompletionChunks(head)
            if relay is not None and request.logprobs is None:
                template = chunks.text(0)
                relay.render = lambda delta: event_text(template.render(delta.text)) if delta.text else ""
            async with aclosing(generate_all(self._dispatcher, requests, choices, caller, relay)) as pieces:
                async for index, piece in pieces:
                    state = states[index]
                    state.usage = piece.usage
                    if piece.text or piece.finish_reason or piece.logprobs:
                        logprobs = self._logprobs(request, state, list(piece.logprobs))
                        yield chunks.next(index, piece.text, piece.finish_reason, logprobs)
        if request.stream_options and request.stream_options.include_usage:
            yield chunks.usage(_counted(request, states))

    async def _requests(
        self, request: CompletionRequest, head: Head, caller: Caller
    ) -> list[inference_pb2.GenerateRequest]:
        with counting_rejections(self._on_rejection), valid_unicode():
            prompts, params = completion_prompts(request), completion_sampling(request)
            requests = one_per_prompt(head.request_id, request, prompts, params)
        if (request.n or 1) > 1:
            await encode_once(self._dispatcher, requests, caller)
        return requests

    def _choice(self, request: CompletionRequest, index: int, state: TextState) -> CompletionChoice:
        logprobs = self._logprobs(request, state, state.logprobs)
        return responses.completion_choice(index, "".join(state.text), state.finish_reason, logprobs)

    def _logprobs(
        self, request: CompletionRequest, state: TextState, positions: list[inference_pb2.PositionLogprobs]
    ) -> Logprobs | None:
        if request.logprobs is None:
            return None
        return state.shown.add(positions)


def _counted(request: CompletionRequest, states: list[TextState]) -> Usage:
    return Usage.of([state.usage for state in states], request.n or 1)
