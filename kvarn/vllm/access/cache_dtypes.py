"""The cache dtypes that vLLM itself knows."""

from __future__ import annotations

from typing import get_args


def stock_cache_dtypes() -> tuple[str, ...]:
    """Names that `--kv-cache-dtype` takes, presets included once the plugin is registered; imports vLLM."""
    from vllm.config.cache import CacheDType

    return get_args(CacheDType)
