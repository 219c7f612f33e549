"""An engine with a stage on each of two GPUs answers like an engine on one, with either executor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.test_engine import SETTINGS, prompt
from tests.gpu.test_tensor_parallel import assert_close, slots_of
from tests.support.engines import ask, engine, make_llama

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("executor", ["mp", "ray"])
def test_two_stages_answer_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str) -> None:
    model = make_llama(tmp_path, heads=8, kv_heads=2, head_dim=128)
    prompts = [prompt(300 + 41 * k, seed=k) for k in range(8)]
    with engine(monkeypatch, model, **SETTINGS) as llm:
        expected = ask(llm, prompts)
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for `slots_of` alone
    with engine(
        monkeypatch,
        model,
        in_process=False,
        pipeline_parallel_size=2,
        distributed_executor_backend=executor,
        **SETTINGS,
    ) as llm:
        for answers in (ask(llm, prompts), ask(llm, prompts)):
            assert_close(answers, expected)
        assert all(answer.cached > 0 for answer in answers)
        first, second = llm.collective_rpc(slots_of)
    assert first == second
    assert first
