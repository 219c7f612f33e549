"""Answers in the format of OpenAI's Responses API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvarn.v1 import inference_pb2
from serve_app.agents.answering import compact_json, event_text
from serve_app.agents.output_blocks import Block, Logprobs, OutputBlocks
from serve_app.agents.responses_requests import ENCRYPTED_REASONING, ResponsesRequest
from serve_app.agents.responses_schema import encoded_reasoning
from serve_app.openai.choices import ChatDelta
from serve_app.openai.error_responses import FAILED
from serve_app.openai.responses import Head
from serve_app.request.event_relay import PLACE, TextTemplate
from serve_app.request.request_errors import BadRequestError, RateLimitError, RequestError

_PREFIXES = {"reasoning": "rs", "text": "msg", "call": "fc"}
_DELTAS = {
    "reasoning": "response.reasoning_text.delta",
    "text": "response.output_text.delta",
    "call": "response.function_call_arguments.delta",
}
_NO_ARGUMENTS = "{}"

ShowLogprobs = Callable[[Logprobs], list[dict[str, Any]]]


class ResponseObjects:
    """Makes the objects of one response.

    Args:
        head: id and model of the response.
        wanted: the request.
        logprobs: converts log probabilities.
    """

    def __init__(self, head: Head, wanted: ResponsesRequest, logprobs: ShowLogprobs) -> None:
        self._head = head
        self._wanted = wanted
        self._functions = wanted.functions
        self.logprobs = logprobs

    def response(
        self,
        status: str,
        output: list[dict[str, Any]],
        usage: inference_pb2.Usage | None = None,
        error: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """Return the response itself, with the settings of its request."""
        wanted = self._wanted
        return {
            "id": self._head.id,
            "object": "response",
            "created_at": self._head.created,
            "status": status,
            "background": False,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": wanted.instructions,
            "max_output_tokens": wanted.max_output_tokens,
            "metadata": wanted.metadata or {},
            "model": self._head.model,
            "output": output,
            "parallel_tool_calls": wanted.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": wanted.prompt_cache_key,
            "reasoning": {"effort": wanted.reasoning.effort if wanted.reasoning else None, "summary": None},
            "safety_identifier": wanted.safety_identifier,
            "store": False,
            "temperature": wanted.temperature,
            "text": _text(wanted),
            "tool_choice": _tool_choice(wanted),
            "tools": [tool.model_dump(by_alias=True, exclude_none=True) for tool in wanted.tools or ()],
            "top_logprobs": wanted.top_logprobs or 0,
            "top_p": wanted.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else response_usage(usage),
            "user": wanted.user,
        }

    def item_id(self, block: Block) -> str:
        """Return the id of a block's item."""
        return f"{_PREFIXES[block.kind]}_{self._head.request_id}_{block.index}"

    def item(self, block: Block, status: str) -> dict[str, Any]:
        """Return the item of a block."""
        made: dict[str, Any] = {"id": self.item_id(block), "status": status}
        match block.kind:
            case "reasoning":
                made |= {"type": "reasoning", "summary": [], "content": [self.part(block)]}
                if self._wanted.includes(ENCRYPTED_REASONING):
                    made["encrypted_content"] = encoded_reasoning(block.text)
            case "text":
                made |= {"type": "message", "role": "assistant", "content": [self.part(block)]}
            case "call":
                arguments = block.text or ("" if status == "incomplete" else _NO_ARGUMENTS)
                made |= {"type": "function_call", "arguments": arguments, **self.named(block)}
        return made

    def opened_item(self, block: Block) -> dict[str, Any]:
        """Return the item of a block that has no content yet."""
        made: dict[str, Any] = {"id": self.item_id(block), "status": "in_progress"}
        match block.kind:
            case "reasoning":
                made |= {"type": "reasoning", "summary": [], "content": []}
            case "text":
                made |= {"type": "message", "role": "assistant", "content": []}
            case "call":
                made |= {"type": "function_call", "arguments": "", **self.named(block)}
        return made

    def named(self, block: Block) -> dict[str, str]:
        """Return which function a block calls."""
        namespace, function = self._functions.get(block.name, (None, None))
        names = {"name": function.name if function else block.name}
        return {"call_id": block.call_id, **names, **({"namespace": namespace} if namespace else {})}

    def part(self, block: Block) -> dict[str, Any]:
        """Return the one part of the content of a message or of reasoning."""
        if block.kind == "reasoning":
            return {"type": "reasoning_text", "text": block.text}
        logprobs = self.logprobs(block.logprobs)
        return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": logprobs}


