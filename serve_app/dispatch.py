"""Takes one request through a gateway: check, tokenize, route, and proxy the engine's stream."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc

from kvarn.v1 import engine_pb2, inference_pb2, sampling_pb2
from serve_app.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    NoRoomError,
    RequestError,
    UnavailableError,
    UnknownModelError,
)
from serve_app.fleet import Fleet
from serve_app.prompts import PromptEncoder
from serve_app.routing import Candidate, Decision, Refusal, RequestNeed, Router
from serve_app.sampling import check_sampling

MAX_REQUEST_ID_CHARACTERS = 128
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
    """

    def __init__(
        self,
        gateway_id: str,
        model_name: str,
        encoder: PromptEncoder,
        router: Router,
        fleet: Fleet,
        default_max_tokens: int,
    ) -> None:
        self._gateway_id = gateway_id
        self._model_name = model_name
        self._encoder = encoder
        self._router = router
        self._fleet = fleet
        self._default_max_tokens = default_max_tokens

    async def generate(
        self, request: Request, timeout_s: float | None
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """Yield the output of `request`, of which at most `timeout_s` seconds are left.

        Raises:
            RequestError: with the sentence for the caller.
        """
        ids, sampling = await self._prepare(request)
        reservation = uuid.uuid4().hex
        request_id = request.request_id or reservation
        chosen = self._admit(reservation, RequestNeed(len(ids), sampling.max_tokens))
        try:
            call = self._call(chosen, request_id, ids, sampling, timeout_s)
            usage = inference_pb2.Usage(prompt_tokens=len(ids))
            async with aclosing(call):
                async for delta in call:
                    usage.completion_tokens += len(delta.token_ids)
                    usage.cached_tokens = delta.cached_tokens
                    yield _response(request_id, chosen.replica_id, delta, usage)
        finally:
            self._router.release(reservation)

    async def _prepare(self, request: Request) -> tuple[list[int], sampling_pb2.SamplingParams]:
        self._require_replicas()
        _check_request_id(request.request_id)
        if request.model and request.model != self._model_name:
            raise UnknownModelError(
                f"The model {request.model!r} is not served here: use {self._model_name!r}."
            )
        check_sampling(request.sampling_params, self._encoder.vocab_size)
        ids = await self._encoder.encode(request.prompt)
        sampling = sampling_pb2.SamplingParams()
        sampling.CopyFrom(request.sampling_params)
        if not sampling.HasField("max_tokens"):
            sampling.max_tokens = max(1, min(self._default_max_tokens, self._context_tokens() - len(ids)))
        return ids, sampling

    def _require_replicas(self) -> None:
        if not self._router.replicas():
            raise UnavailableError(_NOT_READY)

    def _context_tokens(self) -> int:
        return max(r.snapshot.capacity.max_model_len for r in self._router.replicas())

    def _admit(self, reservation: str, need: RequestNeed) -> Candidate:
        decision = self._router.admit(reservation, need)
        if decision.chosen is None:
            raise _refuse(decision, need, self._context_tokens())
        return decision.chosen

    async def _call(
        self,
        chosen: Candidate,
        request_id: str,
        ids: list[int],
        sampling: sampling_pb2.SamplingParams,
        timeout_s: float | None,
    ) -> AsyncGenerator[engine_pb2.EngineGenerateResponse, None]:
        message = engine_pb2.EngineGenerateRequest(
            request_id=request_id,
            gateway_id=self._gateway_id,
            prompt_token_ids=ids,
            sampling_params=sampling,
        )
        call = self._fleet.stub(chosen.replica_id).Generate(message, timeout=timeout_s)
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


_NOT_READY = "No engine replica is ready yet: try again in a few seconds."
_LOST = "The replica that served this request was lost: send the request again."
_TOO_LATE = "The deadline passed before the output was complete: allow more time or lower max_tokens."


def _check_request_id(request_id: str) -> None:
    if len(request_id) > MAX_REQUEST_ID_CHARACTERS:
        raise InvalidRequestError(
            f"request_id must have at most {MAX_REQUEST_ID_CHARACTERS} characters, got {len(request_id)}."
        )


def _refuse(decision: Decision, need: RequestNeed, context_tokens: int) -> RequestError:
    """The refusal a caller can do most about."""
    refusals = decision.refusals
    asked = f"The prompt has {need.prompt_tokens} tokens and max_tokens is {need.max_tokens}"
    if Refusal.NO_ROOM in refusals:
        return NoRoomError(
            f"{asked}, and no replica has room for that now: try again later or lower max_tokens."
        )
    if not all(refusal.is_permanent for refusal in refusals):
        return UnavailableError(_NOT_READY)
    limit = f"the context of {context_tokens} tokens"
    if Refusal.PAST_CONTEXT not in refusals:
        limit = "what the cache of any replica can hold"
    return InvalidRequestError(
        f"{asked}, together more than {limit}: shorten the prompt or lower max_tokens."
    )


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
