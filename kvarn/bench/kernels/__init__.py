"""Kernel benchmarks against FlashAttention 3 and vLLM's other quantized caches."""
