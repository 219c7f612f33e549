"""Which blocks a directory that several processes change holds, looked up beside the engine's steps."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Lock, Thread

LOOK_S = 1.0  # between listings of the directory


class Presence:
    """Follows the names that `list_names` returns, on a thread of its own."""

    def __init__(self, list_names: Callable[[], set[str]]) -> None:
        self._list_names = list_names
        self._seen: set[str] = set()
        self._published: set[str] = set()
        self._lock = Lock()
        self._closed = Event()
        self._thread = Thread(target=self._look_forever, name="kvarn-store-presence", daemon=True)
        self._thread.start()

    def changes(self) -> tuple[set[str], set[str]]:
        """Names that are new since the last call, and those that are gone."""
        with self._lock:
            seen = self._seen
        added, gone = seen - self._published, self._published - seen
        self._published = seen
        return added, gone

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _look_forever(self) -> None:
        while True:
            seen = self._list_names()
            with self._lock:
                if seen != self._seen:
                    self._seen = seen
            if self._closed.wait(LOOK_S):
                return
