"""Adds the preset names to the values of vLLM's `kv_cache_dtype`."""

from __future__ import annotations

from kvarn.presets import PRESETS
from kvarn.vllm.hooks import Hook
from kvarn.vllm.versions import register_cache_dtypes


def install() -> None:
    """Register every preset with vLLM."""
    register_cache_dtypes(PRESETS)


HOOK = Hook(
    "cache dtype names",
    (
        "vllm.config.cache:CacheDType.__args__",
        "vllm.config.cache:CacheConfig",
        "vllm.utils.torch_utils:STR_DTYPE_TO_TORCH_DTYPE",
    ),
    install,
)
