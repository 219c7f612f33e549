"""Gives layers with a quantized cache our attention backend, and every other layer vLLM's choice."""

from __future__ import annotations

from functools import wraps
from typing import Any

from kvarn.presets import PRESETS
from kvarn.vllm.hooks import Hook


def install() -> None:
    """Wrap the selector, which sees each layer's own cache dtype; platform lists know no outside backend."""
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from kvarn.vllm.backend import BACKENDS, KVarNBackend

    register_backend(AttentionBackendEnum.CUSTOM, f"{KVarNBackend.__module__}.{KVarNBackend.__qualname__}")
    choose = selector._cached_get_attn_backend

    @wraps(choose)
    def choose_backend(backend: Any, attn_selector_config: Any, **kwargs: Any) -> Any:
        if attn_selector_config.kv_cache_dtype in PRESETS:
            return BACKENDS[attn_selector_config.kv_cache_dtype]
        return choose(backend=backend, attn_selector_config=attn_selector_config, **kwargs)

    selector._cached_get_attn_backend = choose_backend


HOOK = Hook(
    "attention backend",
    (
        "vllm.v1.attention.selector:_cached_get_attn_backend",
        "vllm.v1.attention.backends.registry:AttentionBackendEnum.CUSTOM",
        "vllm.v1.attention.backends.registry:register_backend",
    ),
    install,
)
