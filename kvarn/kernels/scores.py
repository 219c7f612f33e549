"""Learned attention sinks: logits that take their share of a softmax and have no value."""

from __future__ import annotations

from math import e, log2

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(log2(e))


@triton.jit
def add_sinks(sinks, m, l, acc):
    """Add a sink to each row of an online softmax in base 2.

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
