"""Observability of a gateway's requests: metrics, a span per request, and one JSON log line per request.

Neither prompts nor outputs nor keys appear in any of them.
"""

from __future__ import annotations

import json
import time
from asyncio import CancelledError
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import grpc
from opentelemetry.trace import SpanKind, Status, StatusCode

from kvarn.v1 import inference_pb2
from serve_app.gateway.admission_queue import QUEUE_REASONS, AdmissionQueue
from serve_app.gateway.hot_prefixes import HotPrefixes, prefix_id
from serve_app.observability import metrics, tracing
from serve_app.observability.demand import RecentLatencies
from serve_app.observability.metrics import Recorder
from serve_app.observability.tracing import Tracing
from serve_app.request.request_errors import RequestError
from serve_app.routing import Caller, Decision, Router

Log = Callable[[str], None]


def log_to_stdout(line: str) -> None:
    """Write a line to standard output, which Ray collects with its logs; `logging` would take five times as long."""
    with suppress(OSError, ValueError):  # a request must not fail because its log line cannot be written
        print(line, flush=True)


class Observer:
    """Observes every request of one gateway.

    Args:
        recorder: takes the metrics.
        spans: creates the spans.
        log: takes one line of JSON per request; None for no log.
    """

    def __init__(self, recorder: Recorder, spans: Tracing, log: Log | None = None) -> None:
        self.recorder = recorder
        self.tracer = spans.tracer
        self.log = log
        self.first_tokens = RecentLatencies()
        self.prefixes = HotPrefixes()
        self.rejections: Counter[str] = Counter()
        self.open: set[Observation] = set()

    def begin(self, request_id: str, caller: Caller) -> Observation:
        """Start observing a request from `caller`, which named it `request_id` or left that empty."""
        return Observation(self, request_id, caller)

    def count_rejection(self, reason: str) -> None:
        """Count a request that was rejected or failed, whether or not it was observed."""
        self.recorder.add(metrics.REJECTS, reason=reason)
        self.rejections[reason] += 1


