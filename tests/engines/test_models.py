"""Families of models on real engines, as tiny models with random weights: the read rule, and refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from traceback import format_exc
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention, PrefillPrefixLMAttention
from vllm.model_executor.models import llama

from kvarn.layer_kinds import smallest_block
from kvarn.plan.model_shape import ModelShape
from kvarn.presets import get_preset
from kvarn.tile import TileLayout
from kvarn.vllm.access.telemetry import cache_state
from kvarn.vllm.hooks import RefusalError, attention_layers
from kvarn.vllm.mixed_layers import block_use, other_blocks
from kvarn.vllm.versions import packs_states
from tests.support.engines import (
    PRESET,
    TILE,
    ask,
    ask_and_preempt,
    ask_cold,
    assert_nothing_left,
    chunks_of,
    end_passes_at_states,
    engine,
    first_differences,
    make_llama,
    make_matmuls_row_invariant,
    prompt_of,
    scheduler_of,
)
from tests.support.families import (
    FAMILIES,
    GGUF,
    MAX_MODEL_LEN,
    REFUSED,
    WINDOWS,
    make_config,
    make_family,
    make_model,
)
from tests.support.quantized import multiply_gguf_on_cpus
from tests.support.scheduling import CACHE_EVENTS, Observer

LENGTH = 3 * TILE + 40
BFLOAT16_STEP = (
    2**-4
)  # of log probabilities of 4 to 8 nats: matmuls in bfloat16 may round two of them otherwise


class Processes:
    """A process that serves families one after the other, and another one once it is spoiled."""

    def __init__(self) -> None:
        self._process: ProcessPoolExecutor | None = None

    def run(self, work: Callable[..., None], *args: Any, spoils: bool) -> None:
        """Run `work` there, and fail as it did; `spoils` is whether no other can follow."""
        self._process = self._process or ProcessPoolExecutor(1, get_context("spawn"))
        try:
            failure = self._process.submit(failure_of, work, *args).result()
        except BrokenProcessPool:
            failure, spoils = "the process died", True
        if spoils:
            self.stop()
        assert failure is None, failure

    def stop(self) -> None:
        if self._process is not None:
            self._process.shutdown()
            self._process = None


def failure_of(work: Callable[..., None], *args: Any) -> str | None:
    """Call `work` and return its traceback if it fails: not every exception travels between processes."""
    try:
        work(*args)
    except Exception:
        return format_exc()
    return None


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    made = Processes()
    yield made
    made.stop()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_alike_however_it_is_served(
    processes: Processes, tmp_path: Path, family: str, long_mode: bool
) -> None:
    if FAMILIES[family].long and not long_mode:
        pytest.skip("runs with --long")
    if FAMILIES[family].has_states and not packs_states():
        pytest.skip("needs a vLLM whose blocks hold pages of several sizes")
    if (module := FAMILIES[family].requires) and find_spec(module) is None:
        pytest.skip(f"needs {module}")
    processes.run(serve_alike, tmp_path, family, spoils=FAMILIES[family].spoils_process)


def serve_alike(directory: Path, family: str) -> None:
    made = FAMILIES[family]
    model = make_family(directory, made)
    settings = {"skip_tokenizer_init": True, "max_model_len": MAX_MODEL_LEN, **made.settings}
    tolerance = BFLOAT16_STEP if made.settings.get("dtype") == "bfloat16" else 1e-3
    prompt = prompt_of(LENGTH)
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_matmuls_row_invariant(monkeypatch)
        end_passes_at_states(monkeypatch)
        if made.weights == GGUF:
            multiply_gguf_on_cpus(monkeypatch)
        quantized = {**settings, "kv_cache_dtype": "kvarn_k4v4_g128", "kv_events_config": CACHE_EVENTS}
        with engine(monkeypatch, model, **quantized) as llm:
            observer = Observer(scheduler_of(llm))
            cold = ask_cold(llm, prompt)
            ask(llm, [prompt_of(300, 1)])
            (expected,) = observer.expected_hits([prompt])
            (hit,) = ask(llm, [prompt])
            block = scheduler_of(llm).block_tokens
            assert hit.cached == LENGTH // block * block == expected > 0
            if other_blocks(scheduler_of(llm))[0]:
                assert_blocks_as_limited(model, llm)
            with chunks_of(llm, 77):
                chunked = ask_cold(llm, prompt)
            assert llm.reset_prefix_cache()
            (preempted,) = ask_and_preempt(llm, [prompt], max_tokens=6)
            for answer in (hit, *([chunked, preempted] if made.chunked else [])):
                answer.assert_same(cold, tolerance)
            assert_nothing_left(llm)
        with engine(monkeypatch, model, kv_cache_dtype="auto", **settings) as llm:
            assert max(first_differences([cold], [ask_cold(llm, prompt)])) < 0.7


def assert_blocks_as_limited(model: Path, llm: Any) -> None:
    """Compare the blocks that `kvarn plan` and `kvarn serve` compute with those of an engine of the same model."""
    scheduler = scheduler_of(llm)
    state, vllm_config = cache_state(llm.llm_engine.engine_core.engine_core), llm.llm_engine.vllm_config
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    shape = ModelShape.read(str(model), MAX_MODEL_LEN, dtype=dtype, device="cpu")
    layout = TileLayout.of_heads(get_preset("kvarn_k4v4_g128"), shape.head_dim)
    use = block_use(
        layout, shape.layers, shape.kv_heads, shape.others(), MAX_MODEL_LEN, smallest_block("cpu")
    )
    assert (use.tokens, use.nbytes) == (state["tile_tokens"], state["bytes_per_tile"])
    assert (use.others, use.others_tokens) == (state["other_blocks"], state["other_tokens"])
    if shape.state_layers:
        groups = scheduler.kv_cache_config.kv_cache_groups
        specs = [group.kv_cache_spec for group in groups if group is not groups[scheduler.cache_group]]
        most = (spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes for spec in specs)
        assert use.others == sum(most)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_is_refused_in_one_sentence(tmp_path: Path, family: str, long_mode: bool) -> None:
    if not long_mode:  # vLLM inspects each architecture in a process of its own
        pytest.skip("runs with --long")
    made, sentence = REFUSED[family]
    arguments = EngineArgs(
        str(make_config(tmp_path, made)),
        kv_cache_dtype=PRESET,
        max_model_len=MAX_MODEL_LEN,
        skip_tokenizer_init=True,
    )
    with pytest.raises(RefusalError, match=f"^kv_cache_dtype='{PRESET}' .*{sentence}.*"):
        arguments.create_engine_config()


def test_blocks_change_between_tiles_and_windows(processes: Processes, tmp_path: Path) -> None:
    """A tile's bytes read as floats may be NaN, which a masked token would pass on."""
    processes.run(serve_in_few_blocks, tmp_path, spoils=False)


