"""Watching a value: a snapshot, then every change, and a new snapshot for a watcher that falls behind."""

import asyncio
from contextlib import aclosing, suppress

import pytest

from kvarn.vllm.access.telemetry import CacheState
from serve_app.engine import cache_monitor
from serve_app.engine.cache_monitor import CacheMonitor
from serve_app.routing import RequestNeed
from serve_app.rpc.feed import MAX_PENDING, Feed


async def take(feed: Feed[int], count: int, started: asyncio.Event) -> list[int]:
    taken = []
    async with aclosing(feed.watch()) as values:
        async for value in values:
            taken.append(value)
            started.set()
            if len(taken) == count:
                break
    return taken


async def test_a_watcher_sees_the_value_and_each_change() -> None:
    feed = Feed(lambda: 10)
    started = asyncio.Event()
    watcher = asyncio.create_task(take(feed, 3, started))
    await started.wait()
    feed.publish(11)
    feed.publish(12)
    assert await watcher == [10, 11, 12]


async def test_a_slow_watcher_gets_a_snapshot_instead_of_missed_changes() -> None:
    feed = Feed(lambda: -1)
    async with aclosing(feed.watch()) as values:
        assert await anext(values) == -1
        for change in range(MAX_PENDING + 1):
            feed.publish(change)
        assert await anext(values) == -1


async def test_closing_ends_watches() -> None:
    feed = Feed(lambda: 0)
    async with aclosing(feed.watch()) as values:
        await anext(values)
        feed.close()
        assert [value async for value in values] == []


def cache_state(used: int) -> CacheState:
    return CacheState(
        cache_dtype="auto",
        tile_tokens=128,
        bytes_per_tile=1,
        max_model_len=1024,
        max_requests=3,
        total_blocks=10,
        free_blocks=10 - used,
        evictable_blocks=0,
        used_blocks=used,
        slots_total=4,
        tail_slots_used=0,
        sink_slots_used=0,
        sink_slots_idle=0,
        sinks_missing=0,
        running_requests=0,
        waiting_requests=0,
        waiting_prefill_tokens=0,
        preemptions=0,
    )


async def test_the_monitor_numbers_each_different_state() -> None:
    used = 0

    async def read() -> CacheState:
        return cache_state(used)

    monitor = CacheMonitor(read)
    await monitor.start()
    running = asyncio.create_task(monitor.run())
    async with aclosing(monitor.watch()) as states:
        first = await anext(states)
        used = 3
        monitor.reservations.hold(
            "request", "gateway", RequestNeed(300, 300), 128, blocks=5, pending_tokens=300
        )
        monitor.touch()
        second = await anext(states)
        monitor.reservations.release("request")
        monitor.drain()
        third = await anext(states)
    running.cancel()
    assert [first.sequence, second.sequence, third.sequence] == [1, 2, 3]
    assert (second.load.used_blocks, second.load.reserved_blocks) == (3, {"gateway": 5})
    assert second.load.pending_prefill_tokens == {"gateway": 300}
    assert third.draining
    assert second.capacity == first.capacity


async def test_measured_speeds_alone_are_no_news_to_the_watchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token changes them a little, and an update costs a gateway as much as many tokens."""
    monkeypatch.setattr(cache_monitor, "MIN_INTERVAL_S", 0.001)
    reads = 0

    async def read() -> CacheState:
        nonlocal reads
        reads += 1
        monitor.inter_token_latency_s.add(0.01 * reads)
        monitor.prefill_tokens_per_s.add(100 * reads, 1)
        monitor.touch()
        return cache_state(used=1 if reads < 50 else 2)

    monitor = CacheMonitor(read)
    await monitor.start()
    monkeypatch.setattr(
        monitor, "_published_s", float("inf")
    )  # the update per second of an idle engine is not due
    running = asyncio.create_task(monitor.run())
    async with aclosing(monitor.watch()) as states:
        first, second = await anext(states), await anext(states)
    running.cancel()
    assert (first.sequence, second.sequence) == (1, 2)
    assert second.load.used_blocks == 2
    assert second.load.inter_token_latency_s > first.load.inter_token_latency_s


async def test_the_engine_is_read_while_requests_run_without_a_signal_for_each_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache_monitor, "MIN_INTERVAL_S", 0)
    monkeypatch.setattr(cache_monitor, "PROGRESS_INTERVAL_S", 0.001)
    monkeypatch.setattr(cache_monitor, "IDLE_INTERVAL_S", 3600)
    used = 0

    async def read() -> CacheState:
        nonlocal used
        used += 1
        return cache_state(used)

    monitor = CacheMonitor(read)
    await monitor.start()
    running = asyncio.create_task(monitor.run())
    monitor.reservations.hold("request", "gateway", RequestNeed(3, 3), 128, blocks=1, pending_tokens=3)
    monitor.touch()
    async with aclosing(monitor.watch()) as states:
        seen = [(await anext(states)).load.used_blocks for _ in range(5)]
        assert seen == [1, 2, 3, 4, 5]
        monitor.reservations.release("request")
        monitor.touch()
        await asyncio.sleep(0.05)
        last = monitor.snapshot.sequence
        await asyncio.sleep(0.05)
        assert monitor.snapshot.sequence == last, "an engine without requests is read rarely"
    running.cancel()


async def test_a_busy_engine_is_distinguished_from_a_hanging_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_monitor, "IDLE_INTERVAL_S", 0.02)
    answers = [cache_state(1)]

    async def read() -> CacheState:
        return answers.pop() if answers else await asyncio.Event().wait()

    monitor = CacheMonitor(read, step_timeout_s=0.5)
    await monitor.start()
    running = asyncio.create_task(monitor.run())
    async with aclosing(monitor.watch()) as states:
        seen = [await anext(states) for _ in range(4)]
        assert [state.sequence for state in seen] == [1, 2, 3, 4]
        assert {state.load.used_blocks for state in seen} == {1}
        last = seen[-1]
        with suppress(TimeoutError):
            while True:
                last = await asyncio.wait_for(anext(states), 1)
        assert last.sequence > 4
    running.cancel()
