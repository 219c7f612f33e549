"""Selects our attention backend for layers with a quantized cache; vLLM selects it for every other layer."""

from __future__ import annotations

from functools import wraps
from typing import Any

from kvarn.vllm.hooks import Hook


def install() -> None:
    """Wrap the selector, which sees each layer's own cache dtype; platform lists have no external backends."""
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from kvarn.vllm.backend import BACKENDS, KVarNBackend

    register_backend(AttentionBackendEnum.CUSTOM, f"{KVarNBackend.__module__}.{KVarNBackend.__qualname__}")
    choose = selector._cached_get_attn_backend

    @wraps(choose)
    def choose_backend(backend: Any, attn_selector_config: Any, **kwargs: Any) -> Any:
        ours = BACKENDS.get(attn_selector_config.kv_cache_dtype)
        if ours is None:
            return choose(backend=backend, attn_selector_config=attn_selector_config, **kwargs)
        _refuse_unsupported(ours, attn_selector_config)
        return ours

    selector._cached_get_attn_backend = choose_backend


def _refuse_unsupported(backend: Any, layer: Any) -> None:
    """Validate our backend for a layer as vLLM's selector validates its own backends.

    Raises:
        ValueError: the layer needs a feature that the cache does not have.
    """
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    if problems := backend.validate_configuration(device_capability=capability, **layer._asdict()):
        raise ValueError(
            f"kv_cache_dtype={layer.kv_cache_dtype!r} does not fit this model's attention: {', '.join(problems)}; "
            "use kv_cache_dtype='auto' for it."
        )


HOOK = Hook(
    "attention backend",
    (
        "vllm.v1.attention.selector:_cached_get_attn_backend",
        "vllm.v1.attention.backends.registry:AttentionBackendEnum.CUSTOM",
        "vllm.v1.attention.backends.registry:register_backend",
    ),
    install,
)
