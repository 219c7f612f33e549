"""Takes one request through a gateway: check, tokenize, route, pass on what an engine puts out, resume elsewhere."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from random import Random

from kvarn.v1 import cluster_pb2, inference_pb2, sampling_pb2
from serve_app.config import RoutingConfig
from serve_app.gateway.admission_queue import AdmissionQueue
from serve_app.gateway.engine_call import EngineCall, ReplicaError
from serve_app.gateway.fleet import Fleet
from serve_app.gateway.generation import Generation, new_key
from serve_app.gateway.observation import Observation, Observer
from serve_app.gateway.scale_from_zero import ScaleFromZero
from serve_app.request.errors import (
    NOT_READY,
    BadRequestError,
    ContextLengthError,
    ModelNotFoundError,
    ReplicaUnavailableError,
    RequestError,
)
from serve_app.request.prompts import PromptEncoder
from serve_app.request.sampling import check_sampling, check_token_ids
from serve_app.routing import Caller, Candidate, Prompt, RetryBudget, Router, pause_s, token_array
from serve_app.rpc import wire

MAX_NAME_CHARACTERS = 128
MAX_ATTEMPTS = 5  # replicas that may fail a request one after another without a token in between
Responses = AsyncGenerator[inference_pb2.GenerateResponse, None]
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
        scale_from_zero: lets requests wait while there are no replicas; None refuses them.
        config: how requests wait and are sent again.
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
        config: RoutingConfig,
        scale_from_zero: ScaleFromZero | None,
    ) -> None:
        self._gateway_id = gateway_id
        self._model_name = model_name
        self._encoder = encoder
        self._router = router
        self._fleet = fleet
        self._default_max_tokens = default_max_tokens
        self._observer = observer
        self._scale_from_zero = scale_from_zero
        self._hedge_after_s = config.hedge_after_s
        self._random = Random(gateway_id)
        self._retries = RetryBudget(config.retry_share)
        self.admissions = AdmissionQueue(router, config)

    async def generate(self, request: Request, timeout_s: float | None, caller: Caller) -> Responses:
        """Yield the output of `request` from `caller`, of which at most `timeout_s` seconds are left.

        Raises:
            RequestError: with the sentence for the caller.
        """
        deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        with self._observer.begin(request.request_id, caller) as observation:
            if self._scale_from_zero is not None:
                await self._scale_from_zero.wait(timeout_s)
            generation = await self._generation(request, deadline_s, caller)
            observation.tokenized(generation.ids, generation.salt)
            self._retries.earn()
            tried: list[str] = []
            while True:
                generation.begin(self._router)
                out = len(generation.output)
                try:
                    call = await self._call(generation, tried, observation)
                    try:
                        async for delta in call:
                            response = generation.take(call.replica_id, delta)
                            observation.count(response)
                            if delta.finish_reason:
                                self._router.lengths.observe(
                                    generation.sampling.max_tokens, len(generation.output)
                                )
                            yield response
                        return
                    finally:
                        self._close(call)
                except ReplicaError as error:
                    if (
                        not error.is_failure and len(generation.output) == out
                    ):  # it had no room, or has just gone
                        continue
                    tried = [error.replica_id] if len(generation.output) > out else [*tried, error.replica_id]
                    self._check_retry(generation, tried, error)
                if generation.output:
                    generation.resumptions += 1
                    observation.resumed()
                await asyncio.sleep(pause_s(len(tried), self._random))

    async def encode(self, request: Request, caller: Caller) -> list[int]:
        """The token ids of a prompt that several requests from `caller` share, of which `request` is one.

        A refusal is observed as one request, since none of them comes to `generate`.

        Raises:
            RequestError: with the sentence for the caller.
        """
        try:
            if self._scale_from_zero is not None:
                await self._scale_from_zero.wait(None)
            context_tokens = self._context_tokens()
            ids = await self._ids(request)
            if len(ids) > context_tokens:
                raise ContextLengthError(
                    f"The prompt has {len(ids)} tokens, more than the context of {context_tokens} tokens: "
                    "shorten the prompt."
                )
        except RequestError:
            with self._observer.begin(request.request_id, caller):
                raise
        return ids

    async def explain(
        self, request: cluster_pb2.ExplainRouteRequest, caller: Caller
    ) -> cluster_pb2.ExplainRouteResponse:
        """Where a request would go now, whoever asks, and every replica's terms.

        Raises:
            RequestError: with the sentence for the caller.
        """
        context_tokens = self._context_tokens()
        check_sampling(request.sampling_params, self._encoder.vocab_size)
        ids = await self._encoder.encode(request.prompt)
        sampling = self._with_max_tokens(request.sampling_params, context_tokens - len(ids))
        need = self._router.need(len(ids), sampling.max_tokens)
        decision = self._router.choose(need, Prompt(token_array(ids), request.cache_salt), time.monotonic())
        return cluster_pb2.ExplainRouteResponse(
            chosen_replica_id=decision.chosen.replica_id if decision.chosen else "",
            candidates=[wire.candidate_to_proto(candidate) for candidate in sorted(decision.explain())],
            prompt_tokens=len(ids),
            expected_tokens=need.expected_tokens,
            near=decision.near,
            queued_requests=len(self.admissions),
        )

    async def _call(self, generation: Generation, tried: list[str], observation: Observation) -> EngineCall:
        """Send `generation` to a replica that has room for it, once there is one."""
        generation.headers = observation.headers()
        try:
            decision = await self.admissions.admit(generation, tried)
        finally:
            observation.queued(generation.queued_s)
        observation.routed(decision, generation.decision_s)
        assert decision.chosen is not None
        call = self._open(generation, generation.key, decision.chosen)
        if self._hedge_after_s is None or generation.output:
            return call
        return await self._hedged(generation, call, self._hedge_after_s)

    async def _hedged(self, generation: Generation, call: EngineCall, after_s: float) -> EngineCall:
        """The call that answers first: `call`, or one to another replica if nothing has come after `after_s`."""
        calls = [call]
        try:
            if await call.has_begun(after_s):
                return call
            key = new_key()
            decision = self._router.admit(
                key, generation.need, generation.prompt, time.monotonic(), [call.replica_id]
            )
            if decision.chosen is None:
                return call
            calls.append(self._open(generation, key, decision.chosen))
            winner, loser = await call.race(calls[1])
        except BaseException:
            for opened in calls:
                self._close(opened)
            raise
        self._close(loser)
        return winner

    def _close(self, call: EngineCall) -> None:
        call.close()
        self.admissions.wake()

    def _open(self, generation: Generation, key: str, chosen: Candidate) -> EngineCall:
        left_s = (
            None if math.isinf(generation.deadline_s) else max(generation.deadline_s - time.monotonic(), 0)
        )
        message = generation.message(self._gateway_id, chosen)
        try:
            return EngineCall(
                self._fleet, self._router, key, chosen.replica_id, message, left_s, generation.headers
            )
        except KeyError:  # it went between the choice and now
            self._router.release(key)
            raise ReplicaError(chosen.replica_id, is_failure=False) from None

    def _check_retry(self, generation: Generation, tried: list[str], error: ReplicaError) -> None:
        """Raise if `generation` should not be sent to another replica."""
        if generation.output and generation.sampling.HasField("structured_outputs"):
            raise ReplicaUnavailableError(_NOT_RESUMABLE) from error
        if len(tried) >= MAX_ATTEMPTS:
            raise ReplicaUnavailableError(_LOST) from error
        if not generation.output and not self._retries.spend():
            raise ReplicaUnavailableError(_LOST) from error

    async def _generation(self, request: Request, deadline_s: float, caller: Caller) -> Generation:
        context_tokens = self._context_tokens()
        ids = await self._ids(request)
        output: list[int] = []
        if isinstance(request, inference_pb2.GenerateRequest):
            output = list(request.resume_token_ids)
        sampling = self._with_max_tokens(request.sampling_params, context_tokens - len(ids))
        if len(output) > sampling.max_tokens:
            raise BadRequestError(
                f"resume_token_ids must hold at most max_tokens={sampling.max_tokens} ids, got {len(output)}."
            )
        return Generation(
            request_id=request.request_id or f"{self._random.getrandbits(128):032x}",
            caller=caller,
            ids=ids,
            sampling=sampling,
            salt=request.cache_salt,
            deadline_s=deadline_s,
            output=output,
        )

    async def _ids(self, request: Request) -> list[int]:
        self._check(request)
        return await self._encoder.encode(request.prompt)

    def _context_tokens(self) -> int:
        """The longest context of any replica."""
        tokens = self._router.max_model_len()
        if not tokens:
            raise ReplicaUnavailableError(NOT_READY)
        return tokens

    def _check(self, request: Request) -> None:
        for name in ("request_id", "cache_salt"):
            length = len(getattr(request, name))
            if length > MAX_NAME_CHARACTERS:
                raise BadRequestError(
                    f"{name} must have at most {MAX_NAME_CHARACTERS} characters, got {length}."
                )
        if not request.request_id.isprintable():
            raise BadRequestError("request_id must hold printable characters only.")
        if request.model and request.model != self._model_name:
            name = request.model[:MAX_NAME_CHARACTERS]  # statuses travel in headers, which are small
            raise ModelNotFoundError(f"The model {name!r} is not served here: use {self._model_name!r}.")
        check_sampling(request.sampling_params, self._encoder.vocab_size)
        if isinstance(request, inference_pb2.GenerateRequest) and request.resume_token_ids:
            check_token_ids(request.resume_token_ids, self._encoder.vocab_size, "resume_token_ids")
            if request.sampling_params.HasField("structured_outputs"):
                raise BadRequestError(_NOT_RESUMABLE)

    def _with_max_tokens(
        self, asked: sampling_pb2.SamplingParams, room_tokens: int
    ) -> sampling_pb2.SamplingParams:
        sampling = sampling_pb2.SamplingParams()
        sampling.CopyFrom(asked)
        if not sampling.HasField("max_tokens"):
            default = max(self._default_max_tokens, sampling.min_tokens)
            sampling.max_tokens = max(1, min(default, room_tokens))
        return sampling


_LOST = (
    "The replica that served this request was lost, and no other could take it over: send the request again."
)
_NOT_RESUMABLE = (
    "An interrupted stream with structured_outputs cannot be resumed: send the whole request again."
)
