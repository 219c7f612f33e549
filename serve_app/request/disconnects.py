"""Clients that disconnect before they have their response."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Receive


class UntilDisconnect:
    """Cancels its block, and nothing else of the task, once the client disconnects; the block then ends silently.

    Args:
        receive: yields the disconnect; the body has been received.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._has_left = False
        self._task: asyncio.Task[object]
        self._cancelling = 0
        self._watching: asyncio.Task[None]

    def __enter__(self) -> UntilDisconnect:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._watching = asyncio.create_task(self._watch())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._watching.cancel()
        if not self._has_left:
            return False
        is_ours_alone = self._task.uncancel() <= self._cancelling
        return is_ours_alone and isinstance(error, asyncio.CancelledError)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._has_left = True
        self._task.cancel()
