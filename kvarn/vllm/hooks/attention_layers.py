"""Decides which attention layers are quantized, checks these, and completes them once weights are loaded."""

from __future__ import annotations

from contextvars import ContextVar
from copy import copy
from functools import wraps
from inspect import signature
from typing import Any

from kvarn.layer_kinds import is_idle
from kvarn.presets import PRESETS
from kvarn.tile import padded_head_dim
from kvarn.vllm.hooks import Hook, RefusalError
from kvarn.vllm.hooks.refusals import refuse
from kvarn.vllm.mixed_layers import is_quantized

_WINDOW, _CACHE = "per_layer_sliding_window", "cache_config"
_loaded_before: ContextVar[frozenset[str]] = ContextVar("loaded_before", default=frozenset())
"""Names of the layers that existed when the loading of this model began: the target's, while a drafter is loaded."""


def install() -> None:
    """Wrap the constructor of vLLM's decoder layers, and the loading of a model."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    stock_init, stock_load = Attention.__init__, BaseModelLoader.load_model

    @wraps(stock_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        config = get_current_vllm_config()
        if config.cache_config.cache_dtype in PRESETS:
            if is_idle(kwargs.get(_WINDOW), config.model_config.max_model_len):
                del kwargs[_WINDOW]
            kwargs.setdefault(_CACHE, config.cache_config)  # vLLM's Falcon passes none
        if kwargs.get(_WINDOW) is not None:
            kwargs.update(_unquantized(kwargs))
        stock_init(self, *args, **kwargs)
        if self.kv_cache_dtype in PRESETS:
            layers, target = config.compilation_config.static_forward_context, _loaded_before.get()
            refuse_unlike(self, [layer for name, layer in layers.items() if name not in target])
            self.impl.is_drafter = bool(target)

    @wraps(stock_load)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("vllm_config") or args[0]
        token = _loaded_before.set(frozenset(config.compilation_config.static_forward_context))
        try:
            model = stock_load(self, *args, **kwargs)
        finally:
            _loaded_before.reset(token)
        complete_layers(config)
        return model

    Attention.__init__ = init
    BaseModelLoader.load_model = load_model


def _unquantized(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The cache configuration among a layer's arguments, with vLLM's own cache in place of a preset."""
    cache: Any = kwargs.get(_CACHE)
    if getattr(cache, "cache_dtype", None) not in PRESETS:
        return {}
    own = copy(cache)
    own.cache_dtype = "auto"
    return {_CACHE: own}


def refuse_unlike(layer: Any, layers: Any) -> None:
    """Refuse a layer whose attention is not plainly causal, or whose shape is not that of the first of `layers`.

    Such a layer is made with a backend that wraps ours and changes what each step reads.

    Raises:
        RefusalError: the cache does not support the layer.
    """
    from kvarn.vllm.backend import BACKENDS

    dtype = layer.kv_cache_dtype
    if layer.attn_backend is not BACKENDS[dtype]:
        refuse(
            RefusalError(
                f"This model's attention is not plainly causal ({layer.attn_backend.__name__}), which the {dtype} "
                "cache does not support; use kv_cache_dtype='auto' for it."
            )
        )
    first = next(filter(is_quantized, layers))
    if layer.head_size_v > (held := padded_head_dim(layer.head_size)):
        refuse(
            RefusalError(
                f"The values of this model have {layer.head_size_v} channels per head, and the {dtype} cache's records "
                f"for its keys of {layer.head_size} hold {held}; use kv_cache_dtype='auto' for it."
            )
        )
    for attribute, unit in (
        ("head_size", "channels per head"),
        ("num_kv_heads", "KV heads"),
        ("num_heads", "query heads"),
    ):
        if (mine := getattr(layer, attribute)) != (theirs := getattr(first, attribute)):
            refuse(_unlike(dtype, theirs, mine, unit))


def _unlike(dtype: str, one: int, other: int, unit: str) -> RefusalError:
    return RefusalError(
        f"The layers of this model have {one} and {other} {unit}, and the {dtype} cache needs them equal; "
        "use kv_cache_dtype='auto' for it."
    )


def complete_layers(vllm_config: Any) -> None:
    """Finish layers that are not among the model's modules, as on the Transformers backend before vLLM 0.30."""
    from kvarn.vllm.layer import KVarNLayer

    for layer in vllm_config.compilation_config.static_forward_context.values():
        impl = getattr(layer, "impl", None)
        if isinstance(impl, KVarNLayer) and not hasattr(impl, "pool"):
            impl.process_weights_after_loading(vllm_config.model_config.dtype)


def probe() -> str | None:
    """Check that layers take their window and their cache under the names that the hook knows."""
    from vllm.model_executor.layers.attention import Attention

    if missing := {_WINDOW, _CACHE} - signature(Attention.__init__).parameters.keys():
        return f"its attention layers take no {min(missing)}"
    return None


HOOK = Hook(
    "attention layers",
    (
        "vllm.model_executor.layers.attention:Attention.__init__",
        "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model",
        "vllm.config:get_current_vllm_config",
    ),
    install,
    probe,
)
