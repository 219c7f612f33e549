"""vLLM's OffloadingConnector beside the quantized cache on a GPU: what it brings back is read as if it had stayed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vllm import LLM
from vllm.config import KVTransferConfig

from tests.gpu.answering_alike import assert_alike
from tests.support.engines import MIB, PRESET, TILE, Answer, ask, ask_cold, engine, make_llama, prompt_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LENGTHS = range(2 * TILE, 4 * TILE, 9)


@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graph"])
def test_offloaded_prefixes_answer_as_computed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enforce_eager: bool
) -> None:
    model = make_llama(tmp_path, heads=8, kv_heads=2, head_dim=128)
    transfer = KVTransferConfig(
        "OffloadingConnector", kv_role="kv_both", kv_connector_extra_config={"cpu_bytes_to_use": 256 * MIB}
    )
    prompts = [prompt_of(length, length) for length in LENGTHS]
    with engine(
        monkeypatch,
        model,
        kv_cache_dtype=PRESET,
        dtype="float16",
        skip_tokenizer_init=True,
        enforce_eager=enforce_eager,
        kv_cache_memory_bytes=256 * MIB,
        gpu_memory_utilization=0.5,  # must be free at start: others may use the GPU
        kv_transfer_config=transfer,
        additional_config={"kvarn": {"host_sinks": len(prompts) + 2}},
    ) as llm:
        computed = [ask_cold(llm, prompt) for prompt in prompts]
        loaded = [_ask_later(llm, prompt) for prompt in prompts]
        assert llm.reset_prefix_cache()
        together = ask(llm, prompts)
    for answers in (loaded, together):
        assert [answer.cached for answer in answers] == [(length - 1) // TILE * TILE for length in LENGTHS]
        assert_alike(answers, computed)


def _ask_later(llm: LLM, prompt: list[int]) -> Answer:
    """Ask once the cache has forgotten the prompt, and other requests have taken its blocks."""
    assert llm.reset_prefix_cache()
    ask(llm, [prompt_of(3 * TILE, 1), prompt_of(3 * TILE, 2)], max_tokens=1)
    (answer,) = ask(llm, [prompt])
    return answer
