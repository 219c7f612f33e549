"""Capacity plans compared with the blocks that real engines report."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvarn.plan.capacity import make_plan
from tests.support.engines import engine, make_llama, num_blocks


@pytest.mark.parametrize("dtype", ["auto", "kvarn_k4v2_g128", "kvarn_k4v4_g64"])
def test_planned_tokens_match_vllms_blocks(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_llama(tmp_path, heads=4, kv_heads=2, head_dim=64, dtype="float32")
    plan = make_plan(str(model), gpu="h200", context=1024, cache_gib=0.125)
    planned = next(row for row in plan.rows if row.dtype == dtype)
    settings = {"dtype": "auto", "kv_cache_dtype": dtype, "skip_tokenizer_init": True}
    with engine(monkeypatch, model, **settings) as llm:
        tokens = num_blocks(llm) * llm.llm_engine.vllm_config.cache_config.block_size
    assert planned.tokens == pytest.approx(tokens, rel=0.02)
