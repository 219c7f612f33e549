"""The application on two GPUs: two replicas side by side, and one with tensor parallelism over both."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from serve_app.client import Client
from serve_app.config import AppConfig
from tests.gpu.test_tensor_parallel import SAME_TOKENS
from tests.support.engines import make_llama, matching_fraction
from tests.support.live import deploy, free_port, in_replica, ready, serving, wait_for

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.timeout(600),
]

APP = "kvarn"
START_S = 240
PROMPTS = [[(k * 7919 + i * i * 31) % 250 for i in range(300 + 41 * k)] for k in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a tokenizer of single bytes."""
    directory = make_llama(
        tmp_path_factory.mktemp("llama"), heads=8, kv_heads=2, head_dim=128, torch_dtype="float16"
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory


@contextmanager
def served(model: Path, replicas: int, **engine: Any) -> Iterator[Client]:
    """Serve the application and yield a client once `replicas` replicas are ready."""
    port = free_port()
    config = AppConfig.model_validate(
        {
            "model": str(model),
            "engine": {
                "num_replicas": replicas,
                "device": "cuda",
                "dtype": "float16",
                "cpus_per_replica": 2,
                "kv_cache_memory_gib": 0.25,
                "gpu_memory_utilization": 0.5,  # must be free at start: others may use the GPU
                "max_model_len": 2048,
                "max_num_seqs": 8,
                **engine,
            },
            "gateway": {"port": port, "http": {"port": free_port()}},
        }
    )
    with serving(num_gpus=2):
        deploy(APP, config)
        with Client(f"127.0.0.1:{port}") as client:
            wait_for(lambda: len(ready(client)) == replicas, START_S)
            yield client


def answers(client: Client) -> list[list[int]]:
    responses = [client.generate_once(p, max_tokens=16, temperature=0, ignore_eos=True) for p in PROMPTS]
    return [list(answer.token_ids) for answer in responses]


def test_a_dead_replica_is_replaced_and_tensor_parallel_replicas_answer_alike(
    model: Path,
) -> None:
    with served(model, replicas=2) as client:
        before = ready(client)
        expected = answers(client)
        killed = min(before)
        os.kill(in_replica(APP, killed, lambda engine: os.getpid()), signal.SIGKILL)
        assert matching_fraction(answers(client), expected) >= 0.97
        wait_for(lambda: len(ready(client)) == 2 and killed not in ready(client), START_S)
        assert matching_fraction(answers(client), expected) >= 0.97
    for executor in ("mp", "ray"):
        with served(
            model, replicas=1, tensor_parallel_size=2, distributed_executor_backend=executor
        ) as client:
            assert matching_fraction(answers(client), expected) >= SAME_TOKENS
