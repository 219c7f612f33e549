"""Triton kernels of the quantized cache, one family a file, each beside the reference in `kvarn.reference` it must match."""
