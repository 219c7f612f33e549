"""LoRA adapters on a real engine: the read rule for each, and prefixes kept apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.lora.request import LoRARequest

from tests.support.adapters import make_adapter
from tests.support.engines import (
    PRESET,
    TILE,
    ask,
    ask_and_preempt,
    ask_cold,
    assert_nothing_left,
    chunks_of,
    engine,
    make_llama,
    make_matmuls_row_invariant,
    prompt_of,
)

LENGTH = TILE + 40


def test_adapters_keep_their_prefixes_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_matmuls_row_invariant(monkeypatch)
    model = make_llama(tmp_path / "model")
    adapters = [
        None,
        *(
            LoRARequest(name, number, str(make_adapter(tmp_path / name, model, number)))
            for number, name in enumerate(("one", "two"), start=1)
        ),
    ]
    prompt = prompt_of(LENGTH)
    settings = {"kv_cache_dtype": PRESET, "skip_tokenizer_init": True, "max_loras": 2, "max_lora_rank": 8}
    settings["max_num_batched_tokens"] = 512
    with engine(monkeypatch, model, enable_lora=True, **settings) as llm:
        cold = [ask_cold(llm, prompt, lora=adapter) for adapter in adapters]
        assert len({answer.tokens for answer in cold}) == len(adapters)
        assert llm.reset_prefix_cache()
        for adapter in adapters:
            (first,) = ask(llm, [prompt], lora=adapter)
            assert first.cached == 0
        for adapter, expected in zip(adapters, cold, strict=True):
            (hit,) = ask(llm, [prompt], lora=adapter)
            assert hit.cached == LENGTH // TILE * TILE
            hit.assert_same(expected)
        with chunks_of(llm, 77):
            chunked = ask_cold(llm, prompt, lora=adapters[1])
        assert llm.reset_prefix_cache()
        (preempted,) = ask_and_preempt(llm, [prompt], max_tokens=6, lora=adapters[1])
        for answer in (chunked, preempted):
            answer.assert_same(cold[1])
        assert_nothing_left(llm)
