"""A tiny model's tokens however a request is served, and the cache's blocks, as JSON in a file.

Run with each vLLM version as `python -m tests.versions.tiny_engine MODEL RESULT`; the first run makes the model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.engines import (
    PRESET,
    TILE,
    Answer,
    ask,
    ask_and_preempt,
    ask_cold,
    assert_nothing_left,
    chunks_of,
    engine,
    make_llama,
    make_matmuls_row_invariant,
    num_blocks,
    prompt_of,
)

LENGTH = 3 * TILE + 40


def answers_of(monkeypatch: pytest.MonkeyPatch, model: Path) -> tuple[dict[str, Answer], int]:
    """Answers to one prompt by how it was served, and the number of blocks."""
    prompt, others = prompt_of(LENGTH), [prompt_of(300, 1), prompt_of(TILE, 2)]
    answers = {}
    with engine(monkeypatch, model, kv_cache_dtype=PRESET, skip_tokenizer_init=True) as llm:
        answers["cold"] = ask_cold(llm, prompt)
        ask(llm, others)
        (answers["hit"],) = ask(llm, [prompt])
        assert answers["hit"].cached == LENGTH // TILE * TILE, (
            "the prompt's full tiles were not found in the cache"
        )
        with chunks_of(llm, 77):
            answers["chunked"] = ask_cold(llm, prompt)
        assert llm.reset_prefix_cache()
        (answers["preempted"],) = ask_and_preempt(llm, [prompt], max_tokens=6)
        assert llm.reset_prefix_cache()
        answers["batched"] = ask(llm, [*others, prompt])[-1]
        for answer in answers.values():
            answer.assert_same(answers["cold"])
        blocks = num_blocks(llm)
        assert_nothing_left(llm)
    return answers, blocks


def bfloat16_blocks(monkeypatch: pytest.MonkeyPatch, model: Path) -> int:
    """Blocks of as many tokens in as much memory, of vLLM's own cache."""
    settings = {"dtype": "bfloat16", "block_size": TILE, "skip_tokenizer_init": True}
    with engine(monkeypatch, model, **settings) as llm:
        return num_blocks(llm)


def main(model: Path, result: Path) -> None:
    if not model.exists():
        make_llama(model)
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_matmuls_row_invariant(monkeypatch)
        answers, blocks = answers_of(monkeypatch, model)
        bfloat16 = bfloat16_blocks(monkeypatch, model)
    tokens = {way: answer.tokens for way, answer in answers.items()}
    result.write_text(json.dumps({"tokens": tokens, "blocks": blocks, "bfloat16_blocks": bfloat16}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
