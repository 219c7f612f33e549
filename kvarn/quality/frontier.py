"""The frontier of quality per byte: which formats diverge least among those of at most as many bytes."""

from __future__ import annotations

from dataclasses import dataclass

from kvarn.quality.differences import Pairs, Row, difference, pairs_of
from kvarn.quality.settings import REFERENCE

FEWEST = 3


@dataclass(frozen=True)
class Place:
    """Where a row stands among the rows of at most as many bytes per token.

    Attributes:
        row: the row.
        is_best: whether none of them diverges less than `row`.
        is_behind: whether the sample shows that one of them diverges less than `row`.
    """

    row: Row
    is_best: bool
    is_behind: bool

    @property
    def in_words(self) -> str:
        """The verdict."""
        if self.is_best:
            return "on the frontier"
        return "behind" if self.is_behind else "not shown to be behind"


def places(rows: list[Row]) -> list[Place]:
    """The places of all rows of one protocol that have a divergence, smallest first, without knobs and the reference.

    A frontier of fewer than `FEWEST` rows says nothing: the list is empty.
    """
    measured = [
        row for row in rows if "kld_mean" in row and row["dtype"] != REFERENCE and "=" not in row["dtype"]
    ]
    if len(measured) < FEWEST:
        return []
    pairs = pairs_of(measured)
    ordered = sorted(measured, key=lambda row: (row["bytes_per_token"], row["kld_mean"]))
    return [_place(row, ordered, pairs) for row in ordered]


def _place(row: Row, rows: list[Row], pairs: Pairs) -> Place:
    better = [
        other
        for other in rows
        if other["bytes_per_token"] <= row["bytes_per_token"] and other["kld_mean"] < row["kld_mean"]
    ]
    found = (difference(pairs, row["dtype"], other["dtype"]) for other in better)
    is_behind = any(pair.is_more for pair in found if pair is not None)
    return Place(row, not better, is_behind)
