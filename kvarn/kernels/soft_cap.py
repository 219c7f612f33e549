"""Soft-capped scores, bounded by c * tanh(score / c)."""

from __future__ import annotations

import triton
import triton.language as tl

from kvarn.kernels.sink_logits import LOG2_E


@triton.jit
def soft_capped(score, soft_cap: tl.constexpr):
    """Return `soft_cap` * tanh(score / `soft_cap`); the score itself if `soft_cap` is 0.

    Args:
        score: float32, in base 2 (times log2(e)), as is the result. It may be infinite.
        soft_cap: float >= 0, not in base 2.
    """
    if soft_cap > 0:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), where an overflow of exp leaves 1.
        largest: tl.constexpr = soft_cap * LOG2_E
        score = 1 / (tl.exp2(score * (2 / soft_cap)) + 1) * (-2 * largest) + largest
    return score
