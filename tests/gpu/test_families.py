"""Families with windows, sinks, states and padded heads on a real engine and GPU, within float16's rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.test_engine import SETTINGS, assert_alike
from tests.support.engines import (
    TILE,
    ask,
    ask_and_preempt,
    ask_cold,
    assert_nothing_left,
    chunks_of,
    engine,
    first_differences,
    prompt_of,
)
from tests.support.families import FAMILIES, make_family

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SERVED = (
    "Gemma 3",
    "OLMo 3",
    "Ministral",
    "Cohere 2",
    "gpt-oss",
    "Qwen3-MoE",
    "Granite 4",
    "Nemotron-H",
    "Falcon-H1",
    "Qwen3-Next",
    "LFM2",
    "Llama, 5 heads of 80 over 1",
    "Llama, 12 heads of 192 over 2",
    "Llama, 16 heads of 128 over 1",
)
IN_BFLOAT16 = ("Gemma 3", "gpt-oss", "Granite 4", "Nemotron-H", "Falcon-H1", "Qwen3-Next", "LFM2")
LENGTHS = range(2 * TILE, 4 * TILE, 19)
WITHOUT_COMPILATION: dict[str, Any] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}


@pytest.mark.parametrize("family", SERVED)
def test_a_family_answers_alike_however_it_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    made = FAMILIES[family]
    model = make_family(tmp_path, made)
    dtype = "bfloat16" if family in IN_BFLOAT16 else "float16"
    settings = {
        **SETTINGS,
        "dtype": dtype,
        "kv_cache_dtype": "kvarn_k4v4_g128",
        "max_model_len": 1024,
        "compilation_config": WITHOUT_COMPILATION,
    }
    prompts = [prompt_of(length, length) for length in LENGTHS]
    with engine(monkeypatch, model, **settings) as llm:
        cold = [ask_cold(llm, prompt) for prompt in prompts]
        assert llm.reset_prefix_cache()
        assert_alike(ask(llm, prompts), cold)
        hits = ask(llm, prompts)
        assert all(answer.cached >= TILE for answer in hits[-1 if made.has_states else 0 :])
        assert_alike(hits, cold)
        if made.chunked:
            with chunks_of(llm, 77):
                assert_alike([ask_cold(llm, prompt) for prompt in prompts], cold)
        assert llm.reset_prefix_cache()
        assert_alike(ask_and_preempt(llm, prompts[:4], max_tokens=6), cold[:4])
        assert_nothing_left(llm)
    with engine(monkeypatch, model, **{**settings, "kv_cache_dtype": "auto"}) as llm:
        differences = first_differences(cold, [ask_cold(llm, prompt) for prompt in prompts])
    assert sum(differences) / len(differences) < 0.2
