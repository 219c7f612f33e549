"""vLLM's reasoning parsers, used outside vLLM's own server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvarn.errors import did_you_mean
from kvarn.vllm.access.output_parsers import MarkedParts, check_reads_output, is_engine_based, misfits

if TYPE_CHECKING:
    from vllm.reasoning import ReasoningParser


def reasoning_parser_names() -> list[str]:
    """Return the names of the installed vLLM's parsers; importing them takes seconds."""
    from vllm.reasoning import ReasoningParserManager

    return ReasoningParserManager.list_registered()


def find_reasoning_parser(name: str) -> type[ReasoningParser]:
    """Return the class of a reasoning parser; importing vLLM's parsers takes seconds.

    Raises:
        ValueError: vLLM has no parser of this name; the message lists the known names.
    """
    from vllm.reasoning import ReasoningParserManager

    known = reasoning_parser_names()
    if name not in known:
        raise ValueError(
            f"reasoning_parser is {name!r}{did_you_mean(name, known)}, expected one of {', '.join(known)} or none"
        )
    return ReasoningParserManager.get_reasoning_parser(name)


def check_reasoning_parser(name: str, tokenizer: Any) -> None:
    """Check that a parser can read the output of the model with `tokenizer`.

    Raises:
        ValueError: vLLM has no usable parser of this name, or it does not fit.
    """
    parser_class, setting = find_reasoning_parser(name), f"reasoning_parser {name}"
    with misfits(setting):
        parser = parser_class(tokenizer)
    check_reads_output(setting, lambda: parser.extract_reasoning_streaming("", "", "", [], [], []))


def shows_special_tokens(parser_class: type[ReasoningParser], tokenizer: Any) -> bool:
    """Whether the parser needs the text of special tokens in the output."""
    parser = parser_class(tokenizer)
    return is_engine_based(parser) or not _markers(parser).keys().isdisjoint(tokenizer.all_special_ids)


@dataclass(frozen=True)
class ReasoningDelta:
    """What a piece of output adds: reasoning and its number of tokens; then the answer, with its token ids."""

    reasoning: str = ""
    reasoning_tokens: int = 0
    content: str = ""
    content_ids: Sequence[int] = ()


class StreamedReasoning:
    """Splits one streamed output into reasoning and answer.

    The output is passed to vLLM's parser in parts that are a marker of reasoning or hold none.

    Args:
        parser_class: from `find_reasoning_parser`.
        tokenizer: from `with_cached_vocabulary`.
        prompt_token_ids: the prompt, which may open or end the reasoning.
        chat_template_kwargs: arguments of the chat template, on which some parsers depend.
        has_ended: whether the prompt has ended the reasoning, as another output's reader found.

    Attributes:
        has_ended: whether the reasoning has ended.
    """

    def __init__(
        self,
        parser_class: type[ReasoningParser],
        tokenizer: Any,
        prompt_token_ids: Sequence[int],
        chat_template_kwargs: Mapping[str, Any],
        has_ended: bool | None = None,
    ) -> None:
        self._kwargs = dict(chat_template_kwargs)
        self._parser = parser_class(tokenizer, chat_template_kwargs=dict(self._kwargs))
        self._engine_based = is_engine_based(self._parser)
        self._markers = _markers(self._parser)
        self.has_ended = self._parser.is_reasoning_end(prompt_token_ids) if has_ended is None else has_ended
        if not self.has_ended:
            self._parser.adjust_initial_state_from_prompt(prompt_token_ids)
        self._parts = MarkedParts(self._markers)
        self._text = ""
        self._ids_before, self._ids = _TokenIds(), _TokenIds()
        self._uncounted = 0  # tokens whose text the parser holds back

    def feed(self, text: str, token_ids: Sequence[int], is_last: bool) -> ReasoningDelta:
        """Return what the next piece of the output adds."""
        if self.has_ended:
            return ReasoningDelta(content=text, content_ids=token_ids)
        deltas = [self._step(*part) for part in self._parts.take(text, token_ids, is_last)]
        if is_last and not self.has_ended:
            deltas.append(self._finish())
        return _joined(deltas)

    def _step(self, text: str, token_ids: list[int]) -> ReasoningDelta:
        if self.has_ended:
            return ReasoningDelta(content=text, content_ids=token_ids)
        before, self._text = self._text, self._text + text
        self._ids.extend(token_ids)
        found = self._parser.extract_reasoning_streaming(
            before, self._text, text, self._ids_before, self._ids, token_ids
        )
        self._ids_before.extend(token_ids)
        reasoning, content = _texts(found)
        self._uncounted += self._countable(token_ids)
        if self._ends(token_ids):
            self.has_ended = True
            if self._engine_based:
                content += _texts(self._parser.finish_streaming())[1]
            content_ids = self._parser.extract_content_ids(token_ids)
            return ReasoningDelta(
                reasoning, self._counted() - self._countable(content_ids), content, content_ids
            )
        if content and not reasoning:  # the model answers without reasoning
            self._uncounted = 0
            return ReasoningDelta(content=content, content_ids=token_ids)
        return ReasoningDelta(reasoning, self._counted() if reasoning else 0, content)

    def _ends(self, token_ids: list[int]) -> bool:
        if self._engine_based:
            return self._parser.has_engine_confirmed_reasoning_end()
        return self._parser.is_reasoning_end_streaming(self._ids, token_ids)

    def _finish(self) -> ReasoningDelta:
        """Return what the parser still holds back at the end of an output without an end of its reasoning."""
        if not self._engine_based:
            return ReasoningDelta()
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        request = ChatCompletionRequest(messages=[], chat_template_kwargs=self._kwargs)
        promoted = self._parser.get_streaming_fallback_content("", request)
        reasoning, content = _texts(self._parser.finish_streaming())
        return ReasoningDelta(reasoning, self._counted(), (promoted or "") + content)

    def _countable(self, token_ids: Sequence[int]) -> int:
        return sum(token not in self._markers for token in token_ids)

    def _counted(self) -> int:
        counted, self._uncounted = self._uncounted, 0
        return counted


class _TokenIds(list[int]):
    """Token ids so far; vLLM's parsers search all of them at every step."""

    def __init__(self) -> None:
        super().__init__()
        self._distinct: set[int] = set()

    def extend(self, token_ids: Sequence[int]) -> None:  # type: ignore[override]
        super().extend(token_ids)
        self._distinct.update(token_ids)

    def __contains__(self, token_id: object) -> bool:
        return token_id in self._distinct


def _markers(parser: ReasoningParser) -> dict[int, str]:
    """Return the tokens that start and end reasoning, with their texts; a tool call may end it too."""
    vocabulary = parser.vocab
    texts = (parser.reasoning_start_str, parser.reasoning_end_str)
    markers = {vocabulary[text]: text for text in texts if text and text in vocabulary}
    for token in getattr(parser, "reasoning_end_token_ids", ()):  # from 0.30 on
        markers.setdefault(token, parser.model_tokenizer.decode([token]))
    return markers


def _texts(delta: Any) -> tuple[str, str]:
    return (delta.reasoning or "", delta.content or "") if delta is not None else ("", "")


def _joined(deltas: Sequence[ReasoningDelta]) -> ReasoningDelta:
    if len(deltas) == 1:
        return deltas[0]
    return ReasoningDelta(
        "".join(delta.reasoning for delta in deltas),
        sum(delta.reasoning_tokens for delta in deltas),
        "".join(delta.content for delta in deltas),
        [token for delta in deltas for token in delta.content_ids],
    )
