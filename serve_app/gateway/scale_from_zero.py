"""Scale from zero: the first request starts a replica, and requests wait until it is ready."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from serve_app.request.request_errors import DeadlineError, ReplicaUnavailableError

logger = logging.getLogger(__name__)

MAX_WAIT_S = 900.0
RETRY_S = 1.0
TOO_LATE = (
    "No engine replica started before the deadline: allow more time, or set autoscaling.min_replicas to 1."
)
NOT_STARTED = "No engine replica has started yet: try again in a minute, or check the log of Ray Serve."


class ScaleFromZero:
    """Makes requests wait while no replica is ready.

    Args:
        call: makes Serve start a replica, by calling one; returns once one has answered.
        is_ready: whether a replica takes requests.
    """

    def __init__(self, call: Callable[[], Any], is_ready: Callable[[], bool]) -> None:
        self._call = call
        self._is_ready = is_ready
        self._changed = asyncio.Event()
        self._calling: asyncio.Task[None] | None = None
        self._waiting = 0

    def report_change(self) -> None:
        """Check again: a replica was added, changed or removed."""
        if self._is_ready():
            self._changed.set()

    async def wait(self, timeout_s: float | None) -> None:
        """Return once a replica takes requests.

        Raises:
            DeadlineError: no replica was ready within `timeout_s`.
            ReplicaUnavailableError: no replica was ready within `MAX_WAIT_S`.
        """
        if self._is_ready():
            return
        self._waiting += 1
        self._wake()
        self._changed.clear()
        has_deadline = timeout_s is not None and timeout_s <= MAX_WAIT_S
        try:
            async with asyncio.timeout(timeout_s if has_deadline else MAX_WAIT_S):
                await self._changed.wait()
        except TimeoutError:
            raise (
                DeadlineError(TOO_LATE) if has_deadline else ReplicaUnavailableError(NOT_STARTED)
            ) from None
        finally:
            self._waiting -= 1

    def _wake(self) -> None:
        if self._calling is None or self._calling.done():
            self._calling = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        """Call until it succeeds or no request waits any more."""
        while self._waiting:
            try:
                await self._call()
            except Exception:
                logger.exception("waking an engine replica failed: retrying")
                await asyncio.sleep(RETRY_S)
            else:
                return
