"""Reasoning that models write before their answers, as one of vLLM's reasoning parsers reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvarn.v1 import inference_pb2, sampling_pb2
from serve_app.openai.requests import template_kwargs
from serve_app.openai.schema import ChatCompletionRequest, NamedToolChoice
from serve_app.openai.tools import CallDelta, FirstCallReader, Found, Reader, new_id
from serve_app.request.harmony import REASONING_PARSER, HarmonyOutput, HarmonyTokens, Kind, Segment

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


class HarmonyReader:
    """Reads the messages of an output in Harmony.

    Args:
        output: splits the output.
        takes_calls: whether the caller has offered functions.
        is_shown: whether the caller wants the reasoning.
    """

    def __init__(self, output: HarmonyOutput, takes_calls: bool, is_shown: bool) -> None:
        self._output = output
        self._takes_calls = takes_calls
        self._is_shown = is_shown
        self._written: set[Kind] = set()
        self._calls = 0

    def read(self, text: str, token_ids: Sequence[int], is_last: bool) -> Found:
        """Return what the next piece of the output adds; each message to the same reader is a line of its own."""
        texts = {Kind.ANSWER: "", Kind.REASONING: ""}
        calls: list[CallDelta] = []
        tokens = 0
        for segment in self._output.feed(text, token_ids, is_last):
            if segment.kind is Kind.CALL and self._takes_calls:
                calls.append(self._call(segment))
            elif segment.kind in texts:
                texts[segment.kind] += self._line(segment)
                tokens += segment.tokens * (segment.kind is Kind.REASONING)
        reasoning = texts[Kind.REASONING] if self._is_shown else ""
        return Found(texts[Kind.ANSWER], tuple(calls), reasoning, tokens)

    def _call(self, segment: Segment) -> CallDelta:
        self._calls += segment.opens
        if segment.opens:
            return CallDelta(self._calls - 1, "", new_id(), segment.name)
        return CallDelta(self._calls - 1, segment.text)

    def _line(self, segment: Segment) -> str:
        if segment.opens:
            return "\n" if segment.kind in self._written else ""
        self._written.add(segment.kind)
        return segment.text


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
        self._harmony: HarmonyTokens | None = None
        if name == REASONING_PARSER:
            self._harmony = HarmonyTokens(tokenizer)
        elif name is not None:
            from kvarn.vllm.access.output_parsers import with_cached_vocabulary
            from kvarn.vllm.access.reasoning_parsers import find_reasoning_parser, shows_special_tokens

            self._parser_class = find_reasoning_parser(name)
            self._tokenizer = with_cached_vocabulary(tokenizer)
            self._shows_special_tokens = shows_special_tokens(self._parser_class, self._tokenizer)

    @property
    def is_on(self) -> bool:
        """Whether reasoning is read, which depends on the prompt's token ids."""
        return self._parser_class is not None or self._harmony is not None

    def prepare(self, params: sampling_pb2.SamplingParams) -> None:
        """Request the text of special tokens, if the parser needs it."""
        if self._harmony is not None or (self._parser_class is not None and self._shows_special_tokens):
            params.skip_special_tokens = False

    def open_answer(self, request: ChatCompletionRequest, encoded: inference_pb2.GenerateRequest) -> None:
        """Open the message that a constraint is for, where the notation has messages: it rules out their headers.

        Such an output has no reasoning.

        Args:
            request: the caller's.
            encoded: what the dispatcher gets, with the prompt's token ids, which are extended.
        """
        if self._harmony is None or not encoded.sampling_params.HasField("structured_outputs"):
            return
        encoded.sampling_params.structured_outputs.after_reasoning = False
        ids = encoded.prompt.token_ids.ids
        if HarmonyOutput(self._harmony, ids).is_at_start:
            choice = request.tool_choice
            ids.extend(
                self._harmony.opening(choice.function.name if isinstance(choice, NamedToolChoice) else None)
            )

    def readers(
        self,
        request: ChatCompletionRequest,
        encoded: inference_pb2.GenerateRequest,
        answers: Sequence[Reader],
    ) -> Sequence[Reader]:
        """Return a reader for each choice, which passes what follows the reasoning to its reader in `answers`.

        Args:
            request: the caller's.
            encoded: what the dispatcher gets; with the prompt's token ids, if reasoning is read.
            answers: readers of the answers.
        """
        if not self.is_on:
            return answers
        prompt_token_ids = list(encoded.prompt.token_ids.ids)
        if self._parser_class is None:
            if encoded.sampling_params.HasField("structured_outputs"):
                return answers
            return [self._harmony_reader(request, prompt_token_ids) for _ in answers]
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

    def _harmony_reader(self, request: ChatCompletionRequest, prompt_token_ids: Sequence[int]) -> Reader:
        assert self._harmony is not None
        takes_calls = bool(request.tools) and request.tool_choice != "none"
        output = HarmonyOutput(self._harmony, prompt_token_ids)
        reader = HarmonyReader(output, takes_calls, request.include_reasoning is not False)
        return FirstCallReader(reader) if request.parallel_tool_calls is False else reader
