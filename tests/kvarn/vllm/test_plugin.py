"""Engine configurations that the plugin accepts, completes or refuses, and its hooks; no engine is started."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import envs
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_events import BlockRemoved
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils import torch_utils
from vllm.v1.attention import selector
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request

from kvarn.cli import doctor
from kvarn.errors import KVarNError
from kvarn.model import kv_shape
from kvarn.presets import PRESETS, get_preset
from kvarn.tile import TileLayout
from kvarn.vllm import backend, hooks, plugin, spec, versions
from kvarn.vllm.access.cache_events import CACHE_EVENTS_METHOD
from kvarn.vllm.access.telemetry import CACHE_STATE_METHOD
from kvarn.vllm.cache_settings import side_pool_slots, slot_bytes
from kvarn.vllm.hooks import HookError, RefusalError, engine_config, page_size, private_names
from kvarn.vllm.mixed_layers import is_mixed, num_quantized_layers
from kvarn.vllm.scheduler import KVarNAsyncScheduler, KVarNScheduler
from tests.support.block_store import block_store, shared_store
from tests.support.engines import use_triton_backend
from tests.support.families import VISION
from tests.support.scheduling import MODEL_CONFIG, make_scheduler

PRESET = "kvarn_k4v2_g128"


def write_config(directory: Path, **changes: Any) -> Path:
    """Write a model directory that holds only a Llama's config.json with `changes`."""
    (directory / "config.json").write_text(json.dumps({**MODEL_CONFIG, **changes}))
    return directory


STORE = Path("/var/blocks")
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def configure(model: Path, **settings: Any) -> VllmConfig:
    arguments = {"kv_cache_dtype": PRESET, "skip_tokenizer_init": True, **settings}
    return EngineArgs(str(model), **arguments).create_engine_config()


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
def test_block_size_defaults_to_the_group(model: Path, preset: Any) -> None:
    config = configure(model, kv_cache_dtype=preset.name)
    assert config.cache_config.block_size == preset.group
    assert config.cache_config.cache_dtype == preset.name


def test_scheduler_is_chosen_and_a_custom_one_is_kept(model: Path) -> None:
    assert configure(model).scheduler_config.scheduler_cls is KVarNScheduler
    own = configure(model, scheduler_cls=KVarNAsyncScheduler)
    assert own.scheduler_config.scheduler_cls is KVarNAsyncScheduler


def test_an_unquantized_cache_is_left_alone(model: Path) -> None:
    config = configure(model, kv_cache_dtype="auto", max_num_seqs=200)
    assert config.scheduler_config.scheduler_cls is None
    assert config.scheduler_config.max_num_seqs == 200


def test_side_pool_follows_max_num_seqs_and_the_setting(model: Path) -> None:
    assert side_pool_slots(configure(model, max_num_seqs=10)) == 23
    settings = {"kvarn": {"retained_sinks": 5}}
    assert side_pool_slots(configure(model, max_num_seqs=10, additional_config=settings)) == 25


def test_side_pool_stays_within_its_memory_cap(model: Path) -> None:
    slot_bytes = 2 * 2 * 2 * 2 * 128 * 64  # keys and values, fp16, layers, heads, tokens, channels
    settings = {"kvarn": {"side_pool_gib": 7.5 * slot_bytes / 2**30}}
    assert side_pool_slots(configure(model, max_num_seqs=10, additional_config=settings)) == 7


@pytest.mark.parametrize("partition", [None, "1,1,3"])
def test_every_pipeline_stage_has_the_slots_that_the_largest_can_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partition: str | None
) -> None:
    if partition is not None:
        monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", partition)
    model = write_config(tmp_path, num_hidden_layers=5)
    largest = 2 if partition is None else 3
    # layers, keys and values, fp16, heads, tokens, channels
    cap = 7.5 * largest * 2 * 2 * 2 * 128 * 64 / 2**30
    settings = {"pipeline_parallel_size": 3, "additional_config": {"kvarn": {"side_pool_gib": cap}}}
    config = configure(model, max_num_seqs=10, **settings)
    for rank in range(3):
        config.parallel_config.rank = rank
        assert side_pool_slots(config) == 7


