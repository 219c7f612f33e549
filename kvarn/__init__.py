"""KVarN: a KV cache quantized to 4-bit keys and 2-bit values, as a plugin for stock vLLM."""

__version__ = "0.1.0"
