"""Sets the engine configuration that the quantized cache needs, and refuses what the cache does not support."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from functools import wraps
from types import SimpleNamespace
from typing import Any

from kvarn.layer_kinds import ATTENTION, CHUNKED, FULL, SLIDING, is_idle, layer_kinds
from kvarn.presets import PRESETS, Preset, get_preset
from kvarn.tile import TileLayout
from kvarn.vllm.hooks import Hook, HookError, RefusalError, untested
from kvarn.vllm.hooks.engine_probe import doctor_probe
from kvarn.vllm.mixed_layers import config_of, is_mixed, splits_quantized, stage_kinds
from kvarn.vllm.versions import (
    bypasses_workers,
    has_shared_hash_seed,
    packs_states,
    returns_routed_experts,
)

TARGET = "vllm.engine.arg_utils:EngineArgs.create_engine_config"
DEFAULT_MAX_NUM_SEQS = 64
DRAFTS_OF_TEXT = ("ngram", "suffix", "custom_class")  # methods whose drafter has no cache
CONNECTORS = ("OffloadingConnector",)  # of vLLM's own, those that copy whole blocks
FIRST_WITH_STATES = "0.32"
USE_AUTO = "use kv_cache_dtype='auto' for this model."


def install() -> None:
    """Wrap the single place where an engine's arguments become its configuration."""
    from vllm.engine.arg_utils import EngineArgs

    stock_create = EngineArgs.create_engine_config

    @wraps(stock_create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not names_preset(self):
            _refuse_quantized_drafter(self)
            return stock_create(self, *args, **kwargs)
        preset = _preset(self)
        _refuse_untested(self)
        _refuse_other_devices(self)
        _refuse_other_backends(self)
        _refuse_one_group(self)
        _set_defaults(self, preset)
        config = stock_create(self, *args, **kwargs)
        _refuse_unsupported(config, preset)
        config.cache_config.sliding_window = None  # what passed is idle, or some layers' own
        _open_chunks(config.model_config)
        _set_layout(config)
        _set_scheduler(config)
        _log_limits(config)
        return config

    EngineArgs.create_engine_config = create_engine_config


def install_refusal(error: HookError) -> None:
    """Make engines with a preset fail with `error`, on a vLLM that some hook does not fit."""
    from vllm.engine.arg_utils import EngineArgs

    stock_create = EngineArgs.create_engine_config

    @wraps(stock_create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if names_preset(self):
            _refuse_untested(self)
            raise error
        return stock_create(self, *args, **kwargs)

    EngineArgs.create_engine_config = create_engine_config


def names_preset(args: Any) -> bool:
    """Whether an engine's cache dtype is meant as a preset: a misspelled one gets our error and not vLLM's."""
    return str(getattr(args, "kv_cache_dtype", "")).startswith("kvarn")


def _preset(args: Any) -> Preset:
    try:
        return get_preset(args.kv_cache_dtype)
    except ValueError as error:
        raise RefusalError(str(error)) from None


def _refuse_quantized_drafter(args: Any) -> None:
    """Refuse a preset for a drafter only: without one for the target, no scheduler plans its slots."""
    drafter = getattr(args, "speculative_config", None) or {}
    cache_dtype = drafter.get("kv_cache_dtype") if isinstance(drafter, dict) else None
    if str(cache_dtype).startswith("kvarn"):
        raise RefusalError(
            f"speculative_config's kv_cache_dtype={cache_dtype!r} needs a target with the same; set kv_cache_dtype to "
            "it too, or leave it out of speculative_config."
        )


def _refuse_untested(args: Any) -> None:
    from kvarn.vllm.cache_settings import KVarNConfig

    if (refusal := untested()) and not KVarNConfig.of(args).allow_untested_vllm:
        raise refusal


def _refuse_other_devices(args: Any) -> None:
    from vllm.platforms import current_platform

    if not (current_platform.is_cuda() or current_platform.is_cpu()):
        device = getattr(current_platform, "device_name", None) or "no device that it knows"
        raise RefusalError(
            f"kv_cache_dtype={args.kv_cache_dtype!r} runs on NVIDIA GPUs and on CPUs, and this vLLM runs on {device}; "
            "use kv_cache_dtype='auto' on this machine."
        )


def _refuse_other_backends(args: Any) -> None:
    from kvarn.vllm.backend import KVarNBackend

    named = args.attention_backend or args.attention_config.backend or "auto"
    if str(getattr(named, "name", named)).upper() not in ("AUTO", KVarNBackend.get_name()):
        raise RefusalError(
            f"attention_backend={getattr(named, 'name', named)!r} cannot read kv_cache_dtype={args.kv_cache_dtype!r}, "
            "which brings its own; leave attention_backend out."
        )
    if args.attention_config.backend_per_kind:
        raise RefusalError(
            f"kv_cache_dtype={args.kv_cache_dtype!r} brings its own attention backend; leave "
            "attention_config's backend_per_kind out."
        )


def _refuse_one_group(args: Any) -> None:
    if args.disable_hybrid_kv_cache_manager:
        raise RefusalError(
            f"kv_cache_dtype={args.kv_cache_dtype!r} keeps layers with windows in cache groups of their own; leave "
            "disable_hybrid_kv_cache_manager out."
        )


def _set_defaults(args: Any, preset: Preset) -> None:
    if args.block_size is None:
        args.block_size = preset.group
    if args.block_size != preset.group:
        raise RefusalError(
            f"block_size={args.block_size} does not fit kv_cache_dtype={preset.name!r}, whose blocks are tiles of "
            f"{preset.group} tokens; leave block_size out or set it to {preset.group}."
        )
    if args.max_num_seqs is None:
        args.max_num_seqs = DEFAULT_MAX_NUM_SEQS


def _refuse_unsupported(config: Any, preset: Preset) -> None:
    if problem := next(_problems(config, preset), None):
        raise RefusalError(f"kv_cache_dtype={preset.name!r} {problem}")


def _problems(config: Any, preset: Preset) -> Iterator[str]:
    """Yield each unsupported part of `config` as the end of a sentence that says what to change."""
    from vllm import envs

    from kvarn.vllm.backend import device_backend
    from kvarn.vllm.cache_settings import KVarNConfig

    model, parallel = config.model_config, config.parallel_config
    if model.is_encoder_decoder or model.runner_type not in ("generate", "draft"):
        yield f"serves decoder-only generation, not a model of runner type {model.runner_type!r}; {USE_AUTO}"
    if model.use_mla:
        yield f"does not support multi-head latent attention; {USE_AUTO}"
    if model.is_attention_free:
        yield f"needs layers with full attention, and this model has none; {USE_AUTO}"
    elif model.is_hybrid:
        yield from _state_problems(config)
    elif local := _local_attention(model):
        yield f"{local}, or {USE_AUTO}"
    if model.uses_alibi:
        yield f"does not support ALiBi; {USE_AUTO}"
    if getattr(model.hf_text_config, "num_kv_shared_layers", None):
        yield f"does not support KV sharing between layers; {USE_AUTO}"
    if model.is_mm_prefix_lm:
        yield f"attends to earlier tokens only, and this model's images also to later ones; {USE_AUTO}"
    if (heads := _heads_per_kv_head(config)) > (limit := device_backend().layer.max_heads_per_kv_head):
        yield f"serves at most {limit} query heads per KV head, and this model has {heads}; {USE_AUTO}"
    try:
        TileLayout.of_heads(preset, model.get_head_size())
    except ValueError as error:
        yield f"cannot hold this model: {error}"
    if config.cache_config.kv_cache_dtype_skip_layers:
        yield "quantizes every layer; leave kv_cache_dtype_skip_layers out."
    if config.kv_transfer_config is not None:
        yield from _connector_problems(config)
    if config.speculative_config is not None:
        yield from _speculation_problems(config, preset)
    if 0 < config.scheduler_config.long_prefill_token_threshold <= config.num_speculative_tokens:
        # vLLM pads a new request's step with drafts, then cuts the step to the threshold, but not the drafts.
        yield (
            "needs one step to hold a token and its drafts; raise long_prefill_token_threshold from "
            f"{config.scheduler_config.long_prefill_token_threshold} to {config.num_speculative_tokens + 1} or more."
        )
    if model.enable_sleep_mode:
        yield "keeps raw tiles outside the memory that vLLM restores; leave enable_sleep_mode out."
    if envs.VLLM_BATCH_INVARIANT:
        yield "does not sum in the same order in every batch; leave VLLM_BATCH_INVARIANT out."
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield "does not support context parallelism; use tensor_parallel_size instead."
    if parallel.pipeline_parallel_size > 1:
        yield from _stage_problems(config)
    if bypasses_workers(config):
        yield "passes no slots through vLLM's first Ray executor; leave VLLM_USE_RAY_V2_EXECUTOR_BACKEND out."
    if returns_routed_experts(config):
        yield "does not support returning routed experts; leave enable_return_routed_experts out."
    if KVarNConfig.of(config).raw_chunks and not device_backend().layer.supports_raw_chunks:
        yield "has raw_chunks on GPUs only; leave kvarn.raw_chunks out of additional_config."
    if KVarNConfig.of(config).split_tiles and not device_backend().layer.supports_split_tiles:
        yield "has split_tiles on GPUs only; leave kvarn.split_tiles out of additional_config."
    if _has_own_scheduler(config) and not _plans_slots(config):
        yield (
            f"needs a scheduler that plans its slots, not {config.scheduler_config.scheduler_cls}; "
            "derive yours from kvarn.vllm.scheduler.SlotPlanning."
        )


def _state_problems(config: Any) -> Iterator[str]:
    """Yield what is not supported beside layers that keep a state, as `_problems` does."""
    model = config.model_config
    kinds = set(layer_kinds(config_of(model)))
    if not packs_states():
        yield f"supports layers with a state from vLLM {FIRST_WITH_STATES} on; install that, or {USE_AUTO}"
    if kinds.isdisjoint(ATTENTION):
        yield f"needs layers with full attention, and this model's configuration names none; {USE_AUTO}"
    if not kinds.isdisjoint({SLIDING, CHUNKED}) or model.get_sliding_window() is not None:
        yield f"does not support layers with a window beside layers with a state; {USE_AUTO}"
    if config.speculative_config is not None:
        yield "does not support drafts for a model with state layers; leave speculative_config out."


def _connector_problems(config: Any) -> Iterator[str]:
    """Yield what is not supported beside a KV connector, as `_problems` does."""
    from vllm.platforms import current_platform

    from kvarn.vllm.cache_settings import carries_first_tiles

    transfer, drafter = config.kv_transfer_config, config.speculative_config
    if not _copies_blocks(transfer):
        yield (
            f"needs a KV connector that copies whole blocks, for which {transfer.kv_connector} was not tried; use "
            f"{', '.join(CONNECTORS)} or a class of yours with copies_blocks = True, or leave kv_transfer_config out."
        )
    if transfer.kv_connector in CONNECTORS and current_platform.is_cpu():
        yield f"has {transfer.kv_connector} on GPUs only; leave kv_transfer_config out."
    if transfer.kv_role != "kv_both":
        yield "stores and loads blocks in every engine; set kv_transfer_config's kv_role to 'kv_both'."
    if carries_first_tiles(transfer):
        yield from _store_problems(config)
    if config.model_config.is_hybrid or is_mixed(config.model_config):
        yield "supports KV connectors where every layer is full attention; leave kv_transfer_config out."
    if config.parallel_config.pipeline_parallel_size > 1:
        yield "does not support KV connectors with pipeline parallelism; leave kv_transfer_config out."
    if drafter is not None and drafter.method not in DRAFTS_OF_TEXT:
        yield "supports KV connectors beside drafts of the text alone; set speculative_config's method to 'ngram'."


def _store_problems(config: Any) -> Iterator[str]:
    """Yield what keeps engines from sharing a store, as `_problems` does."""
    from kvarn.vllm.store.store_settings import StoreSettings

    algorithm = config.cache_config.prefix_caching_hash_algo
    try:
        StoreSettings.of(config)
    except ValueError as error:
        yield f"cannot use kv_transfer_config's kv_connector_extra_config: {error}"
    if not has_shared_hash_seed(algorithm):
        yield (
            f"shares blocks by hashes that are equal in all engines, and vLLM seeds those of {algorithm} at random; "
            "set the environment variable PYTHONHASHSEED to the same number for every engine."
        )


def _copies_blocks(transfer: Any) -> bool:
    """Whether a KV connector is known, or says, to copy whole blocks as bytes."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if not transfer.kv_connector_module_path:
        return transfer.kv_connector in CONNECTORS
    return bool(getattr(KVConnectorFactory.get_connector_class(transfer), "copies_blocks", False))


def _stage_problems(config: Any) -> Iterator[str]:
    """Yield what is not supported where each stage of a pipeline has a part of the layers, as `_problems` does."""
    model = config.model_config
    if model.is_hybrid:  # a block's tiles would be of other layers in each stage, and so would their number
        yield "does not support pipeline parallelism beside state layers; use tensor_parallel_size instead."
    elif is_mixed(model) and any(len(kinds) < 2 for kinds in stage_kinds(model, config.parallel_config)):
        yield (
            "needs full-attention layers and layers with a window in every pipeline stage; lower "
            "pipeline_parallel_size, or divide the layers otherwise with VLLM_PP_LAYER_PARTITION."
        )
    if config.speculative_config is not None:
        yield "does not support drafts with pipeline parallelism; leave speculative_config out."


def _speculation_problems(config: Any, preset: Preset) -> Iterator[str]:
    """Yield each unsupported part of a speculative configuration, as `_problems` does."""
    from kvarn.vllm.backend import device_backend
    from kvarn.vllm.cache_settings import DRAFT_MODEL_METHODS

    drafter = config.speculative_config
    supported = (*DRAFT_MODEL_METHODS, *DRAFTS_OF_TEXT)
    if drafter.method not in supported:
        yield (
            f"does not support speculative_config's method {drafter.method!r}; "
            f"use one of {', '.join(supported)}, or leave speculative_config out."
        )
    if drafter.parallel_drafting:
        yield "does not support drafting in parallel; leave speculative_config's parallel_drafting out."
    limit = device_backend().layer.max_queries - 1
    if drafter.method == "draft_model" and device_backend().layer.limits_draft_passes:
        limit -= 1  # its first pass has one token more than a step with drafts
    if drafter.num_speculative_tokens > limit:
        yield (
            f"decodes at most {limit + 1} tokens per request and step; set speculative_config's "
            f"num_speculative_tokens to {limit} or less."
        )
    if drafter.method in DRAFT_MODEL_METHODS:
        yield from _drafter_problems(config, preset)


def _drafter_problems(config: Any, preset: Preset) -> Iterator[str]:
    """Yield what a draft model's layers need that the cache does not have; they share the target's block table."""
    drafter = config.speculative_config
    model, cache_dtype = drafter.draft_model_config, drafter.kv_cache_dtype
    if drafter.use_gemma4_mtp():
        yield "does not support a drafter that reads the target's keys and values; use another method."
    if is_mixed(config.model_config):
        yield (
            "supports drafts of the text alone for a model that mixes kinds of attention; set speculative_config's "
            "method to 'ngram'."
        )
    others = model.use_mla or model.is_hybrid or model.is_attention_free
    if others or is_mixed(model) or _local_attention(model):
        yield f"needs every layer of the drafter {model.model!r} to be full attention; use another drafter."
    if cache_dtype in PRESETS and cache_dtype != preset.name:
        yield (
            f"cannot share blocks with speculative_config's kv_cache_dtype={cache_dtype!r}; set that to 'auto', or "
            "leave it out."
        )
    if cache_dtype in (None, preset.name):
        view = copy(config)
        view.model_config, view.parallel_config = model, drafter.draft_parallel_config
        view.speculative_config = None
        for problem in _problems(view, preset):
            remedy = problem.replace(USE_AUTO, "set speculative_config's kv_cache_dtype to 'auto'.")
            yield f"does not fit the drafter {model.model!r}: it {remedy}"


def _heads_per_kv_head(config: Any) -> int:
    model, parallel = config.model_config, config.parallel_config
    return int(model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel))


def _local_attention(model: Any) -> str | None:
    """What to change where layers that read less than the sequence are not supported, None where they are."""
    kinds = set(layer_kinds(config_of(model)))
    window = getattr(model.hf_text_config, "sliding_window", None)
    if model.attention_chunk_size is not None:
        chunk = model.attention_chunk_size
        if not is_idle(chunk, model.max_model_len):
            return f"serves attention in chunks as full attention, up to a chunk; set max_model_len to {chunk} or less"
        kinds.discard(CHUNKED)
    if other := kinds - {FULL, SLIDING}:
        return f"does not support layers of type {min(other)}; give a model without them"
    if is_mixed(model):
        if splits_quantized(model):
            return (
                "needs as many layers with a window as full-attention layers, or more; give a model with them"
            )
        return None
    has_window = model.get_sliding_window() is not None or SLIDING in kinds
    if not has_window or is_idle(window, model.max_model_len):
        return None
    return (
        f"serves a sliding window as full attention, up to its length; set max_model_len to {window} or less"
    )


def _open_chunks(model: Any) -> None:
    """Let layers whose chunk holds the longest sequence have full attention."""
    if model.attention_chunk_size is not None:
        model.attention_chunk_size = None
        model.hf_text_config.attention_chunk_size = None


def _has_own_scheduler(config: Any) -> bool:
    return config.scheduler_config.scheduler_cls is not None


def _plans_slots(config: Any) -> bool:
    from kvarn.vllm.scheduler import SlotPlanning

    return issubclass(config.scheduler_config.get_scheduler_cls(), SlotPlanning)


def _set_layout(config: Any) -> None:
    """Let blocks of models with state layers hold pages of several sizes, side by side."""
    if config.model_config.is_hybrid:
        config.cache_config.kv_cache_layout = "BLHNC"


def _set_scheduler(config: Any) -> None:
    from kvarn.vllm.scheduler import KVarNAsyncScheduler, KVarNScheduler

    scheduler = config.scheduler_config
    if not _has_own_scheduler(config):
        scheduler.scheduler_cls = KVarNAsyncScheduler if scheduler.async_scheduling else KVarNScheduler


def _log_limits(config: Any) -> None:
    from vllm.logger import init_logger

    from kvarn.vllm.cache_settings import side_pool_slots, slot_bytes

    slots, one_slot = side_pool_slots(config), slot_bytes(config)
    init_logger(__name__).info(
        "KV cache %s keeps the tiles being filled and the first tiles of its sequences raw: %d slots of %.1f MiB, "
        "%.0f MiB per rank, for up to %d sequences. max_num_seqs, kvarn.retained_sinks and kvarn.side_pool_gib "
        "change that.",
        config.cache_config.cache_dtype,
        slots,
        one_slot / 2**20,
        slots * one_slot / 2**20,
        config.scheduler_config.max_num_seqs,
    )


def probe() -> str | None:
    """Check that vLLM's arguments pass through the hook, which refuses a misspelled preset."""
    from vllm.engine.arg_utils import EngineArgs

    misspelled: Any = SimpleNamespace(kv_cache_dtype="kvarn", additional_config={})
    try:
        EngineArgs.create_engine_config(misspelled)
    except ValueError:
        return None
    return "EngineArgs accepts the misspelled kv_cache_dtype='kvarn'"


HOOK = Hook("engine configuration", (TARGET,), install, probe, doctor_probe)
