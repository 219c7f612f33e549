"""vLLM's tool parsers, used outside vLLM's own server."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvarn.errors import did_you_mean
from kvarn.vllm.access.output_parsers import check_reads_output, is_engine_based, misfits

if TYPE_CHECKING:
    from vllm.entrypoints.generate.base.protocol import DeltaMessage
    from vllm.tool_parsers import ToolParser

logger = logging.getLogger(__name__)


def tool_parser_names() -> list[str]:
    """Return the names of the installed vLLM's parsers; importing them takes seconds."""
    from vllm.tool_parsers import ToolParserManager

    return ToolParserManager.list_registered()


def find_tool_parser(name: str) -> type[ToolParser]:
    """Return the class of a tool parser; importing vLLM's parsers takes seconds.

    Raises:
        ValueError: vLLM has no parser of this name; the message lists the known names.
    """
    from vllm.tool_parsers import ToolParserManager

    try:
        return ToolParserManager.get_tool_parser(name)
    except KeyError:
        known = tool_parser_names()
        raise ValueError(
            f"tool_parser is {name!r}{did_you_mean(name, known)}, expected one of {', '.join(known)} or none"
        ) from None


def check_tool_parser(name: str, tokenizer: Any) -> None:
    """Check that a parser can read the output of the model with `tokenizer`.

    Raises:
        ValueError: vLLM has no usable parser of this name, or it does not fit.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    parser_class, setting = find_tool_parser(name), f"tool_parser {name}"
    with misfits(setting):
        parser = parser_class(tokenizer, None)
    request = ChatCompletionRequest(messages=[])
    check_reads_output(setting, lambda: parser.extract_tool_calls_streaming("", "", "", [], [], [], request))


@dataclass(frozen=True)
class ParsedCall:
    """A tool call or a part of one: the first part has the name."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class ParsedOutput:
    """Text for the user and tool calls in an output, or in a piece of it."""

    content: str = ""
    calls: Sequence[ParsedCall] = ()


class _ToolCalls:
    """A parser of the tool calls in one output.

    Args:
        parser_class: from `find_tool_parser`.
        tokenizer: the model's.
        model: the model's name.
        tools: the tools of the request, in OpenAI's format.
    """

    def __init__(
        self, parser_class: type[ToolParser], tokenizer: Any, model: str, tools: list[dict[str, Any]]
    ) -> None:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        self._request = ChatCompletionRequest(messages=[], model=model, tools=tools, tool_choice="auto")
        self._parser = parser_class(tokenizer, self._request.tools)
        if hasattr(self._parser, "skip_reasoning_parsing"):
            self._parser.skip_reasoning_parsing = True  # what the reasoning parser left is not reasoning


class WholeToolCalls(_ToolCalls):
    """Parser of the tool calls in one complete output."""

    def read(self, text: str) -> ParsedOutput:
        """Return the output's content and calls; all of it is content if the parser fails on it."""
        try:
            found = self._parser.extract_tool_calls(text, self._request)
        except Exception:
            logger.exception("the tool parser failed on an output, which is returned as text")
            return ParsedOutput(text)
        if not found.tools_called and not is_engine_based(self._parser):
            return ParsedOutput(text)
        calls = [
            ParsedCall(index, call.function.arguments or "{}", call.id, call.function.name)
            for index, call in enumerate(found.tool_calls)
        ]
        return ParsedOutput(found.content or "", calls)


class StreamedToolCalls(_ToolCalls):
    """Parser of the tool calls in one streamed output."""

    def __init__(
        self, parser_class: type[ToolParser], tokenizer: Any, model: str, tools: list[dict[str, Any]]
    ) -> None:
        super().__init__(parser_class, tokenizer, model, tools)
        self._text = ""
        self._ids_before: list[int] = []
        self._ids: list[int] = []
        self._content = ""
        self._last_call: int | None = None
        self._arguments = ""  # returned of the last call

    def feed(self, text: str, token_ids: Sequence[int]) -> ParsedOutput:
        """Return the content and the parts of calls that the next piece of the output adds."""
        text_before = self._text
        self._text += text
        self._ids += token_ids
        delta = self._parser.extract_tool_calls_streaming(
            text_before, self._text, text, self._ids_before, self._ids, list(token_ids), self._request
        )
        # From 10,000 tokens on, a copy of all IDs at every step would take longer than the step.
        self._ids_before += token_ids
        found = _parsed(delta)
        self._content += found.content
        for call in found.calls:
            if call.index != self._last_call:
                self._last_call, self._arguments = call.index, ""
            self._arguments += call.arguments
        return found

    def finish(self) -> ParsedOutput:
        """Return what the parser has held back at the end of the output."""
        if is_engine_based(self._parser):
            return _parsed(self._parser.finish_streaming())
        if self._last_call is not None:
            rest = self._parser.get_remaining_unstreamed_args()
            if not any(self._parser.streamed_args_for_tool[-1:]):  # xlam and hunyuan_a13b do not count them
                rest = rest.removeprefix(self._arguments)
            return ParsedOutput(calls=[ParsedCall(self._last_call, rest)] if rest else [])
        is_prefix = self._text.startswith(self._content)  # else the parser has changed the content
        return ParsedOutput(self._text[len(self._content) :] if is_prefix else "")


def _parsed(delta: DeltaMessage | None) -> ParsedOutput:
    if delta is None:
        return ParsedOutput()
    calls = [
        ParsedCall(
            call.index,
            (call.function.arguments if call.function else None) or "",
            call.id,
            call.function.name if call.function else None,
        )
        for call in delta.tool_calls
    ]
    return ParsedOutput(delta.content or "", calls)
