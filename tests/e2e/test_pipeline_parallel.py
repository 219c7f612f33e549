"""An engine with two pipeline stages answers like one with all layers in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM

from kvarn.layer_kinds import FULL, SLIDING, smallest_block
from kvarn.plan.model_shape import ModelShape
from kvarn.presets import get_preset
from kvarn.tile import TileLayout
from kvarn.vllm.cache_settings import GIB
from kvarn.vllm.mixed_layers import block_use
from tests.support.engines import (
    MIB,
    PRESET,
    TILE,
    Answer,
    ask,
    ask_and_preempt,
    ask_cold,
    assert_nothing_left,
    chunks_of,
    engine,
    make_matmuls_row_invariant,
    num_blocks,
    prompt_of,
    scheduler_of,
)
from tests.support.families import MAX_MODEL_LEN, WINDOWS, make_model

PROMPTS = [prompt_of(3 * TILE + 40 + 30 * number, number) for number in range(3)]
SLOT_BYTES_OF_LAYER = 2 * 2 * TILE * 2 * 64  # keys and values, fp16, tokens, KV heads, channels
CAPPED_SLOTS = 12
CACHE_BYTES = 16 * MIB


@dataclass(frozen=True)
class Pipeline:
    """A model, how many layers each of its two stages has, and how many of these are quantized."""

    layers: str
    quantized: tuple[int, int]
    config: str = "LlamaConfig"
    changes: dict[str, Any] = field(default_factory=dict)


PIPELINES = {
    "even": Pipeline("1,1", (1, 1)),
    "uneven": Pipeline("1,2", (1, 2), changes={"num_hidden_layers": 3}),
    "windows, a stage without one of the groups": Pipeline(
        "2,3",
        (1, 1),
        "Gemma3TextConfig",
        {
            **WINDOWS,
            "head_dim": 64,
            "num_hidden_layers": 5,
            "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL],
        },
    ),
}


@contextmanager
def staged(monkeypatch: pytest.MonkeyPatch, model: Path, layers: str, **settings: Any) -> Iterator[LLM]:
    """Run an engine with two stages, of as many `layers` as named.

    vLLM's CPU workers allocate the buffer in which a stage receives activations in their dummy runs alone, and without
    compilation they have none before the first request.
    """
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", layers)
    with engine(monkeypatch, model, pipeline_parallel_size=2, **settings) as llm:
        llm.collective_rpc("execute_dummy_batch")
        yield llm


def slots_of_layers(worker: Any) -> list[int]:
    """Slots of the side pool of each quantized layer of a worker."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    impls = (getattr(layer, "impl", None) for layer in layers)
    return [len(impl.pool) for impl in impls if hasattr(impl, "pool")]


def planned_block_bytes(model: Path) -> int:
    """Bytes of a block on the rank with most layers, as `kvarn plan` computes them for two stages."""
    shape = ModelShape.read(str(model), MAX_MODEL_LEN, dtype="float32", device="cpu").of_stage(2)
    layout = TileLayout.of_heads(get_preset(PRESET), shape.head_dim)
    others, smallest = shape.others(), smallest_block("cpu")
    return block_use(layout, shape.layers, shape.kv_heads, others, MAX_MODEL_LEN, smallest).nbytes


@pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=PIPELINES)
def test_stages_answer_like_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline
) -> None:
    """On an empty cache, from cached tiles, in chunks, preempted, and with a step in flight in each stage."""
    make_matmuls_row_invariant(monkeypatch)
    model = make_model(tmp_path, pipeline.config, pipeline.changes)
    cap = (CAPPED_SLOTS + 0.5) * max(pipeline.quantized) * SLOT_BYTES_OF_LAYER / GIB
    settings = {
        "kv_cache_dtype": PRESET,
        "skip_tokenizer_init": True,
        "max_model_len": MAX_MODEL_LEN,
        "kv_cache_memory_bytes": CACHE_BYTES,
        "additional_config": {"kvarn": {"side_pool_gib": cap}},
    }
    with engine(monkeypatch, model, **settings) as llm:
        expected = [ask_cold(llm, prompt) for prompt in PROMPTS]
    with staged(monkeypatch, model, pipeline.layers, **settings) as llm:
        slots = scheduler_of(llm).slots.num_slots
        assert llm.collective_rpc(slots_of_layers) == [[slots] * layers for layers in pipeline.quantized]
        assert slots == CAPPED_SLOTS
        assert num_blocks(llm) == CACHE_BYTES // planned_block_bytes(model)
        cold = [ask_cold(llm, prompt) for prompt in PROMPTS]
        together, hits = ask(llm, PROMPTS), ask(llm, PROMPTS)
        assert all(hit.cached >= 3 * TILE for hit in hits)
        with steps_in_flight(llm) as depths, chunks_of(llm, 77):
            assert llm.reset_prefix_cache()
            chunked = ask(llm, PROMPTS)
        assert max(depths) == 2
        assert llm.reset_prefix_cache()
        preempted = ask_and_preempt(llm, PROMPTS, max_tokens=6)
        for answers in (cold, together, hits, chunked, preempted):
            assert_same(answers, expected)
        assert_nothing_left(llm)


def assert_same(answers: list[Answer], expected: list[Answer]) -> None:
    for answer, single in zip(answers, expected, strict=True):
        answer.assert_same(single)


@contextmanager
def steps_in_flight(llm: LLM) -> Iterator[list[int]]:
    """Collect how many steps are in flight after each that is scheduled."""
    core = llm.llm_engine.engine_core.engine_core
    execute, depths = core.model_executor.execute_model, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        depths.append(len(core.batch_queue) + 1)
        return execute(*args, **kwargs)

    core.model_executor.execute_model = counted
    try:
        yield depths
    finally:
        core.model_executor.execute_model = execute


def test_stages_with_an_unquantized_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_matmuls_row_invariant(monkeypatch)
    model = make_model(tmp_path, "LlamaConfig", {})
    settings = {"kv_cache_dtype": "auto", "skip_tokenizer_init": True, "kv_cache_memory_bytes": 16 * MIB}
    with engine(monkeypatch, model, **settings) as llm:
        expected = ask(llm, PROMPTS)
    with staged(monkeypatch, model, "1,1", **settings) as llm:
        assert_same(ask(llm, PROMPTS), expected)
