"""Metrics, spans and the log line of requests: what they contain, and what they must not."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvarn.model import KvShape
from kvarn.v1 import inference_pb2, inference_pb2_grpc
from kvarn.v1.sampling_pb2 import SamplingParams
from serve_app.config import RoutingConfig, TracingConfig
from serve_app.engine.engine_metrics import EngineMetrics
from serve_app.gateway.admission_queue import QUEUE_REASONS, AdmissionQueue
from serve_app.gateway.generation import Generation
from serve_app.gateway.observation import GatewayGauges, Observation, Observer
from serve_app.observability import metrics, tracing
from serve_app.observability.metrics import ALL_METRICS, MetricKind
from serve_app.observability.tracing import Tracing
from serve_app.request.request_errors import CapacityError, RequestError
from serve_app.routing import (
    BreakerState,
    CacheCapacity,
    CacheLoad,
    CacheSnapshot,
    Caller,
    Candidate,
    Decision,
    Rejection,
    RequestNeed,
    Router,
    token_array,
)
from serve_app.rpc.grpc_server import GrpcServer
from tests.support.observing import Remembered, through

TRACING = TracingConfig(otlp_endpoint="http://127.0.0.1:1")
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
HERE = Candidate("here", blocks=2, occupancy_after=0.25)
FULL = Candidate("full", blocks=2, occupancy_after=1.5, rejection=Rejection.NO_ROOM)
TEXT = "a secret answer"


class Watched:
    """An observer whose metrics, spans and log lines can be inspected."""

    def __init__(self) -> None:
        self.recorder = Remembered()
        self._exporter = InMemorySpanExporter()
        self._spans = Tracing("test", "one", TRACING, self._exporter)
        self.lines: list[str] = []
        self._observer = Observer(self.recorder, self._spans, self.lines.append)

    def begin(self) -> Observation:
        return self._observer.begin("mine", Caller("acme", 0))

    @property
    def open_requests(self) -> float:
        return self.gauges(Router("me"))[metrics.STREAMS,]

    def gauges(self, router: Router, queue: AdmissionQueue | None = None) -> dict[Any, float]:
        queue = queue or AdmissionQueue(router, RoutingConfig())
        GatewayGauges(self._observer, queue, router).record()
        return self.recorder.values

    @property
    def spans(self) -> Any:
        self._spans.close()
        return self._exporter.get_finished_spans()

    @property
    def line(self) -> dict[str, Any]:
        (line,) = self.lines
        record: dict[str, Any] = json.loads(line)
        return record


@pytest.fixture
def watched() -> Watched:
    return Watched()


async def answer(error: Exception | None = None) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
    completion = 0
    for tokens in (1, 2, 1):
        completion += tokens
        yield inference_pb2.GenerateResponse(
            request_id="mine",
            replica_id="here",
            token_ids=range(tokens),
            text=TEXT,
            finish_reason=inference_pb2.FINISH_REASON_LENGTH if completion == 4 and not error else None,
            usage=inference_pb2.Usage(prompt_tokens=300, cached_tokens=256, completion_tokens=completion),
        )
    if error is not None:
        raise error


async def test_an_answered_request_is_measured_traced_and_logged(watched: Watched) -> None:
    observation = watched.begin()
    observation.routed(Decision(HERE, [Rejection.NO_ROOM], lambda: [HERE, FULL]), 0.001)
    received = [response async for response in through(observation, answer())]
    assert len(received) == 3
    recorder = watched.recorder
    assert recorder.values[metrics.REQUESTS, "OK"] == 1
    watched.gauges(Router("me"))
    assert recorder.observed[metrics.DECISION] == [0.001]
    assert {m: len(v) for m, v in recorder.observed.items()} == {
        metrics.DECISION: 1,
        metrics.TTFT: 1,
        metrics.ITL: 2,
        metrics.DURATION: 1,
    }
    line = watched.line
    assert (
        line.items()
        >= {
            "request_id": "mine",
            "tenant": "acme",
            "replica_id": "here",
            "status": "OK",
            "reason": None,
            "finish_reason": "length",
            "prompt_tokens": 300,
            "cached_tokens": 256,
            "completion_tokens": 4,
        }.items()
    )
    assert 0 <= line["time_to_first_token_s"] <= line["duration_s"]
    (span,) = watched.spans
    assert line["trace_id"] == f"{span.context.trace_id:032x}"
    assert span.attributes["kvarn.routing.replica_id"] == "here"
    here, full = map(json.loads, span.attributes["kvarn.routing.candidates"])
    assert (here["replica_id"], here["refusal"]) == ("here", None)
    assert (full["replica_id"], full["refusal"]) == ("full", "no room now")
    assert [event.name for event in span.events] == ["first token"]
    assert TEXT not in span.to_json() + json.dumps(line)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (CapacityError("No room."), "RESOURCE_EXHAUSTED", "no_room"),
        (ValueError("a secret"), "INTERNAL", "internal"),
    ],
)
async def test_a_failed_request_has_a_reason(
    watched: Watched, error: Exception, status: str, reason: str
) -> None:
    with pytest.raises(type(error)):
        async for _ in through(watched.begin(), answer(error)):
            pass
    assert watched.recorder.values[metrics.REQUESTS, status] == 1
    assert watched.recorder.values[metrics.REJECTS, reason] == 1
    line = watched.line
    assert (line["status"], line["reason"]) == (status, reason)
    (span,) = watched.spans
    assert span.status.description == reason
    assert "secret" not in span.to_json() + json.dumps(line)


def test_observations_are_recorded_together_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[float] = []

    class Instrument:
        def observe(self, value: float) -> None:
            recorded.append(value)

    monkeypatch.setattr(metrics, "_instrument", lambda metric: Instrument())
    recorder = metrics.RayRecorder([metrics.ITL])
    for value in range(metrics.MAX_HELD - 1):
        recorder.observe(metrics.ITL, value)
    assert recorded == []
    recorder.observe(metrics.ITL, metrics.MAX_HELD - 1)
    assert recorded == list(range(metrics.MAX_HELD))
    recorder.observe(metrics.ITL, metrics.MAX_HELD)
    recorder.flush()
    recorder.flush()
    assert recorded == list(range(metrics.MAX_HELD + 1))


async def test_time_in_the_queue_and_resumptions_are_measured(watched: Watched) -> None:
    for waited_s in (0.0, 1.5):
        watched.begin().queued(waited_s)
    watched.begin().resumed()
    watched.gauges(Router("me"))
    assert watched.recorder.observed[metrics.QUEUE_WAIT] == [1.5]
    assert watched.recorder.values[metrics.RESUMES,] == 1


@pytest.mark.parametrize(
    ("slots", "load", "reachable", "reason"),
    [
        (8, CacheLoad(used_blocks=4), True, "blocks"),
        (8, CacheLoad(free_blocks=4, tail_slots_used=7), True, "slots"),
        (8, CacheLoad(free_blocks=4, running_requests=3), True, "batch"),
        (8, CacheLoad(free_blocks=4), False, "replicas"),
    ],
)
async def test_the_reasons_for_waiting_in_the_queue_are_gauged(
    watched: Watched, slots: int, load: CacheLoad, reachable: bool, reason: str
) -> None:
    router = Router("me")
    capacity = CacheCapacity("kvarn_k4v2_g128", 128, 622_080, 4, 1024, slots, max_requests=3)
    router.update("one", CacheSnapshot(1, 1, capacity, load), time.monotonic())
    router.mark_reachable("one", reachable)
    queue = AdmissionQueue(router, RoutingConfig())
    generation = generation_of(router)
    waiting = asyncio.create_task(queue.admit(generation, tried=["another"]))
    await asyncio.sleep(0.05)
    assert queued(watched.gauges(router, queue)) == {reason: 1}
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


def generation_of(router: Router) -> Generation:
    generation = Generation(
        request_id="mine",
        caller=Caller(),
        prompt_token_ids=token_array([5] * 300),
        sampling=SamplingParams(max_tokens=84),
        cache_salt="",
        deadline_s=math.inf,
    )
    generation.begin(router)
    return generation


def queued(gauges: dict[Any, float]) -> dict[str, float]:
    """Requests in the queue by reason, without zeros."""
    counts = {key[1]: count for key, count in gauges.items() if key[0] is metrics.QUEUED_REQUESTS}
    assert counts.keys() == set(QUEUE_REASONS)
    return {reason: count for reason, count in counts.items() if count}


async def test_the_queue_and_the_breakers_are_gauged(watched: Watched) -> None:
    router = Router("me")
    capacity = CacheCapacity("kvarn_k4v2_g128", 128, 622_080, 4, 1024)
    for replica_id in ("full", "failing"):
        router.update(replica_id, CacheSnapshot(1, 1, capacity, CacheLoad(used_blocks=4)), time.monotonic())
    small = RequestNeed(1, 1)
    for number in range(3):
        router.update(
            "failing", CacheSnapshot(1, 2 + number, capacity, CacheLoad(free_blocks=4)), time.monotonic()
        )
        router.admit(f"r{number}", small, None, time.monotonic())
        router.failed(f"r{number}", time.monotonic())
    queue = AdmissionQueue(router, RoutingConfig())
    generation = generation_of(router)
    waiting = asyncio.create_task(queue.admit(generation))
    await asyncio.sleep(0)
    gauges = watched.gauges(router, queue)
    assert gauges[metrics.QUEUED_TOKENS,] == 384
    assert queued(gauges) == {"turn": 1}
    await asyncio.sleep(0.05)  # the queue has tried it
    assert queued(watched.gauges(router, queue)) == {"blocks": 1}
    assert gauges[metrics.BREAKER, "full"] == BreakerState.CLOSED.value == 0
    assert gauges[metrics.BREAKER, "failing"] == BreakerState.OPEN.value == 2
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    gauges = watched.gauges(router, queue)
    assert gauges[metrics.QUEUED_TOKENS,] == 0
    assert queued(gauges) == {}
    assert generation.queued_s > 0


async def test_a_caller_that_leaves_is_cancelled_unless_it_has_everything(watched: Watched) -> None:
    for read, status in ((1, "CANCELLED"), (3, "OK")):
        responses = through(watched.begin(), answer())
        for _ in range(read):
            await anext(responses)
        assert watched.open_requests == 1
        await responses.aclose()
        assert watched.recorder.values[metrics.REQUESTS, status] == 1
    assert watched.open_requests == 0


def test_every_error_has_its_reason() -> None:
    kinds = RequestError.__subclasses__()
    assert kinds
    assert all("reason" in vars(kind) for kind in kinds)


class Downstream(inference_pb2_grpc.InferenceServicer):
    """A server whose spans must belong to its caller's trace."""

    def __init__(self, spans: Tracing) -> None:
        self._tracer = spans.tracer

    async def GenerateOnce(self, request: Any, context: Any) -> inference_pb2.GenerateOnceResponse:  # noqa: N802
        with self._tracer.start_as_current_span("downstream"):
            return inference_pb2.GenerateOnceResponse()


