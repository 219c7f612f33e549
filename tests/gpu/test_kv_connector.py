"""KV connectors beside the quantized cache on a GPU: what they bring back is read as if it had stayed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM
from vllm.config import KVTransferConfig

from tests.gpu.answering_alike import assert_alike
from tests.support.block_store import shared_store, wait_for_files
from tests.support.engines import MIB, PRESET, TILE, Answer, ask, ask_cold, engine, make_llama, prompt_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LENGTHS = range(2 * TILE, 4 * TILE, 9)


def gpu_engine(
    monkeypatch: pytest.MonkeyPatch, model: Path, transfer: KVTransferConfig, **settings: Any
) -> AbstractContextManager[LLM]:
    return engine(
        monkeypatch,
        model,
        kv_cache_dtype=PRESET,
        dtype="float16",
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=256 * MIB,
        gpu_memory_utilization=0.5,  # must be free at start: others may use the GPU
        kv_transfer_config=transfer,
        **settings,
    )


@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graph"])
def test_offloaded_prefixes_answer_as_computed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enforce_eager: bool
) -> None:
    model = make_llama(tmp_path, heads=8, kv_heads=2, head_dim=128)
    transfer = KVTransferConfig(
        "OffloadingConnector", kv_role="kv_both", kv_connector_extra_config={"cpu_bytes_to_use": 256 * MIB}
    )
    prompts = [prompt_of(length, length) for length in LENGTHS]
    sinks = {"kvarn": {"host_sinks": len(prompts) + 2}}
    with gpu_engine(
        monkeypatch, model, transfer, enforce_eager=enforce_eager, additional_config=sinks
    ) as llm:
        computed = [ask_cold(llm, prompt) for prompt in prompts]
        loaded = [_ask_later(llm, prompt) for prompt in prompts]
        assert llm.reset_prefix_cache()
        together = ask(llm, prompts)
    for answers in (loaded, together):
        assert [answer.cached for answer in answers] == [(length - 1) // TILE * TILE for length in LENGTHS]
        assert_alike(answers, computed)


@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graph"])
def test_prefixes_that_another_engine_stored_answer_as_computed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enforce_eager: bool
) -> None:
    model, store = make_llama(tmp_path / "model", heads=8, kv_heads=2, head_dim=128), tmp_path / "store"
    transfer = shared_store(store)
    prompts = [prompt_of(length, length) for length in LENGTHS]
    with gpu_engine(monkeypatch, model, transfer, enforce_eager=enforce_eager) as llm:
        computed = [ask_cold(llm, prompt) for prompt in prompts]
        wait_for_files(store, sum((length + len(computed[0].tokens) - 1) // TILE for length in LENGTHS))
    with gpu_engine(monkeypatch, model, transfer, enforce_eager=enforce_eager) as llm:
        loaded = ask(llm, prompts)
    assert [answer.cached for answer in loaded] == [(length - 1) // TILE * TILE for length in LENGTHS]
    assert_alike(loaded, computed)


def _ask_later(llm: LLM, prompt: list[int]) -> Answer:
    """Ask once the cache has forgotten the prompt, and other requests have taken its blocks."""
    assert llm.reset_prefix_cache()
    ask(llm, [prompt_of(3 * TILE, 1), prompt_of(3 * TILE, 2)], max_tokens=1)
    (answer,) = ask(llm, [prompt])
    return answer
