"""Engines and small models for tests that run vLLM itself."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm._custom_ops as vllm_ops
from llvmlite.binding import ffi
from transformers import LlamaConfig
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.v1.core.sched.scheduler import Scheduler

from kvarn.vllm import backend
from kvarn.vllm.gpu import triton_backend, triton_plan
from tests.support.families import save_model

MIB = 2**20
PRESET, TILE = "kvarn_k4v2_g128", 128


class _Library(type(ffi.lib)):  # type: ignore[misc]
    """llvmlite's library, whose `__getattr__` answers any name with a function, without an answer for `__dict__`.

    From 0.31 on, vLLM reads the `__dict__` of every object of every loaded module when it starts an engine on a CPU.
    It fails if numba is loaded, as it is after an engine in this process that used n-gram drafts.
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return super().__getattr__(name)


ffi.lib.__class__ = _Library


def make_llama(directory: Path, heads: int = 4, kv_heads: int = 2, head_dim: int = 64, **config: Any) -> Path:
    """Save a two-layer Llama with random float32 weights in Hugging Face format, without a tokenizer."""
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=512,
        hidden_size=heads * head_dim,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=2048,
        initializer_range=0.08,
        **config,
    )
    save_model(settings, directory)
    return directory


def prompt_of(length: int, number: int = 0) -> list[int]:
    """Return token IDs below 500; prompts with different numbers share no prefix."""
    return [(7 * i * i + 3 * i + 101 * number) % 500 for i in range(length)]


def use_triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make engines on this CPU use the GPU's device backend, in Triton's interpreter."""
    triton = backend.DeviceBackend(triton_plan.TritonMetadataBuilder, triton_backend.TritonLayer)
    monkeypatch.setattr(backend, "device_backend", lambda: triton)


def make_matmuls_row_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each row's result in vLLM's CPU linear layers independent of the other rows, bit for bit.

    A BLAS selects its kernel, and so its rounding, by the number of rows. Rounding codes to 2 and 4 bits
    amplifies such noise from layer to layer (docs/decisions/0011-exactness-is-bitwise.md), so a test of the
    read rule must exclude it: rows are multiplied in blocks of a fixed size for which this machine's kernel
    treats all rows alike.
    """
    stock, block = vllm_ops.onednn_mm, _row_invariant_block()

    def onednn_mm(handler: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        padded = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % block))
        parts = [stock(handler, part, bias) for part in padded.split(block)]
        return torch.cat(parts)[: len(rows)].reshape(*x.shape[:-1], -1)

    monkeypatch.setattr(vllm_ops, "onednn_mm", onednn_mm)


def end_passes_at_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """End each pass at a state that vLLM keeps: its CPU kernel for Mamba 2 returns none from within a pass."""

    def get_kv_cache_spec(self: MambaMixer2, vllm_config: Any) -> Any:
        return MambaBase.get_kv_cache_spec(self, vllm_config)

    monkeypatch.setattr(MambaMixer2, "get_kv_cache_spec", get_kv_cache_spec)


@lru_cache
def _row_invariant_block() -> int:
    """Return the smallest number of rows for which this machine's matmul gives equal rows the same result."""
    handler = vllm_ops.create_onednn_mm(torch.randn(576, 960), 32)
    for block in (12, 16, 24, 32, 48, 64):
        row = torch.randn(1, 576).expand(block, -1).contiguous()
        result = vllm_ops.onednn_mm(handler, row, None)
        if all(torch.equal(result[0], other) for other in result):
            return block
    raise RuntimeError("No block size makes this machine's float32 matmul row-invariant.")


