"""A watchable value: each watcher gets a snapshot first, then every change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Generic, TypeVar

T = TypeVar("T")
MAX_PENDING = 256  # changes queued for a slow watcher before they are replaced by a snapshot


class Feed(Generic[T]):
    """Publishes changes to watchers; `snapshot()` returns the whole value as a message of the same type."""

    def __init__(self, snapshot: Callable[[], T]) -> None:
        self._snapshot = snapshot
        self._watchers: set[asyncio.Queue[T | None]] = set()

    @property
    def is_watched(self) -> bool:
        """Whether anyone would get a change."""
        return bool(self._watchers)

    def publish(self, change: T) -> None:
        """Publish `change`; a watcher too far behind gets a snapshot instead of all pending changes."""
        for queue in self._watchers:
            if queue.full():
                _drop_pending(queue)
                queue.put_nowait(self._snapshot())
            else:
                queue.put_nowait(change)

    def close(self) -> None:
        """End every watch after its pending changes."""
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