def serve_in_few_blocks(directory: Path) -> None:
    settings = {
        "max_model_len": MAX_MODEL_LEN,
        "max_num_batched_tokens": 300,
        "num_gpu_blocks_override": 70,
        "kv_events_config": CACHE_EVENTS,
    }
    shared = prompt_of(2 * TILE)
    prompts = [
        [*(shared if number % 2 else ()), *prompt_of(150 + 37 * number, number)] for number in range(6)
    ]
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_matmuls_row_invariant(monkeypatch)
        model = make_model(directory, "Gemma3TextConfig", {"head_dim": 64, **WINDOWS})
        with engine(monkeypatch, model, kv_cache_dtype=PRESET, skip_tokenizer_init=True, **settings) as llm:
            observer = Observer(scheduler_of(llm))
            alone = [ask_cold(llm, prompt, max_tokens=12) for prompt in prompts]
            for _ in range(2):
                together = ask(llm, prompts, max_tokens=12)
                for one, other in zip(alone, together, strict=True):
                    one.assert_same(other)
            hits = []
            for prompt in prompts:
                (expected,) = observer.expected_hits([prompt])
                (again,) = ask(llm, [prompt], max_tokens=1)
                hits.append(again.cached)
                assert again.cached == expected
            assert any(hits)
            assert_nothing_left(llm)


