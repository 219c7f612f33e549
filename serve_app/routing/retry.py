"""Retry budget and backoff."""

from __future__ import annotations

from random import Random

FIRST_PAUSE_S = 0.02
LAST_PAUSE_S = 1.0


class RetryBudget:
    """Limits retries to a share of the requests, so that they do not overload a failing fleet.

    Args:
        share: retries earned per request.
        reserve: maximum number of saved retries, and the number at the start.
    """

    def __init__(self, share: float = 0.2, reserve: float = 20.0) -> None:
        self._share = share
        self._reserve = reserve
        self._saved = reserve

    def earn(self) -> None:
        """Count a new request."""
        self._saved = min(self._saved + self._share, self._reserve)

    def spend(self) -> bool:
        """Take one retry; return False if there is none left."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True


def pause_s(attempt: int, random: Random) -> float:
    """Return the pause before retry number `attempt`, from 1 on: exponential backoff with full jitter."""
    return random.uniform(0, min(FIRST_PAUSE_S * 2**attempt, LAST_PAUSE_S))
