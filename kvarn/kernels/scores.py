"""What models do to attention scores: learned sinks, which take a share of the softmax, and soft caps."""

from __future__ import annotations

from math import e, log2

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(log2(e))


@triton.jit
def add_sinks(sinks, m, l, acc):
    """Add a sink, a learned logit that has no value, to each row of an online softmax in base 2.

    Args:
        sinks: pointers to the logits, [N] or one for all rows.
        m, l: [N] float32, the maximum and the sum.
        acc: [N, D] float32, the output before division by l.

    Returns:
        The larger of m and the sink, and l and acc relative to it.
    """
    sink = tl.load(sinks).to(tl.float32) * LOG2_E
    largest = tl.maximum(m, sink)
    alpha = tl.exp2(m - largest)
    return largest, l * alpha + tl.exp2(sink - largest), acc * alpha[:, None]


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