def test_layers_that_vllm_does_not_complete_are_completed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before vLLM 0.30, those of its Transformers backend were not among the model's modules."""
    monkeypatch.setattr(Attention, "process_weights_after_loading", lambda layer, dtype: None)
    with engine(monkeypatch, make_llama(tmp_path), kv_cache_dtype=PRESET, skip_tokenizer_init=True) as llm:
        assert ask_cold(llm, prompt_of(LENGTH)).tokens


class UnevenAttention(Attention):
    """Layers of which the second has more KV heads than the first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["num_kv_heads"] = 4 if ".layers.1." in kwargs["prefix"] else 2
        super().__init__(*args, **kwargs)


class WideValues(Attention):
    """Layers whose values do not fit the record of their keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, head_size_v=80, **kwargs)


VALUE_SIZE = 48


class NarrowValues(Attention):
    """A layer whose heads have values of 48 channels and keys of 64."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, head_size_v=VALUE_SIZE, **kwargs)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Tensor:
        value = value.unflatten(-1, (self.num_kv_heads, -1))[..., :VALUE_SIZE].flatten(-2)
        attended = super().forward(query, key, value, *args).unflatten(-1, (self.num_heads, -1))
        return torch.nn.functional.pad(attended, (0, self.head_size - VALUE_SIZE)).flatten(-2)


def test_values_may_be_smaller_than_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Values cut to their first channels are like values whose other channels are zero, and are not read."""
    weights = load_file(make_llama(tmp_path) / "model.safetensors")
    for name, weight in weights.items():
        if "v_proj" in name:
            weight.unflatten(0, (-1, 64))[:, VALUE_SIZE:] = 0
        if "o_proj" in name:  # a rounding error is also in channels that are zero
            weight.unflatten(1, (-1, 64))[:, :, VALUE_SIZE:] = 0
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    answers = []
    for attention in (Attention, NarrowValues):
        monkeypatch.setattr(llama, "Attention", attention)
        with engine(monkeypatch, tmp_path, kv_cache_dtype=PRESET, skip_tokenizer_init=True) as llm:
            answers.append(ask_cold(llm, prompt_of(LENGTH)))
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("attention", "sentence"),
    [
        (PrefillPrefixLMAttention, "attention is not plainly causal"),
        (UnevenAttention, "layers of this model have 2 and 4 KV heads"),
        (WideValues, "values of this model have 80 channels per head, .* for its keys of 64 hold 64"),
    ],
    ids=["prefix LM", "uneven layers", "wide values"],
)
def test_layers_that_would_answer_wrongly_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, attention: type[Attention], sentence: str
) -> None:
    monkeypatch.setattr(llama, "Attention", attention)
    settings = {"kv_cache_dtype": PRESET, "skip_tokenizer_init": True}
    with (
        pytest.raises(RefusalError, match=f"{sentence}.*use kv_cache_dtype='auto'"),
        engine(monkeypatch, make_llama(tmp_path), **settings),
    ):
        pass


def test_a_step_that_reads_later_tokens_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llama, "Attention", PrefillPrefixLMAttention)
    monkeypatch.setattr(attention_layers, "refuse_unlike", lambda layer, layers: None)
    settings = {"kv_cache_dtype": PRESET, "skip_tokenizer_init": True}
    with (
        engine(monkeypatch, make_llama(tmp_path), **settings) as llm,
        pytest.raises(RefusalError, match="not plainly causal"),
    ):
        ask(llm, [prompt_of(20)])
