"""Current state of one engine's cache: its reported load, its reservations, and its measured speed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import fields, replace
from typing import Any

from kvarn.vllm.access.telemetry import CacheState
from serve_app.routing import CacheCapacity, CacheLoad, CacheSnapshot, Reservations
from serve_app.rpc.feed import Feed

MIN_INTERVAL_S = 0.05
PROGRESS_INTERVAL_S = 0.25
IDLE_INTERVAL_S = 1.0


class Rate:
    """Exponentially weighted mean of a measured quantity; 0 until the first measurement."""

    def __init__(self, weight: float = 0.1) -> None:
        self._weight = weight
        self.value = 0.0

    def add(self, measured: float) -> None:
        weight = self._weight if self.value else 1.0
        self.value += weight * (measured - self.value)


class Speed:
    """Work per second, with exponentially decaying weights; 0 until the first measurement."""

    def __init__(self, keep: float = 0.95) -> None:
        self._keep = keep
        self._done = self._taken_s = 0.0

    @property
    def value(self) -> float:
        return self._done / self._taken_s if self._taken_s else 0.0

    def add(self, done: float, taken_s: float) -> None:
        """Add `done` units of work that took `taken_s` seconds."""
        self._done = self._keep * self._done + done
        self._taken_s = self._keep * self._taken_s + taken_s


class CacheMonitor:
    """Publishes the state of one engine's cache.

    Reads the engine within 50 ms after a request starts, gets its first token or ends, every 250 ms while
    requests run, and once per second while none does: further tokens take blocks that are reserved for them,
    so that no gateway's headroom changes, and a gateway spends as much on an update as on many tokens. Each
    state that differs from the last in more than measured speeds and drafts, which every token changes, gets
    the next sequence number, and so does at least one state per second, unless the engine has not answered
    for longer than a step may take: watchers can distinguish an idle engine from a hanging one.

    Args:
        read: reads the engine's state.
        step_timeout_s: longest time that a step may keep the engine from answering.
        is_prefill: whether the engine only computes prompts.

    Attributes:
        epoch: identifies this run of the engine.
        reservations: blocks and prefill that gateways reserved here for their requests, by gateway.
        state: the engine's state as last read.
    """

    def __init__(
        self, read: Callable[[], Awaitable[CacheState]], step_timeout_s: float = 30, is_prefill: bool = False
    ) -> None:
        self._read = read
        self._is_prefill = is_prefill
        self._step_timeout_s = step_timeout_s
        self.epoch = time.time_ns()
        self.reservations = Reservations()
        self._published_s = time.monotonic()
        self._changed = asyncio.Event()
        self._draining = False
        self._feed = Feed(lambda: self.snapshot)
        self.prefill_tokens_per_s = Speed()
        self.inter_token_latency_s = Rate()
        self.snapshot: CacheSnapshot
        self.state: CacheState

    async def start(self) -> None:
        """Read the engine's state for the first time."""
        self.state = await self._read()
        capacity = replace(_capacity(self.state), is_prefill=self._is_prefill)
        self.snapshot = CacheSnapshot(self.epoch, 1, capacity, self._load(self.state))

    async def run(self) -> None:
        """Publish changes until cancelled or the engine dies."""
        while True:
            await self._wait_for_change()
            await self._read_state()
            for gateway_id in self.reservations.owners():
                self.reservations.settle(gateway_id)
            self._publish(self._load(self.state))
            await asyncio.sleep(MIN_INTERVAL_S)

    def touch(self) -> None:
        """Have the engine's state read soon: it may have changed by more than another token."""
        self._changed.set()

    def headroom_blocks(self) -> int:
        """Blocks that are neither used nor reserved; negative if reservations exceed what is free."""
        load = self.snapshot.load
        return load.free_blocks + load.evictable_blocks - self.reservations.total_blocks

    def drain(self) -> None:
        """Publish at once that this replica accepts no new requests."""
        self._draining = True
        self._publish(self.snapshot.load)

    def watch(self) -> AsyncGenerator[CacheSnapshot, None]:
        """Yield the current state, then every later one."""
        return self._feed.watch()

    def close(self) -> None:
        """End every watch."""
        self._feed.close()

    async def _read_state(self) -> None:
        """Read the engine; while it is busy, keep publishing the last known state."""
        reading = asyncio.ensure_future(self._read())
        asked_s = time.monotonic()
        try:
            while not (await asyncio.wait([reading], timeout=IDLE_INTERVAL_S))[0]:
                if time.monotonic() - asked_s < self._step_timeout_s:
                    self._publish(self._load(self.state))
            self.state = reading.result()
        finally:
            reading.cancel()

    async def _wait_for_change(self) -> None:
        interval_s = PROGRESS_INTERVAL_S if self.reservations.owners() else IDLE_INTERVAL_S
        try:
            await asyncio.wait_for(self._changed.wait(), interval_s)
        except TimeoutError:
            return
        self._changed.clear()

    def _publish(self, load: CacheLoad) -> None:
        now_s = time.monotonic()
        is_news = (_counts(load), self._draining) != (_counts(self.snapshot.load), self.snapshot.draining)
        if is_news or now_s - self._published_s >= IDLE_INTERVAL_S:
            self._published_s = now_s
            self.snapshot = self.snapshot.advanced(self.snapshot.sequence + 1, load, self._draining)
            self._feed.publish(self.snapshot)

    def _load(self, state: CacheState) -> CacheLoad:
        blocks, tokens = self.reservations.by_owner()
        return CacheLoad(
            **_shared_fields(CacheLoad, state),
            reserved_blocks=blocks,
            pending_prefill_tokens=tokens,
            prefill_tokens_per_s=self.prefill_tokens_per_s.value,
            inter_token_latency_s=self.inter_token_latency_s.value,
        )


def _counts(load: CacheLoad) -> CacheLoad:
    return replace(
        load,
        prefill_tokens_per_s=0.0,
        inter_token_latency_s=0.0,
        drafts_proposed=0,
        drafts_accepted=0,
        loading_s=0.0,
    )


def _capacity(state: CacheState) -> CacheCapacity:
    return CacheCapacity(**_shared_fields(CacheCapacity, state), total_slots=state.slots_total)


def _shared_fields(kind: type[CacheCapacity] | type[CacheLoad], state: CacheState) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in fields(kind) if hasattr(state, f.name)}
