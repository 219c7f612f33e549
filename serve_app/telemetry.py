"""Keeps one engine's cache state current: what the engine reports, what is reserved, how fast it runs."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import fields
from typing import Any

from kvarn.vllm.telemetry import CacheState
from serve_app.feed import Feed
from serve_app.routing import CacheCapacity, CacheLoad, CacheSnapshot

MIN_INTERVAL_S = 0.05
IDLE_INTERVAL_S = 1.0


class Rate:
    """An exponentially weighted mean of a measured quantity; 0 until the first measurement."""

    def __init__(self, weight: float = 0.1) -> None:
        self._weight = weight
        self.value = 0.0

    def add(self, measured: float) -> None:
        weight = self._weight if self.value else 1.0
        self.value += weight * (measured - self.value)


class CacheMonitor:
    """The published state of one engine's cache.

    Reads the engine at most every 50 ms while something happens and every second while nothing does; each state
    that differs from the last gets the next sequence number.

    Args:
        read: asks the engine for its state.
    """

    def __init__(self, read: Callable[[], Awaitable[CacheState]]) -> None:
        self._read = read
        self._epoch = time.time_ns()
        self._reserved: Counter[str] = Counter()
        self._changed = asyncio.Event()
        self._draining = False
        self._feed = Feed(lambda: self.snapshot)
        self.prefill_tokens_per_s = Rate()
        self.inter_token_latency_s = Rate()
        self.snapshot: CacheSnapshot

    async def start(self) -> None:
        """Take the first reading."""
        state = await self._read()
        self.snapshot = CacheSnapshot(self._epoch, 1, _capacity(state), self._load(state))

    async def run(self) -> None:
        """Publish changes until cancelled or the engine dies."""
        while True:
            await self._wait_for_change()
            self._publish(self._load(await self._read()))
            await asyncio.sleep(MIN_INTERVAL_S)

    def touch(self) -> None:
        """Say that the engine's state may have changed."""
        self._changed.set()

    def reserve(self, gateway_id: str, blocks: int) -> None:
        """Count blocks promised to a request; a negative number gives them back."""
        self._reserved[gateway_id] += blocks
        self._reserved += Counter()  # drops the counts that reached zero
        self.touch()

    def drain(self) -> None:
        """Tell watchers at once that this replica takes nothing new."""
        self._draining = True
        self._publish(self.snapshot.load)

    def watch(self) -> AsyncGenerator[CacheSnapshot, None]:
        """Yield the state now and each one after it."""
        return self._feed.watch()

    def close(self) -> None:
        """End every watch."""
        self._feed.close()

    async def _wait_for_change(self) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), IDLE_INTERVAL_S)
        except TimeoutError:
            return
        self._changed.clear()

    def _publish(self, load: CacheLoad) -> None:
        if (load, self._draining) != (self.snapshot.load, self.snapshot.draining):
            self.snapshot = self.snapshot.advanced(self.snapshot.sequence + 1, load, self._draining)
            self._feed.publish(self.snapshot)

    def _load(self, state: CacheState) -> CacheLoad:
        return CacheLoad(
            **_shared_fields(CacheLoad, state),
            reserved_blocks=dict(self._reserved),
            prefill_tokens_per_s=self.prefill_tokens_per_s.value,
            inter_token_latency_s=self.inter_token_latency_s.value,
        )


def _capacity(state: CacheState) -> CacheCapacity:
    return CacheCapacity(**_shared_fields(CacheCapacity, state), total_slots=state.slots_total)


def _shared_fields(kind: type[CacheCapacity] | type[CacheLoad], state: CacheState) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in fields(kind) if hasattr(state, f.name)}
