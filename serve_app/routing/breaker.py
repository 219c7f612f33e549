"""A circuit breaker per replica."""

from __future__ import annotations

from serve_app.routing.types import BreakerState

FAILURES_TO_OPEN = 3
FIRST_PAUSE_S = 0.5
LAST_PAUSE_S = 30.0


class Breaker:
    """Counts one replica's failures: closed, open for a pause that doubles, then half-open for one probe at a time."""

    def __init__(self) -> None:
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._open_until_s = 0.0
        self._probing = False

    @property
    def is_closed(self) -> bool:
        """Whether the replica has failed fewer than `FAILURES_TO_OPEN` times in a row."""
        return self._failures < FAILURES_TO_OPEN

    def allows(self, now_s: float) -> bool:
        """Whether a request may be sent to the replica now."""
        return self.is_closed or (now_s >= self._open_until_s and not self._probing)

    def state(self, now_s: float) -> BreakerState:
        """Return the state; half-open lasts from the end of the pause to the outcome of the probe."""
        if self.is_closed:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if self._probing or now_s >= self._open_until_s else BreakerState.OPEN

    def sent(self) -> None:
        """Record that a request was sent; on a half-open breaker it is the probe."""
        self._probing = not self.is_closed

    def succeeded(self) -> None:
        """Record that a request got its first token."""
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._open_until_s = 0.0
        self._probing = False

    def failed(self, now_s: float) -> None:
        """Record that a request failed through the replica's fault.

        Ignored while the breaker is open: one fault may fail all requests that were sent before.
        """
        if now_s < self._open_until_s:
            return
        self._failures += 1
        if self.is_closed:
            return
        self._open_until_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, LAST_PAUSE_S)
        self._probing = False

    def abandoned(self) -> None:
        """Record that a request ended without evidence for or against the replica."""
        self._probing = False
