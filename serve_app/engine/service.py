"""The Engine gRPC service: takes token ids and streams deltas from one vLLM engine."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
from opentelemetry.trace import Span
from vllm.exceptions import VLLMClientError
from vllm.inputs import tokens_input
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from kvarn.v1 import engine_pb2, engine_pb2_grpc, inference_pb2, sampling_pb2
from kvarn.vllm.access.constraints import ConstraintChecks, ConstraintError
from kvarn.vllm.kept_prefixes import keep_tokens
from kvarn.vllm.store.hand_over import HandOver
from serve_app.engine.cache_monitor import CacheMonitor
from serve_app.engine.call_server import CallServer, Write
from serve_app.engine.engine_metrics import EngineMetrics
from serve_app.engine.resumption import Resumption
from serve_app.engine.tile_log import TileLog
from serve_app.engine.watches import stream_cache, stream_tiles
from serve_app.observability.demand import Demand, DemandBook
from serve_app.observability.tracing import Tracing
from serve_app.request.request_errors import (
    BadRequestError,
    CapacityError,
    ModelNotFoundError,
    ReplicaUnavailableError,
)
from serve_app.request.sampling import to_vllm
from serve_app.request.structured_outputs import engine_reasoning
from serve_app.routing import RequestNeed, usable_tiles

if TYPE_CHECKING:
    from vllm import CompletionOutput, RequestOutput
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

SERVICE_NAME = engine_pb2.DESCRIPTOR.services_by_name["Engine"].full_name
MIN_MEASURED_TOKENS = 128  # a shorter prompt takes the time of a step, however few tokens it computes
MAX_SENTENCE_CHARACTERS = 1000  # gRPC statuses travel in headers, whose size is limited
_FINISH_REASONS = {
    "stop": inference_pb2.FINISH_REASON_STOP,
    "length": inference_pb2.FINISH_REASON_LENGTH,
    "abort": inference_pb2.FINISH_REASON_ABORT,
    "error": inference_pb2.FINISH_REASON_ERROR,
    "repetition": inference_pb2.FINISH_REASON_REPETITION,
}


class EngineService(engine_pb2_grpc.EngineServicer):
    """Serves gateways. Methods raise `RequestError`s, which `GrpcServer` and `CallServer` turn into statuses.

    All calls of a gateway share one stream; `_generate` runs each of them.
    """

    def __init__(
        self,
        engine: AsyncLLM,
        monitor: CacheMonitor,
        tiles: TileLog,
        metrics: EngineMetrics,
        spans: Tracing,
        demands: DemandBook,
        adapters: Mapping[str, LoRARequest] = MappingProxyType({}),
        hand_over: HandOver | None = None,
    ) -> None:
        self._engine = engine
        self._demands = demands
        self._adapters = adapters
        self._hand_over = hand_over
        self._monitor = monitor
        self._tiles = tiles
        self._metrics = metrics
        self._tracer = spans.tracer
        self._constraints = ConstraintChecks(engine)
        self._calls = CallServer(self._generate)

    async def Generate(  # noqa: N802
        self,
        requests: AsyncIterator[engine_pb2.EngineGenerateRequest],
        context: grpc.aio.ServicerContext,
    ) -> None:
        """Run a gateway's calls."""
        await self._calls.serve(context)

    def close(self) -> None:
        """Release the threads."""
        self._constraints.close()

    def drain(self) -> None:
        """Reject new calls, and end each stream once its running calls have ended."""
        self._calls.drain()

    async def _generate(self, request: engine_pb2.EngineRequest, write: Write) -> None:
        """Write a request's output; on cancellation, vLLM aborts the request and frees its blocks."""
        with (
            self._reservation(request) as reservation,
            _engine_errors(request.sampling_params.structured_outputs.WhichOneof("constraint")),
            self._tracer.start_as_current_span("engine generate", record_exception=False) as span,
        ):
            counts = _Counts(
                prompt=not (request.is_handed_over or request.hand_over), output=not request.hand_over
            )
            meter = _Meter(self._monitor, reservation, self._metrics, span, counts)
            async with aclosing(self._deltas(request, meter)) as deltas:
                async for delta in deltas:
                    await write(delta)

    async def WatchCache(  # noqa: N802
        self, request: engine_pb2.EngineWatchCacheRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Stream the cache's state: a snapshot at first and after a gap, deltas otherwise."""
        if self._engine.errored:
            raise ReplicaUnavailableError(_ENGINE_LOST)
        await stream_cache(self._monitor, context)

    async def ReportDemand(  # noqa: N802
        self, request: engine_pb2.ReportDemandRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.ReportDemandResponse:
        """Store the demand of a gateway's queued requests."""
        self._demands.take(request.gateway_id, Demand(request.queued_tokens, request.first_token_s))
        return engine_pb2.ReportDemandResponse()

    async def WatchTiles(  # noqa: N802
        self, request: engine_pb2.EngineWatchTilesRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Stream the tiles in the prefix cache: a snapshot at first, deltas otherwise."""
        if self._engine.errored:
            raise ReplicaUnavailableError(_ENGINE_LOST)
        await stream_tiles(self._tiles, context)

    async def _deltas(
        self, request: engine_pb2.EngineRequest, meter: _Meter
    ) -> AsyncGenerator[engine_pb2.EngineDelta, None]:
        if request.resume_token_ids:
            resumption = Resumption(request, self._engine.get_tokenizer())
            if resumption.is_complete:
                yield resumption.ending()
                return
            prompt, params = resumption.prompt, resumption.params
        else:
            resumption = None
            prompt, params = list(request.prompt_token_ids), to_vllm(request.sampling_params)
            await self._constraints.check(params)
        hand_over = self._hand_over if request.hand_over else None
        if hand_over is not None:
            hand_over.ask(params)
        if request.kept_tokens:
            keep_tokens(params, request.kept_tokens)
        salt = request.cache_salt or None
        outputs = self._engine.generate(
            tokens_input(prompt, cache_salt=salt),
            params,
            request.request_id,
            lora_request=self._adapter(request.adapter),
            **engine_reasoning(request.sampling_params),
        )
        async with aclosing(outputs):
            async for output in outputs:
                meter.count(output)
                delta = _delta(output)
                if (
                    delta.finish_reason == inference_pb2.FINISH_REASON_ERROR
                    and params.structured_outputs is not None
                ):
                    raise _unmet(request.sampling_params)
                if resumption is not None:
                    resumption.write_text(delta)
                if hand_over is not None and delta.finish_reason:
                    delta.stored_tiles = await hand_over.wait(output)
                    meter.handed_over(output, delta.stored_tiles)
                yield delta
                if delta.finish_reason:
                    return  # a stop string that vLLM does not know of may end a resumed request

    def _adapter(self, name: str) -> LoRARequest | None:
        """Return vLLM's handle of a LoRA adapter; None for the model itself.

        Raises:
            ModelNotFoundError: this replica has no such adapter, as during a rolling update.
        """
        if not name:
            return None
        if name not in self._adapters:
            raise ModelNotFoundError(f"This replica has no LoRA adapter {name!r}: send the request again.")
        return self._adapters[name]

    @contextmanager
    def _reservation(self, request: engine_pb2.EngineRequest) -> Iterator[str]:
        """Hold the blocks the gateway reserved for the request; yield the reservation's id.

        Raises:
            CapacityError: earlier reservations leave too few blocks.
        """
        headroom = max(self._monitor.headroom_blocks(), 0)
        if request.reserved_blocks > headroom:
            raise CapacityError(
                f"The request reserves {request.reserved_blocks} blocks and only {headroom} are available: "
                "send it to another replica, or retry later."
            )
        reservation = uuid.uuid4().hex
        prompt_tokens = len(request.prompt_token_ids) + len(request.resume_token_ids)
        left = request.sampling_params.max_tokens - len(request.resume_token_ids)
        self._monitor.reservations.hold(
            reservation,
            request.gateway_id,
            RequestNeed(prompt_tokens, max(left, 0), request.expected_tokens),
            self._monitor.snapshot.capacity.tile_tokens,
            request.reserved_blocks,
            request.uncached_tokens,
        )
        self._monitor.touch()
        try:
            yield reservation
        finally:
            self._monitor.reservations.release(reservation)
            self._monitor.touch()


class _Counts(NamedTuple):
    """What a call adds to the metrics at once: of a prompt that is handed over, each replica counts its part."""

    prompt: bool
    output: bool


class _Meter:
    """Measures one request: prefill speed by its first output, inter-token latency by the others."""

    def __init__(
        self, monitor: CacheMonitor, reservation: str, metrics: EngineMetrics, span: Span, counts: _Counts
    ) -> None:
        self._monitor = monitor
        self._counts = counts
        self._reservation = reservation
        self._metrics = metrics
        self._span = span
        self._last_s = 0.0
        self._tokens = 0
        self._filled_blocks = 0

    def count(self, output: RequestOutput) -> None:
        now = time.monotonic()
        tokens = len(output.outputs[0].token_ids)
        if self._last_s:
            self._monitor.inter_token_latency_s.add((now - self._last_s) / max(tokens, 1))
        else:
            self._count_prefill(output)
            self._monitor.touch()
        self._last_s = now
        if self._counts.output:
            self._metrics.generated(tokens)
        self._count_blocks(tokens)
        self._monitor.reservations.grow(self._reservation, tokens)

    def handed_over(self, output: RequestOutput, stored_tiles: int) -> None:
        """Count the prompt unless some of its whole tiles are missing in the store: then it is computed again."""
        prompt, cached = len(output.prompt_token_ids or ()), output.num_cached_tokens or 0
        if stored_tiles >= usable_tiles(prompt, self._monitor.snapshot.capacity.tile_tokens):
            self._metrics.started(prompt, cached)

    def _count_blocks(self, tokens: int) -> None:
        """Count the blocks filled since the last output; the newest token is not in the cache yet."""
        capacity = self._monitor.snapshot.capacity
        self._tokens += tokens
        filled = max(self._tokens - 1, 0) // capacity.tile_tokens
        self._metrics.filled(filled - self._filled_blocks, capacity.cache_dtype)
        self._filled_blocks = filled

    def _count_prefill(self, output: RequestOutput) -> None:
        prompt, cached = len(output.prompt_token_ids or ()), output.num_cached_tokens or 0
        if self._counts.prompt:
            self._metrics.started(prompt, cached)
        self._span.set_attributes({"kvarn.prompt_tokens": prompt, "kvarn.cached_tokens": cached})
        self._span.add_event("first token")
        self._tokens = prompt
        self._filled_blocks = cached // self._monitor.snapshot.capacity.tile_tokens
        computed = prompt - cached
        times = output.metrics
        is_measured = times is not None and times.first_token_ts > times.scheduled_ts
        if computed >= MIN_MEASURED_TOKENS and is_measured:
            self._monitor.prefill_tokens_per_s.add(computed, times.first_token_ts - times.scheduled_ts)


@contextmanager
def _engine_errors(kind: str | None) -> Iterator[None]:
    """Turn vLLM's errors into `RequestError`s; `kind` is that of the request's constraint, if any."""
    try:
        yield
    except ConstraintError as error:
        raise BadRequestError(f"structured_outputs.{kind} cannot be enforced: {error}.") from error
    except VLLMClientError as error:
        raise _invalid(error) from error
    except EngineGenerateError as error:
        if isinstance(error.__cause__, ValueError):  # vLLM cannot compile the constraint
            raise _invalid(error.__cause__) from error
        raise
    except EngineDeadError as error:
        raise ReplicaUnavailableError(_ENGINE_LOST) from error


def _invalid(error: Exception) -> BadRequestError:
    return BadRequestError(" ".join(str(error).split())[:MAX_SENTENCE_CHARACTERS])


_LIMITS_TOKENS = ("allowed_token_ids", "min_tokens", "ignore_eos")


def _unmet(params: sampling_pb2.SamplingParams) -> BadRequestError:
    """Return the error of an output that ended where the constraint and the other parameters left no token."""
    sent = {field.name for field, value in params.ListFields() if value}
    if others := " and ".join(name for name in _LIMITS_TOKENS if name in sent):
        return BadRequestError(
            f"No token satisfies both structured_outputs and {others}: change the constraint, or omit {others}."
        )
    return BadRequestError(
        "structured_outputs cannot be enforced: the constraint is too large, or no token satisfies it; "
        "make it smaller, or change it."
    )


_ENGINE_LOST = "The engine of this replica has stopped: send the request again."


def _delta(output: RequestOutput) -> engine_pb2.EngineDelta:
    completion = output.outputs[0]
    return engine_pb2.EngineDelta(
        token_ids=completion.token_ids,
        text=completion.text,
        logprobs=[
            _position(*at) for at in zip(completion.token_ids, completion.logprobs or (), strict=False)
        ],
        finish_reason=_FINISH_REASONS.get(completion.finish_reason or ""),
        stop_reason=_stop_reason(completion),
        cached_tokens=output.num_cached_tokens or 0,
    )


def _stop_reason(completion: CompletionOutput) -> inference_pb2.StopReason | None:
    if isinstance(completion.stop_reason, str):
        return inference_pb2.StopReason(stop=completion.stop_reason)
    if isinstance(completion.stop_reason, int):
        return inference_pb2.StopReason(stop_token_id=completion.stop_reason)
    return None


def _position(sampled: int, logprobs: dict[int, Any]) -> inference_pb2.PositionLogprobs:
    """Rank a position's log probabilities with the sampled token first; vLLM lists it anywhere."""
    ranked = sorted(logprobs.items(), key=lambda item: (item[0] != sampled, item[1].rank))
    return inference_pb2.PositionLogprobs(
        candidates=[
            inference_pb2.TokenLogprob(token_id=token, logprob=entry.logprob, rank=entry.rank)
            for token, entry in ranked
        ]
    )
