"""The caller of `LLM` or `AsyncLLM` sees why the quantized cache does not serve a model, wherever that is noticed."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from vllm import AsyncEngineArgs, SamplingParams
from vllm.engine.protocol import StreamingInput
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from kvarn.vllm.hooks import HookError, RefusalError
from kvarn.vllm.scheduler import KVarNScheduler
from tests.support.engines import PRESET, engine, make_llama

ENCODER = (
    f"kv_cache_dtype={PRESET!r} does not fit this model's attention: attention type AttentionType.ENCODER_ONLY not "
    "supported; use kv_cache_dtype='auto' for it."
)
SMALL: dict[str, Any] = {"kv_cache_dtype": PRESET, "skip_tokenizer_init": True, "max_num_seqs": 2}
ASYNC: dict[str, Any] = {
    **SMALL,
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 2**24,
}


class UnpausableScheduler(KVarNScheduler):
    """A scheduler of a vLLM that keeps its pause state elsewhere."""

    _pause_state = property(lambda self: self.missing, lambda self, state: None)


@pytest.fixture(scope="module")
def encoder_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers alone are asked for what the cache does not support."""
    return make_llama(tmp_path_factory.mktemp("encoder"), is_causal=False)


@pytest.mark.parametrize("in_process", [True, False], ids=["in process", "core process"])
def test_a_layers_refusal_reaches_the_caller(
    monkeypatch: pytest.MonkeyPatch, encoder_model: Path, in_process: bool
) -> None:
    with pytest.raises(RefusalError) as raised, engine(monkeypatch, encoder_model, in_process, **SMALL):
        pass
    assert str(raised.value) == ENCODER


@pytest.mark.parametrize("in_process", [True, False], ids=["in process", "core process"])
def test_a_workers_refusal_reaches_the_caller(
    monkeypatch: pytest.MonkeyPatch, encoder_model: Path, in_process: bool
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    parallel = {**SMALL, "tensor_parallel_size": 2}
    with pytest.raises(RefusalError) as raised, engine(monkeypatch, encoder_model, in_process, **parallel):
        pass
    assert str(raised.value) == ENCODER


def test_a_refusal_reaches_the_caller_of_an_async_engine(
    monkeypatch: pytest.MonkeyPatch, encoder_model: Path
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(RefusalError) as raised:
        AsyncLLM.from_engine_args(AsyncEngineArgs(str(encoder_model), **ASYNC))
    assert str(raised.value) == ENCODER


@pytest.mark.parametrize("in_process", [True, False], ids=["in process", "core process"])
def test_a_schedulers_refusal_reaches_the_caller(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_process: bool
) -> None:
    settings = {**SMALL, "scheduler_cls": UnpausableScheduler}
    raised_as = HookError if in_process else RefusalError
    sentence = r"'private names'.*Scheduler\._pause_state is missing; .*run `kvarn doctor`"
    with (
        pytest.raises(raised_as, match=sentence),
        engine(monkeypatch, make_llama(tmp_path), in_process, **settings),
    ):
        pass


def test_an_error_of_vllm_stays_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = {**SMALL, "kv_cache_memory_bytes": 2**10}
    with (
        pytest.raises(RuntimeError, match="Engine core initialization failed") as raised,
        engine(monkeypatch, make_llama(tmp_path), in_process=False, **settings),
    ):
        pass
    assert not isinstance(raised.value, RefusalError)


def test_a_refusal_reaches_the_caller_whatever_was_configured_since(
    monkeypatch: pytest.MonkeyPatch, encoder_model: Path
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    config = AsyncEngineArgs(str(encoder_model), **ASYNC).create_engine_config()
    AsyncEngineArgs(str(encoder_model), **{**ASYNC, "kv_cache_dtype": "auto"}).create_engine_config()
    with pytest.raises(RefusalError) as raised:
        AsyncLLM.from_vllm_config(config)
    assert str(raised.value) == ENCODER


async def test_a_prompt_streamed_in_parts_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its parts continue on top of rows that the last one computed, which may have left the side pool."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    streaming = SamplingParams(max_tokens=2, output_kind=RequestOutputKind.DELTA)

    async def parts() -> AsyncIterator[StreamingInput]:
        yield StreamingInput({"prompt_token_ids": [1, 2, 3]})

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(str(make_llama(tmp_path)), **ASYNC))
    try:
        with pytest.raises(VLLMValidationError, match=f"'{PRESET}'.*send the whole prompt"):
            await anext(llm.generate(parts(), streaming, "parts"))
        assert not llm.output_processor.has_unfinished_requests()
        whole = [output async for output in llm.generate({"prompt_token_ids": [1, 2]}, streaming, "whole")]
        assert whole[-1].finished
    finally:
        llm.shutdown()
