"""vLLM's tool parsers, used outside vLLM's own server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.entrypoints.openai.engine.protocol import DeltaMessage
    from vllm.tool_parsers import ToolParser


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
        known = ", ".join(tool_parser_names())
        raise ValueError(f"tool_parser is {name!r}, expected one of {known} or none") from None


def check_tool_parser(name: str, tokenizer: Any) -> None:
    """Check that a parser can read the output of the model with `tokenizer`.

    Raises:
        ValueError: vLLM has no parser of this name, or it does not fit.
    """
    parser_class = find_tool_parser(name)
    try:
        parser_class(tokenizer, None)
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        detail = str(error) or type(error).__name__
        raise ValueError(f"tool_parser {name} does not fit the model: {detail}") from error


class StreamedToolCalls:
    """Parser of the tool calls in one streamed output.

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
        self._text = ""
        self._token_ids: list[int] = []

    def feed(self, text: str, token_ids: Sequence[int]) -> DeltaMessage | None:
        """Return the content and the parts of calls that the next piece of the output adds; None if it adds none."""
        text_before, ids_before = self._text, list(self._token_ids)
        self._text += text
        self._token_ids += token_ids
        return self._parser.extract_tool_calls_streaming(
            text_before, self._text, text, ids_before, self._token_ids, list(token_ids), self._request
        )