class ResponseEvents:
    """Renders one response as events.

    Args:
        objects: makes the objects in the events.
    """

    def __init__(self, objects: ResponseObjects) -> None:
        self._objects = objects
        self._output = OutputBlocks(self)
        self._items: list[dict[str, Any]] = []
        self._events: list[str] = []
        self._number = 0
        self._grown_head, self._grown = "", TextTemplate("")  # of the open block
        self._is_cut = False

    def add(self, delta: ChatDelta) -> str:
        """Return the events for the next delta; "" if there are none."""
        if not self._number:
            begun = self._objects.response("in_progress", [])
            self._add("response.created", response=begun)
            self._add("response.in_progress", response=begun)
        self._is_cut = delta.finish_reason == "length"
        self._output.take(delta)
        if delta.finish_reason is not None:
            status = ending_status(delta)
            self._add(f"response.{status}", response=self._objects.response(status, self._items, delta.usage))
        return self._drained()

    def continued(self, text: str) -> str | None:
        """Return the event for more text of an open text block; None if there is none."""
        return self._grown_event(text) if self._output.continued(text) else None

    def failed(self, error: RequestError | None) -> str:
        """Return the event for a failure."""
        response = self._objects.response("failed", self._items, error=_failure(error))
        self._add("response.failed", response=response)
        return self._drained()

    def opened(self, block: Block) -> None:
        """Render the beginning of a block."""
        self._add(
            "response.output_item.added", output_index=block.index, item=self._objects.opened_item(block)
        )
        self._prepare(block)
        if block.kind != "call":
            self._add("response.content_part.added", **self._place(block), part=self._objects.part(block))

    def grew(self, block: Block, text: str, logprobs: Logprobs) -> None:
        """Render more text of a block."""
        if logprobs:
            shown = self._objects.logprobs(logprobs)
            self._add(_DELTAS[block.kind], **self._place(block), delta=text, logprobs=shown)
            return
        self._events.append(self._grown_event(text))

    def closed(self, block: Block) -> None:
        """Render the end of a block."""
        is_cut = self._is_cut and block is self._output.blocks[-1]
        item = self._objects.item(block, "incomplete" if is_cut else "completed")
        if block.kind == "call":
            if not block.parts and not is_cut:
                self.grew(block, _NO_ARGUMENTS, ())
            self._add(
                "response.function_call_arguments.done",
                **self._place(block),
                name=item["name"],
                arguments=item["arguments"],
            )
        else:
            part, kind = item["content"][0], "reasoning_text" if block.kind == "reasoning" else "output_text"
            done = {name: part[name] for name in ("text", "logprobs") if name in part}
            self._add(f"response.{kind}.done", **self._place(block), **done)
            self._add("response.content_part.done", **self._place(block), part=part)
        self._items.append(item)
        self._add("response.output_item.done", output_index=block.index, item=item)

    def _prepare(self, block: Block) -> None:
        """Prepare the events of more text, which differ in their number and text."""
        kind = _DELTAS[block.kind]
        grown = {**self._place(block), "delta": PLACE, **({"logprobs": []} if block.kind == "text" else {})}
        self._grown_head = f'event: {kind}\ndata: {{"type":"{kind}","sequence_number":'
        self._grown = TextTemplate(f"{compact_json(grown).removeprefix('{')}\n\n")

    def _grown_event(self, text: str) -> str:
        number, self._number = self._number, self._number + 1
        return f"{self._grown_head}{number},{self._grown.render(text)}"

    def _place(self, block: Block) -> dict[str, Any]:
        place: dict[str, Any] = {"item_id": self._objects.item_id(block), "output_index": block.index}
        return place if block.kind == "call" else {**place, "content_index": 0}

    def _add(self, kind: str, **fields: Any) -> None:
        self._events.append(event_text(kind, {"type": kind, "sequence_number": self._number, **fields}))
        self._number += 1

    def _drained(self) -> str:
        events, self._events = self._events, []
        return "".join(events)


def whole_response(objects: ResponseObjects, blocks: list[Block], last: ChatDelta) -> dict[str, Any]:
    """Return a whole response."""
    status = ending_status(last)
    items = [objects.item(block, "completed" if block is not blocks[-1] else status) for block in blocks]
    return objects.response(status, items, last.usage)


def ending_status(last: ChatDelta) -> str:
    """Return the status of a response that has ended."""
    return "incomplete" if last.finish_reason == "length" else "completed"


def response_usage(usage: inference_pb2.Usage) -> dict[str, Any]:
    """Return the token counts of a response."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _text(wanted: ResponsesRequest) -> dict[str, Any]:
    given = wanted.text.format if wanted.text else None
    if given is None:
        return {"format": {"type": "text"}}
    return {"format": given.model_dump(by_alias=True, exclude_none=True)}


def _tool_choice(wanted: ResponsesRequest) -> Any:
    choice = wanted.tool_choice or "auto"
    return choice if isinstance(choice, str) else choice.model_dump()


def _failure(error: RequestError | None) -> dict[str, str]:
    if error is None:
        return {"code": "server_error", "message": FAILED}
    code = "server_error"
    if isinstance(error, BadRequestError):
        code = "invalid_prompt"
    elif isinstance(error, RateLimitError):
        code = "rate_limit_exceeded"
    return {"code": code, "message": error.sentence}
