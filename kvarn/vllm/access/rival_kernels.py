"""Kernels of vLLM's other quantized caches; importing them needs a GPU build of vLLM."""

from vllm.v1.attention.ops.int4_per_token_head import reshape_and_cache_int4, unified_attention_int4
from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention
from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

__all__ = [
    "reshape_and_cache_int4",
    "triton_turboquant_decode_attention",
    "triton_turboquant_store",
    "unified_attention_int4",
]
