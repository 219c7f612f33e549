"""The live console: one page, and the server-sent events that update it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, RedirectResponse, StreamingResponse

from kvarn.v1 import cluster_pb2
from serve_app.gateway.admission_queue import AdmissionQueue
from serve_app.gateway.hot_prefixes import HotPrefix
from serve_app.gateway.observation import Observation, Observer
from serve_app.observability.metrics import waiting_for
from serve_app.request.event_relay import event_text
from serve_app.routing import ReplicaState
from serve_app.rpc.wire import replica_status

PAGE = Path(__file__).with_name("console.html")
MIN_INTERVAL_S = 0.25
MAX_INTERVAL_S = 1.0
SHOWN_STREAMS = 12
SHOWN_PREFIXES = 8
PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
Watch = Callable[[], AsyncGenerator[cluster_pb2.WatchCacheResponse, None]]


def console(view: Callable[[], dict[str, Any]], watch: Watch) -> APIRouter:
    """Return the routes of the page and of its events.

    Args:
        view: returns what the page shows now.
        watch: the feed of `Cluster.WatchCache`, which reports changes of the replicas.
    """
    router = APIRouter(include_in_schema=False)
    page = PAGE.read_text()

    @router.get("/")
    async def home() -> RedirectResponse:
        return RedirectResponse("console")

    @router.get("/console")
    async def show() -> HTMLResponse:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    @router.get("/console/events")
    async def events() -> StreamingResponse:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(_events(view, watch), media_type="text/event-stream", headers=headers)

    return router


async def _events(view: Callable[[], dict[str, Any]], watch: Watch) -> AsyncGenerator[str, None]:
    """Yield the view when it may have changed, at most four times and at least once per second."""
    changed = asyncio.Event()
    following = asyncio.create_task(_follow(watch, changed))
    try:
        while not following.done():
            yield event_text(json.dumps(view(), separators=(",", ":")))
            changed.clear()
            await asyncio.sleep(MIN_INTERVAL_S)
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), MAX_INTERVAL_S - MIN_INTERVAL_S)
    finally:
        following.cancel()


async def _follow(watch: Watch, changed: asyncio.Event) -> None:
    async with aclosing(watch()) as changes:
        async for _ in changes:
            changed.set()
    changed.set()


def view(
    model_name: str, replicas: list[ReplicaState], observer: Observer, queue: AdmissionQueue
) -> dict[str, Any]:
    """Return what the page shows, as JSON values; sizes are in tokens unless their name says otherwise."""
    streams = sorted(observer.open, key=lambda observation: observation.age_s)
    return {
        "model": model_name,
        "replicas": [_replica(replica) for replica in replicas],
        "open_requests": len(streams),
        "streams": [_stream(observation) for observation in streams[-SHOWN_STREAMS:]],
        "queue": {"requests": len(queue), "tokens": queue.tokens},
        "first_token_s": observer.first_tokens.p90_s(),
        "rejects": dict(observer.rejections),
        "prefixes": [_prefix(prefix) for prefix in observer.prefixes.hottest(SHOWN_PREFIXES)],
    }


def _replica(replica: ReplicaState) -> dict[str, Any]:
    capacity, load = replica.snapshot.capacity, replica.snapshot.load
    tile = capacity.tile_tokens
    return {
        "id": replica.replica_id,
        "status": cluster_pb2.ReplicaStatus.Name(replica_status(replica))
        .removeprefix("REPLICA_STATUS_")
        .lower(),
        "breaker": replica.breaker.name.lower(),
        "is_prefill": capacity.is_prefill,
        "cache_dtype": capacity.cache_dtype,
        "capacity": capacity.total_blocks * tile,
        "live": load.used_blocks * tile,
        "evictable": load.evictable_blocks * tile,
        "free": load.free_blocks * tile,
        "reserved": replica.reserved_blocks * tile,
        "slots": capacity.total_slots,
        "tails": load.tail_slots_used,
        "sinks_live": load.sink_slots_used,
        "sinks_idle": load.sink_slots_idle,
        "running": load.running_requests,
        "waiting": load.waiting_requests,
        "waiting_for": waiting_for(load),
        "waiting_prefill": load.waiting_prefill_tokens,
        "prefill_tokens_per_s": load.prefill_tokens_per_s,
        "inter_token_latency_s": load.inter_token_latency_s,
        "preemptions": load.preemptions,
        "drafts_proposed": load.drafts_proposed,
        "drafts_accepted": load.drafts_accepted,
        "loaded": load.loaded_tokens,
        "load_tokens_per_s": load.loaded_tokens / load.loading_s if load.loading_s else 0.0,
    }


def _stream(observation: Observation) -> dict[str, Any]:
    return {
        "id": observation.request_id,
        "tenant": observation.tenant,
        "replica": observation.replica_id,
        "prompt": observation.usage.prompt_tokens,
        "cached": observation.usage.cached_tokens,
        "completion": observation.usage.completion_tokens,
        "age_s": round(observation.age_s, 1),
    }


def _prefix(prefix: HotPrefix) -> dict[str, Any]:
    return {
        "name": prefix.name,
        "requests": prefix.requests,
        "shared": prefix.shared_tokens,
        "hit_share": prefix.cached_tokens / prefix.prompt_tokens,
        "replicas": sorted(prefix.replicas),
    }
