"""Test doubles for metrics and traces: a recorder in memory, an OTLP collector, and a Prometheus scrape."""

from __future__ import annotations

import urllib.request
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator
from concurrent import futures
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import ray
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from kvarn.v1 import inference_pb2
from serve_app.gateway.observation import Observation
from serve_app.observability.metrics import Metric

Samples = dict[str, list[tuple[dict[str, str], float]]]


class Remembered:
    """A metrics recorder that keeps sums of counters, latest values of gauges and the flushed values of histograms."""

    def __init__(self) -> None:
        self.values: dict[tuple[Any, ...], float] = defaultdict(float)
        self.observed: dict[Metric, list[float]] = defaultdict(list)
        self._held: list[tuple[Metric, float]] = []

    def add(self, metric: Metric, amount: float = 1, **labels: str) -> None:
        assert set(labels) == set(metric.labels)
        self.values[(metric, *labels.values())] += amount

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        assert set(labels) == set(metric.labels)
        self.values[(metric, *labels.values())] = value

    def observe(self, metric: Metric, value: float) -> None:
        self._held.append((metric, value))

    def flush(self) -> None:
        for metric, value in self._held:
            self.observed[metric].append(value)
        self._held.clear()


async def through(
    observation: Observation, responses: AsyncGenerator[inference_pb2.GenerateResponse, None]
) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
    """Yield `responses` and count each in `observation`."""
    with observation:
        async with aclosing(responses):
            async for response in responses:
                observation.count(response)
                yield response


@dataclass
class Span:
    """A span as an OTLP collector receives it."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    events: list[str]
    error: str


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that keeps the spans it receives."""

    address: str = ""
    spans: list[Span] = field(default_factory=list)

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        for resource in request.resource_spans:
            service = attributes(resource.resource)["service.name"]
            for scope in resource.scope_spans:
                self.spans.extend(received(service, span) for span in scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()


def received(service: str, span: Any) -> Span:
    return Span(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        attributes(span),
        [event.name for event in span.events],
        span.status.message,
    )


def attributes(holder: Any) -> dict[str, Any]:
    return {item.key: plain(item.value) for item in holder.attributes}


def plain(value: Any) -> Any:
    if value.HasField("array_value"):
        return [plain(item) for item in value.array_value.values]
    return getattr(value, value.WhichOneof("value"))


@contextmanager
def otlp_collector() -> Iterator[Collector]:
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None)


def scraped() -> Samples:
    """Scrape the metrics agents of all nodes, as Prometheus does: name -> (labels, value) of each sample."""
    samples: Samples = defaultdict(list)
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            for family in text_string_to_metric_families(response.read().decode()):
                for sample in family.samples:
                    samples[sample.name].append((sample.labels, sample.value))
    return samples


def total(samples: Samples, name: str, **labels: str) -> float:
    """Return the sum of a metric's samples with `labels`."""
    return sum(value for found, value in samples.get(name, ()) if labels.items() <= found.items())
