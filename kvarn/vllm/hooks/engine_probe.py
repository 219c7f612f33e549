"""Configures an engine for a small model and schedules its first step, without weights or workers."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvarn.presets import PRESETS, Preset
from kvarn.tile import TileLayout

_SMALL_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 128,
    "max_position_embeddings": 1024,
    "torch_dtype": "float32",
}
_BLOCKS = 8


def doctor_probe() -> str | None:
    """Check the configuration and the scheduler of an engine with a small model, which needs no weights."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    if current_platform.is_unspecified():  # vLLM configures no engine without a device
        return None
    preset = next(iter(PRESETS.values()))
    with TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(_SMALL_MODEL))
        config = EngineArgs(
            directory,
            skip_tokenizer_init=True,
            kv_cache_dtype=preset.name,
            additional_config={"kvarn": {"allow_untested_vllm": True}},
        ).create_engine_config()
    if config.cache_config.cache_dtype != preset.name:
        return f"an engine gets kv_cache_dtype={config.cache_config.cache_dtype!r} instead of {preset.name!r}"
    if config.cache_config.block_size != preset.group:
        return f"an engine gets blocks of {config.cache_config.block_size} tokens instead of {preset.group}"
    return _scheduler_difference(config, preset)


def _scheduler_difference(config: Any, preset: Preset) -> str | None:
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    from kvarn.vllm.slots import SLOT_PLAN
    from kvarn.vllm.spec import KVarNSpec

    config.cache_config.num_gpu_blocks = _BLOCKS
    spec = KVarNSpec.of(TileLayout.of_heads(preset, config.model_config.get_head_size()), num_kv_heads=1)
    scheduler = config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(_BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=preset.group,
    )
    init_none_hash(sha256)
    hasher = get_request_block_hasher(preset.group, sha256)
    prompt = [0] * (preset.group + 1)
    scheduler.add_request(Request("probe", prompt, SamplingParams(max_tokens=1), None, block_hasher=hasher))
    plan = getattr(scheduler.schedule(), SLOT_PLAN, None)
    if plan is None or len(plan.assigned) != 2:
        return f"a step that fills one tile and begins another plans {plan} instead of two slots"
    return None
