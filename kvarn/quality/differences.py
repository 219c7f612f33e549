"""Paired differences between cache dtypes on the same positions, tighter than the interval of each dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvarn.presets import PRESETS

Row = dict[str, Any]
Pairs = dict[tuple[str, str], dict[str, Any]]  # (later dtype, earlier dtype) -> `divergence.contrast`


@dataclass(frozen=True)
class Difference:
    """The difference between two dtypes.

    Attributes:
        kld: mean KL divergence of `dtype` minus that of `other`, in nats.
        kld_ci: its 95 % confidence interval.
        smallest_effect: minimum detectable difference of the sample.
    """

    dtype: str
    other: str
    kld: float
    kld_ci: tuple[float, float]
    smallest_effect: float

    @property
    def is_more(self) -> bool:
        """Whether `dtype` was shown to diverge more; a single block has no spread, and shows nothing."""
        low, high = self.kld_ci
        return low != high and low > 0

    @property
    def in_words(self) -> str:
        """Whether `dtype` diverges less or more than `other`, or else the minimum detectable difference."""
        low, high = self.kld_ci
        if low == high:  # a single block has no spread
            return "too few positions to tell" if self.kld else "equal"
        if high < 0:
            return "less"
        return "more" if self.is_more else f"no difference shown (visible from {self.smallest_effect:.5f})"


def of_presets(rows: list[Row]) -> list[Difference]:
    """Differences between each KVarN preset and every other dtype of which a pair was measured, in one protocol."""
    dtypes = [row["dtype"] for row in rows]
    pairs = pairs_of(rows)
    return [
        found
        for dtype in dtypes
        if dtype in PRESETS
        for other in dtypes
        if (found := difference(pairs, dtype, other)) is not None
    ]


def pairs_of(rows: list[Row]) -> Pairs:
    """The pairs that were measured in one protocol, from the rows measured later, which hold them."""
    return {(row["dtype"], other): pair for row in rows for other, pair in row.get("against", {}).items()}


def difference(pairs: Pairs, dtype: str, other: str) -> Difference | None:
    """The difference of two dtypes, whichever was measured later; None if they were not compared."""
    if (pair := pairs.get((dtype, other))) is not None:
        low, high = pair["kld_ci"]
        return Difference(dtype, other, pair["kld"], (low, high), pair["kld_smallest_effect"])
    if (pair := pairs.get((other, dtype))) is not None:
        low, high = pair["kld_ci"]
        return Difference(dtype, other, -pair["kld"], (-high, -low), pair["kld_smallest_effect"])
    return None