async def test_a_trace_continues_over_grpc() -> None:
    exporter = InMemorySpanExporter()
    spans = Tracing("test", "one", TRACING, exporter)
    server = GrpcServer("127.0.0.1:0", [])
    inference_pb2_grpc.add_InferenceServicer_to_server(Downstream(spans), server)  # type: ignore[no-untyped-call]
    port = await server.start()
    upstream = spans.tracer.start_span("upstream")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        await stub.GenerateOnce(inference_pb2.GenerateOnceRequest(), metadata=tracing.headers_of(upstream))
        await stub.GenerateOnce(inference_pb2.GenerateOnceRequest())
    upstream.end()
    await server.stop(0)
    spans.close()
    first, second, _ = exporter.get_finished_spans()
    assert first.parent.span_id == upstream.get_span_context().span_id
    assert first.context.trace_id == upstream.get_span_context().trace_id
    assert second.parent is None


def test_without_tracing_no_context_is_propagated() -> None:
    span = Tracing("test", "one", None).tracer.start_span("any")
    assert tracing.headers_of(span) == ()
    assert tracing.trace_id_of(span) is None


def test_the_states_of_the_cache_sum_to_its_capacity() -> None:
    recorder = Remembered()
    engine = EngineMetrics(recorder, KvShape(layers=30, kv_heads=3, head_dim=64))
    capacity = CacheCapacity("kvarn_k4v2_g128", 128, 622_080, 100, 1024, 8)
    load = CacheLoad(60, 30, 10, {"a": 12, "b": 3}, preemptions=2, sinks_missing=1)
    load = replace(load, waiting_requests=7, waiting_for_slots=4, waiting_for_prefix=2)
    load = replace(load, drafts_proposed=12, drafts_accepted=9, loaded_tokens=384)
    for sequence in (1, 2):
        engine.record(CacheSnapshot(1, sequence, capacity, load))
    values = recorder.values
    by_state = {state: values[metrics.CACHE_TOKENS, state] for state in ("free", "evictable", "live")}
    assert by_state == {"free": 7680, "evictable": 3840, "live": 1280}
    assert values[metrics.CACHE_CAPACITY,] == 12800
    reasons = ("slots", "blocks", "prefix", "turn")
    assert [values[metrics.ENGINE_WAITING, reason] for reason in reasons] == [4, 0, 2, 1]
    assert values[metrics.CACHE_RESERVED,] == 15 * 128
    fp16_block = 2 * 2 * 30 * 3 * 64 * 128
    assert values[metrics.CACHE_SAVED,] == 40 * (fp16_block - 622_080)
    assert values[metrics.PREEMPTIONS,] == 2
    assert values[metrics.MISSING_SINKS,] == 1
    assert values[metrics.LOADED_TOKENS,] == 384
    assert [values[metrics.DRAFTS, result] for result in ("accepted", "rejected")] == [9, 3]


