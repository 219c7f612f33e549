"""Passes the size of a tile record to vLLM's memory accounting."""

from __future__ import annotations

from functools import wraps
from typing import Any

from kvarn.presets import PRESETS, get_preset
from kvarn.vllm.hooks import Hook


def install() -> None:
    """Wrap the layer's cache spec for quantized layers."""
    from vllm.model_executor.layers.attention import Attention

    from kvarn.tile import TileLayout
    from kvarn.vllm.spec import KVarNSpec

    stock_spec = Attention.get_kv_cache_spec

    @wraps(stock_spec)
    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        if self.kv_cache_dtype in PRESETS:
            return KVarNSpec.of(
                TileLayout(get_preset(self.kv_cache_dtype), self.head_size), self.num_kv_heads
            )
        return stock_spec(self, vllm_config)

    Attention.get_kv_cache_spec = get_kv_cache_spec


HOOK = Hook(
    "page size",
    (
        "vllm.model_executor.layers.attention:Attention.get_kv_cache_spec",
        "vllm.v1.kv_cache_interface:FullAttentionSpec.real_page_size_bytes",
    ),
    install,
)
