"""Tool calls: constraints that tool_choice puts on the output, and parsing of the calls in it.

If the caller requires a call, the output is constrained to JSON, which is parsed here. If the model decides,
one of vLLM's tool parsers reads the model's own notation.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import JsonValue

from kvarn.v1 import sampling_pb2
from serve_app.openai.schema import ChatCompletionRequest, NamedToolChoice, Tool
from serve_app.request.request_errors import BadRequestError

if TYPE_CHECKING:
    from kvarn.vllm.access.tool_parsers import StreamedToolCalls


@dataclass(frozen=True)
class CallDelta:
    """A part of a tool call: the first part has `id` and `name`, later ones only text of the arguments."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Found:
    """Contents of a piece of output: text for the user, parts of tool calls, and reasoning before both."""

    content: str = ""
    calls: Sequence[CallDelta] = field(default_factory=tuple)
    reasoning: str = ""
    reasoning_tokens: int = 0


class Reader(Protocol):
    """Reads the output of one choice piece by piece."""

    def read(self, text: str, token_ids: Sequence[int], is_last: bool) -> Found:
        """Return what the next piece of the output adds."""


class PlainReader:
    """Reads all output as text."""

    def read(self, text: str, token_ids: Sequence[int], is_last: bool) -> Found:
        return Found(text)


class NamedReader:
    """Reads all output as the arguments of one function, `name`."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def read(self, text: str, token_ids: Sequence[int], is_last: bool) -> Found:
        if self._name is None:
            return Found(calls=(CallDelta(0, text),)) if text else Found()
        name, self._name = self._name, None
        return Found(calls=(CallDelta(0, text, _new_id(), name),))


class RequiredReader:
    """Reads the output as a JSON list of calls once it is complete; a truncated list is returned as text."""

    def __init__(self) -> None:
        self._text = ""

    def read(self, text: str, token_ids: Sequence[int], is_last: bool) -> Found:
        self._text += text
        if not is_last:
            return Found()
        try:
            calls = [(call["name"], json.dumps(call["parameters"])) for call in json.loads(self._text)]
        except (ValueError, TypeError, KeyError):
            return Found(self._text)
        deltas = (CallDelta(i, arguments, _new_id(), name) for i, (name, arguments) in enumerate(calls))
        return Found(calls=tuple(deltas))


class ParserReader:
    """Passes the output to one of vLLM's tool parsers."""

    def __init__(self, calls: StreamedToolCalls) -> None:
        self._calls = calls

    def read(self, text: str, token_ids: Sequence[int], is_last: bool) -> Found:
        delta = self._calls.feed(text, token_ids)
        if delta is None:
            return Found()
        return Found(delta.content or "", tuple(_call_delta(call) for call in delta.tool_calls))


class ToolParsers:
    """Makes readers of tool calls; with a parser, the model may decide to call tools by itself.

    Args:
        name: one of vLLM's tool parsers; with None, only calls that the request requires are supported.
        tokenizer: the model's.

    Raises:
        ValueError: vLLM has no such parser.
    """

    def __init__(self, name: str | None, tokenizer: Any) -> None:
        self._parser_class: type[Any] | None = None
        self._tokenizer = tokenizer
        if name is not None:
            from kvarn.vllm.access.parser_tokenizer import with_cached_vocabulary
            from kvarn.vllm.access.tool_parsers import find_tool_parser

            self._parser_class = find_tool_parser(name)
            self._tokenizer = with_cached_vocabulary(tokenizer)

    def prepare(self, request: ChatCompletionRequest, params: sampling_pb2.SamplingParams) -> None:
        """Constrain the output in `params` as the request's tool_choice requires.

        Raises:
            BadRequestError: the model may decide, and no parser is configured to read its calls.
        """
        if not request.tools or request.tool_choice == "none":
            return
        if isinstance(request.tool_choice, NamedToolChoice):
            (function,) = (
                tool.function
                for tool in request.tools
                if tool.function.name == request.tool_choice.function.name
            )
            params.structured_outputs.json_schema = json.dumps(function.parameters or {"type": "object"})
        elif request.tool_choice == "required":
            several = request.parallel_tool_calls is not False
            params.structured_outputs.json_schema = json.dumps(calls_schema(request.tools, several))
        elif self._parser_class is None:
            raise BadRequestError(
                "No parser is configured for tool calls that the model makes by itself: set tool_choice to "
                "required or to one function, or set gateway.tool_parser on the server."
            )
        else:
            params.skip_special_tokens = False  # some models mark tool calls by special tokens

    def reader(self, request: ChatCompletionRequest) -> Reader:
        """Return a reader for one choice."""
        if not request.tools or request.tool_choice == "none":
            return PlainReader()
        if isinstance(request.tool_choice, NamedToolChoice):
            return NamedReader(request.tool_choice.function.name)
        if request.tool_choice == "required":
            return RequiredReader()
        return self._parser_reader(request)

    def _parser_reader(self, request: ChatCompletionRequest) -> ParserReader:
        from kvarn.vllm.access.tool_parsers import StreamedToolCalls

        assert self._parser_class is not None  # `prepare` has rejected the request otherwise
        tools = [tool.model_dump(exclude={"function": {"strict"}}) for tool in request.tools or ()]
        return ParserReader(
            StreamedToolCalls(self._parser_class, self._tokenizer, request.model or "", tools)
        )


def calls_schema(tools: Sequence[Tool], several: bool) -> dict[str, JsonValue]:
    """Return the JSON schema of a list of calls: at least one, and at most one unless `several`."""
    definitions: dict[str, JsonValue] = {}
    calls: list[JsonValue] = []
    for tool in tools:
        parameters = dict(tool.function.parameters or {"type": "object"})
        for keyword in ("$defs", "definitions"):
            hoisted = parameters.pop(keyword, {})  # references are relative to the root
            if isinstance(hoisted, dict) and hoisted:
                held = definitions.setdefault(keyword, {})
                assert isinstance(held, dict)
                held.update(hoisted)
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "enum": [tool.function.name]},
                    "parameters": parameters,
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, JsonValue] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, **definitions}
    return schema if several else {**schema, "maxItems": 1}


def _call_delta(call: Any) -> CallDelta:
    function = call.function
    return CallDelta(
        index=call.index,
        arguments=(function.arguments if function else None) or "",
        id=call.id or (_new_id() if function and function.name else None),
        name=function.name if function else None,
    )


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
