"""The read rule, CUDA graphs and steps without synchronization, on a real engine and GPU with a small model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM

from kvarn.vllm.gpu.triton_backend import TritonLayer
from kvarn.vllm.gpu.triton_plan import TritonMetadataBuilder
from tests.gpu.answering_alike import assert_alike, assert_served_alike, compiling_nothing
from tests.support.engines import (
    MIB,
    PRESET,
    TILE,
    Answer,
    ask,
    ask_and_preempt,
    ask_cold,
    chunks_of,
    engine,
    first_differences,
    make_llama,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SETTINGS: dict[str, Any] = {
    "kv_cache_dtype": PRESET,
    "dtype": "float16",
    "skip_tokenizer_init": True,
    "enforce_eager": False,
    "kv_cache_memory_bytes": 256 * MIB,
    "gpu_memory_utilization": 0.5,  # must be free at start: others may use the GPU
}
WITHOUT_COMPILATION: dict[str, Any] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
RESIDUES = [2 * TILE + residue for residue in range(TILE)]
# Of the 130 first tokens that an unquantized cache reports for every fifth of `RESIDUES`, those that the preset's cache
# reports too, in float32 on a CPU. Unrelated prompts share 3; a fifth less allows for a GPU's rounding.
SHARED_ON_CPU = {"kvarn_k4v3_g128": 71, "kvarn_k4v4_g64": 63, "kvarn_k5v4_g128": 91}


def prompt(tokens: int, seed: int = 1) -> list[int]:
    return [(seed * 7919 + i * i * 31 + i * seed) % 500 for i in range(tokens)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"), heads=8, kv_heads=2, head_dim=128)


@pytest.fixture(scope="module")
def cold(model: Path) -> list[Answer]:
    """Answers to prompts of every length modulo the tile, each alone on an empty cache."""
    with pytest.MonkeyPatch.context() as patch, engine(patch, model, **SETTINGS) as llm:
        return [ask_cold(llm, prompt(length, seed=length)) for length in RESIDUES]


@pytest.fixture(scope="module")
def llm(model: Path, cold: list[Answer]) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch, engine(patch, model, **SETTINGS) as made:
        yield made


def test_a_prefix_hit_changes_nothing(llm: LLM, cold: list[Answer]) -> None:
    hits = []
    for length in RESIDUES:
        ask(llm, [prompt(length, seed=length)], max_tokens=1)
        ask(llm, [prompt(150, seed=3)], max_tokens=1)
        hits += ask(llm, [prompt(length, seed=length)])
    assert all(answer.cached >= TILE for answer in hits)
    assert_alike(hits, cold)


def test_a_batch_changes_nothing(llm: LLM, cold: list[Answer]) -> None:
    assert llm.reset_prefix_cache()
    assert_alike(ask(llm, [prompt(length, seed=length) for length in RESIDUES]), cold)


def test_chunks_change_nothing(llm: LLM, cold: list[Answer]) -> None:
    for tokens in (77, 300):
        with chunks_of(llm, tokens):
            assert_alike([ask_cold(llm, prompt(length, seed=length)) for length in RESIDUES[::3]], cold[::3])


def test_preemption_changes_nothing(llm: LLM, cold: list[Answer]) -> None:
    """Each request is preempted in the middle of its answer; four run together."""
    answers: list[Answer] = []
    for first in range(0, len(RESIDUES), 4):
        assert llm.reset_prefix_cache()
        prompts = [prompt(length, seed=length) for length in RESIDUES[first : first + 4]]
        answers += ask_and_preempt(llm, prompts, max_tokens=6)
    assert_alike(answers, cold)


def test_nothing_is_compiled_while_serving(llm: LLM) -> None:
    assert llm.reset_prefix_cache()
    with compiling_nothing():
        ask(llm, [prompt(length, seed=5) for length in (1, 7, 128, 129, 700, 1500)], max_tokens=140)


# Tests that start their own engines come last: with runner V1, an engine that ends destroys the others' groups.


def test_speculation_changes_nothing(
    model: Path, cold: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With drafts of four tokens, steps of up to five query tokens per request run in the decode kernel."""
    seen: list[int] = []
    plan = TritonMetadataBuilder._plan_decode

    def watched(*args: Any) -> Any:
        batch = plan(*args)
        seen.append(batch.shape.queries)
        return batch

    monkeypatch.setattr(TritonMetadataBuilder, "_plan_decode", watched)
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    with engine(monkeypatch, model, **SETTINGS, speculative_config=drafts) as llm:
        seen.clear()  # drop the plans made for CUDA graph capture
        assert_alike([ask_cold(llm, prompt(length, seed=length)) for length in RESIDUES], cold)
    assert 5 in seen


@pytest.mark.parametrize("preset", SHARED_ON_CPU)
def test_a_preset_answers_alike_however_it_is_served(
    model: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    prompts = [prompt(length, seed=length) for length in RESIDUES[::5]]
    settings = {**SETTINGS, "kv_cache_dtype": preset, "compilation_config": WITHOUT_COMPILATION}
    with engine(monkeypatch, model, **settings) as llm:
        cold = [ask_cold(llm, tokens) for tokens in prompts]
        assert_served_alike(llm, prompts, cold)
    with engine(monkeypatch, model, **{**settings, "kv_cache_dtype": "auto"}) as llm:
        shared = first_differences(cold, [ask_cold(llm, tokens) for tokens in prompts])
    assert len(shared) > 0.8 * SHARED_ON_CPU[preset]


def test_a_raw_chunk_reads_nothing_through_records(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `raw_chunks`, the first token after a single-chunk prompt differs from fp16's only by rounding."""
    prompts = [prompt(length, seed=length) for length in (128, 300, 1000, 1500)]
    eager = {**SETTINGS, "enforce_eager": True}
    with engine(monkeypatch, model, **{**eager, "kv_cache_dtype": "auto"}) as llm:
        expected = [ask_cold(llm, tokens, max_tokens=1) for tokens in prompts]
    errors = {}
    for raw in (True, False):
        with engine(monkeypatch, model, **eager, additional_config={"kvarn": {"raw_chunks": raw}}) as llm:
            answers = [ask_cold(llm, tokens, max_tokens=1) for tokens in prompts]
        errors[raw] = max(first_differences(answers, expected))
    assert errors[True] < 0.05
    assert errors[False] > 3 * errors[True], errors


def test_a_decode_step_never_synchronizes_with_the_device(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded_calls = 0

    def forbid_synchronization(stock: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal guarded_calls
            guarded_calls += 1
            torch.cuda.set_sync_debug_mode("error")
            try:
                return stock(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    with engine(monkeypatch, model, **{**SETTINGS, "enforce_eager": True}) as llm:
        ask(llm, [prompt(100), prompt(300)], max_tokens=2)
        monkeypatch.setattr(
            TritonMetadataBuilder, "build", forbid_synchronization(TritonMetadataBuilder.build)
        )
        monkeypatch.setattr(TritonLayer, "forward", forbid_synchronization(TritonLayer.forward))
        ask(llm, [prompt(126), prompt(300, seed=2)], max_tokens=8)
    assert guarded_calls > 8
