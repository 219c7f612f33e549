"""Chat completions: one conversation, one or more choices."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import Protocol

from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob

from kvarn.v1 import engine_pb2, inference_pb2
from serve_app.openai import responses
from serve_app.openai.choices import ChatDelta, Usage, encode_once, generate_all
from serve_app.openai.logprobs import Vocabulary, chat_logprobs
from serve_app.openai.reasoning import ReasoningParsers
from serve_app.openai.requests import chat_prompt, chat_sampling, one_per_prompt, valid_unicode
from serve_app.openai.responses import ChatState, ChoiceReader, Head
from serve_app.openai.schema import ChatCompletionRequest
from serve_app.openai.tools import ToolParsers, naming_function
from serve_app.request.event_relay import EventRelay, event_text
from serve_app.request.handler import RequestHandler
from serve_app.request.request_errors import counting_rejections
from serve_app.request.structured_outputs import place_constraint
from serve_app.routing import Caller


class DeltaRendering(Protocol):
    """Renders the deltas of one choice as server-sent events."""

    def add(self, delta: ChatDelta) -> str:
        """Return the events for the next delta; "" if there are none."""

    def continued(self, text: str) -> str | None:
        """Do what `add` does for a delta of `text` alone, from a template; return None if that is not possible."""


class ChatService:
    """Handles chat completion requests.

    Args:
        dispatcher: generates the outputs.
        parsers: for tool calls.
        reasoning: for reasoning.
        vocabulary: the model's.
        on_rejection: called with the reason of each request rejected before it reaches the dispatcher.
    """

    def __init__(
        self,
        dispatcher: RequestHandler,
        parsers: ToolParsers,
        reasoning: ReasoningParsers,
        vocabulary: Vocabulary,
        on_rejection: Callable[[str], None],
    ) -> None:
        self._dispatcher = dispatcher
        self._parsers = parsers
        self._reasoning = reasoning
        self._vocabulary = vocabulary
        self._on_rejection = on_rejection

    async def complete(self, request: ChatCompletionRequest, head: Head, caller: Caller) -> ChatCompletion:
        """Return the whole response.

        Raises:
            RequestError: with the sentence for the caller.
        """
        states = [ChatState([] if request.logprobs else None) for _ in range(request.generations)]
        async with aclosing(self.deltas(request, head, caller)) as deltas:
            async for delta in deltas:
                states[delta.index].take(delta, self.logprobs(request, delta.logprobs))
        return responses.chat_completion(head, states, _counted(state.usage for state in states))

    async def stream(
        self, request: ChatCompletionRequest, head: Head, caller: Caller, relay: EventRelay | None
    ) -> AsyncGenerator[str, None]:
        """Yield the response in chunks, as JSON; a `relay` writes plain ones.

        Raises:
            RequestError: with the sentence for the caller.
        """
        usages: dict[int, inference_pb2.Usage] = {}
        chunks = responses.ChatChunks(head)
        rendering = _ChunkEvents(chunks)
        async with aclosing(self.deltas(request, head, caller, relay=relay, rendering=rendering)) as deltas:
            async for delta in deltas:
                if delta.index not in usages:
                    yield chunks.first(delta.index)
                usages[delta.index] = delta.usage
                logprobs = self.logprobs(request, delta.logprobs)
                shown = ChoiceLogprobs(content=logprobs, refusal=None) if logprobs else None
                if made := chunks.next(delta, shown):
                    yield made
        if request.stream_options and request.stream_options.include_usage:
            yield chunks.usage(_counted(usages[index] for index in sorted(usages)))

    async def deltas(
        self,
        request: ChatCompletionRequest,
        head: Head,
        caller: Caller,
        context_tokens: Callable[[], int] | None = None,
        relay: EventRelay | None = None,
        rendering: DeltaRendering | None = None,
    ) -> AsyncGenerator[ChatDelta, None]:
        """Yield what the output of all choices adds, for any protocol to render.

        Args:
            request: the request.
            head: the request's id.
            caller: the caller's tenant and priority.
            context_tokens: returns the context of the model, and max_tokens is lowered to what the prompt leaves of
                it; with None, a request that exceeds the context is rejected.
            relay: writes deltas of a single choice without log probabilities, which are then not yielded.
            rendering: of what `relay` writes.

        Raises:
            RequestError: with the sentence for the caller.
        """
        with request.naming_fields():
            requests = self._requests(request, head)
            if self._reasoning.is_on or context_tokens is not None or request.generations > 1:
                await encode_once(self._dispatcher, requests, caller)
            self._reasoning.open_answer(request, requests[0])
            if context_tokens is not None:
                _limit(requests[0], context_tokens())
            readers = self._readers(request, requests[0])
            relayed = None
            if relay is not None and rendering is not None:
                relayed = _RelayedChoice(readers[0], rendering)
                relay.render = relayed.render
            pieces_of_all = generate_all(self._dispatcher, requests, len(readers), caller, relay)
            async with naming_function(request), aclosing(pieces_of_all) as pieces:
                async for index, piece in pieces:
                    if relayed is not None and relayed.error is not None:
                        raise relayed.error
                    yield readers[index].read(piece)

    async def count(self, request: ChatCompletionRequest, head: Head, caller: Caller) -> int:
        """Return the number of tokens of the request's prompt.

        Raises:
            RequestError: with the sentence for the caller.
        """
        with request.naming_fields():
            (counted,) = self._requests(request, head)
            return len(await self._dispatcher.encode(counted, caller))

    def logprobs(
        self, request: ChatCompletionRequest, positions: Iterable[inference_pb2.PositionLogprobs]
    ) -> list[ChatCompletionTokenLogprob]:
        """Return log probabilities in OpenAI's format."""
        return chat_logprobs(positions, request.top_logprobs or 0, self._vocabulary)

    def _readers(
        self, request: ChatCompletionRequest, encoded: inference_pb2.GenerateRequest
    ) -> list[ChoiceReader]:
        """Return a reader per choice; where reasoning begins depends on the prompt, which is encoded for it."""
        answers = [self._parsers.reader(request) for _ in range(request.generations)]
        readers = self._reasoning.readers(request, encoded, answers)
        return [ChoiceReader(index, reader) for index, reader in enumerate(readers)]

    def _requests(self, request: ChatCompletionRequest, head: Head) -> list[inference_pb2.GenerateRequest]:
        with counting_rejections(self._on_rejection), valid_unicode():
            params = chat_sampling(request)
            self._parsers.prepare(request, params)
            self._reasoning.prepare(params)
            prompt = chat_prompt(request)
            place_constraint(params, prompt)
            return one_per_prompt(head.request_id, request, [prompt], params)


