"""Passes the sizes of pages to vLLM's memory accounting: of tile records, and of layers that share blocks with them."""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from types import SimpleNamespace
from typing import Any

from kvarn.layer_kinds import FULL, SLIDING
from kvarn.presets import PRESETS, get_preset
from kvarn.tile import HEAD_DIMS, TileLayout
from kvarn.vllm.hooks import Hook
from kvarn.vllm.hooks.stand_ins import attention_layer, default_config
from kvarn.vllm.mixed_layers import pages_of, state_pages
from kvarn.vllm.versions import (
    CACHE_GROUPS,
    CACHE_LAYOUT,
    CACHE_SHAPE,
    PAGE_SIZE,
    SPEC_CUSTOMIZATION,
    backends_customize_specs,
    cache_groups,
    cache_planning,
    layer_cache_shape,
    records_of,
)

_BLOCKS, _KV_HEADS = 5, 3  # of the probe's layer


def install() -> None:
    """Wrap the cache spec of vLLM's decoder layers."""
    from vllm.model_executor.layers.attention import Attention

    from kvarn.vllm.backend import BACKENDS

    stock_spec = Attention.get_kv_cache_spec

    @wraps(stock_spec)
    def get_kv_cache_spec(self: Any, *args: Any, **kwargs: Any) -> Any:
        spec = stock_spec(self, *args, **kwargs)
        pages = next((found for x in (*args, *kwargs.values()) if (found := pages_of(x)) is not None), None)
        ours = BACKENDS.get(getattr(self, "kv_cache_dtype", ""))
        if pages is not None and spec is not None:
            block = spec.block_size if ours is not None else pages.block_tokens
            spec = replace(spec, block_size=block, page_size_padded=pages.nbytes)
        return spec if ours is None or backends_customize_specs() else ours.customize_spec(spec)

    Attention.get_kv_cache_spec = get_kv_cache_spec
    _install_alignment()
    _install_groups()


def _install_groups() -> None:
    """Wrap the choice of cache groups: a group of equal layers beside state layers gets their spec.

    vLLM wraps it, and its workers then overlook groups of states.
    """
    planning = cache_planning()
    stock_groups = planning.get_kv_cache_groups

    @wraps(stock_groups)
    def get_kv_cache_groups(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        groups = stock_groups(vllm_config, *args, **kwargs)
        if vllm_config.cache_config.cache_dtype in PRESETS:
            for group in groups:
                specs = list(getattr(group.kv_cache_spec, "kv_cache_specs", {}).values())
                if len(groups) > 1 and specs and all(spec == specs[0] for spec in specs):
                    group.kv_cache_spec = specs[0]
        return groups

    planning.get_kv_cache_groups = get_kv_cache_groups  # type: ignore[attr-defined]


def _install_alignment() -> None:
    """Wrap the choice of the block size of models with state layers, which follows once their layers exist."""
    from vllm.platforms.interface import Platform

    stock_align = Platform._align_hybrid_block_size.__func__

    @wraps(stock_align)
    def align_hybrid_block_size(cls: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        cache = vllm_config.cache_config
        if cache.cache_dtype not in PRESETS:
            stock_align(cls, vllm_config, *args, **kwargs)
            return
        pages = state_pages(vllm_config)
        cache.block_size = pages.tiles * get_preset(cache.cache_dtype).group
        cache.mamba_page_size_padded = pages.state_bytes
        if cache.mamba_cache_mode != "none":
            cache.mamba_block_size = cache.block_size

    Platform._align_hybrid_block_size = classmethod(align_hybrid_block_size)


def probe() -> str | None:
    """Check the pages and the tensor that both of vLLM's model runners make for a layer, and for a model that mixes."""
    layouts = [TileLayout(preset, head_dim) for preset in PRESETS.values() for head_dim in HEAD_DIMS]
    found = next((found for layout in layouts if (found := _difference(layout))), None)
    return found or _mixed_difference(layouts[0])


def _difference(layout: TileLayout) -> str | None:
    import torch

    from kvarn.vllm.backend import BACKENDS

    name = layout.preset.name
    layer = attention_layer(name, BACKENDS[name], _KV_HEADS, layout.head_dim)
    expected = (_BLOCKS, _KV_HEADS, layout.nbytes)
    for runner, specs in _specs([layer], default_config(name, layout.group)).items():
        spec = specs["0"]
        made = f"its {runner} makes pages of"
        if spec.block_size != layout.group:
            return f"{made} {spec.block_size} tokens for {name} instead of {layout.group}"
        if (page := spec.page_size_bytes) != _KV_HEADS * layout.nbytes:
            return f"{made} {page} bytes for {name} instead of {_KV_HEADS * layout.nbytes}"
        shape = layer_cache_shape(BACKENDS[name], spec, _BLOCKS)
        records = records_of(torch.empty(shape, dtype=torch.uint8, device="meta"), layout.nbytes)
        if tuple(records.shape) != expected:
            return f"{made} {name} that it shapes as {shape}, which is not {expected}"
    return None


def _mixed_difference(layout: TileLayout) -> str | None:
    """What differs for a model of one quantized layer and two with a window."""
    import torch
    from vllm.v1.attention.backend import AttentionBackend

    from kvarn.vllm.backend import BACKENDS

    name, group = layout.preset.name, layout.group
    full = attention_layer(name, BACKENDS[name], _KV_HEADS, layout.head_dim)
    local = [attention_layer("auto", AttentionBackend, _KV_HEADS, layout.head_dim) for _ in range(2)]
    for layer in local:
        layer.__dict__.update(sliding_window=4 * group, kv_cache_torch_dtype=torch.bfloat16)
    config = default_config(name, group)
    kinds = SimpleNamespace(layer_types=[FULL, SLIDING, SLIDING])
    config.model_config = SimpleNamespace(max_model_len=64 * group, hf_text_config=kinds)
    config.cache_config.kv_cache_layout = "LBHNC"
    for runner, specs in _specs([full, *local], config).items():
        blocks, pages = {s.block_size for s in specs.values()}, {s.page_size_bytes for s in specs.values()}
        if len(pages) > 1 or any(group % block for block in blocks) or max(blocks) != group:
            return f"its {runner} makes blocks of {blocks} tokens and pages of {pages} bytes for layers that share them"
        layers = [group.layer_names for group in cache_groups(config, specs)]
        if sorted(layers) != [["0"], ["1"], ["2"]]:
            return f"it puts layers with and without a window into the cache groups {layers}"
    return None


def _specs(layers: list[Any], config: Any) -> dict[str, dict[str, Any]]:
    """The layers' cache specs, by number, as each model runner asks for them."""
    from vllm.v1.worker.gpu import attn_utils
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    config.compilation_config.static_forward_context = {str(i): layer for i, layer in enumerate(layers)}
    first: Any = SimpleNamespace(vllm_config=config, shared_kv_cache_layers={})
    return {
        "model runner V1": GPUModelRunner.get_kv_cache_spec(first),
        "model runner V2": attn_utils.get_kv_cache_spec(config),
    }


HOOK = Hook(
    "page size",
    (
        SPEC_CUSTOMIZATION,
        PAGE_SIZE,
        CACHE_SHAPE,
        CACHE_LAYOUT,
        CACHE_GROUPS,
        "vllm.model_executor.layers.attention:Attention.get_kv_cache_spec",
        "vllm.platforms.interface:Platform._align_hybrid_block_size",
        "vllm.v1.worker.gpu.attn_utils:get_kv_cache_spec",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.get_kv_cache_spec",
    ),
    install,
    probe,
)
