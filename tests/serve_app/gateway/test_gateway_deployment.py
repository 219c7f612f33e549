"""The wiring of a gateway: what a change of a replica reaches, and when the gateway takes requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

from kvarn.model import DEFAULT_MODEL
from serve_app.config import GatewayConfig, ObservabilityConfig
from serve_app.gateway.gateway_deployment import GatewayParts, wire_gateway
from serve_app.routing import CacheCapacity, CacheLoad, CacheSnapshot

READY = CacheSnapshot(1, 1, CacheCapacity("auto", 16, 1, 100, 4096), CacheLoad(free_blocks=100))


@asynccontextmanager
async def wired(wake_engines: Callable[[], Awaitable[object]] | None = None) -> AsyncIterator[GatewayParts]:
    config = GatewayConfig.model_validate({"port": 0, "http": {"port": 0}})
    parts = wire_gateway(
        "gateway",
        DEFAULT_MODEL,
        "small",
        config=config,
        observability=ObservabilityConfig(),
        wake_engines=wake_engines,
    )
    try:
        yield parts
    finally:
        await parts.fleet.close()


async def test_a_change_of_a_replica_reaches_watchers_and_health() -> None:
    async with wired() as parts, aclosing(parts.feed.watch()) as events:
        assert not (await anext(events)).snapshot.replicas
        answers: asyncio.Queue[bool] = asyncio.Queue()
        following = asyncio.create_task(parts.readiness.follow(answers.put))
        await parts.readiness.wait(0.01)
        assert not parts.readiness.is_ready()
        parts.router.update("one", READY, time.monotonic())
        parts.fleet._on_change("one")
        assert (await anext(events)).updated.replica_id == "one"
        assert await answers.get()
        parts.router.remove("one")
        parts.fleet._on_change("one")
        assert (await anext(events)).removed_replica_id == "one"
        assert not await answers.get()
        following.cancel()


async def test_a_gateway_that_can_start_a_replica_is_ready_without_one() -> None:
    async def wake() -> None:
        """Start nothing."""

    async with wired(wake) as parts:
        assert parts.readiness.is_ready()
        await parts.readiness.wait(60)