class _RelayedChoice:
    """Reads and renders the deltas of a choice that are relayed.

    Attributes:
        error: why one of them could not be read, which the usual path raises; None as long as all could.
    """

    def __init__(self, reader: ChoiceReader, rendering: DeltaRendering) -> None:
        self._reader = reader
        self._rendering = rendering
        self.error: Exception | None = None

    def render(self, delta: engine_pb2.EngineDelta) -> str | None:
        """Return the events of `delta`; None after an error."""
        if self._reader.is_plain:
            events = self._rendering.continued(delta.text)
            if events is not None:
                return events
        if self.error is None:
            try:
                return self._rendering.add(self._reader.read_part(delta.text, delta.token_ids))
            except Exception as error:
                self.error = error
        return None


class _ChunkEvents:
    """Renders the deltas of one choice as events of chunks."""

    def __init__(self, chunks: responses.ChatChunks) -> None:
        self._chunks = chunks
        self._text = chunks.text(0)

    def continued(self, text: str) -> str | None:
        return event_text(self._text.render(text)) if text else ""

    def add(self, delta: ChatDelta) -> str:
        made = self._chunks.next(delta, None)
        return "" if made is None else event_text(made)


def _limit(request: inference_pb2.GenerateRequest, context_tokens: int) -> None:
    room_tokens = context_tokens - len(request.prompt.token_ids.ids)
    if room_tokens > 0 and request.sampling_params.HasField("max_tokens"):
        request.sampling_params.max_tokens = min(request.sampling_params.max_tokens, room_tokens)


def _counted(usages: Iterable[inference_pb2.Usage]) -> Usage:
    last = list(usages)
    return Usage.of(last, len(last))
