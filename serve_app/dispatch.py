"""Takes one request through a gateway: check, tokenize, route, and proxy the engine's stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import grpc

from kvarn.v1 import engine_pb2, inference_pb2, sampling_pb2
from serve_app.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    UnavailableError,
    UnknownModelError,
)
from serve_app.fleet import Fleet
from serve_app.observation import Observation, Observer, Responses
from serve_app.prompts import PromptEncoder
from serve_app.refusals import NOT_READY, refusal
from serve_app.routing import Caller, Candidate, RequestNeed, Router
from serve_app.sampling import check_sampling
from serve_app.wake import Waker

MAX_NAME_CHARACTERS = 128
Request = inference_pb2.GenerateRequest | inference_pb2.GenerateOnceRequest


class Dispatcher:
    """The path of every request through one gateway.

    Args:
        gateway_id: under which engines count this gateway's reservations.
        model_name: the name requests may give.
        encoder: turns prompts into token ids.
        router: chooses replicas and holds reservations.
        fleet: reaches them.
        default_max_tokens: for requests that set none.
        observer: is told of every request.
        waker: lets requests wait while there are no replicas; None refuses them.
    """

    def __init__(
        self,
        gateway_id: str,
        model_name: str,
        encoder: PromptEncoder,
        router: Router,
        fleet: Fleet,
        default_max_tokens: int,
        observer: Observer,
        waker: Waker | None,
    ) -> None:
        self._gateway_id = gateway_id
        self._model_name = model_name
        self._encoder = encoder
        self._router = router
        self._fleet = fleet
        self._default_max_tokens = default_max_tokens
        self._observer = observer
        self._waker = waker

    def generate(self, request: Request, timeout_s: float | None, caller: Caller) -> Responses:
        """Yield the output of `request` from `caller`, of which at most `timeout_s` seconds are left.

        Raises:
            RequestError: with the sentence for the caller.
        """
        observation = self._observer.begin(request.request_id, caller)
        return observation.through(self._generate(request, timeout_s, caller, observation))

    async def _generate(
        self, request: Request, timeout_s: float | None, caller: Caller, observation: Observation
    ) -> Responses:
        if self._waker is not None:
            await self._waker.wait(timeout_s)
        context_tokens = self._context_tokens()
        self._check(request)
        ids = await self._encoder.encode(request.prompt)
        observation.tokenized(ids)
        sampling = self._with_max_tokens(request.sampling_params, context_tokens - len(ids))
        need = RequestNeed(len(ids), sampling.max_tokens)
        reservation = uuid.uuid4().hex
        request_id = request.request_id or reservation
        start = time.perf_counter()
        decision = self._router.admit(reservation, need)
        observation.routed(decision, time.perf_counter() - start)
        chosen = decision.chosen
        if chosen is None:
            raise refusal(decision, need, context_tokens)
        try:
            call = self._call(
                chosen, request_id, ids, sampling, timeout_s, observation.headers(), request.cache_salt
            )
            usage = inference_pb2.Usage(prompt_tokens=len(ids))
            async with aclosing(call):
                async for delta in call:
                    usage.completion_tokens += len(delta.token_ids)
                    usage.cached_tokens = delta.cached_tokens
                    yield _response(request_id, chosen.replica_id, delta, usage)
        finally:
            self._router.release(reservation)

    def _context_tokens(self) -> int:
        """The longest context of any replica."""
        contexts = [replica.snapshot.capacity.max_model_len for replica in self._router.replicas()]
        if not contexts:
            raise UnavailableError(NOT_READY)
        return max(contexts)

    def _check(self, request: Request) -> None:
        if len(request.request_id) > MAX_NAME_CHARACTERS:
            raise InvalidRequestError(
                f"request_id must have at most {MAX_NAME_CHARACTERS} characters, "
                f"got {len(request.request_id)}."
            )
        if len(request.cache_salt) > MAX_NAME_CHARACTERS:
            raise InvalidRequestError(
                f"cache_salt must have at most {MAX_NAME_CHARACTERS} characters, "
                f"got {len(request.cache_salt)}."
            )
        if request.model and request.model != self._model_name:
            name = request.model[:MAX_NAME_CHARACTERS]  # statuses travel in headers, which are small
            raise UnknownModelError(f"The model {name!r} is not served here: use {self._model_name!r}.")
        check_sampling(request.sampling_params, self._encoder.vocab_size)

    def _with_max_tokens(
        self, asked: sampling_pb2.SamplingParams, room_tokens: int
    ) -> sampling_pb2.SamplingParams:
        sampling = sampling_pb2.SamplingParams()
        sampling.CopyFrom(asked)
        if not sampling.HasField("max_tokens"):
            default = max(self._default_max_tokens, sampling.min_tokens)
            sampling.max_tokens = max(1, min(default, room_tokens))
        return sampling

    async def _call(
        self,
        chosen: Candidate,
        request_id: str,
        ids: list[int],
        sampling: sampling_pb2.SamplingParams,
        timeout_s: float | None,
        metadata: Sequence[tuple[str, str]],
        cache_salt: str,
    ) -> AsyncGenerator[engine_pb2.EngineGenerateResponse, None]:
        message = engine_pb2.EngineGenerateRequest(
            request_id=request_id,
            gateway_id=self._gateway_id,
            prompt_token_ids=ids,
            sampling_params=sampling,
            cache_salt=cache_salt,
        )
        call = self._fleet.stub(chosen.replica_id).Generate(message, timeout=timeout_s, metadata=metadata)
        try:
            async for delta in call:
                yield delta
        except grpc.aio.AioRpcError as error:
            raise self._translate(error, chosen.replica_id) from error
        finally:
            call.cancel()

    def _translate(self, error: grpc.aio.AioRpcError, replica_id: str) -> Exception:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            self._fleet.report_lost(replica_id)
            return UnavailableError(_LOST)
        if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequestError(error.details() or "The engine refused the request.")
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceededError(_TOO_LATE)
        return error


_LOST = "The replica that served this request was lost: send the request again."
_TOO_LATE = "The deadline passed before the output was complete: allow more time or lower max_tokens."


def _response(
    request_id: str,
    replica_id: str,
    delta: engine_pb2.EngineGenerateResponse,
    usage: inference_pb2.Usage,
) -> inference_pb2.GenerateResponse:
    response = inference_pb2.GenerateResponse(
        request_id=request_id,
        replica_id=replica_id,
        token_ids=delta.token_ids,
        text=delta.text,
        logprobs=delta.logprobs,
        finish_reason=delta.finish_reason,
        usage=usage,
    )
    if delta.HasField("stop_reason"):
        response.stop_reason.CopyFrom(delta.stop_reason)
    return response
