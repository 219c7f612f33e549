"""Passes the size of a tile record to vLLM's memory accounting."""

from __future__ import annotations

from functools import wraps
from types import SimpleNamespace
from typing import Any

from kvarn.presets import PRESETS
from kvarn.tile import HEAD_DIMS, TileLayout
from kvarn.vllm.hooks import Hook
from kvarn.vllm.hooks.stand_ins import attention_layer, default_config
from kvarn.vllm.versions import (
    CACHE_LAYOUT,
    CACHE_SHAPE,
    PAGE_SIZE,
    SPEC_CUSTOMIZATION,
    backends_customize_specs,
    layer_cache_shape,
    records_of,
)

_BLOCKS, _KV_HEADS = 5, 3  # of the probe's layer


def install() -> None:
    """Wrap the layer's cache spec, unless vLLM asks the backend for it."""
    if backends_customize_specs():
        return
    from vllm.model_executor.layers.attention import Attention

    from kvarn.vllm.backend import BACKENDS

    stock_spec = Attention.get_kv_cache_spec

    @wraps(stock_spec)
    def get_kv_cache_spec(self: Any, *args: Any, **kwargs: Any) -> Any:
        spec = stock_spec(self, *args, **kwargs)
        ours = BACKENDS.get(getattr(self, "kv_cache_dtype", ""))
        return spec if ours is None else ours.customize_spec(spec)

    Attention.get_kv_cache_spec = get_kv_cache_spec


def probe() -> str | None:
    """Check the pages and the tensor that both of vLLM's model runners make for a layer."""
    layouts = (TileLayout(preset, head_dim) for preset in PRESETS.values() for head_dim in HEAD_DIMS)
    return next((found for layout in layouts if (found := _difference(layout))), None)


def _difference(layout: TileLayout) -> str | None:
    import torch

    from kvarn.vllm.backend import BACKENDS

    name = layout.preset.name
    layer = attention_layer(name, BACKENDS[name], _KV_HEADS, layout.head_dim)
    expected = (_BLOCKS, _KV_HEADS, layout.nbytes)
    for runner, spec in _specs(layer, default_config(name, layout.group)).items():
        made = f"its {runner} makes pages of"
        if spec.block_size != layout.group:
            return f"{made} {spec.block_size} tokens for {name} instead of {layout.group}"
        if (page := spec.page_size_bytes) != _KV_HEADS * layout.nbytes:
            return f"{made} {page} bytes for {name} instead of {_KV_HEADS * layout.nbytes}"
        shape = layer_cache_shape(BACKENDS[name], spec, _BLOCKS)
        records = records_of(torch.empty(shape, dtype=torch.uint8, device="meta"))
        if tuple(records.shape) != expected:
            return f"{made} {name} that it shapes as {shape}, which is not {expected}"
    return None


def _specs(layer: Any, config: Any) -> dict[str, Any]:
    """The layer's cache spec as each model runner asks for it."""
    from vllm.v1.worker.gpu import attn_utils
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    config.compilation_config.static_forward_context = {"layer": layer}
    first: Any = SimpleNamespace(vllm_config=config, shared_kv_cache_layers={})
    return {
        "model runner V1": GPUModelRunner.get_kv_cache_spec(first)["layer"],
        "model runner V2": attn_utils.get_kv_cache_spec(config)["layer"],
    }


HOOK = Hook(
    "page size",
    (
        SPEC_CUSTOMIZATION,
        PAGE_SIZE,
        CACHE_SHAPE,
        CACHE_LAYOUT,
        "vllm.v1.worker.gpu.attn_utils:get_kv_cache_spec",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.get_kv_cache_spec",
    ),
    install,
    probe,
)