@contextmanager
def engine(
    monkeypatch: pytest.MonkeyPatch, model: Path, in_process: bool = True, **settings: Any
) -> Iterator[LLM]:
    """Run a vLLM engine, by default in this process so that a test can reach its scheduler."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0" if in_process else "1")
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 128 * MIB,
        "disable_log_stats": False,
    }
    llm = LLM(str(model), **{**defaults, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def scheduler_of(llm: LLM) -> Scheduler:
    """Return the scheduler of an in-process engine."""
    scheduler: Scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return scheduler


@contextmanager
def chunks_of(llm: LLM, tokens: int) -> Iterator[None]:
    """Limit each step to `tokens` tokens."""
    scheduler = scheduler_of(llm)
    usual = scheduler.max_num_scheduled_tokens
    scheduler.max_num_scheduled_tokens = tokens
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens = usual


def assert_nothing_left(llm: LLM) -> None:
    """Assert that all blocks and slots are free once the prefix cache is reset."""
    scheduler = scheduler_of(llm)
    pool = scheduler.kv_cache_manager.block_pool
    assert not scheduler.requests
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert llm.reset_prefix_cache()
    # An empty step, in which the scheduler releases finished requests and notifies the worker.
    llm.llm_engine.engine_core.engine_core.model_executor.execute_model(scheduler.schedule())
    assert scheduler.slots.num_free == scheduler.slots.num_slots


def num_blocks(llm: LLM) -> int:
    """Return the number of blocks that vLLM allocated for the cache."""
    blocks: int = scheduler_of(llm).kv_cache_manager.block_pool.num_gpu_blocks
    return blocks


@dataclass(frozen=True)
class Answer:
    """One request's tokens, their top log-probabilities by token id, and its number of cached prompt tokens."""

    tokens: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...]
    cached: int

    def assert_same(self, other: Answer, tolerance: float = 1e-3) -> None:
        """Assert equal tokens, and equal log-probabilities within `tolerance` for every token that both report."""
        assert self.tokens == other.tokens
        for mine, theirs in zip(self.logprobs, other.logprobs, strict=True):
            shared = mine.keys() & theirs.keys()
            assert len(shared) >= min(len(mine), len(theirs)) - 1
            for token in shared:
                assert mine[token] == pytest.approx(theirs[token], abs=tolerance)


def first_differences(ours: list[Answer], theirs: list[Answer]) -> list[float]:
    """Return the differences in nats between the first tokens' log-probabilities, for every token that both report."""
    return [
        abs(one.logprobs[0][token] - other.logprobs[0][token])
        for one, other in zip(ours, theirs, strict=True)
        for token in one.logprobs[0].keys() & other.logprobs[0].keys()
    ]


def matching_fraction(ours: Iterable[Sequence[int]], theirs: Iterable[Sequence[int]]) -> float:
    """Return the fraction of equal tokens, counting each pair of outputs up to its first difference.

    After that, the outputs of a model with random weights diverge whatever the cache holds.
    """
    same = different = 0
    for one, other in zip(ours, theirs, strict=True):
        equal = [a == b for a, b in zip(one, other, strict=True)]
        first = equal.index(False) if False in equal else len(equal)
        same += first
        different += first < len(equal)
    return same / (same + different)


def ask(
    llm: LLM,
    prompts: list[list[int]],
    max_tokens: int = 6,
    logprobs: int = 5,
    lora: LoRARequest | None = None,
) -> list[Answer]:
    """Return greedy answers to prompts of token ids, submitted together; `lora` is their adapter."""
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=logprobs, ignore_eos=True)
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False, lora_request=lora
    )
    return [
        Answer(
            tokens=tuple(output.outputs[0].token_ids),
            logprobs=tuple({t: p.logprob for t, p in step.items()} for step in output.outputs[0].logprobs),
            cached=output.num_cached_tokens or 0,
        )
        for output in outputs
    ]


def ask_and_preempt(
    llm: LLM, prompts: list[list[int]], max_tokens: int, lora: LoRARequest | None = None
) -> list[Answer]:
    """Return greedy answers; every request is preempted once after its second output token."""
    scheduler, schedule = scheduler_of(llm), scheduler_of(llm).schedule
    preempted: set[str] = set()
    # A request may run again in the same step: vLLM then drops the output of one in flight, which comes too late.
    in_flight = {"drop_stale_output": True} if scheduler.scheduler_config.async_scheduling else {}

    def schedule_after_preemption(*args: bool) -> object:
        for request in [r for r in scheduler.running if r.num_output_tokens >= 2]:
            if request.request_id not in preempted:
                preempted.add(request.request_id)
                scheduler.running.remove(request)
                scheduler._preempt_request(request, time.monotonic(), **in_flight)
                scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
        return schedule(*args)

    scheduler.schedule = schedule_after_preemption  # type: ignore[method-assign]
    try:
        answers = ask(llm, prompts, max_tokens, lora=lora)
    finally:
        del scheduler.schedule
    assert len(preempted) == len(prompts)
    return answers


def ask_cold(llm: LLM, prompt: list[int], **sampling: Any) -> Answer:
    """Return the answer from an empty cache."""
    assert llm.reset_prefix_cache()
    (answer,) = ask(llm, [prompt], **sampling)
    assert answer.cached == 0
    return answer
