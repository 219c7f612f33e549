"""Scale from zero: the first request starts a replica, and all wait for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from serve_app.request.errors import DeadlineError, ReplicaUnavailableError

logger = logging.getLogger(__name__)

MAX_WAIT_S = 900.0
RETRY_S = 1.0
TOO_LATE = (
    "No engine replica started before the deadline: allow more time, or keep autoscaling.min_replicas at 1."
)
NOT_STARTED = "No engine replica has started yet: try again in a minute, or look at Serve's log."


class ScaleFromZero:
    """Lets requests wait while no replica takes any.

    Args:
        call: asks Serve for a replica, by calling one; returns when one has answered.
        is_ready: whether a replica takes requests.
    """

    def __init__(self, call: Callable[[], Any], is_ready: Callable[[], bool]) -> None:
        self._call = call
        self._is_ready = is_ready
        self._changed = asyncio.Event()
        self._calling: asyncio.Task[None] | None = None
        self._waiting = 0

    def report_change(self) -> None:
        """A replica has come, gone or changed."""
        if self._is_ready():
            self._changed.set()

    async def wait(self, timeout_s: float | None) -> None:
        """Return once a replica takes requests.

        Raises:
            DeadlineError: none did within `timeout_s`.
            ReplicaUnavailableError: none did for long.
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
        """Ask until it works, as long as any request waits."""
        while self._waiting:
            try:
                await self._call()
            except Exception:
                logger.exception("waking an engine replica failed: trying again")
                await asyncio.sleep(RETRY_S)
            else:
                return
