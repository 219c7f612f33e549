"""Every metric the application exports: name, unit, meaning and labels, in one place.

Ray's metrics agent on each node exports them to Prometheus and adds Serve's labels `application`, `deployment` and
`replica`. `Metric.exported` is the name there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from kvarn.v1 import cache_pb2
from serve_app.routing import CacheLoad

RECORD_INTERVAL_S = 2.0


class MetricKind(Enum):
    """Prometheus's kinds of metric."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Metric:
    """One metric; names end in their unit, and `boundaries` are upper bounds of a histogram's buckets."""

    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """The name in Prometheus."""
        return f"ray_{self.name}_total" if self.kind is MetricKind.COUNTER else f"ray_{self.name}"


def _counter(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(f"kvarn_{name}", MetricKind.COUNTER, meaning, labels)


def _gauge(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(f"kvarn_{name}", MetricKind.GAUGE, meaning, labels)


def _histogram(name: str, meaning: str, boundaries: tuple[float, ...]) -> Metric:
    return Metric(f"kvarn_{name}", MetricKind.HISTOGRAM, meaning, (), boundaries)


_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0)
_DECISION_SECONDS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 0.1)

CACHE_CAPACITY = _gauge("cache_capacity_tokens", "Tokens the KV cache can hold.")
CACHE_TOKENS = _gauge(
    "cache_tokens",
    "Tokens of cache space by state: free holds nothing, evictable holds prefixes nobody uses, live is in use. "
    "The states sum to the capacity.",
    "state",
)
CACHE_RESERVED = _gauge(
    "cache_reserved_tokens", "Tokens of cache space promised to admitted requests that they do not use yet."
)
CACHE_SAVED = _gauge("cache_saved_bytes", "Memory that what the cache holds would take more of in fp16.")
SLOT_CAPACITY = _gauge("side_pool_capacity_slots", "fp16 tiles of the side pool.")
SLOTS = _gauge(
    "side_pool_slots",
    "Slots in use: tail is being filled, sink_live belongs to a running request, sink_idle to a cached prefix.",
    "use",
)
ENGINE_REQUESTS = _gauge("engine_requests", "Requests inside the engine: running or waiting.", "state")
ENGINE_WAITING = _gauge(
    "engine_waiting_requests",
    "Requests that wait inside the engine, by what for: slots of the side pool, blocks of the cache, a prefix that "
    "another request computes, or their turn, which max_num_seqs and the tokens of a step limit.",
    "reason",
)
WAITING_PREFILL = _gauge("waiting_prefill_tokens", "Prompt tokens inside the engine not yet computed.")
PREFILL_SPEED = _gauge("prefill_tokens_per_second", "Measured speed of computing prompts.")
PROMPT_TOKENS = _counter("prompt_tokens", "Prompt tokens of requests that produced output.")
PREFIX_HIT_TOKENS = _counter("prefix_hit_tokens", "Of the prompt tokens, those found in the prefix cache.")
GENERATED_TOKENS = _counter("generated_tokens", "Tokens generated.")
QUANTIZED_TILES = _counter(
    "quantized_tiles",
    "Tiles that requests filled, over all layers and KV heads; computing a preempted request again is not counted.",
)
PREEMPTIONS = _counter("preemptions", "Requests whose cache the engine gave up before they ended.")
MISSING_SINKS = _counter("missing_sinks", "First tiles read from their record for want of a slot.")

ENGINE_METRICS = (
    CACHE_CAPACITY,
    CACHE_TOKENS,
    CACHE_RESERVED,
    CACHE_SAVED,
    SLOT_CAPACITY,
    SLOTS,
    ENGINE_REQUESTS,
    ENGINE_WAITING,
    WAITING_PREFILL,
    PREFILL_SPEED,
    PROMPT_TOKENS,
    PREFIX_HIT_TOKENS,
    GENERATED_TOKENS,
    QUANTIZED_TILES,
    PREEMPTIONS,
    MISSING_SINKS,
)

