"""vLLM's own cache dtypes."""

from __future__ import annotations

from typing import get_args


def stock_cache_dtypes() -> tuple[str, ...]:
    """Values of `--kv-cache-dtype`, including presets once the plugin is registered; imports vLLM."""
    from vllm.config.cache import CacheDType

    return get_args(CacheDType)
