"""Engine configurations that the plugin accepts, completes or refuses, and its hooks; no engine is started."""

from __future__ import annotations

import json
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_events import BlockRemoved
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention import selector
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.request import Request

from kvarn.presets import PRESETS
from kvarn.vllm import backend, plugin
from kvarn.vllm.cache_settings import side_pool_slots
from kvarn.vllm.hooks import HookError, engine_config
from kvarn.vllm.scheduler import KVarNAsyncScheduler, KVarNScheduler
from tests.support.engines import use_triton_backend
from tests.support.scheduling import make_scheduler

PRESET = "kvarn_k4v2_g128"


def write_config(directory: Path, **changes: Any) -> Path:
    """Write a model directory that holds only a Llama's config.json with `changes`."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
        "torch_dtype": "float32",
        **changes,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


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
    assert side_pool_slots(configure(model, max_num_seqs=10)) == 30
    settings = {"kvarn": {"retained_sinks": 5}}
    assert side_pool_slots(configure(model, max_num_seqs=10, additional_config=settings)) == 25


def test_side_pool_stays_within_its_memory_cap(model: Path) -> None:
    slot_bytes = 2 * 2 * 2 * 2 * 128 * 64  # keys and values, fp16, layers, heads, tokens, channels
    settings = {"kvarn": {"side_pool_gib": 7.5 * slot_bytes / 2**30}}
    assert side_pool_slots(configure(model, max_num_seqs=10, additional_config=settings)) == 7


def test_side_pool_size_and_its_remedy_are_logged(model: Path, caplog_vllm: pytest.LogCaptureFixture) -> None:
    configure(model, max_num_seqs=10)
    assert "30 slots of 0.1 MiB, 4 MiB per rank" in caplog_vllm.text
    assert "max_num_seqs, kvarn.retained_sinks and kvarn.side_pool_gib change that" in caplog_vllm.text


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kv_cache_dtype": "kvarn_k3v2_g128"}, "choose one of kvarn_k4v2_g128"),
        ({"block_size": 64}, "leave block_size out or set it to 128"),
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, "context parallelism"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism; use tensor_parallel_size"),
        ({"kv_cache_dtype_skip_layers": ["0"]}, "leave kv_cache_dtype_skip_layers out"),
        ({"scheduler_cls": Scheduler}, "derive yours from kvarn.vllm.scheduler.SlotPlanning"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 16, "prompt_lookup_max": 2}},
            "num_speculative_tokens to 15 or less",
        ),
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
            {
                "speculative_config": {
                    "method": "ngram_gpu",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 2,
                }
            },
            "set speculative_config's method to 'ngram', or leave it out",
        ),
        (
            {"kv_transfer_config": KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")},
            "leave kv_transfer_config out",
        ),
        (
            {"additional_config": {"kvarn": {"retained": 1}}},
            "no setting retained; use expected_output_tokens",
        ),
        ({"additional_config": {"kvarn": {"raw_chunks": "yes"}}}, "give true or false"),
        ({"additional_config": {"kvarn": {"raw_chunks": True}}}, "has raw_chunks on GPUs only"),
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
def test_unsupported_settings_are_refused(model: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        configure(model, **settings)


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
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "projection_dim": 256,
    },
    "projection_dim": 256,
    "image_token_index": 511,
}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"head_dim": 96}, "head_dim"),
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 512},
            "does not support sliding-window attention; use kv_cache_dtype='auto'",
        ),
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
        (PALIGEMMA, "this model's images also to later ones; use kv_cache_dtype='auto'"),
    ],
    ids=["head_dim", "sliding window", "encoder", "MLA", "images read both ways"],
)
def test_unsupported_models_are_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    model = write_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=sentence):
        configure(model)


def test_many_query_heads_per_kv_head_are_refused_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_config(tmp_path, num_attention_heads=32, num_key_value_heads=1)
    configure(model)
    use_triton_backend(monkeypatch)
    with pytest.raises(ValueError, match="at most 16 query heads per KV head, and this model has 32"):
        configure(model)


def test_sleep_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_sleep_mode_available", lambda self: True)
    with pytest.raises(ValueError, match="leave enable_sleep_mode out"):
        configure(model, enable_sleep_mode=True)


def test_batch_invariance_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="leave VLLM_BATCH_INVARIANT out"):
        configure(model)


@pytest.mark.parametrize(
    ("feature", "sentence"),
    [
        ("use_mm_prefix", "partial multimodal token full attention not supported"),
        ("use_non_causal", "non-causal attention not supported"),
        ("has_sink", "attention sinks not supported"),
        ("use_per_head_quant_scales", "per-head quant scales not supported"),
    ],
)
def test_a_layer_that_needs_more_is_refused(feature: str, sentence: str) -> None:
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


def test_a_missing_target_refuses_presets_only(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(EngineArgs, "create_engine_config", EngineArgs.create_engine_config.__wrapped__)
    monkeypatch.delattr(BlockPool, "evict_blocks")
    plugin.register()
    with pytest.raises(
        HookError, match=r"'slot plan to workers'.*BlockPool.evict_blocks is missing.*0\.27\.1"
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
        (Scheduler, "_pause_state"),
        (Scheduler, "kv_event_publisher"),
        (Scheduler, "kv_cache_manager.coordinator.single_type_managers"),
        (SingleTypeKVCacheManager, "req_to_blocks"),
        (BlockPool, "cached_block_hash_to_block"),
        (Request, "is_prefill_chunk"),
    ],
)
def test_a_scheduler_refuses_a_vllm_whose_objects_lack_a_private_name(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    stock_init = owner.__init__

    def init_without_name(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_init(self, *args, **kwargs)
        holder, _, attribute = name.rpartition(".")
        delattr(attrgetter(holder)(self) if holder else self, attribute)

    monkeypatch.setattr(owner, "__init__", init_without_name)
    with pytest.raises(HookError, match=rf"'private names'.*\b{name} is missing; install .*0\.27\.1"):
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