def test_every_pipeline_stage_needs_layers_of_both_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    model = write_config(tmp_path, **WINDOWED, num_hidden_layers=4, layer_types=kinds)
    sentence = "layers with a window in every pipeline stage; lower pipeline_parallel_size, or divide"
    with pytest.raises(RefusalError, match=sentence):
        configure(model, pipeline_parallel_size=2)
    kinds[3] = "full_attention"
    model = write_config(tmp_path, **WINDOWED, num_hidden_layers=4, layer_types=kinds)
    assert configure(model, pipeline_parallel_size=2).parallel_config.world_size == 2
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,3")
    with pytest.raises(RefusalError, match=sentence):
        configure(model, pipeline_parallel_size=2)


def test_layers_of_other_shapes_share_one_group_and_its_block_table(model: Path) -> None:
    """As the layers of a draft model do, quantized or not."""
    config = configure(model)
    quantized = [
        spec.KVarNSpec.of(TileLayout(get_preset(PRESET), dim), heads) for dim, heads in ((64, 2), (128, 1))
    ]
    plain = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=64, dtype=torch.float32)
    for layers in (quantized, [quantized[0], plain], [plain, quantized[0]]):
        named = {f"layer{number}": layer for number, layer in enumerate(layers)}
        (group,) = get_kv_cache_groups(config, named)
        assert set(group.layer_names) == set(named)


