"""All metrics that the application exports, with their names, units, help texts and labels.

Ray's metrics agent on each node exports them to Prometheus and adds Serve's labels `application`, `deployment` and
`replica`. `Metric.exported` is the name in Prometheus.
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
MAX_HELD = 64  # observations that wait to be recorded together


class MetricKind(Enum):
    """Prometheus metric types."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, eq=False)  # hashed by identity: its fields would take as long as the rest of a record
class Metric:
    """One metric; names end in their unit, and `boundaries` are the upper bounds of a histogram's buckets."""

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

CACHE_CAPACITY = _gauge(
    "cache_capacity_tokens",
    "Tokens the KV cache can hold, if layers with windows or states took none of its blocks.",
)
CACHE_TOKENS = _gauge(
    "cache_tokens",
    "Tokens of cache space by state: free is empty, evictable holds prefixes not in use, live is in use. "
    "The states sum to the capacity.",
    "state",
)
CACHE_RESERVED = _gauge(
    "cache_reserved_tokens", "Tokens of cache space reserved for admitted requests and not used yet."
)
CACHE_SAVED = _gauge(
    "cache_saved_bytes",
    "Memory saved by quantization: size of the cached tiles in fp16, less their actual size. Where layers have "
    "windows or states, their cached blocks and the most that running requests hold for them do not count.",
)
SLOT_CAPACITY = _gauge("side_pool_capacity_slots", "fp16 tiles of the side pool.")
SLOTS = _gauge(
    "side_pool_slots",
    "Slots in use: tail for a tile being filled, sink_live for a running request, sink_idle for a cached prefix.",
    "use",
)
ENGINE_REQUESTS = _gauge("engine_requests", "Requests inside the engine: running or waiting.", "state")
ENGINE_WAITING = _gauge(
    "engine_waiting_requests",
    "Requests waiting inside the engine, by reason: slots of the side pool, blocks of the cache, a prefix that another "
    "request computes, or their turn, limited by max_num_seqs and the token budget of a step.",
    "reason",
)
WAITING_PREFILL = _gauge("waiting_prefill_tokens", "Prompt tokens inside the engine not yet computed.")
PREFILL_SPEED = _gauge("prefill_tokens_per_second", "Measured prefill throughput.")
PROMPT_TOKENS = _counter("prompt_tokens", "Prompt tokens of requests that produced output.")
PREFIX_HIT_TOKENS = _counter("prefix_hit_tokens", "Prompt tokens found in the prefix cache.")
GENERATED_TOKENS = _counter("generated_tokens", "Tokens generated.")
QUANTIZED_TILES = _counter(
    "quantized_tiles",
    "Tiles that requests filled, over all layers and KV heads; recomputing a preempted request is not counted.",
)
PREEMPTIONS = _counter("preemptions", "Requests preempted: the engine freed their cache before they ended.")
DRAFTS = _counter(
    "draft_tokens", "Draft tokens of speculative decoding by result: accepted or rejected.", "result"
)
LOADED_TOKENS = _counter(
    "loaded_tokens", "Prompt tokens whose blocks a KV connector brought back into the cache."
)
MISSING_SINKS = _counter(
    "missing_sinks", "First tiles read from their quantized record because no slot was free."
)

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
    LOADED_TOKENS,
    DRAFTS,
    MISSING_SINKS,
)

REQUESTS = _counter("requests", "Requests that ended, by gRPC status.", "status")
REJECTS = _counter("rejects", "Requests rejected or failed, by reason.", "reason")
STREAMS = _gauge("open_requests", "Requests that have not ended.")
TTFT = _histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", _SECONDS)
ITL = _histogram(
    "inter_token_latency_seconds",
    "Time between two tokens of one request, as sent to the client.",
    _TOKEN_SECONDS,
)
QUEUED_REQUESTS = _gauge(
    "queued_requests",
    "Requests waiting in the gateway, by reason: blocks of a cache, slots of a side pool, a place in a batch "
    "(max_num_seqs), a reachable replica, or their turn behind others.",
    "reason",
)
QUEUED_TOKENS = _gauge(
    "queued_tokens", "Cache space that requests waiting in the gateway are expected to take."
)
QUEUE_WAIT = _histogram(
    "queue_wait_seconds", "Time in the gateway's queue, for requests that had to wait.", _SECONDS
)
RESUMES = _counter("resumes", "Resumptions of streams on another replica after theirs was lost.")
PREFILLS = _counter(
    "prefills",
    "Prompts given to replicas that only compute prompts, by result: done, or failed, so that they, or what the "
    "store has not taken, were computed where they were answered.",
    "result",
)
BREAKER = _gauge(
    "breaker_state",
    "Circuit breaker of a replica: 0 closed, it gets all requests; 1 half-open, a probe; 2 open, none.",
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
    PREFILLS,
    BREAKER,
    TTFT,
    ITL,
    DURATION,
    DECISION,
)
ALL_METRICS = (*ENGINE_METRICS, *GATEWAY_METRICS)


class Recorder(Protocol):
    """Sink of measured values."""

    def add(self, metric: Metric, amount: float = 1, **labels: str) -> None:
        """Increase a counter by `amount`; zero is ignored."""

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge."""

    def observe(self, metric: Metric, value: float) -> None:
        """Add a value to a histogram; it may be recorded with the next `flush` only."""

    def flush(self) -> None:
        """Record what has been observed."""


class RayRecorder:
    """Records through Ray; create it inside a Serve replica, so that Serve's labels are added.

    Observations are recorded together: one by one, between other work, each takes several times as long.

    Args:
        metrics: the metrics that will be recorded.
    """

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._instruments = {metric: _instrument(metric) for metric in metrics}
        self._observed: list[tuple[Metric, float]] = []

    def add(self, metric: Metric, amount: float = 1, **labels: str) -> None:
        if amount > 0:  # Ray refuses zero
            self._instruments[metric].inc(amount, labels)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        self._instruments[metric].set(value, labels)

    def observe(self, metric: Metric, value: float) -> None:
        self._observed.append((metric, value))
        if len(self._observed) == MAX_HELD:
            self.flush()

    def flush(self) -> None:
        observed, self._observed = self._observed, []
        for metric, value in observed:
            self._instruments[metric].observe(value)


async def record_forever(record: Callable[[], None]) -> None:
    """Call `record` periodically: Ray's agents drop a gauge that has not been set for a while."""
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
    """Count waiting requests by what they lack; the rest of `load.waiting_requests` wait for their turn."""
    return {
        "slots": load.waiting_for_slots,
        "blocks": load.waiting_for_blocks,
        "prefix": load.waiting_for_prefix,
    }
