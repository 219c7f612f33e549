"""Comparison of answers that differ by rounding alone, however an engine serves their requests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from triton import knobs
from vllm import LLM

from tests.support.engines import (
    TILE,
    Answer,
    ask,
    ask_and_preempt,
    ask_cold,
    assert_nothing_left,
    chunks_of,
    first_differences,
    matching_fraction,
)

# The rounding of linear layers depends on the number of rows in the batch, and flipped codes amplify it.
TOLERANCE = 0.3
HIT_AT_ONCE = 4  # prompts, few enough that the side pool keeps the first tile of each


SAME_TOKENS = 0.97  # of answers in float16
SAME_IN_BFLOAT16 = 0.9  # whose products round 8 times coarser


@contextmanager
def compiling_nothing() -> Iterator[None]:
    """Assert that none of our kernels is compiled in this process meanwhile."""
    compiled: list[str] = []

    def note(*, repr: str, fn: Any, **_: Any) -> None:
        if fn.module.startswith("kvarn."):
            compiled.append(repr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knobs.runtime, "jit_post_compile_hook", note)
        yield
    assert compiled == []


def assert_alike(ours: list[Answer], theirs: list[Answer], least: float = SAME_TOKENS) -> None:
    """Assert that the first tokens' log-probabilities agree and a share of at least `least` of the tokens."""
    assert all(difference < TOLERANCE for difference in first_differences(ours, theirs))
    same = matching_fraction([a.tokens for a in ours], [a.tokens for a in theirs])
    assert same >= least, f"{same:.1%} of the tokens are the same"


def assert_served_alike(
    llm: LLM,
    prompts: list[list[int]],
    cold: list[Answer],
    *,
    chunked: bool = True,
    has_states: bool = False,
    least: float = SAME_TOKENS,
) -> None:
    """Assert that a batch, prefix hits, chunks and preempted requests answer as each prompt alone on an empty cache
    did, and that nothing is left in the engine.

    Args:
        llm: the engine.
        prompts: prompts of at least two tiles.
        cold: their answers.
        chunked: whether the model takes chunks of any size.
        has_states: whether only the latest prompts can be hit: vLLM keeps few states.
        least: share of the tokens that must be the same.
    """
    tokens = len(cold[0].tokens)
    assert llm.reset_prefix_cache()
    assert_alike(ask(llm, prompts, tokens), cold, least)
    hits: list[Answer] = []
    for first in range(0, len(prompts), HIT_AT_ONCE):
        some = prompts[first : first + HIT_AT_ONCE]
        ask(llm, some, max_tokens=1)
        hits += ask(llm, some, tokens)
    assert all(answer.cached >= TILE for answer in hits[-1 if has_states else 0 :])
    assert_alike(hits, cold, least)
    if chunked:
        with chunks_of(llm, 77):
            some = [ask_cold(llm, prompt, max_tokens=tokens) for prompt in prompts[::3]]
        assert_alike(some, cold[::3], least)
    assert llm.reset_prefix_cache()
    few = slice(0, len(prompts), max(1, len(prompts) // 4))
    assert_alike(ask_and_preempt(llm, prompts[few], tokens), cold[few], least)
    assert_nothing_left(llm)
