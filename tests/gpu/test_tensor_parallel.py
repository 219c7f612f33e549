"""An engine on two GPUs answers like an engine on one, with either executor."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from kvarn.vllm.slot_map import find_slot_map
from tests.gpu.test_engine import SETTINGS, prompt
from tests.support.engines import Answer, ask, engine, first_differences, make_llama, matching_fraction

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


# Summing the ranks' halves of a row rounds differently from a single sum, and flipped codes amplify it.
MEAN_TOLERANCE, SAME_TOKENS = 0.15, 0.85


def assert_close(ours: list[Answer], theirs: list[Answer]) -> None:
    """Assert that the first tokens' log-probabilities agree on average, in nats, and most tokens are the same."""
    assert fmean(first_differences(ours, theirs)) < MEAN_TOLERANCE
    assert matching_fraction([a.tokens for a in ours], [a.tokens for a in theirs]) >= SAME_TOKENS


def slots_of(worker: Any) -> dict[int, int]:
    """Return the slot of each block on this rank."""
    found = find_slot_map(worker.vllm_config)
    assert found is not None
    return dict(found._slot_of)


def assert_two_ranks_answer_like_one(
    directory: Path, monkeypatch: pytest.MonkeyPatch, kv_heads: int, **parallel: Any
) -> None:
    """Assert that an engine with the `parallel` settings of two ranks answers like one on one GPU, and that both ranks
    hold the same blocks in the same slots.

    Args:
        directory: where the model is made.
        monkeypatch: for the engines.
        kv_heads: KV heads of the model.
        parallel: the engine's settings.
    """
    model = make_llama(directory, heads=8, kv_heads=kv_heads, head_dim=128)
    prompts = [prompt(300 + 41 * k, seed=k) for k in range(8)]
    with engine(monkeypatch, model, **SETTINGS) as llm:
        expected = ask(llm, prompts)
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for `slots_of` alone
    with engine(monkeypatch, model, in_process=False, **parallel, **SETTINGS) as llm:
        for answers in (ask(llm, prompts), ask(llm, prompts)):
            assert_close(answers, expected)
        assert all(answer.cached > 0 for answer in answers)
        first, second = llm.collective_rpc(slots_of)
    assert first == second
    assert first


@pytest.mark.parametrize("executor", ["mp", "ray"])
@pytest.mark.parametrize("kv_heads", [2, 1], ids=["one head per rank", "one head on both ranks"])
def test_two_ranks_answer_like_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str, kv_heads: int
) -> None:
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": executor}
    assert_two_ranks_answer_like_one(tmp_path, monkeypatch, kv_heads, **parallel)
