"""Families of models on real engines, as tiny models with random weights: the read rule, and refusals."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from vllm.model_executor.layers.attention import Attention, PrefillPrefixLMAttention
from vllm.model_executor.models import llama

from kvarn.vllm.hooks import RefusalError, attention_layers
from tests.support.engines import (
    PRESET,
    TILE,
    ask,
    ask_and_preempt,
    ask_cold,
    assert_nothing_left,
    chunks_of,
    engine,
    first_differences,
    make_llama,
    make_matmuls_row_invariant,
    prompt_of,
)

LENGTH = 3 * TILE + 40
MAX_MODEL_LEN = 1024
COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.08,
    "pad_token_id": 0,
}
# The configuration's class, what differs from COMMON in it, and the engine's settings.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Llama on Transformers": ("LlamaConfig", {}, {"model_impl": "transformers"}),
    "SmolLM3": ("SmolLM3Config", {}, {}),
    "OLMo 2 on Transformers": ("Olmo2Config", {}, {"model_impl": "transformers"}),
    "Mistral 0.1 in its window": ("MistralConfig", {"sliding_window": MAX_MODEL_LEN}, {}),
    "Mistral 0.1 in its window, on Transformers": (
        "MistralConfig",
        {"sliding_window": MAX_MODEL_LEN},
        {"model_impl": "transformers"},
    ),
    "Phi-3 in its window": ("Phi3Config", {"sliding_window": 2047}, {}),
    "Gemma 3 in its window": ("Gemma3TextConfig", {"head_dim": 64, "sliding_window": 4096}, {}),
}


def make_model(directory: Path, config: str, changes: dict[str, Any]) -> Path:
    """Save a model of the class `config` with random float32 weights, without a tokenizer."""
    torch.manual_seed(0)
    settings = getattr(transformers, config)(**{**COMMON, **changes})
    AutoModelForCausalLM.from_config(settings).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_alike_however_it_is_served(tmp_path: Path, family: str) -> None:
    """Each family has a process of its own: what vLLM registers for one must not reach the next."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        process.submit(serve_alike, tmp_path, family).result()


def serve_alike(directory: Path, family: str) -> None:
    config, changes, settings = FAMILIES[family]
    model = make_model(directory, config, changes)
    settings = {"skip_tokenizer_init": True, "max_model_len": MAX_MODEL_LEN, **settings}
    prompt = prompt_of(LENGTH)
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_matmuls_row_invariant(monkeypatch)
        with engine(monkeypatch, model, kv_cache_dtype="kvarn_k4v4_g128", **settings) as llm:
            cold = ask_cold(llm, prompt)
            ask(llm, [prompt_of(300, 1)])
            (hit,) = ask(llm, [prompt])
            assert hit.cached == LENGTH // TILE * TILE
            with chunks_of(llm, 77):
                chunked = ask_cold(llm, prompt)
            assert llm.reset_prefix_cache()
            (preempted,) = ask_and_preempt(llm, [prompt], max_tokens=6)
            for answer in (hit, chunked, preempted):
                answer.assert_same(cold)
            assert_nothing_left(llm)
        with engine(monkeypatch, model, kv_cache_dtype="auto", **settings) as llm:
            assert max(first_differences([cold], [ask_cold(llm, prompt)])) < 0.5


def test_layers_that_vllm_does_not_complete_are_completed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before vLLM 0.30, those of its Transformers backend were not among the model's modules."""
    monkeypatch.setattr(Attention, "process_weights_after_loading", lambda layer, dtype: None)
    with engine(monkeypatch, make_llama(tmp_path), kv_cache_dtype=PRESET, skip_tokenizer_init=True) as llm:
        assert ask_cold(llm, prompt_of(LENGTH)).tokens


class UnevenAttention(Attention):
    """Layers of which the second has more KV heads than the first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["num_kv_heads"] = 4 if ".layers.1." in kwargs["prefix"] else 2
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize(
    ("attention", "sentence"),
    [
        (PrefillPrefixLMAttention, "attention is not plainly causal"),
        (UnevenAttention, "layers of this model have 2 and 4 KV heads"),
    ],
    ids=["prefix LM", "uneven layers"],
)
def test_layers_that_would_answer_wrongly_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, attention: type[Attention], sentence: str
) -> None:
    monkeypatch.setattr(llama, "Attention", attention)
    settings = {"kv_cache_dtype": PRESET, "skip_tokenizer_init": True}
    with (
        pytest.raises(RefusalError, match=f"{sentence}.*use kv_cache_dtype='auto'"),
        engine(monkeypatch, make_llama(tmp_path), **settings),
    ):
        pass


def test_a_step_that_reads_later_tokens_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llama, "Attention", PrefillPrefixLMAttention)
    monkeypatch.setattr(attention_layers, "refuse_unlike", lambda layer, layers: None)
    settings = {"kv_cache_dtype": PRESET, "skip_tokenizer_init": True}
    with (
        engine(monkeypatch, make_llama(tmp_path), **settings) as llm,
        pytest.raises(RefusalError, match="not plainly causal"),
    ):
        ask(llm, [prompt_of(20)])
