"""A watchdog of the event loop: it finds callbacks that hold the loop for too long."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

BOUND_S = 0.05


@dataclass
class LoopWatch:
    """The longest callback so far, in CPU seconds of the loop's thread: other work on the machine does not count."""

    longest_s: float = 0.0
    callback: str = ""

    def check(self, request: object = "") -> None:
        """Fail if a callback exceeded the bound since the last check; `request` says what was sent."""
        longest_s, self.longest_s = self.longest_s, 0.0
        assert longest_s <= BOUND_S, f"{longest_s * 1e3:.0f} ms in {self.callback} {str(request)[:300]}"


@contextmanager
def watching_loop() -> Iterator[LoopWatch]:
    """Watch the callbacks of this thread's loop. Objects that exist are hidden from the collector, as in a gateway."""
    watch, thread = LoopWatch(), threading.get_ident()
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        start_s = time.thread_time()
        run(handle)
        took_s = time.thread_time() - start_s
        if took_s > watch.longest_s and threading.get_ident() == thread:
            watch.longest_s, watch.callback = took_s, repr(handle)

    gc.collect()
    gc.freeze()
    asyncio.Handle._run = timed  # type: ignore[method-assign]
    try:
        yield watch
    finally:
        asyncio.Handle._run = run  # type: ignore[method-assign]
        gc.unfreeze()
    watch.check()