def test_blocks_of_windows_and_states_save_nothing() -> None:
    recorder = Remembered()
    engine = EngineMetrics(recorder, KvShape(layers=30, kv_heads=3, head_dim=64))
    capacity = CacheCapacity("kvarn_k4v2_g128", 128, 622_080, 100, 1024, other_blocks=5, other_tokens=96)
    load = CacheLoad(60, 10, 30, running_requests=4, evictable_other_blocks=7)
    engine.record(CacheSnapshot(1, 1, capacity, load))
    saved_per_tile = 128 * 2 * 2 * 30 * 3 * 64 - 622_080
    assert recorder.values[metrics.CACHE_SAVED,] == (10 - 7 + 30 - 4 * 5) * saved_per_tile


def test_tiles_are_counted_for_quantized_caches_only() -> None:
    recorder = Remembered()
    engine = EngineMetrics(recorder, KvShape(layers=30, kv_heads=3, head_dim=64))
    engine.filled(2, "auto")
    engine.filled(2, "kvarn_k4v2_g128")
    assert recorder.values[metrics.QUANTIZED_TILES,] == 180


@pytest.mark.parametrize("metric", ALL_METRICS, ids=lambda metric: metric.name)
def test_names_follow_prometheus(metric: metrics.Metric) -> None:
    assert metric.name.startswith("kvarn_")
    assert metric.help.endswith(".")
    assert not metric.name.endswith("_total")  # Ray adds it to counters
    if metric.kind is MetricKind.HISTOGRAM:
        assert metric.name.endswith("_seconds")
        assert list(metric.boundaries) == sorted(metric.boundaries)
