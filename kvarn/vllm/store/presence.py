"""Which blocks a directory that several processes change holds, looked up beside the engine's steps."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Lock, Thread

LISTING_INTERVAL_S = 1.0


class Presence:
    """Follows the names that `list_names` returns, on a thread of its own."""

    def __init__(self, list_names: Callable[[], set[str]]) -> None:
        self._list_names = list_names
        self._seen: set[str] = set()
        self._added: set[str] = set()
        self._gone: set[str] = set()
        self._lock = Lock()
        self._closed = Event()
        self._thread = Thread(target=self._look_forever, name="kvarn-store-presence", daemon=True)
        self._thread.start()

    def changes(self) -> tuple[set[str], set[str]]:
        """Names that are new since the last call, and those that are gone: at once, as every step asks."""
        with self._lock:
            changes = self._added, self._gone
            if self._added or self._gone:
                self._added, self._gone = set(), set()
        return changes

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _look_forever(self) -> None:
        while True:
            self._look()
            if self._closed.wait(LISTING_INTERVAL_S):
                return

    def _look(self) -> None:
        seen = self._list_names()
        new, lost = seen - self._seen, self._seen - seen
        self._seen = seen
        with self._lock:
            added, gone = self._added, self._gone
            self._added = (added - lost) | (new - gone)
            self._gone = (gone - new) | (lost - added)
