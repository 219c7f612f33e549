"""A watchdog of the event loop: it finds callbacks that hold the loop for too long."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

# What is not checked in bounded time takes seconds. The longest callbacks, such as validating 4 MiB of token ids,
# take 40 ms of a core, and twice that where a busy one shares its units.
BOUND_S = 0.15
_active: list[LoopWatch] = []


class _Collections:
    """CPU seconds that this thread spent in the garbage collector, which calls it before and after each collection."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._start_s = 0.0
        self.spent_s = 0.0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if threading.get_ident() != self._thread:
            return
        if phase == "start":
            self._start_s = time.thread_time()
        else:
            self.spent_s += time.thread_time() - self._start_s


@dataclass
class LoopWatch:
    """The longest callback so far, in CPU seconds of the loop's thread: other work on the machine does not count."""

    longest_s: float = 0.0
    handle: asyncio.Handle | None = None  # formatting one may take longer than running it

    def check(self, request: object = "") -> None:
        """Fail if a callback exceeded the bound since the last check; `request` says what was sent."""
        longest_s, self.longest_s = self.longest_s, 0.0
        assert longest_s <= BOUND_S, f"{longest_s * 1e3:.0f} ms in {self.handle} {str(request)[:300]}"


def check_all(request: object) -> None:
    """Fail if a watched callback exceeded the bound since the last check."""
    for watch in _active:
        watch.check(request)


@contextmanager
def watching_loop(only: ContextVar[bool] | None = None) -> Iterator[LoopWatch]:
    """Watch the callbacks of this thread's loop, less the collector's time, which is that of the tests' own objects.

    Objects that exist are hidden from the collector, as in a gateway.

    Args:
        only: watch only callbacks in whose context this is true.
    """
    watch, thread, collections = LoopWatch(), threading.get_ident(), _Collections()
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        if only is not None and not handle._context.get(only, False):  # type: ignore[attr-defined]
            run(handle)
            return
        start_s = time.thread_time() - collections.spent_s
        run(handle)
        took_s = time.thread_time() - collections.spent_s - start_s
        if took_s > watch.longest_s and threading.get_ident() == thread:
            watch.longest_s, watch.handle = took_s, handle

    gc.collect()
    gc.freeze()
    gc.callbacks.append(collections)
    asyncio.Handle._run = timed  # type: ignore[method-assign]
    _active.append(watch)
    try:
        yield watch
    finally:
        _active.remove(watch)
        gc.callbacks.remove(collections)
        asyncio.Handle._run = run  # type: ignore[method-assign]
        if not _active:
            gc.unfreeze()
    watch.check()
