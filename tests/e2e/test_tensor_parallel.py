"""An engine on two processes answers like an engine in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.block_store import block_store
from tests.support.engines import MIB, ask, engine, make_llama

RANKS_TOLERANCE = 0.02  # nats: matmuls of a rank have other shapes, and the codes amplify their rounding


@pytest.mark.parametrize("kv_heads", [2, 1], ids=["one head per rank", "one head on both ranks"])
def test_tensor_parallel_in_processes_equals_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_heads: int
) -> None:
    model = make_llama(tmp_path, kv_heads=kv_heads)
    prompts = [[(11 * i * i + k * i) % 500 for i in range(300 + 40 * k)] for k in range(3)]
    settings = {
        "kv_cache_dtype": "kvarn_k4v2_g128",
        "skip_tokenizer_init": True,
        "kv_cache_memory_bytes": 16 * MIB,
    }
    with engine(monkeypatch, model, **settings) as llm:
        expected = ask(llm, prompts)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    settings["kv_transfer_config"] = block_store(directory=str(tmp_path / "blocks"))
    with engine(monkeypatch, model, in_process=False, tensor_parallel_size=2, **settings) as llm:
        computed, cached = ask(llm, prompts), ask(llm, prompts)
        assert llm.reset_prefix_cache()
        loaded = ask(llm, prompts)
    for answers in (computed, cached, loaded):
        for answer, single in zip(answers, expected, strict=True):
            answer.assert_same(single, RANKS_TOLERANCE)
    assert [answer.cached for answer in loaded] == [answer.cached for answer in cached]
    assert all(answer.cached > 0 for answer in loaded)