class Observation:
    """One request from its arrival to its end; its `with` block spans it."""

    def __init__(self, observer: Observer, request_id: str, caller: Caller) -> None:
        self._observer = observer
        self._recorder = observer.recorder
        self._request_id = request_id
        self._caller = caller
        self._start = time.perf_counter()
        self._last = 0.0
        self._first_token_s: float | None = None
        self._response = inference_pb2.GenerateResponse()
        self._relayed_tokens = 0  # since that response
        self._prompt: tuple[Sequence[int], str] | None = None
        self._span = observer.tracer.start_span("generate", kind=SpanKind.SERVER)

    @property
    def request_id(self) -> str:
        """The id from the caller, or the one the gateway generated."""
        return self._response.request_id or self._request_id

    @property
    def tenant(self) -> str:
        """The caller's tenant."""
        return self._caller.tenant

    @property
    def replica_id(self) -> str:
        """The replica of the latest output; empty before the first."""
        return self._response.replica_id

    @property
    def usage(self) -> inference_pb2.Usage:
        """Token counts so far."""
        counted = inference_pb2.Usage()
        counted.CopyFrom(self._response.usage)
        counted.completion_tokens += self._relayed_tokens
        return counted

    @property
    def age_s(self) -> float:
        """Seconds since the request arrived."""
        return time.perf_counter() - self._start

    def tokenized(self, token_ids: Sequence[int], adapter: str = "", salt: str = "") -> None:
        """Note the prompt, its LoRA adapter and its cache salt; what remains is an opaque name of its prefix."""
        self._prompt = token_ids, f"{len(adapter)}:{adapter}{salt}"

    def queued(self, waited_s: float) -> None:
        """Record that the request left the queue, admitted or rejected, after `waited_s`; 0 if it did not wait."""
        if waited_s:
            self._recorder.observe(metrics.QUEUE_WAIT, waited_s)
            self._span.add_event("left the queue", {"kvarn.queued_s": waited_s})

    def resumed(self) -> None:
        """Record that the replica was lost and another one resumes the output."""
        self._recorder.add(metrics.RESUMES)
        self._span.add_event("resumed")

    def routed(self, decision: Decision, decision_s: float) -> None:
        """Record a routing decision, which took `decision_s` seconds."""
        self._recorder.observe(metrics.DECISION, decision_s)
        if self._span.is_recording():
            self._span.set_attributes(tracing.explanation(decision))

    def headers(self) -> tuple[tuple[str, str], ...]:
        """Return the trace context for calls to engines."""
        return tracing.headers_of(self._span)

    def __enter__(self) -> Observation:
        self._observer.open.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._observer.open.discard(self)
        if isinstance(error, RequestError):
            self._end(error.status, error.reason)
        elif error is None or self._response.finish_reason:
            self._end(grpc.StatusCode.OK)
        elif isinstance(error, CancelledError | GeneratorExit):  # the caller disconnected
            self._end(grpc.StatusCode.CANCELLED)
        else:
            self._end(grpc.StatusCode.INTERNAL, RequestError.reason)

    def count(self, response: inference_pb2.GenerateResponse) -> None:
        """Account for a response that is about to be sent to the caller."""
        now = time.perf_counter()
        tokens = len(response.token_ids)
        self._response = response
        self._relayed_tokens = 0
        if tokens and self._first_token_s is None:
            self._first_token_s = now - self._start
            self._recorder.observe(metrics.TTFT, self._first_token_s)
            self._observer.first_tokens.add(self._first_token_s)
            self._span.add_event("first token")
        elif tokens:
            self._recorder.observe(metrics.ITL, (now - self._last) / tokens)
        self._last = now

    def count_relayed(self, tokens: int) -> None:
        """Account for `tokens` tokens, not the first ones, that were relayed to the caller."""
        now = time.perf_counter()
        self._relayed_tokens += tokens
        if tokens:
            self._recorder.observe(metrics.ITL, (now - self._last) / tokens)
        self._last = now

    def _end(self, status: grpc.StatusCode, reason: str = "") -> None:
        duration_s = self.age_s
        self._recorder.add(metrics.REQUESTS, status=status.name)
        self._recorder.observe(metrics.DURATION, duration_s)
        if reason:
            self._observer.count_rejection(reason)
        if self._prompt is not None and self._first_token_s is not None:
            self._count_prefix(*self._prompt)
        log, is_recording = self._observer.log, self._span.is_recording()
        if log is not None or is_recording:
            record = self._record(status, reason, duration_s)
            if log is not None:
                log(json.dumps({"time": datetime.now(UTC).isoformat(), **record}))
            if is_recording:
                self._trace(record, reason)
        self._span.end()

    def _count_prefix(self, token_ids: Sequence[int], salt: str) -> None:
        prefix, usage = prefix_id(token_ids, salt), self.usage
        if prefix is not None:
            self._observer.prefixes.count(prefix, self.replica_id, usage.prompt_tokens, usage.cached_tokens)

    def _trace(self, record: dict[str, Any], reason: str) -> None:
        self._span.set_attributes(
            {f"kvarn.{key}": value for key, value in record.items() if value is not None}
        )
        if reason:
            self._span.set_status(Status(StatusCode.ERROR, reason))

    def _record(self, status: grpc.StatusCode, reason: str, duration_s: float) -> dict[str, Any]:
        usage = self.usage
        return {
            "request_id": self.request_id,
            "trace_id": tracing.trace_id_of(self._span),
            "tenant": self.tenant,
            "replica_id": self.replica_id or None,
            "status": status.name,
            "reason": reason or None,
            "finish_reason": _finish_reason(self._response),
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "time_to_first_token_s": _rounded(self._first_token_s),
            "duration_s": _rounded(duration_s),
        }


def _finish_reason(response: inference_pb2.GenerateResponse) -> str | None:
    if not response.finish_reason:
        return None
    return _FINISH_REASONS[response.finish_reason]


_FINISH_REASONS = {
    number: name.removeprefix("FINISH_REASON_").lower() for name, number in inference_pb2.FinishReason.items()
}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


class GatewayGauges:
    """Gauges of one gateway, recorded by its observer's recorder.

    Args:
        observer: holds the open requests.
        queue: holds the requests that wait.
        router: holds the state of the replicas.
    """

    def __init__(self, observer: Observer, queue: AdmissionQueue, router: Router) -> None:
        self._observer = observer
        self._queue = queue
        self._router = router

    def record(self) -> None:
        """Set all gauges to their current values."""
        recorder = self._observer.recorder
        recorder.set(metrics.STREAMS, len(self._observer.open))
        waiting = self._queue.by_reason()
        for reason in QUEUE_REASONS:
            recorder.set(metrics.QUEUED_REQUESTS, waiting[reason], reason=reason)
        recorder.set(metrics.QUEUED_TOKENS, self._queue.tokens)
        for replica in self._router.replicas(time.monotonic()):
            recorder.set(metrics.BREAKER, replica.breaker.value, replica_id=replica.replica_id)
        recorder.flush()