def test_side_pool_size_and_its_remedy_are_logged(model: Path, caplog_vllm: pytest.LogCaptureFixture) -> None:
    configure(model, max_num_seqs=10)
    assert "23 slots of 0.1 MiB, 3 MiB per rank" in caplog_vllm.text
    assert "max_num_seqs, kvarn.retained_sinks and kvarn.side_pool_gib change that" in caplog_vllm.text


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kv_cache_dtype": "kvarn_k3v2_g128"}, "choose one of kvarn_k4v2_g128"),
        ({"attention_backend": "FLASH_ATTN"}, "attention_backend='FLASH_ATTN'.*leave attention_backend out"),
        (
            {"attention_config": {"backend_per_kind": {"full_attention": "FLASH_ATTN"}}},
            "leave attention_config's backend_per_kind out",
        ),
        ({"additional_config": {"kvarn": {"allow_untested_vllm": 1}}}, "give true or false"),
        ({"block_size": 64}, "leave block_size out or set it to 128"),
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, "context parallelism"),
        ({"pipeline_parallel_size": 2, "speculative_config": NGRAM}, "leave speculative_config out"),
        ({"kv_cache_dtype_skip_layers": ["0"]}, "leave kv_cache_dtype_skip_layers out"),
        ({"scheduler_cls": Scheduler}, "derive yours from kvarn.vllm.scheduler.SlotPlanning"),
        (
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 4,
                    "prompt_lookup_max": 2,
                },
                "long_prefill_token_threshold": 4,
            },
            "raise long_prefill_token_threshold from 4 to 5 or more",
        ),
        (
            {"kv_transfer_config": KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")},
            "ExampleConnector was not tried; use OffloadingConnector or a class of yours",
        ),
        (
            {"kv_transfer_config": KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")},
            "has OffloadingConnector on GPUs only; leave kv_transfer_config out",
        ),
        (
            {"kv_transfer_config": replace(block_store(), kv_role="kv_consumer")},
            "set kv_transfer_config's kv_role to 'kv_both'",
        ),
        (
            {"kv_transfer_config": block_store(), "pipeline_parallel_size": 2},
            "KV connectors with pipeline parallelism; leave kv_transfer_config out",
        ),
        (
            {
                "kv_transfer_config": KVTransferConfig(
                    "OffloadingConnector",
                    kv_role="kv_both",
                    kv_connector_module_path="vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector",
                )
            },
            "for which OffloadingConnector was not tried",
        ),
        ({"additional_config": {"kvarn": {"host_sinks": -1}}}, "give a number of tiles >= 0"),
        (
            {"kv_transfer_config": shared_store(Path("blocks"))},
            "kv_connector_extra_config: directory is 'blocks'; give an absolute path",
        ),
        (
            {"kv_transfer_config": shared_store(STORE, capacity_gib=0)},
            "kv_connector_extra_config: capacity_gib is 0; give a size in GiB > 0",
        ),
        (
            {"kv_transfer_config": shared_store(STORE, size=1)},
            "kv_connector_extra_config: size is no setting; use capacity_gib, directory, load_timeout_s",
        ),
        (
            {"kv_transfer_config": replace(shared_store(STORE), kv_connector_extra_config={})},
            "kv_connector_extra_config: capacity_gib, directory is missing",
        ),
        (
            {"kv_transfer_config": shared_store(STORE), "prefix_caching_hash_algo": "xxhash"},
            "set the environment variable PYTHONHASHSEED to the same number for every engine",
        ),
        (
            {"additional_config": {"kvarn": {"retained": 1}}},
            "no setting retained; use allow_untested_vllm, expected_output_tokens",
        ),
        ({"additional_config": {"kvarn": {"raw_chunks": "yes"}}}, "give true or false"),
        ({"additional_config": {"kvarn": {"raw_chunks": True}}}, "has raw_chunks on GPUs only"),
        ({"additional_config": {"kvarn": {"split_tiles": 0}}}, "give a number of tiles > 0"),
        ({"additional_config": {"kvarn": {"split_tiles": 8}}}, "has split_tiles on GPUs only"),
        ({"additional_config": {"kvarn": {"retained_sinks": -1}}}, "give a number of slots >= 0"),
        (
            {"additional_config": {"kvarn": {"order": "lifo"}}},
            "kvarn.order is 'lifo'; give one of prefix, fcfs",
        ),
        ({"additional_config": {"kvarn": None}}, r"additional_config\['kvarn'\] is None; give a mapping"),
        (
            {"additional_config": {"kvarn": "order"}},
            r"additional_config\['kvarn'\] is 'order'; give a mapping",
        ),
        ({"additional_config": {"kvarn": {"side_pool_gib": float("inf")}}}, "give a size in GiB > 0"),
        ({"additional_config": {"kvarn": {"window": 0}}}, "give a number of requests > 0"),
        ({"additional_config": {"kvarn": {"max_overtakes": None}}}, "give a number of requests >= 0"),
        ({"additional_config": {"kvarn": {"side_pool_gib": "1"}}}, "give a size in GiB > 0"),
        (
            {"additional_config": {"kvarn": {"side_pool_gib": 1e-6}}},
            "one request may need 3; give at least 0.0004",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_settings_are_refused(
    monkeypatch: pytest.MonkeyPatch, model: Path, settings: dict[str, Any], sentence: str
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ValueError, match=sentence):
        configure(model, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_cache_dtype": "kvarn_k3v2_g128"},
        {"attention_backend": "FLASH_ATTN"},
        {"attention_config": {"backend_per_kind": {"full_attention": "FLASH_ATTN"}}},
        {"block_size": 64},
        {"pipeline_parallel_size": 2, "speculative_config": NGRAM},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_unsupported_settings_are_errors_that_a_user_can_act_on(
    model: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(KVarNError) as raised:
        configure(model, **settings)
    assert type(raised.value) is RefusalError


PALIGEMMA = {
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "model_type": "paligemma",
    "text_config": {
        "model_type": "gemma",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
    },
    "vision_config": {"model_type": "siglip_vision_model", **VISION, "projection_dim": 256},
    "projection_dim": 256,
    "image_token_index": 511,
}
WINDOWED: dict[str, Any] = {
    "architectures": ["Olmo3ForCausalLM"],
    "model_type": "olmo3",
    "sliding_window": 512,
}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"head_dim": 512}, "heads of 512 channels .* use a model with at most 256 channels per head"),
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 512},
            "set max_model_len to 512 or less, or use kv_cache_dtype='auto'",
        ),
        (
            {"layer_types": ["full_attention", "linear_attention"]},
            "layers of type linear_attention; give a model without them, or use kv_cache_dtype='auto'",
        ),
        (
            {
                **WINDOWED,
                "num_hidden_layers": 3,
                "layer_types": ["full_attention"] * 2 + ["sliding_attention"],
            },
            "as many layers with a window as full-attention layers, or more; give a model with them, or use",
        ),
        (
            {**WINDOWED, "layer_types": ["chunked_attention", "full_attention"]},
            "layers of type chunked_attention; give a model without them, or use kv_cache_dtype='auto'",
        ),
        (
            {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 512},
            "as full attention, up to a chunk; set max_model_len to 512 or less, or use kv_cache_dtype='auto'",
        ),
        ({"alibi": True}, "does not support ALiBi; use kv_cache_dtype='auto'"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "decoder-only generation"),
        (
            {
                "architectures": ["DeepseekV2ForCausalLM"],
                "model_type": "deepseek_v2",
                "kv_lora_rank": 64,
                "qk_rope_head_dim": 32,
                "qk_nope_head_dim": 32,
                "v_head_dim": 64,
                "q_lora_rank": None,
            },
            "multi-head latent attention; use kv_cache_dtype='auto'",
        ),
        ({"num_kv_shared_layers": 1}, "KV sharing between layers; use kv_cache_dtype='auto'"),
        (PALIGEMMA, "this model's images also to later ones; use kv_cache_dtype='auto'"),
    ],
    ids=[
        "head_dim",
        "sliding window",
        "linear attention",
        "few windows",
        "chunks of no size",
        "chunks",
        "ALiBi",
        "encoder",
        "MLA",
        "KV sharing",
        "images read both ways",
    ],
)
def test_unsupported_models_are_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    model = write_config(tmp_path, **changes)
    with pytest.raises(RefusalError, match=sentence):
        configure(model)


