"""An engine on two processes answers like an engine in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.block_store import block_store, shared_store, wait_for_files
from tests.support.engines import MIB, TILE, ask, engine, make_llama

RANKS_TOLERANCE = 0.02  # nats: matmuls of a rank have other shapes, and the codes amplify their rounding
OUTPUT_TOKENS = 6


@pytest.mark.parametrize(
    ("kv_heads", "is_shared"),
    [(2, False), (1, False), (2, True)],
    ids=["one head per rank", "one head on both ranks", "one head per rank, in a shared store"],
)
def test_tensor_parallel_in_processes_equals_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_heads: int, is_shared: bool
) -> None:
    model = make_llama(tmp_path, kv_heads=kv_heads)
    prompts = [[(11 * i * i + k * i) % 500 for i in range(300 + 40 * k)] for k in range(3)]
    settings = {
        "kv_cache_dtype": "kvarn_k4v2_g128",
        "skip_tokenizer_init": True,
        "kv_cache_memory_bytes": 16 * MIB,
    }
    with engine(monkeypatch, model, **settings) as llm:
        expected = ask(llm, prompts, OUTPUT_TOKENS)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    store = tmp_path / "blocks"
    settings["kv_transfer_config"] = shared_store(store) if is_shared else block_store(str(store))
    with engine(monkeypatch, model, in_process=False, tensor_parallel_size=2, **settings) as llm:
        computed, cached = ask(llm, prompts, OUTPUT_TOKENS), ask(llm, prompts, OUTPUT_TOKENS)
        if is_shared:
            tiles = sum((len(prompt) + OUTPUT_TOKENS - 1) // TILE for prompt in prompts)
            wait_for_files(store, 2 * tiles)
        assert llm.reset_prefix_cache()
        loaded = ask(llm, prompts, OUTPUT_TOKENS)
    for answers in (computed, cached, loaded):
        for answer, single in zip(answers, expected, strict=True):
            answer.assert_same(single, RANKS_TOLERANCE)
    assert [answer.cached for answer in loaded] == [answer.cached for answer in cached]
    assert all(answer.cached > 0 for answer in loaded)
