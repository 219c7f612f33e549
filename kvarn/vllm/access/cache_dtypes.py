"""vLLM's own cache dtypes."""

from __future__ import annotations

from typing import get_args


def stock_cache_dtypes() -> tuple[str, ...]:
    """Values of `--kv-cache-dtype`, including presets once the plugin is registered; imports vLLM."""
    from vllm.config.cache import CacheDType

    return get_args(CacheDType)


def cpu_cache_dtypes() -> tuple[str, ...]:
    """Those of vLLM's own that its attention on CPUs takes; imports vLLM."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return tuple(name for name in stock_cache_dtypes() if CPUAttentionBackend.supports_kv_cache_dtype(name))
