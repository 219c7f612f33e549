"""OpenTelemetry spans of requests, from the client through the gateway to the engine.

The trace context travels in the W3C header `traceparent`: over HTTP from clients, in gRPC metadata from clients and
from gateways to engines.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import NoOpTracerProvider, Span, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.config import TracingConfig
from serve_app.routing import Decision

_propagator = TraceContextTextMapPropagator()


class Tracing:
    """Creates the spans of one process.

    Args:
        service: name of the service in traces.
        instance: id of this replica of the service.
        config: OTLP endpoint and sampling; None disables tracing.
        exporter: replaces the OTLP exporter.
    """

    def __init__(
        self, service: str, instance: str, config: TracingConfig | None, exporter: SpanExporter | None = None
    ) -> None:
        self._provider = None if config is None else _provider(service, instance, config, exporter)
        self.tracer: Tracer = (self._provider or NoOpTracerProvider()).get_tracer("serve_app")

    def close(self) -> None:
        """Export pending spans."""
        if self._provider is not None:
            self._provider.shutdown()


def _provider(
    service: str, instance: str, config: TracingConfig, exporter: SpanExporter | None
) -> TracerProvider:
    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(config.sample_ratio),
        resource=Resource({SERVICE_NAME: service, SERVICE_INSTANCE_ID: instance}),
        shutdown_on_exit=False,
    )
    otlp = exporter or OTLPSpanExporter(endpoint=config.otlp_endpoint)  # http:// or https:// decides on TLS
    provider.add_span_processor(
        BatchSpanProcessor(otlp, schedule_delay_millis=config.export_interval_s * 1000)
    )
    return provider


def adopt_parent(headers: Iterable[tuple[str, str | bytes]]) -> None:
    """Make the caller's span, if `headers` carry one, the parent of the spans that this task starts."""
    carrier = {key: value for key, value in headers if isinstance(value, str)}
    if "traceparent" in carrier:
        otel_context.attach(_propagator.extract(carrier))


def headers_of(span: Span) -> tuple[tuple[str, str], ...]:
    """Return gRPC metadata that makes `span` the parent of the callee's spans."""
    if not span.get_span_context().is_valid:
        return ()
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, set_span_in_context(span))
    return tuple(carrier.items())


def trace_id_of(span: Span) -> str | None:
    """Return the id of the trace, or None if `span` is not sampled."""
    context = span.get_span_context()
    return f"{context.trace_id:032x}" if context.trace_flags.sampled else None


def explanation(decision: Decision) -> Mapping[str, Any]:
    """Return a routing decision as span attributes: the chosen replica, and each candidate's cost terms as JSON."""
    candidates = [json.dumps(candidate.exported(), default=_plain) for candidate in decision.explain()]
    chosen = decision.chosen.replica_id if decision.chosen is not None else ""
    return {"kvarn.routing.replica_id": chosen, "kvarn.routing.candidates": candidates}


def _plain(value: object) -> object:
    return value.value if isinstance(value, Enum) else str(value)


class TraceContext:
    """ASGI middleware: `adopt_parent` for HTTP requests."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = scope["headers"]
            if any(key == b"traceparent" for key, _ in headers):
                adopt_parent((key.decode("latin-1"), value.decode("latin-1")) for key, value in headers)
        await self._app(scope, receive, send)
