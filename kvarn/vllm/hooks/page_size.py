"""Passes the size of a tile record to vLLM's memory accounting."""

from __future__ import annotations

from functools import wraps
from typing import Any

from kvarn.vllm.hooks import Hook
from kvarn.vllm.versions import backends_customize_specs


def install() -> None:
    """Wrap the layer's cache spec, unless vLLM asks the backend for it."""
    if backends_customize_specs():
        return
    from vllm.model_executor.layers.attention import Attention

    from kvarn.vllm.backend import BACKENDS

    stock_spec = Attention.get_kv_cache_spec

    @wraps(stock_spec)
    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        spec = stock_spec(self, vllm_config)
        ours = BACKENDS.get(self.kv_cache_dtype)
        return spec if ours is None else ours.customize_spec(spec)

    Attention.get_kv_cache_spec = get_kv_cache_spec


HOOK = Hook(
    "page size",
    (
        "vllm.model_executor.layers.attention:Attention.get_kv_cache_spec",
        "vllm.v1.kv_cache_interface:FullAttentionSpec.real_page_size_bytes",
    ),
    install,
)
