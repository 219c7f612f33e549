"""Stage 1: orthonormal Hadamard rotation along head_dim (arXiv 2606.03458).

    x' = x H,   H[i, j] = (-1)^popcount(i & j) / sqrt(D),   H = H^T = H^-1

spreads a channel outlier over all channels. Because H is orthonormal, rotated queries give the same scores
against rotated keys, and a sum of rotated values is un-rotated by H again.
"""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache
def hadamard_matrix(size: int) -> Tensor:
    """Return the orthonormal Sylvester-Hadamard matrix.

    Args:
        size: a power of two.

    Returns:
        [size, size] float32, symmetric and its own inverse.

    Raises:
        ValueError: if size is not a power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard matrix cannot have size {size}: use a power of two")
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / size**0.5


def rotate(x: Tensor) -> Tensor:
    """Rotate the last axis: [..., D] float -> [..., D] float64 for float64, else float32. Its own inverse."""
    x = x if x.dtype == torch.float64 else x.float()
    return x @ hadamard_matrix(x.shape[-1]).to(x)
