"""vLLM's own objects without an engine, for the probes of hooks."""

from __future__ import annotations

from typing import Any

import torch


def default_config(cache_dtype: str, block_size: int) -> Any:
    """A `VllmConfig` of vLLM's defaults with a cache dtype, made without the work of its constructor."""
    from vllm.config import CacheConfig, VllmConfig

    config = object.__new__(VllmConfig)
    for name, field in VllmConfig.__pydantic_fields__.items():
        try:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
        except Exception:  # vLLM infers some of them, such as the device, and this machine may have none
            default = None
        object.__setattr__(config, name, default)
    config.cache_config = CacheConfig(cache_dtype=cache_dtype, block_size=block_size)
    return config


def attention_layer(cache_dtype: str, backend: Any, num_kv_heads: int, head_size: int) -> Any:
    """An `Attention` layer with what its cache spec depends on, and without weights."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backend import AttentionType

    layer = object.__new__(Attention)
    layer.__dict__.update(
        attn_backend=backend,
        attn_type=AttentionType.DECODER,
        head_size=head_size,
        head_size_v=head_size,
        kv_cache_dtype=cache_dtype,
        kv_cache_torch_dtype=torch.uint8,
        kv_sharing_target_layer_name=None,
        num_heads=num_kv_heads,
        num_kv_heads=num_kv_heads,
        sliding_window=None,
    )
    return layer
