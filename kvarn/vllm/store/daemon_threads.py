"""Threads for calls that may hang, as those of a file system do: they keep no process from ending."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


class DaemonThreads:
    """Runs what is submitted, in order, on `number` daemon threads."""

    def __init__(self, number: int, name: str) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._is_closed = False
        self._threads = [
            Thread(target=self._run, name=f"{name}-{place}", daemon=True) for place in range(number)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Have a thread call `function`; return what it will give."""
        future: Future[T] = Future()
        self._tasks.put((future, lambda: function(*args)))
        return future

    def close(self, wait_s: float) -> None:
        """End the threads: run what was submitted for up to `wait_s`, and cancel the rest."""
        for _ in self._threads:
            self._tasks.put(None)
        until_s = time.monotonic() + wait_s
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        self._is_closed = True

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, call = task
            if self._is_closed:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)
            del task, future, call  # which would keep the result until the next task
