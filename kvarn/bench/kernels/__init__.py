"""Speed of the kernels beside FlashAttention 3 and vLLM's other quantized caches."""
