"""Counts in sentences."""

from __future__ import annotations

import pytest

from kvarn.counts import counted


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 turns"), (1, "1 turn"), (2, "2 turns"), (2000, "2,000 turns")]
)
def test_only_one_is_singular(count: int, text: str) -> None:
    assert counted(count, "turn") == text