def test_chunks_of_the_longest_sequence_are_full_attention(tmp_path: Path) -> None:
    kinds = ["chunked_attention", "full_attention"]
    model = configure(write_config(tmp_path, layer_types=kinds, attention_chunk_size=1024)).model_config
    assert (model.max_model_len, model.attention_chunk_size) == (1024, None)
    assert model.hf_text_config.attention_chunk_size is None


WITH_STATES: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}


@pytest.mark.parametrize(
    ("changes", "settings", "sentence"),
    [
        (
            {"layer_types": ["linear_attention"] * 3},
            {},
            "configuration names none; use kv_cache_dtype='auto'",
        ),
        (
            {"layer_types": ["linear_attention", "full_attention", "sliding_attention"]},
            {},
            "a window beside layers with a state; use kv_cache_dtype='auto'",
        ),
        ({"sliding_window": 64}, {}, "a window beside layers with a state; use kv_cache_dtype='auto'"),
        (
            {},
            {"speculative_config": NGRAM},
            "drafts for a model with state layers; leave speculative_config out",
        ),
        ({}, {"pipeline_parallel_size": 2}, "beside state layers; use tensor_parallel_size instead"),
    ],
    ids=["states alone", "windows", "a window", "drafts", "pipeline"],
)
def test_what_state_layers_cannot_have_is_refused(
    tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any], sentence: str
) -> None:
    model = write_config(tmp_path, **{**WITH_STATES, **changes})
    with pytest.raises(RefusalError, match=sentence):
        configure(model, **settings)


def test_state_layers_need_blocks_of_several_page_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_config(tmp_path, **WITH_STATES)
    config = configure(model)
    assert config.cache_config.kv_cache_layout == "BLHNC"
    assert num_quantized_layers(config.model_config, config.parallel_config) == 1
    assert kv_shape(model, 1024).layers == 1
    monkeypatch.setattr(engine_config, "packs_states", lambda: False)
    with pytest.raises(RefusalError, match=r"from vLLM 0\.32 on; install that, or use kv_cache_dtype='auto'"):
        configure(model)


def test_the_scheduler_plans_as_many_slots_as_layers_have(tmp_path: Path) -> None:
    """vLLM's engine core sets the block size to that of the smallest blocks before it makes the scheduler."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    model = write_config(tmp_path, **WINDOWED, num_hidden_layers=3, layer_types=kinds)
    config = configure(model)
    settings = {"kvarn": {"side_pool_gib": 7.5 * slot_bytes(config) / 2**30}}
    config = configure(model, max_num_seqs=10, additional_config=settings)
    assert side_pool_slots(config) == 7
    config.cache_config.block_size = 32
    assert side_pool_slots(config) == 7


def test_quantized_layers_alone_have_slots(tmp_path: Path) -> None:
    """Layers with a window keep vLLM's own cache."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    model = write_config(tmp_path, **WINDOWED, num_hidden_layers=3, layer_types=kinds)
    mixed, full = configure(model), configure(model, max_model_len=512)
    assert slot_bytes(full) == 3 * slot_bytes(mixed)
    for config in (mixed, full):
        shape = kv_shape(model, config.model_config.max_model_len)
        assert shape.layers == num_quantized_layers(config.model_config, config.parallel_config)
    assert is_mixed(mixed.model_config)
    assert not is_mixed(full.model_config)


def test_one_cache_group_for_layers_with_and_without_windows_is_refused(model: Path) -> None:
    with pytest.raises(RefusalError, match="leave disable_hybrid_kv_cache_manager out"):
        configure(model, disable_hybrid_kv_cache_manager=True)


