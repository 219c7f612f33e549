"""A value that many can watch: the whole of it first, then every change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Generic, TypeVar

T = TypeVar("T")
MAX_PENDING = 256  # changes kept for a slow watcher before it gets the whole value again


class Feed(Generic[T]):
    """Passes changes on to watchers; `snapshot()` is the whole value as a message of the same kind."""

    def __init__(self, snapshot: Callable[[], T]) -> None:
        self._snapshot = snapshot
        self._watchers: set[asyncio.Queue[T | None]] = set()

    def publish(self, change: T) -> None:
        """Pass `change` on; whoever is too far behind gets a snapshot in place of all pending changes."""
        for queue in self._watchers:
            if queue.full():
                _drop_pending(queue)
                queue.put_nowait(self._snapshot())
            else:
                queue.put_nowait(change)

    def close(self) -> None:
        """End every watch, after what is pending."""
        for queue in self._watchers:
            if queue.full():
                _drop_pending(queue)
            queue.put_nowait(None)

    async def watch(self) -> AsyncGenerator[T, None]:
        """Yield a snapshot, then every change, until the feed is closed."""
        queue: asyncio.Queue[T | None] = asyncio.Queue(MAX_PENDING)
        queue.put_nowait(self._snapshot())
        self._watchers.add(queue)
        try:
            while (change := await queue.get()) is not None:
                yield change
        finally:
            self._watchers.discard(queue)


def _drop_pending(queue: asyncio.Queue[T | None]) -> None:
    while not queue.empty():
        queue.get_nowait()
