"""Reasoning that models write before their answers, as one of vLLM's reasoning parsers reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvarn.v1 import sampling_pb2
from serve_app.openai.requests import template_kwargs
from serve_app.openai.schema import ChatCompletionRequest
from serve_app.openai.tools import Found, Reader

if TYPE_CHECKING:
    from kvarn.vllm.access.reasoning_parsers import StreamedReasoning


class ReasoningReader:
    """Reads the reasoning, and passes the rest to the reader of the answer.

    Args:
        reasoning: splits the output.
        answer: reads what follows the reasoning.
        is_shown: whether the caller wants the reasoning.
    """

    def __init__(self, reasoning: StreamedReasoning, answer: Reader, is_shown: bool) -> None:
        self._reasoning = reasoning
        self._answer = answer
        self._is_shown = is_shown
        self._is_answering = False

    def read(self, text: str, token_ids: Sequence[int], is_last: bool) -> Found:
        """Return what the next piece of the output adds."""
        delta = self._reasoning.feed(text, token_ids, is_last)
        self._is_answering = self._is_answering or bool(delta.content or delta.content_ids)
        found = Found()
        if self._is_answering:
            found = self._answer.read(delta.content, delta.content_ids, is_last)
        return Found(
            found.content,
            found.calls,
            reasoning=delta.reasoning if self._is_shown else "",
            reasoning_tokens=delta.reasoning_tokens,
        )


class ReasoningParsers:
    """Makes readers of reasoning.

    Args:
        name: one of vLLM's reasoning parsers; with None, all output belongs to the answer.
        tokenizer: the model's.

    Raises:
        ValueError: vLLM has no such parser, or it does not fit the model.
    """

    def __init__(self, name: str | None, tokenizer: Any) -> None:
        self._parser_class: type[Any] | None = None
        if name is not None:
            from kvarn.vllm.access.output_parsers import with_cached_vocabulary
            from kvarn.vllm.access.reasoning_parsers import find_reasoning_parser, shows_special_tokens

            self._parser_class = find_reasoning_parser(name)
            self._tokenizer = with_cached_vocabulary(tokenizer)
            self._shows_special_tokens = shows_special_tokens(self._parser_class, self._tokenizer)

    @property
    def is_on(self) -> bool:
        """Whether reasoning is read, which depends on the prompt's token ids."""
        return self._parser_class is not None

    def prepare(self, params: sampling_pb2.SamplingParams) -> None:
        """Request the text of special tokens, if the parser needs it."""
        if self._parser_class is not None and self._shows_special_tokens:
            params.skip_special_tokens = False

    def readers(
        self, request: ChatCompletionRequest, prompt_token_ids: Sequence[int], answers: Sequence[Reader]
    ) -> Sequence[Reader]:
        """Return a reader for each choice, which passes what follows the reasoning to its reader in `answers`."""
        if self._parser_class is None:
            return answers
        from kvarn.vllm.access.reasoning_parsers import StreamedReasoning

        kwargs, is_shown = template_kwargs(request), request.include_reasoning is not False
        has_ended: bool | None = None  # searching a long prompt takes milliseconds
        readers = []
        for answer in answers:
            reasoning = StreamedReasoning(
                self._parser_class, self._tokenizer, prompt_token_ids, kwargs, has_ended
            )
            has_ended = reasoning.has_ended
            readers.append(ReasoningReader(reasoning, answer, is_shown))
        return readers
