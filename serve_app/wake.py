"""Scale from zero: the first request starts a replica, and all wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from serve_app.errors import DeadlineExceededError, UnavailableError

MAX_WAIT_S = 900.0  # for requests without a deadline
TOO_LATE = (
    "No engine replica started before the deadline: allow more time, or keep autoscaling.min_replicas at 1."
)
NOT_STARTED = "No engine replica has started yet: try again in a minute, or look at Serve's log."


class Waker:
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

    def report_change(self) -> None:
        """A replica has come, gone or changed."""
        if self._is_ready():
            self._changed.set()

    async def wait(self, timeout_s: float | None) -> None:
        """Return once a replica takes requests.

        Raises:
            DeadlineExceededError: none did within `timeout_s`.
            UnavailableError: none did for long.
        """
        if self._is_ready():
            return
        self._wake()
        self._changed.clear()
        try:
            async with asyncio.timeout(MAX_WAIT_S if timeout_s is None else min(timeout_s, MAX_WAIT_S)):
                await self._changed.wait()
        except TimeoutError:
            raise (
                UnavailableError(NOT_STARTED) if timeout_s is None else DeadlineExceededError(TOO_LATE)
            ) from None

    def _wake(self) -> None:
        if self._calling is None or self._calling.done():
            self._calling = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        await self._call()
