"""Tool calls: constraints that tool_choice puts on the output, and parsing of the calls in it.

If the caller requires a call, the output is constrained to JSON, which is parsed here. If the model decides,
one of vLLM's tool parsers reads the model's own notation.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from kvarn.v1 import sampling_pb2
from serve_app.openai.required_calls import CallPart, CallScanner
from serve_app.openai.schema import ChatCompletionRequest, Function, NamedToolChoice
from serve_app.openai.tool_schemas import arguments_schema, calls_schema, check_tools, refused_function
from serve_app.request import harmony
from serve_app.request.request_errors import BadRequestError

if TYPE_CHECKING:
    from kvarn.vllm.access.tool_parsers import ParsedOutput, StreamedToolCalls, WholeToolCalls


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
        return Found(calls=(CallDelta(0, text, new_id(), name),))


class RequiredReader:
    """Reads the output as a JSON list of calls; without any call in it, as text."""

    def __init__(self) -> None:
        self._scanner = CallScanner()
        self._text: str | None = ""  # until a call begins

    def read(self, text: str, token_ids: Sequence[int], is_last: bool) -> Found:
        parts = self._scanner.feed(text)
        if self._text is not None:
            self._text = None if parts else self._text + text
        if self._text is not None and is_last:
            return Found(self._text)
        return Found(calls=tuple(_required_delta(part) for part in parts))


class StreamReader:
    """Passes the output to one of vLLM's tool parsers piece by piece.

    White space before a call is left out: clients take the first text of a stream as the beginning of the answer.
    """

    def __init__(self, calls: StreamedToolCalls) -> None:
        self._calls = calls
        self._blank: str | None = ""  # until text or a call begins

    def read(self, text: str, token_ids: Sequence[int], is_last: bool) -> Found:
        found = _found(self._calls.feed(text, token_ids))
        if is_last:
            held = _found(self._calls.finish())
            found = Found(found.content + held.content, (*found.calls, *held.calls))
        return (
            found if self._blank is None else self._after_blank(self._blank + found.content, found, is_last)
        )

    def _after_blank(self, content: str, found: Found, is_last: bool) -> Found:
        is_blank = not content.strip()
        if is_blank and not found.calls and not is_last:
            self._blank = content
            return Found()
        self._blank = None
        return Found("" if is_blank and found.calls else content, found.calls)


class WholeReader:
    """Passes the complete output to one of vLLM's tool parsers, which reads more notations than piece by piece."""

    def __init__(self, calls: WholeToolCalls) -> None:
        self._calls = calls
        self._text = ""

    def read(self, text: str, token_ids: Sequence[int], is_last: bool) -> Found:
        self._text += text
        if not is_last:
            return Found()
        return _found(self._calls.read(self._text))


class FirstCallReader:
    """Drops all calls but the first of what `reader` finds, for callers that take one at a time."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def read(self, text: str, token_ids: Sequence[int], is_last: bool) -> Found:
        found = self._reader.read(text, token_ids, is_last)
        return replace(found, calls=tuple(call for call in found.calls if call.index == 0))


class ToolParsers:
    """Makes readers of tool calls; with a parser, the model may decide to call tools by itself.

    Args:
        name: one of vLLM's tool parsers; with None, only calls that the request requires are supported.
        tokenizer: the model's.

    Raises:
        ValueError: vLLM has no such parser.
    """

    def __init__(self, name: str | None, tokenizer: Any) -> None:
        self._is_on = name is not None
        self._parser_class: type[Any] | None = None
        self._tokenizer = tokenizer
        if name is not None and name != harmony.TOOL_PARSER:
            from kvarn.vllm.access.output_parsers import with_cached_vocabulary
            from kvarn.vllm.access.tool_parsers import find_tool_parser

            self._parser_class = find_tool_parser(name)
            self._tokenizer = with_cached_vocabulary(tokenizer)

    def prepare(self, request: ChatCompletionRequest, params: sampling_pb2.SamplingParams) -> None:
        """Constrain the output in `params` as the request's tool_choice requires.

        Raises:
            BadRequestError: the model may decide, and no parser is configured to read its calls; or a tool's
                parameters are nested too deeply.
        """
        if not request.tools or request.tool_choice == "none":
            return
        check_tools(request.tools)
        functions = _choosable(request)
        if isinstance(request.tool_choice, NamedToolChoice):
            params.structured_outputs.json_schema = json.dumps(arguments_schema(functions[0]))
        elif request.tool_choice == "required":
            several = request.parallel_tool_calls is not False
            params.structured_outputs.json_schema = json.dumps(calls_schema(functions, several))
        elif not self._is_on:
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
        if self._parser_class is None:  # the reader of reasoning reads Harmony's calls
            return PlainReader()
        reader = self._parser_reader(request)
        return FirstCallReader(reader) if request.parallel_tool_calls is False else reader

    def _parser_reader(self, request: ChatCompletionRequest) -> Reader:
        from kvarn.vllm.access.tool_parsers import StreamedToolCalls, WholeToolCalls

        assert self._parser_class is not None
        tools = [tool.model_dump(exclude={"function": {"strict"}}) for tool in request.tools or ()]
        arguments = self._parser_class, self._tokenizer, request.model or "", tools
        if request.stream:
            return StreamReader(StreamedToolCalls(*arguments))
        return WholeReader(WholeToolCalls(*arguments))


@asynccontextmanager
async def naming_function(request: ChatCompletionRequest) -> AsyncIterator[None]:
    """Name the function in each `BadRequestError` raised in this block because of the schema of required calls.

    Engines refuse the schema of all functions together, with its paths.
    """
    try:
        yield
    except BadRequestError as error:
        if request.requires_calls and error.sentence.startswith("structured_outputs.json_schema "):
            sentence = await asyncio.to_thread(refused_function, _choosable(request))
            error.sentence = sentence or error.sentence
        raise


def _choosable(request: ChatCompletionRequest) -> list[Function]:
    """Return the functions that the model may call."""
    functions = [tool.function for tool in request.tools or ()]
    if not isinstance(request.tool_choice, NamedToolChoice):
        return functions
    name = request.tool_choice.function.name
    return [function for function in functions if function.name == name]


def _required_delta(part: CallPart) -> CallDelta:
    if part.name is None:
        return CallDelta(part.index, part.arguments)
    return CallDelta(part.index, part.arguments, new_id(), part.name)


def _found(parsed: ParsedOutput) -> Found:
    calls = (
        CallDelta(call.index, call.arguments, call.id or (new_id() if call.name else None), call.name)
        for call in parsed.calls
    )
    return Found(parsed.content, tuple(calls))


def new_id() -> str:
    """Return an id for a tool call."""
    return f"call_{uuid.uuid4().hex[:24]}"
