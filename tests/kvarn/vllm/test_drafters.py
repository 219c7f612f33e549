"""Speculative configurations that the plugin accepts or refuses, and the slots that they take; no engine starts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from vllm.config import ModelConfig, VllmConfig, replace
from vllm.engine.arg_utils import EngineArgs

from kvarn.vllm.cache_settings import GIB, side_pool_slots, slot_bytes, speculation_of
from kvarn.vllm.gpu.triton_plan import max_tokens_in_pass, query_counts
from kvarn.vllm.hooks import RefusalError
from kvarn.vllm.slots import Speculation
from tests.support.drafters import force_async_scheduling
from tests.support.engines import use_triton_backend
from tests.support.scheduling import MODEL_CONFIG

PRESET = "kvarn_k4v2_g128"
TEXT = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
TARGET_SLOT = 2 * 2 * 2 * 2 * 128 * 64  # keys and values, fp16, layers, heads, tokens, channels


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "target")


def write_model(directory: Path, **changes: Any) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**MODEL_CONFIG, **changes}))
    return directory


def configure(model: Path, drafts: dict[str, Any], **settings: Any) -> VllmConfig:
    given = {"kv_cache_dtype": PRESET, "skip_tokenizer_init": True, "max_num_seqs": 10, **settings}
    return EngineArgs(str(model), speculative_config=drafts, **given).create_engine_config()


def drafter(directory: Path, count: int = 3, method: str = "draft_model", **changes: Any) -> dict[str, Any]:
    """A speculative configuration with a drafter that differs from the target by `changes`."""
    return {
        "method": method,
        "model": str(write_model(directory / "drafter", **changes)),
        "num_speculative_tokens": count,
    }


def test_drafts_of_text_take_no_more_slots(model: Path) -> None:
    config = configure(model, TEXT)
    assert side_pool_slots(config) == 23
    assert slot_bytes(config) == TARGET_SLOT


def test_a_drafters_layers_have_slots_and_write_ahead(model: Path, tmp_path: Path) -> None:
    config = configure(model, drafter(tmp_path, num_hidden_layers=1, num_key_value_heads=4))
    assert side_pool_slots(config) == 33
    assert slot_bytes(config) == 2 * TARGET_SLOT


def test_a_drafters_unquantized_cache_takes_no_slots_but_writes_ahead(model: Path, tmp_path: Path) -> None:
    config = configure(model, {**drafter(tmp_path), "kv_cache_dtype": "auto"})
    assert side_pool_slots(config) == 33
    assert slot_bytes(config) == TARGET_SLOT


def test_the_pool_has_as_many_slots_when_vllm_configures_the_drafter(model: Path, tmp_path: Path) -> None:
    """A larger drafter would otherwise have fewer than the scheduler plans."""
    cap = {"kvarn": {"side_pool_gib": 50 * TARGET_SLOT / GIB}}
    config = configure(model, drafter(tmp_path, num_hidden_layers=6), additional_config=cap)
    assert config.speculative_config is not None
    of_drafter = replace(config, model_config=config.speculative_config.draft_model_config)
    assert isinstance(of_drafter.model_config, ModelConfig)
    assert side_pool_slots(config) == side_pool_slots(of_drafter) == 50 // 4


@pytest.mark.parametrize("asynchronous", [False, True])
def test_drafts_in_flight_are_undecided_with_asynchronous_scheduling(
    model: Path, tmp_path: Path, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asynchronous:
        force_async_scheduling(monkeypatch)
    config = configure(model, drafter(tmp_path))
    assert speculation_of(config) == Speculation(6 if asynchronous else 3, 3)


def test_a_drafter_must_have_full_attention_even_if_its_cache_is_not_quantized(
    model: Path, tmp_path: Path
) -> None:
    drafts = drafter(tmp_path, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=64)
    for settings in (drafts, {**drafts, "kv_cache_dtype": "auto"}):
        with pytest.raises(
            RefusalError, match=r"every layer of the drafter '.*drafter' to be full attention"
        ):
            configure(model, settings)


def test_a_model_that_mixes_kinds_of_attention_takes_drafts_of_the_text_alone(tmp_path: Path) -> None:
    mixed = {
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 64,
        "model_type": "gemma3_text",
    }
    target = write_model(tmp_path / "target", **mixed, architectures=["Gemma3ForCausalLM"])
    configure(target, TEXT)
    with pytest.raises(RefusalError, match="set speculative_config's method to 'ngram'"):
        configure(target, drafter(tmp_path))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "ngram_gpu"}, "use one of draft_model, eagle, eagle3, mtp, ngram, suffix, custom_class"),
        ({"num_speculative_tokens": 16}, "num_speculative_tokens to 15 or less"),
    ],
)
def test_other_drafts_are_refused(model: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RefusalError, match=sentence):
        configure(model, {**TEXT, **settings})


def test_a_drafter_that_the_cache_cannot_hold_is_refused_with_its_name(model: Path, tmp_path: Path) -> None:
    drafts = drafter(tmp_path, head_dim=40 * 16)
    sentence = r"does not fit the drafter '.*drafter': it cannot hold this model"
    with pytest.raises(RefusalError, match=sentence):
        configure(model, drafts)
    configure(model, {**drafts, "kv_cache_dtype": "auto"})


def test_parallel_drafting_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match="drafting in parallel"):
        configure(model, {**drafter(tmp_path, pard_token=1), "parallel_drafting": True})


def test_a_quantized_drafter_of_an_unquantized_target_is_refused(model: Path, tmp_path: Path) -> None:
    drafts = {**drafter(tmp_path), "kv_cache_dtype": PRESET}
    with pytest.raises(
        RefusalError, match=re.escape(f"kv_cache_dtype={PRESET!r} needs a target with the same")
    ):
        configure(model, drafts, kv_cache_dtype="auto")


def test_suffix_decoding_without_its_package_is_one_sentence(model: Path) -> None:
    with pytest.raises((RefusalError, ImportError), match="Arctic Inference is required"):
        configure(model, {"method": "suffix", "num_speculative_tokens": 3})


def test_the_gpus_kernels_are_compiled_for_a_draft_models_first_pass(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_triton_backend(monkeypatch)
    config = configure(model, drafter(tmp_path, count=14))
    assert query_counts(config) == [1, 15, 16]
    assert max_tokens_in_pass(config) == config.scheduler_config.max_num_batched_tokens + 10
    with pytest.raises(RefusalError, match="num_speculative_tokens to 14 or less"):
        configure(
            model, {"method": "draft_model", "model": str(tmp_path / "drafter"), "num_speculative_tokens": 15}
        )
    assert query_counts(configure(model, {**TEXT, "num_speculative_tokens": 15})) == [1, 16]
