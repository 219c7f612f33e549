"""Triton kernels of the quantized cache, one family a file; each names the reference it must match."""
