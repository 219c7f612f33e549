"""Adds the preset names to the values of vLLM's `kv_cache_dtype`."""

from __future__ import annotations

import torch

from kvarn.presets import PRESETS
from kvarn.vllm.hooks import Hook


def install() -> None:
    """Extend the literal type that every importer shares, and rebuild the config that validates against it."""
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.config import cache
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    cache.CacheDType.__args__ += tuple(name for name in PRESETS if name not in cache.CacheDType.__args__)
    rebuild_dataclass(cache.CacheConfig, force=True, _types_namespace=vars(cache))
    STR_DTYPE_TO_TORCH_DTYPE.update(dict.fromkeys(PRESETS, torch.uint8))


HOOK = Hook(
    "cache dtype names",
    (
        "vllm.config.cache:CacheDType.__args__",
        "vllm.config.cache:CacheConfig",
        "vllm.utils.torch_utils:STR_DTYPE_TO_TORCH_DTYPE",
    ),
    install,
)