def test_many_query_heads_per_kv_head_are_refused_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_config(tmp_path, num_attention_heads=32, num_key_value_heads=1)
    configure(model)
    use_triton_backend(monkeypatch)
    with pytest.raises(ValueError, match="at most 16 query heads per KV head, and this model has 32"):
        configure(model)


@pytest.mark.parametrize("device", ["rocm", "xpu", "tpu"])
def test_devices_without_a_backend_are_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """They are neither sent to the CPU's backend nor to the GPU's kernels."""
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(current_platform), "device_name", device)
    with pytest.raises(
        RefusalError, match=f"on NVIDIA GPUs and on CPUs, and this vLLM runs on {device}; use"
    ):
        configure(model)


def test_sleep_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_sleep_mode_available", lambda self: True)
    with pytest.raises(ValueError, match="leave enable_sleep_mode out"):
        configure(model, enable_sleep_mode=True)


def test_batch_invariance_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="leave VLLM_BATCH_INVARIANT out"):
        configure(model)


@pytest.mark.skipif(not hasattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND"), reason="vLLM has one Ray executor")
def test_the_ray_executor_that_bypasses_workers_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    assert configure(model, **settings).parallel_config.distributed_executor_backend == "ray"
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")
    with pytest.raises(ValueError, match="leave VLLM_USE_RAY_V2_EXECUTOR_BACKEND out"):
        configure(model, **settings)


def test_probes_do_not_take_a_refused_environment_for_a_misfit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert all(status.ok for status in plugin.hook_report())


@pytest.mark.parametrize(
    ("feature", "sentence"),
    [
        ("use_mm_prefix", "partial multimodal token full attention not supported"),
        ("use_non_causal", "non-causal attention not supported"),
        ("use_per_head_quant_scales", "per-head quant scales not supported"),
    ],
)
def test_a_layer_that_needs_more_is_refused(
    monkeypatch: pytest.MonkeyPatch, feature: str, sentence: str
) -> None:
    plugin.register()
    plain = selector.AttentionSelectorConfig(128, torch.bfloat16, PRESET, 128)
    chosen = selector._cached_get_attn_backend(backend=None, attn_selector_config=plain, num_heads=8)
    assert chosen is backend.BACKENDS[PRESET]
    with pytest.raises(ValueError, match=f"{sentence}; use kv_cache_dtype='auto'"):
        selector._cached_get_attn_backend(
            backend=None, attn_selector_config=plain._replace(**{feature: True}), num_heads=8
        )


def test_every_hook_fits_this_vllm() -> None:
    assert [status.detail for status in plugin.hook_report()] == [""] * len(plugin.HOOKS)


@pytest.fixture
def register_again(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Register the plugin as a new process does, over the hooks that this one has installed."""
    plugin.register()
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(EngineArgs, "create_engine_config", EngineArgs.create_engine_config)
    return plugin.register


def pages_as_if_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Size pages as vLLM 0.29 and 0.30 do for a spec without their fields: by the elements of a token."""
    monkeypatch.setattr(spec, "packed_page_fields", lambda *_: {})
    elements = property(lambda self: 2 * self.block_size * self.num_kv_heads * self.head_size)
    monkeypatch.setattr(spec.KVarNSpec, "page_size_bytes", elements)


def test_pages_of_another_size_fail_the_doctor_and_refuse_engines(
    model: Path, monkeypatch: pytest.MonkeyPatch, register_again: Callable[[], None]
) -> None:
    pages_as_if_unpacked(monkeypatch)
    (broken,) = [check for check in doctor.check_hooks() if not check.ok]
    assert broken.name == "page size"
    assert "makes pages of 49152 bytes for kvarn_k4v2_g128 instead of" in broken.detail
    register_again()
    with pytest.raises(
        HookError, match=r"'page size' to vLLM .*49152 bytes.*was tested on this version.*run `kvarn doctor`"
    ):
        configure(model)
    assert configure(model, kv_cache_dtype="auto").cache_config.cache_dtype == "auto"


def test_a_hook_that_cannot_be_installed_refuses_presets_only(
    model: Path, monkeypatch: pytest.MonkeyPatch, register_again: Callable[[], None]
) -> None:
    def install() -> None:
        raise TypeError("another signature")

    attempts = [page_size.HOOK, engine_config.HOOK]
    others = [replace(hook, install=lambda: None) for hook in plugin.HOOKS if hook not in attempts]
    hooks = (replace(page_size.HOOK, install=install), *others, engine_config.HOOK)
    monkeypatch.setattr(plugin, "HOOKS", hooks)
    monkeypatch.setattr(plugin, "_failed_installs", None)
    register_again()
    with pytest.raises(
        HookError, match=r"'page size' .* its installation fails with TypeError: another signature"
    ):
        configure(model)
    assert configure(model, kv_cache_dtype="auto").cache_config.cache_dtype == "auto"


def test_a_module_that_fails_to_import_is_a_missing_target(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: str) -> Any:
        raise TypeError(f"{module} fails")

    monkeypatch.setattr(hooks, "import_module", fail)
    assert page_size.HOOK.missing_target() == page_size.HOOK.targets[0]


def forget_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SchedulerOutput, "__reduce__", lambda self: (SchedulerOutput.make_empty, ()))


def choose_stock_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selector, "_cached_get_attn_backend", selector._cached_get_attn_backend.__wrapped__)


