"""vLLM's reasoning parsers on text as models stream it, cut anywhere, with text that lags behind its tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from kvarn.vllm.access.output_parsers import with_cached_vocabulary
from kvarn.vllm.access.reasoning_parsers import (
    StreamedReasoning,
    check_reasoning_parser,
    find_reasoning_parser,
    shows_special_tokens,
)

THOUGHT, ANSWER = "I think é, 7<9.\n", "\n\nYes, a </b>."
CALL = '<tool_call>\n{"name": "f"}\n</tool_call>'
OPEN, CLOSED, PLAIN = "Hi<think>", "Hi<think>\n\n</think>\n\n", "Hi"
THINKING = {"thinking": True}


@pytest.fixture(scope="module")
def tokenizer(thinking_model_dir: Path) -> Any:
    return with_cached_vocabulary(AutoTokenizer.from_pretrained(thinking_model_dir))


@dataclass
class Read:
    """All that one output added."""

    reasoning: str = ""
    reasoning_tokens: int = 0
    content: str = ""
    content_ids: list[int] = field(default_factory=list)


def encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def read(tokenizer: Any, parser: str, prompt: str, output: str, cuts: Sequence[int], lag: int) -> Read:
    """Stream `output` in pieces that end at `cuts`, each without its last `lag` characters until the next one."""
    ids = encode(tokenizer, output)
    reading = StreamedReasoning(find_reasoning_parser(parser), tokenizer, encode(tokenizer, prompt), THINKING)
    result, sent = Read(), 0
    for start, end in itertools.pairwise([0, *cuts, len(ids)]):
        is_last = end == len(ids)
        text = tokenizer.decode(ids[:end]).rstrip("\ufffd")
        available = len(text) if is_last else max(sent, len(text) - lag)
        delta = reading.feed(text[sent:available], ids[start:end], is_last)
        sent = available
        result.reasoning += delta.reasoning
        result.reasoning_tokens += delta.reasoning_tokens
        result.content += delta.content
        result.content_ids += delta.content_ids
    return result


def cuttings(tokens: int, long: bool) -> list[Sequence[int]]:
    """Every way to cut at one or two positions, every equal size of pieces; with `long`, at three positions too."""
    counts = (0, 1, 2, 3) if long else (0, 1, 2)
    some = [cuts for count in counts for cuts in itertools.combinations(range(1, tokens), count)]
    return [*some, *(range(size, tokens, size) for size in range(1, 5))]


@pytest.mark.parametrize("parser", ["deepseek_r1", "deepseek_v3", "qwen3", "glm45", "ernie45"])
@pytest.mark.parametrize(
    ("prompt", "output", "reasoning", "content"),
    [
        (OPEN, f"{THOUGHT}</think>{ANSWER}", THOUGHT, ANSWER),
        (PLAIN, f"<think>{THOUGHT}</think>{ANSWER}", THOUGHT, ANSWER),
        (CLOSED, ANSWER, "", ANSWER),
        (OPEN, THOUGHT, THOUGHT, ""),
        (OPEN, f"{THOUGHT}</think>{CALL}", THOUGHT, CALL),
    ],
)
@pytest.mark.parametrize("lag", [0, 2, 9])
def test_outputs_cut_anywhere(
    tokenizer: Any,
    long_mode: bool,
    parser: str,
    prompt: str,
    output: str,
    reasoning: str,
    content: str,
    lag: int,
) -> None:
    tokens = len(encode(tokenizer, output))
    for cuts in cuttings(tokens, long_mode):
        found = read(tokenizer, parser, prompt, output, cuts, lag)
        # Some parsers strip the end of the reasoning.
        assert (found.reasoning.rstrip(), found.content) == (reasoning.rstrip(), content), cuts
        assert found.content_ids == encode(tokenizer, content), cuts
        assert found.reasoning_tokens == len(encode(tokenizer, reasoning)), cuts


@pytest.mark.parametrize("lag", [0, 9])
def test_a_call_may_end_the_reasoning(tokenizer: Any, long_mode: bool, lag: int) -> None:
    for cuts in cuttings(len(encode(tokenizer, THOUGHT + CALL)), long_mode):
        found = read(tokenizer, "qwen3", OPEN, THOUGHT + CALL, cuts, lag)
        assert (found.reasoning, found.content) == (THOUGHT, CALL)


@pytest.mark.parametrize("parser", ["deepseek_r1", "qwen3"])
def test_a_stream_reads_as_vllm_reads_the_whole(tokenizer: Any, parser: str) -> None:
    output = f"{THOUGHT}</think>{ANSWER}"
    whole = find_reasoning_parser(parser)(tokenizer).extract_reasoning(output, None)  # type: ignore[arg-type]
    found = read(tokenizer, parser, OPEN, output, range(1, len(encode(tokenizer, output))), lag=0)
    assert (found.reasoning, found.content) == whole


def test_tokens_are_counted_as_vllm_counts_them(tokenizer: Any) -> None:
    output = f"<think>{THOUGHT}</think>{ANSWER}"
    found = read(tokenizer, "deepseek_r1", PLAIN, output, (), lag=0)
    counted = find_reasoning_parser("deepseek_r1")(tokenizer).count_reasoning_tokens(
        encode(tokenizer, output)
    )
    assert found.reasoning_tokens == counted > 0


def test_parsers_that_cannot_be_used_are_refused_by_name(tokenizer: Any, model_dir: Path) -> None:
    check_reasoning_parser("deepseek_r1", tokenizer)
    with pytest.raises(ValueError, match=r"reasoning_parser is 'no_such', expected one of .*deepseek_r1"):
        find_reasoning_parser("no_such")
    with pytest.raises(ValueError, match="reasoning_parser openai_gptoss cannot be used here"):
        check_reasoning_parser("openai_gptoss", tokenizer)
    with pytest.raises(ValueError, match=r"reasoning_parser deepseek_r1 does not fit the model: .*think"):
        check_reasoning_parser("deepseek_r1", AutoTokenizer.from_pretrained(model_dir))


def test_special_tokens_are_shown_only_to_parsers_that_need_them(
    tokenizer: Any, thinking_model_dir: Path
) -> None:
    parser = find_reasoning_parser("deepseek_r1")
    assert not shows_special_tokens(parser, tokenizer)
    special = AutoTokenizer.from_pretrained(thinking_model_dir)
    special.add_special_tokens({"additional_special_tokens": ["</think>"]})
    assert shows_special_tokens(parser, special)