REQUESTS = _counter("requests", "Requests that ended, by gRPC status.", "status")
REJECTS = _counter("rejects", "Requests refused or failed, by reason.", "reason")
STREAMS = _gauge("open_requests", "Requests that have not ended.")
TTFT = _histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", _SECONDS)
ITL = _histogram(
    "inter_token_latency_seconds",
    "Time between two tokens of one request, as sent to the client.",
    _TOKEN_SECONDS,
)
QUEUED_REQUESTS = _gauge(
    "queued_requests",
    "Requests that wait in the gateway, by what for: blocks of a cache, slots of a side pool, a place in a batch "
    "(max_num_seqs), replicas that answer, or their turn behind others.",
    "reason",
)
QUEUED_TOKENS = _gauge("queued_tokens", "Cache space that what waits in the gateway will probably take.")
QUEUE_WAIT = _histogram(
    "queue_wait_seconds", "Time in the gateway's queue, of requests that had to wait.", _SECONDS
)
RESUMES = _counter("resumes", "Times a stream lost its replica and went on at another.")
BREAKER = _gauge(
    "breaker_state",
    "What the gateway sends a replica after failures: 0 closed, everything; 1 half open, a probe; 2 open, nothing.",
    "replica_id",
)
DURATION = _histogram("request_duration_seconds", "From a request's arrival to its end.", _SECONDS)
DECISION = _histogram("routing_decision_seconds", "Time taken to choose a replica.", _DECISION_SECONDS)

GATEWAY_METRICS = (
    REQUESTS,
    REJECTS,
    STREAMS,
    QUEUED_REQUESTS,
    QUEUED_TOKENS,
    QUEUE_WAIT,
    RESUMES,
    BREAKER,
    TTFT,
    ITL,
    DURATION,
    DECISION,
)
ALL_METRICS = (*ENGINE_METRICS, *GATEWAY_METRICS)


class Recorder(Protocol):
    """Where measured values go."""

    def add(self, metric: Metric, amount: float = 1, **labels: str) -> None:
        """Count `amount` more; zero is ignored."""

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Give a gauge its value."""

    def observe(self, metric: Metric, value: float) -> None:
        """Put a value into a histogram."""


class RayRecorder:
    """Records through Ray; create it inside a Serve replica, so that Serve's labels are added.

    Args:
        metrics: those that will be recorded.
    """

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._instruments = {metric: _instrument(metric) for metric in metrics}

    def add(self, metric: Metric, amount: float = 1, **labels: str) -> None:
        if amount > 0:  # Ray refuses zero
            self._instruments[metric].inc(amount, labels)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        self._instruments[metric].set(value, labels)

    def observe(self, metric: Metric, value: float) -> None:
        self._instruments[metric].observe(value)


async def record_forever(record: Callable[[], None]) -> None:
    """Call `record` again and again: Ray's agents forget a gauge that is not set for a while."""
    while True:
        record()
        await asyncio.sleep(RECORD_INTERVAL_S)


def _instrument(metric: Metric) -> Any:
    from ray.serve import metrics

    match metric.kind:
        case MetricKind.COUNTER:
            return metrics.Counter(metric.name, metric.help, tag_keys=metric.labels)
        case MetricKind.GAUGE:
            return metrics.Gauge(metric.name, metric.help, tag_keys=metric.labels)
        case MetricKind.HISTOGRAM:
            return metrics.Histogram(metric.name, metric.help, boundaries=list(metric.boundaries))


def waiting_for(load: CacheLoad | cache_pb2.CacheLoad) -> dict[str, int]:
    """QueuedRequest requests by what they lack; all others of `load.waiting_requests` wait for their turn."""
    return {
        "slots": load.waiting_for_slots,
        "blocks": load.waiting_for_blocks,
        "prefix": load.waiting_for_prefix,
    }
