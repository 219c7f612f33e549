"""Selects our attention backend for layers with a quantized cache; vLLM selects it for every other layer."""

from __future__ import annotations

from functools import wraps
from typing import Any

from kvarn.presets import PRESETS
from kvarn.vllm.hooks import Hook, RefusalError
from kvarn.vllm.hooks.refusals import refuse
from kvarn.vllm.hooks.stand_ins import default_config


def install() -> None:
    """Wrap the selector, which sees each layer's own cache dtype; platform lists have no external backends."""
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from kvarn.vllm.backend import BACKENDS, KVarNBackend

    register_backend(AttentionBackendEnum.CUSTOM, f"{KVarNBackend.__module__}.{KVarNBackend.__qualname__}")
    choose = selector._cached_get_attn_backend

    @wraps(choose)
    def choose_backend(*args: Any, **kwargs: Any) -> Any:
        for layer in (*args, *kwargs.values()):
            if (ours := BACKENDS.get(getattr(layer, "kv_cache_dtype", ""))) is not None:
                _refuse_unsupported(ours, layer)
                return ours
        return choose(*args, **kwargs)

    selector._cached_get_attn_backend = choose_backend


def _refuse_unsupported(backend: Any, layer: Any) -> None:
    """Validate our backend for a layer as vLLM's selector validates its own backends.

    Raises:
        RefusalError: the layer needs a feature that the cache does not have.
    """
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    if problems := backend.validate_configuration(device_capability=capability, **layer._asdict()):
        refuse(
            RefusalError(
                f"kv_cache_dtype={layer.kv_cache_dtype!r} does not fit this model's attention: "
                f"{', '.join(problems)}; use kv_cache_dtype='auto' for it."
            )
        )


def probe() -> str | None:
    """Check that a layer with a preset gets our backend through the function that layers call."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from kvarn.vllm.backend import BACKENDS

    for preset in PRESETS.values():
        try:
            chosen = _choose(preset.name, preset.group)
        except RefusalError:  # ours, which refuses this environment, such as VLLM_BATCH_INVARIANT
            continue
        if chosen is not BACKENDS[preset.name]:
            return f"it chooses {chosen.__name__} for layers with kv_cache_dtype={preset.name!r}"
        AttentionBackendEnum[chosen.get_name()]  # layers look the name up
    return None


def doctor_probe() -> str | None:
    """Check that other layers keep vLLM's choice, which loads the chosen backend."""
    from vllm.platforms import current_platform

    from kvarn.vllm.backend import BACKENDS

    if current_platform.is_unspecified():  # vLLM has no backends without a device
        return None
    chosen = _choose("auto", 128)
    return f"it chooses {chosen.__name__} for unquantized layers" if chosen in BACKENDS.values() else None


def _choose(cache_dtype: str, block_size: int) -> Any:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    with set_current_vllm_config(default_config(cache_dtype, block_size)):
        return get_attn_backend(128, torch.bfloat16, cache_dtype, num_heads=8)


HOOK = Hook(
    "attention backend",
    (
        "vllm.v1.attention.selector:_cached_get_attn_backend",
        "vllm.v1.attention.selector:get_attn_backend",
        "vllm.v1.attention.backends.registry:AttentionBackendEnum.CUSTOM",
        "vllm.v1.attention.backends.registry:register_backend",
    ),
    install,
    probe,
    doctor_probe,
)
