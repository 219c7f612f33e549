"""vLLM's tool parsers, used outside vLLM's own server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.entrypoints.openai.engine.protocol import DeltaMessage
    from vllm.tool_parsers import ToolParser


def find_tool_parser(name: str) -> type[ToolParser]:
    """Return the class of a tool parser; importing vLLM's parsers takes seconds.

    Raises:
        ValueError: vLLM has no parser of this name; the message lists the known names.
    """
    from vllm.tool_parsers import ToolParserManager

    try:
        return ToolParserManager.get_tool_parser(name)
    except KeyError:
        known = ", ".join(ToolParserManager.list_registered())
        raise ValueError(f"tool_parser is {name!r}, expected one of {known}") from None


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
