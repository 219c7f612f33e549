"""Expected output lengths, learned from requests that ended."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

WINDOW = 512
MIN_SAMPLES = 32


class OutputLengths:
    """A quantile of recent output lengths, one per power of two of `max_tokens`.

    Args:
        quantile: share of outputs that should fit the expectation, above 0 up to 1.
    """

    def __init__(self, quantile: float) -> None:
        self._quantile = quantile
        self._recent: dict[int, tuple[deque[int], list[int]]] = {}

    def expect(self, max_tokens: int) -> int:
        """Return the length to reserve; `max_tokens` until enough similar outputs have ended."""
        _, ordered = self._recent.get(max_tokens.bit_length(), (None, []))
        if len(ordered) < MIN_SAMPLES:
            return max_tokens
        return min(ordered[min(int(self._quantile * len(ordered)), len(ordered) - 1)], max_tokens)

    def observe(self, max_tokens: int, output_tokens: int) -> None:
        """Add an output that ended with a stop condition or at `max_tokens`."""
        order, ordered = self._recent.setdefault(max_tokens.bit_length(), (deque(), []))
        order.append(output_tokens)
        insort(ordered, output_tokens)
        if len(order) > WINDOW:
            del ordered[bisect_left(ordered, order.popleft())]
