"""Answers in the format of Anthropic's Messages API."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pydantic_core import from_json

from kvarn.v1 import inference_pb2
from serve_app.agents.answering import event_text
from serve_app.agents.messages_errors import message_error_body
from serve_app.agents.messages_requests import MessagesRequest
from serve_app.agents.output_blocks import Block, Logprobs, OutputBlocks
from serve_app.openai.choices import ChatDelta
from serve_app.openai.responses import Head
from serve_app.request.event_relay import PLACE, TextTemplate
from serve_app.request.request_errors import RequestError

# Nothing is shown while a parser holds output back; a ping then shows clients and proxies that the stream lives.
PING_AFTER_S = 10.0
_DELTAS = {
    "reasoning": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageEvents:
    """Renders one answer as events.

    Args:
        head: id and model of the answer.
        wanted: the request.
        context_tokens: returns the model's context.
        now_s: returns the time in seconds.
    """

    def __init__(
        self,
        head: Head,
        wanted: MessagesRequest,
        context_tokens: Callable[[], int],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._head = head
        self._wanted = wanted
        self._context_tokens = context_tokens
        self._now_s = now_s
        self._shown_s = now_s()
        self._blocks = OutputBlocks(self)
        self._grown = TextTemplate("")  # of the open block
        self._events: list[str] = []
        self._has_begun = False

    def add(self, delta: ChatDelta) -> str:
        """Return the events for the next delta; "" if there are none."""
        if not self._has_begun:
            self._has_begun = True
            self._add("message_start", message=self._opened_message(delta))
        self._blocks.take(delta)
        if delta.finish_reason is not None:
            stop = _stop(self._wanted, delta, self._context_tokens)
            self._add("message_delta", delta=stop, usage=message_usage(delta.usage))
            self._add("message_stop")
        if not self._events and self._now_s() - self._shown_s >= PING_AFTER_S:
            self._add("ping")
        return self._drained()

    def continued(self, text: str) -> str | None:
        """Return the event for more text of an open text block; None if there is none."""
        if not self._blocks.continued(text):
            return None
        self._shown_s = self._now_s()
        return self._grown.render(text)

    def failed(self, error: RequestError | None) -> str:
        """Return the event for a failure."""
        return event_text("error", message_error_body(error))

    def opened(self, block: Block) -> None:
        """Render the beginning of a block."""
        self._add("content_block_start", index=block.index, content_block=_opened(block))
        self._grown = _template(block)
        if not block.index:
            self._add("ping")

    def grew(self, block: Block, text: str, logprobs: Logprobs) -> None:
        """Render more text of a block."""
        self._events.append(self._grown.render(text))

    def closed(self, block: Block) -> None:
        """Render the end of a block."""
        if block.kind == "reasoning":
            signed = {"type": "signature_delta", "signature": _signature(self._head)}
            self._add("content_block_delta", index=block.index, delta=signed)
        self._add("content_block_stop", index=block.index)

    def _opened_message(self, delta: ChatDelta) -> dict[str, Any]:
        usage = message_usage(delta.usage)
        usage["output_tokens"] = 0
        return _message(self._head, [], {"stop_reason": None, "stop_sequence": None}, usage)

    def _add(self, kind: str, **fields: Any) -> None:
        self._events.append(event_text(kind, {"type": kind, **fields}))

    def _drained(self) -> str:
        if not self._events:
            return ""
        self._shown_s = self._now_s()
        events, self._events = self._events, []
        return "".join(events)


def _template(block: Block) -> TextTemplate:
    kind, name = _DELTAS[block.kind]
    grown = {"type": "content_block_delta", "index": block.index, "delta": {"type": kind, name: PLACE}}
    return TextTemplate(event_text("content_block_delta", grown))


def whole_message(
    head: Head,
    wanted: MessagesRequest,
    blocks: list[Block],
    last: ChatDelta,
    context_tokens: Callable[[], int],
) -> dict[str, Any]:
    """Return a whole answer."""
    content = [_whole(block, head) for block in blocks]
    return _message(head, content, _stop(wanted, last, context_tokens), message_usage(last.usage))


def message_usage(usage: inference_pb2.Usage) -> dict[str, Any]:
    """Return Anthropic's token counts, in which `input_tokens` leaves out cached ones."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def _message(
    head: Head, content: list[dict[str, Any]], stop: dict[str, Any], usage: dict[str, Any]
) -> dict[str, Any]:
    return {
        "id": head.id,
        "type": "message",
        "role": "assistant",
        "model": head.model,
        "content": content,
        **stop,
        "usage": usage,
    }


def _stop(wanted: MessagesRequest, last: ChatDelta, context_tokens: Callable[[], int]) -> dict[str, Any]:
    """Return why the output ended."""
    assert last.finish_reason is not None
    if last.finish_reason == "stop" and isinstance(last.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": last.stop_reason}
    reason, usage = _REASONS[last.finish_reason], last.usage
    is_full = usage.prompt_tokens + usage.completion_tokens >= context_tokens()
    if reason == "max_tokens" and is_full and usage.completion_tokens < wanted.max_tokens:
        reason = "model_context_window_exceeded"
    return {"stop_reason": reason, "stop_sequence": None}


def _opened(block: Block) -> dict[str, Any]:
    match block.kind:
        case "reasoning":
            return {"type": "thinking", "thinking": "", "signature": ""}
        case "text":
            return {"type": "text", "text": ""}
        case "call":
            return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}


def _whole(block: Block, head: Head) -> dict[str, Any]:
    made = _opened(block)
    match block.kind:
        case "reasoning":
            made |= {"thinking": block.text, "signature": _signature(head)}
        case "text":
            made["text"] = block.text
        case "call":
            made["input"] = _arguments(block.text)
    return made


def _arguments(text: str) -> dict[str, Any]:
    """Return a call's arguments; of an output that was cut off, those before the last, whose value may be cut too."""
    try:
        return _object(from_json(text or "{}"))
    except ValueError:
        pass
    try:
        begun = _object(from_json(text, allow_partial="trailing-strings"))
    except ValueError:
        return {}
    return dict([*begun.items()][:-1])


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _signature(head: Head) -> str:
    """Return the signature of a thinking block, which clients return with it and nothing checks."""
    return head.id
