"""The quantized cache on a CPU, in torch: storing, quantizing, decode and prefill attention."""