def store_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_utils.STR_DTYPE_TO_TORCH_DTYPE, PRESET, torch.float16)


def rename_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "__init__", lambda self: setattr(self, "other_waiting", []))


def append_prepended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FCFSRequestQueue, "prepend_request", FCFSRequestQueue.append)


def shape_in_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_size, "layer_cache_shape", lambda backend, spec, blocks: (blocks, 128, 8))


@pytest.mark.parametrize(
    ("change", "hook", "detail"),
    [
        (store_halves, "cache dtype names", "as torch.float16 instead of bytes"),
        (choose_stock_backends, "attention backend", "its probe fails with|it chooses .*CPU"),
        (pages_as_if_unpacked, "page size", "makes pages of 49152 bytes"),
        (shape_in_tokens, "page size", r"shapes as \(5, 128, 8\)"),
        (forget_plan, "slot plan to workers", "loses the slot plan"),
        (lambda patch: patch.delattr(EngineCore, CACHE_STATE_METHOD), "cache state", "finds None"),
        (lambda patch: patch.delattr(EngineCore, CACHE_EVENTS_METHOD), "cache events", "finds None"),
        (rename_queues, "private names", "its probe fails with AttributeError"),
        (append_prepended, "private names", "does not keep the order"),
        (
            lambda patch: patch.setattr(EngineArgs, "create_engine_config", lambda self: None),
            "engine configuration",
            "accepts the misspelled",
        ),
    ],
)
def test_a_vllm_that_behaves_differently_is_noticed(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None], hook: str, detail: str
) -> None:
    plugin.register()
    change(monkeypatch)
    (broken,) = [status for status in plugin.hook_report() if not status.ok]
    assert broken.name == hook
    assert re.search(detail, broken.detail)


def test_the_doctor_notices_a_step_without_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVarNScheduler, "schedule", Scheduler.schedule)
    monkeypatch.setattr(KVarNAsyncScheduler, "schedule", AsyncScheduler.schedule)
    (broken,) = [status for status in plugin.hook_report(thorough=True) if not status.ok]
    assert "plans None instead of two slots" in broken.detail


def test_probes_load_no_module_and_no_device_once_the_hooks_are_installed() -> None:
    plugin.hook_report()
    loaded = {*sys.modules}
    plugin.hook_report()
    assert {*sys.modules} == loaded
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize("version", ["0.99.0", None])
def test_an_untested_version_is_refused_unless_allowed(
    model: Path, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda: version)
    with pytest.raises(
        RefusalError,
        match=rf"not tested on vLLM {version or 'of unknown version'}; install one of 0\.27\.1, .*"
        r"kvarn\.allow_untested_vllm to true",
    ):
        configure(model)
    assert configure(model, kv_cache_dtype="auto").cache_config.cache_dtype == "auto"
    allowed = {"kvarn": {"allow_untested_vllm": True}}
    assert configure(model, additional_config=allowed).cache_config.cache_dtype == PRESET
    (failed,) = [check for check in doctor.check_hooks() if not check.ok]
    assert failed.name == "tested version"


def test_a_local_build_of_a_tested_version_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda: f"{versions.TESTED_VLLM_VERSIONS[0]}+cu129")
    assert versions.is_tested()


