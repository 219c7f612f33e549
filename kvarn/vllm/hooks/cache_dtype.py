"""Adds the preset names to the values of vLLM's `kv_cache_dtype`."""

from __future__ import annotations

from kvarn.presets import PRESETS
from kvarn.vllm.hooks import Hook
from kvarn.vllm.versions import CACHE_DTYPE_REGISTRY, register_cache_dtypes


def install() -> None:
    """Register every preset with vLLM."""
    register_cache_dtypes(PRESETS)


def probe() -> str | None:
    """Check that a configuration takes every preset, and that its cache holds bytes."""
    import torch
    from pydantic import ValidationError
    from vllm.config import CacheConfig
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    for name in PRESETS:
        try:
            CacheConfig(cache_dtype=name)
        except ValidationError:
            return f"its configuration does not accept kv_cache_dtype={name!r}"
        if (stored := kv_cache_dtype_str_to_dtype(name, None)) != torch.uint8:
            return f"it stores kv_cache_dtype={name!r} as {stored} instead of bytes"
    return None


HOOK = Hook(
    "cache dtype names",
    (
        CACHE_DTYPE_REGISTRY,
        "vllm.config.cache:CacheConfig",
        "vllm.utils.torch_utils:STR_DTYPE_TO_TORCH_DTYPE",
        "vllm.utils.torch_utils:kv_cache_dtype_str_to_dtype",
    ),
    install,
    probe,
)
