"""An engine with a stage on each of two GPUs answers like an engine on one, with either executor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.test_tensor_parallel import assert_two_ranks_answer_like_one

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("executor", ["mp", "ray"])
def test_two_stages_answer_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str) -> None:
    parallel = {"pipeline_parallel_size": 2, "distributed_executor_backend": executor}
    assert_two_ranks_answer_like_one(tmp_path, monkeypatch, kv_heads=2, **parallel)