def test_an_allowed_version_is_still_probed(
    model: Path, monkeypatch: pytest.MonkeyPatch, register_again: Callable[[], None]
) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda: "0.99.0")
    pages_as_if_unpacked(monkeypatch)
    register_again()
    with pytest.raises(RefusalError, match=r"not tested on vLLM 0\.99\.0"):
        configure(model)
    with pytest.raises(HookError, match=r"'page size' to vLLM 0\.99\.0.*known to work \(0\.27\.1"):
        configure(model, additional_config={"kvarn": {"allow_untested_vllm": True}})


def test_its_own_attention_backend_may_be_named(model: Path) -> None:
    assert configure(model, attention_backend="CUSTOM").cache_config.cache_dtype == PRESET
    assert configure(model, attention_backend="auto").cache_config.cache_dtype == PRESET


def test_a_missing_target_refuses_presets_only(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(EngineArgs, "create_engine_config", EngineArgs.create_engine_config.__wrapped__)
    monkeypatch.delattr(BlockPool, "evict_blocks")
    plugin.register()
    with pytest.raises(
        HookError, match=r"'slot plan to workers'.*BlockPool.evict_blocks is missing; .*run `kvarn doctor`"
    ):
        configure(model)
    assert configure(model, kv_cache_dtype="auto").cache_config.cache_dtype == "auto"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (KVCacheManager, "prefix_cache_lookup_enabled"),
        (BlockPool, "touch"),
        (AttentionMetadataBuilder, "_init_reorder_batch_threshold"),
        (AsyncMPClient, "call_utility_async"),
        (BlockRemoved, "block_hashes"),
    ],
)
def test_the_doctor_reports_a_missing_private_name(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    monkeypatch.delattr(owner, name)
    broken = [status for status in plugin.hook_report() if not status.ok]
    assert [status.detail.partition(":")[2] for status in broken] == [f"{owner.__name__}.{name} is missing"]


def test_the_doctor_reports_a_missing_dataclass_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CommonAttentionMetadata.__dataclass_fields__, "query_start_loc_cpu")
    (broken,) = [status for status in plugin.hook_report() if not status.ok]
    assert broken.detail.endswith("CommonAttentionMetadata.query_start_loc_cpu is missing")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("", "_pause_state"),
        ("", "kv_event_publisher"),
        ("kv_cache_manager.coordinator", "single_type_managers"),
        ("kv_cache_manager.block_pool", "cached_block_hash_to_block"),
    ],
)
def test_a_scheduler_refuses_a_vllm_whose_objects_lack_a_private_name(owner: str, name: str) -> None:
    scheduler = make_scheduler(num_blocks=8, max_running=1)
    delattr(attrgetter(owner)(scheduler) if owner else scheduler, name)
    with pytest.raises(HookError, match=rf"'private names'.*\b{name} is missing; .*run `kvarn doctor`"):
        private_names.check_scheduler(scheduler)


def test_a_scheduler_refuses_a_vllm_without_a_queue_for_requests_set_aside() -> None:
    scheduler = make_scheduler(num_blocks=8, max_running=1)
    for name in versions.SET_ASIDE_QUEUE.split(" or "):
        vars(scheduler).pop(name, None)
    with pytest.raises(HookError, match="skipped_waiting or kv_holding_waiting is missing"):
        private_names.check_scheduler(scheduler)


@pytest.mark.parametrize(
    ("owner", "name"), [(SingleTypeKVCacheManager, "req_to_blocks"), (Request, "is_prefill_chunk")]
)
def test_a_new_scheduler_is_checked(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    stock_init = owner.__init__

    def init_without_name(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_init(self, *args, **kwargs)
        holder, _, attribute = name.rpartition(".")
        delattr(attrgetter(holder)(self) if holder else self, attribute)

    monkeypatch.setattr(owner, "__init__", init_without_name)
    with pytest.raises(HookError, match=rf"'private names'.*\b{name} is missing; .*run `kvarn doctor`"):
        make_scheduler(num_blocks=8, max_running=1)


def test_without_even_the_refusal_registering_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(engine_config, "TARGET", "vllm.engine.arg_utils:EngineArgs.gone")
    broken = engine_config.Hook("engine configuration", ("vllm.engine.arg_utils:EngineArgs.gone",), print)
    monkeypatch.setattr(engine_config, "HOOK", broken)
    monkeypatch.setattr(plugin, "HOOKS", (*plugin.HOOKS[:-1], broken))
    with pytest.raises(HookError, match="engine configuration"):
        plugin.register()


@pytest.fixture
def caplog_vllm(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """`caplog` for vLLM's loggers, which do not propagate by default."""
    import logging

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("kvarn"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog
