"""Conversion of the engine's output to OpenAI's response objects, in OpenAI's own types."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.chat_completion import Choice as ChatChoice
from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import (
    ChoiceDelta,
    ChoiceDeltaToolCall,
    ChoiceDeltaToolCallFunction,
)
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_message import ChatCompletionMessage
from openai.types.chat.chat_completion_message_function_tool_call import (
    ChatCompletionMessageFunctionToolCall,
    Function,
)
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob
from openai.types.completion_choice import Logprobs
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails
from pydantic import BaseModel

from kvarn.v1 import inference_pb2
from serve_app.openai.choices import ChatDelta, Usage
from serve_app.openai.tools import CallDelta, Found, PlainReader, Reader
from serve_app.request.event_relay import PLACE, TextTemplate

_REASONS: dict[int, Any] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_REPETITION: "stop",
}


_NO_USAGE = inference_pb2.Usage()


@dataclass(frozen=True)
class Head:
    """Fields that all objects of one response share, and the request's id in logs."""

    request_id: str
    id: str
    created: int
    model: str


class ChoiceReader:
    """Reads the output of one chat choice.

    Args:
        index: number of the choice.
        reader: separates text, tool calls and reasoning.

    Attributes:
        is_plain: whether all output is text of the answer.
    """

    def __init__(self, index: int, reader: Reader) -> None:
        self.is_plain = isinstance(reader, PlainReader)
        self._index = index
        self._reader = reader
        self._reasoning_tokens = 0
        self._has_calls = False

    def read(self, piece: inference_pb2.GenerateResponse) -> ChatDelta:
        """Return what the next piece of the output adds."""
        reason = _REASONS.get(piece.finish_reason)
        found = self._read(piece.text, piece.token_ids, is_last=reason is not None)
        piece.usage.reasoning_tokens = self._reasoning_tokens
        kind = piece.stop_reason.WhichOneof("matched")
        return ChatDelta(
            index=self._index,
            content=found.content,
            reasoning=found.reasoning,
            calls=found.calls,
            finish_reason="tool_calls" if self._has_calls and reason == "stop" else reason,
            stop_reason=getattr(piece.stop_reason, kind) if kind else None,
            logprobs=piece.logprobs,
            usage=piece.usage,
        )

    def read_part(self, text: str, token_ids: Sequence[int]) -> ChatDelta:
        """Return what a piece adds that is not the last and has no log probabilities, without its usage."""
        found = self._read(text, token_ids, is_last=False)
        return ChatDelta(
            index=self._index,
            content=found.content,
            reasoning=found.reasoning,
            calls=found.calls,
            finish_reason=None,
            stop_reason=None,
            logprobs=(),
            usage=_NO_USAGE,
        )

    def _read(self, text: str, token_ids: Sequence[int], is_last: bool) -> Found:
        found = self._reader.read(text, token_ids, is_last)
        self._has_calls = self._has_calls or bool(found.calls)
        self._reasoning_tokens += found.reasoning_tokens
        return found


@dataclass
class ChatState:
    """Accumulated deltas of one chat choice; `logprobs` is None unless the caller wants them."""

    logprobs: list[ChatCompletionTokenLogprob] | None
    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)
    finish_reason: str | None = None
    usage: inference_pb2.Usage = field(default_factory=inference_pb2.Usage)

    def take(self, delta: ChatDelta, logprobs: Iterable[ChatCompletionTokenLogprob]) -> None:
        """Add one delta, and its log probabilities in OpenAI's format."""
        self.content += delta.content
        self.reasoning += delta.reasoning
        self.calls = _joined(self.calls, delta.calls)
        self.finish_reason = delta.finish_reason
        self.usage = delta.usage
        if self.logprobs is not None:
            self.logprobs += logprobs


def usage(counted: Usage) -> CompletionUsage:
    """Return OpenAI's token counts of a response."""
    return CompletionUsage(
        prompt_tokens=counted.prompt_tokens,
        completion_tokens=counted.completion_tokens,
        total_tokens=counted.prompt_tokens + counted.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=counted.cached_tokens),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=counted.reasoning_tokens),
    )


def chat_completion(head: Head, states: Sequence[ChatState], counted: Usage) -> ChatCompletion:
    """Return the whole response."""
    return ChatCompletion(
        id=head.id,
        created=head.created,
        model=head.model,
        object="chat.completion",
        choices=[_chat_choice(index, state) for index, state in enumerate(states)],
        usage=usage(counted),
    )


def first_chunk(head: Head, index: int) -> ChatCompletionChunk:
    """Return the chunk that opens a choice."""
    return _chunk(
        head, ChunkChoice(index=index, delta=ChoiceDelta(role="assistant", content=""), finish_reason=None)
    )


def chunk(head: Head, delta: ChatDelta, logprobs: ChunkLogprobs | None) -> ChatCompletionChunk | None:
    """Return the chunk for a delta; None if it would be empty."""
    if not (delta.content or delta.reasoning or delta.calls or delta.finish_reason or logprobs):
        return None
    made = ChoiceDelta()
    if delta.reasoning:
        _set_reasoning(made, delta.reasoning)
    if delta.content:
        made.content = delta.content
    if delta.calls:
        made.tool_calls = [_call_chunk(call) for call in delta.calls]
    choice = ChunkChoice(index=delta.index, delta=made, finish_reason=delta.finish_reason)  # type: ignore[arg-type]
    if logprobs is not None:
        choice.logprobs = logprobs
    return _chunk(head, choice)


def usage_chunk(head: Head, counted: Usage) -> ChatCompletionChunk:
    """Return the last chunk of a stream with `include_usage`."""
    made = _chunk(head)
    made.usage = usage(counted)
    return made


class ChatChunks:
    """Chunks of one streamed chat, as JSON.

    Args:
        head: fields that all chunks share.
    """

    def __init__(self, head: Head) -> None:
        self._head = head
        self._texts: dict[int, TextTemplate] = {}
        self._reasonings: dict[int, TextTemplate] = {}

    def first(self, index: int) -> str:
        """Return the chunk that opens a choice."""
        return _json(first_chunk(self._head, index))

    def next(self, delta: ChatDelta, logprobs: ChunkLogprobs | None) -> str | None:
        """Return the chunk for a delta; None if it would be empty."""
        if not (delta.calls or delta.finish_reason or logprobs):
            if not delta.reasoning:
                return self.text(delta.index).render(delta.content) if delta.content else None
            if not delta.content:
                return self._reasoning(delta.index).render(delta.reasoning)
        made = chunk(self._head, delta, logprobs)
        return None if made is None else _json(made)

    def usage(self, counted: Usage) -> str:
        """Return the last chunk of a stream with `include_usage`."""
        return _json(usage_chunk(self._head, counted))

    def text(self, index: int) -> TextTemplate:
        """Return the template of a choice's chunks that have text only."""
        if index not in self._texts:
            self._texts[index] = self._template(index, content=PLACE)
        return self._texts[index]

    def _reasoning(self, index: int) -> TextTemplate:
        if index not in self._reasonings:
            self._reasonings[index] = self._template(index, reasoning=PLACE)
        return self._reasonings[index]

    def _template(self, index: int, content: str = "", reasoning: str = "") -> TextTemplate:
        delta = ChatDelta(
            index=index,
            content=content,
            reasoning=reasoning,
            calls=(),
            finish_reason=None,
            stop_reason=None,
            logprobs=(),
            usage=inference_pb2.Usage(),
        )
        made = chunk(self._head, delta, None)
        assert made is not None
        return TextTemplate(_json(made))


class CompletionChunks:
    """Chunks of one streamed text completion, as JSON.

    Args:
        head: fields that all chunks share.
    """

    def __init__(self, head: Head) -> None:
        self._head = head
        self._texts: dict[int, TextTemplate] = {}

    def next(self, index: int, text: str, finish_reason: int, logprobs: Logprobs | None) -> str:
        """Return the chunk for a piece."""
        if not finish_reason and logprobs is None:
            return self.text(index).render(text)
        return _json(completion(self._head, [completion_choice(index, text, finish_reason, logprobs)], None))

    def usage(self, counted: Usage) -> str:
        """Return the last chunk of a stream with `include_usage`."""
        return _json(completion(self._head, [], counted))

    def text(self, index: int) -> TextTemplate:
        """Return the template of a choice's chunks that have text only."""
        if index not in self._texts:
            choice = completion_choice(index, PLACE, inference_pb2.FINISH_REASON_UNSPECIFIED, None)
            self._texts[index] = TextTemplate(_json(completion(self._head, [choice], None)))
        return self._texts[index]


def completion(head: Head, choices: Sequence[CompletionChoice], counted: Usage | None) -> Completion:
    """Return a whole text completion, or one chunk of its stream."""
    made = Completion(
        id=head.id, created=head.created, model=head.model, object="text_completion", choices=list(choices)
    )
    if counted is not None:
        made.usage = usage(counted)
    return made


class _CompletionPart(CompletionChoice):
    """A choice or a part of it: parts before the last have no reason, which OpenAI's type does not allow."""

    finish_reason: Any = None


def completion_choice(
    index: int, text: str, finish_reason: int, logprobs: Logprobs | None
) -> CompletionChoice:
    """Return one choice of a text completion, or a part of it."""
    return _CompletionPart(
        index=index, text=text, finish_reason=_REASONS.get(finish_reason), logprobs=logprobs
    )


def _json(made: BaseModel) -> str:
    return made.model_dump_json(exclude_unset=True)


def _chunk(head: Head, *choices: ChunkChoice) -> ChatCompletionChunk:
    return ChatCompletionChunk(
        id=head.id,
        created=head.created,
        model=head.model,
        object="chat.completion.chunk",
        choices=list(choices),
    )


def _chat_choice(index: int, state: ChatState) -> ChatChoice:
    message = ChatCompletionMessage(
        role="assistant", content=state.content or (None if state.calls or state.reasoning else "")
    )
    message.refusal = None
    if state.reasoning:
        _set_reasoning(message, state.reasoning)
    if state.calls:
        message.tool_calls = [_call(call) for call in state.calls]
    logprobs = None if state.logprobs is None else ChoiceLogprobs(content=state.logprobs, refusal=None)
    return ChatChoice(
        index=index,
        message=message,
        logprobs=logprobs,
        finish_reason=state.finish_reason or "stop",  # type: ignore[arg-type]
    )


def _set_reasoning(made: ChoiceDelta | ChatCompletionMessage, reasoning: str) -> None:
    """Set both names by which clients read reasoning; OpenAI's types have neither."""
    made.reasoning_content = made.reasoning = reasoning  # type: ignore[union-attr]


def _joined(calls: list[CallDelta], parts: Iterable[CallDelta]) -> list[CallDelta]:
    """Merge further parts into the calls so far: a part continues the call with its index, or starts it."""
    held = {call.index: call for call in calls}
    for part in parts:
        before = held.get(part.index, CallDelta(part.index))
        held[part.index] = CallDelta(
            part.index,
            before.arguments + part.arguments,
            before.id or part.id,
            before.name or part.name,
        )
    return [held[index] for index in sorted(held)]


def _call(call: CallDelta) -> ChatCompletionMessageFunctionToolCall:
    return ChatCompletionMessageFunctionToolCall(
        id=call.id or "", type="function", function=Function(name=call.name or "", arguments=call.arguments)
    )


def _call_chunk(call: CallDelta) -> ChoiceDeltaToolCall:
    function = ChoiceDeltaToolCallFunction(arguments=call.arguments)
    made = ChoiceDeltaToolCall(index=call.index, function=function)
    if call.id is not None:
        function.name = call.name
        made.id, made.type = call.id, "function"
    return made
